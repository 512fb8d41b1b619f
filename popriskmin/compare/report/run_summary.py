"""What one run reached, and which configuration an arm chooses.

Three figures summarize a run, each on the validation data, where it serves to choose, and on the test data, where it
is reported: "final", the metric after the last step; "best", the metric at the step where the validation metric was
best, which is what stopping there would have given; "area", the mean of the metric over the training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import integrate

from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Record

FIGURES = ("final", "best", "area")


@dataclasses.dataclass(frozen=True)
class Run:
    """The numbers of one run.

    Attributes
    ----------
    steps
        Where it was evaluated.
    validation, test
        For each metric its values at those steps.
    figures
        For each figure and metric, the pair of the value on validation and on test data; None where the run has none,
        because it failed, or diverged (which leaves "best"), or the metric was not finite.
    best_step
        The step with the best validation metric.
    """

    job: Job
    end: Record
    steps: np.ndarray
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    figures: Mapping[str, Mapping[str, tuple[float, float] | None]]
    best_step: int | None

    @property
    def finished(self) -> bool:
        """Whether it went to its end."""
        return bool(self.end["status"] == "finished")


def leading(metrics: Mapping[str, str]) -> tuple[str, int]:
    """Return the metric that chooses, and 1 or -1 to multiply it with, so that larger is better.

    Examples
    --------
    >>> leading({"loss": "min", "accuracy": "max"})
    ('loss', -1)
    """
    metric, direction = next(iter(metrics.items()))
    return metric, 1 if direction == "max" else -1


def read_run(job: Job, records: Sequence[Record], metrics: Mapping[str, str], averaged: bool = False) -> Run:
    """Collect the evaluations of a run and its figures; of its averaged weights, as a run of the arm that they are."""
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if averaged:
        job = dataclasses.replace(job, arm=job.arm.of_averages)
        evaluations = [{"step": record["step"], **record["averaged"]} for record in evaluations]
    steps = np.array([record["step"] for record in evaluations])
    curves = {
        part: {
            metric: np.array([_number(record[part][metric]) for record in evaluations], dtype=float)
            for metric in metrics
        }
        for part in ("validation", "test")
    }
    end = records[-1]
    finished = end["status"] == "finished"
    best = _best_index(curves["validation"], metrics) if end["status"] != "failed" else None
    figures: dict[str, dict[str, tuple[float, float] | None]] = {}
    for figure in FIGURES:
        figures[figure] = {}
        for metric in metrics:
            pair = [_figure(figure, steps, curves[part][metric], best) for part in ("validation", "test")]
            usable = (finished or figure == "best") and all(math.isfinite(value) for value in pair)
            figures[figure][metric] = (pair[0], pair[1]) if usable else None
    best_step = None if best is None else int(steps[best])
    return Run(job, end, steps, curves["validation"], curves["test"], figures, best_step)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _best_index(validation: Mapping[str, np.ndarray], metrics: Mapping[str, str]) -> int | None:
    """Return where the first metric is best on validation data, at the first such step."""
    metric, sign = leading(metrics)
    values = validation[metric] * sign
    return None if not len(values) or np.isnan(values).all() else int(np.nanargmax(values))


def _figure(figure: str, steps: np.ndarray, values: np.ndarray, best: int | None) -> float:
    if best is None:
        return math.nan
    if figure == "final":
        return float(values[-1])
    if figure == "best":
        return float(values[best])
    return float(integrate.trapezoid(values, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(values[0])


def choose(runs: Sequence[Run], figure: str, metrics: Mapping[str, str]) -> tuple[tuple[float, float] | None, float]:
    """Return the (lr, weight decay) of one arm's runs with the best mean figure on validation data, over the seeds.

    And that mean, with its sign turned where the metric is to be small.

    A configuration of which a run lacks the figure is not chosen; None if that leaves none. A run that failed lacks
    all of them, one that diverged "final" and "area". It has a "best": who stops at the best validation step has
    stopped before.
    """
    metric, sign = leading(metrics)
    values: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        configuration = (run.job.configuration.lr, run.job.configuration.weight_decay)
        pair = run.figures[figure][metric]
        values.setdefault(configuration, []).append(-math.inf if pair is None else sign * pair[0])
    means = {configuration: float(np.mean(found)) for configuration, found in values.items()}
    best = max(means, key=lambda configuration: means[configuration])
    return (best, means[best]) if means[best] > -math.inf else (None, -math.inf)


def why_none(runs: Sequence[Run], figure: str, metric: str) -> str:
    """Say why no configuration of one arm's runs can be chosen by a figure."""
    by_configuration: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        by_configuration.setdefault((run.job.configuration.lr, run.job.configuration.weight_decay), []).append(run)
    if any(all(run.finished for run in mine) for mine in by_configuration.values()):
        return f"no configuration had a finite {figure} {metric} on validation and test data with every seed"
    return "no configuration came to its end with every seed"


def runs_of(runs: Sequence[Run], arm: Arm) -> list[Run]:
    """Return the runs of an arm."""
    return [run for run in runs if run.job.arm.name == arm.name]


def chosen_runs(runs: Sequence[Run], arm_name: str, chosen: Mapping[str, float] | None) -> list[Run]:
    """Return the runs of an arm with the configuration it chose, by seed."""
    if chosen is None:
        return []
    found = [
        run
        for run in runs
        if run.job.arm.name == arm_name
        and run.job.configuration.lr == chosen["lr"]
        and run.job.configuration.weight_decay == chosen["weight_decay"]
    ]
    return sorted(found, key=lambda run: run.job.configuration.seed)
