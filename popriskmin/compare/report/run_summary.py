"""What one run reached, which configuration an arm chooses, and a task's references.

Three figures summarize a run, each on validation data, where it chooses, and on test data,
where it is reported. "final" is the metric after the last step. "best" is the metric at the
step with the best validation metric, where early stopping would have stopped. "area" is the
mean of the metric over the training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from popriskmin.compare.report.statistics import Estimate, estimate
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Record

MEANING = {
    "final": "after the last step",
    "best": "at the step with the best validation metric",
    "area": "mean over the training",
}
FIGURES = tuple(MEANING)

# Test values by metric and seed.
BySeed = dict[str, dict[int, float]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A place in the grid."""

    lr: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The numbers of one run.

    Attributes
    ----------
    job
        Its arm, configuration and seed.
    end
        The last record: its status, its times and the bytes of its state.
    steps
        The steps at which it was evaluated.
    validation, test
        For each metric its values at those steps.
    figures
        For each figure and metric, the values on validation and on test data. None where the
        run has none: it failed, it diverged (which leaves "best"), or the metric was not
        finite.
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

    @property
    def place(self) -> Choice:
        """Its place in the grid."""
        return Choice(self.job.configuration.lr, self.job.configuration.weight_decay)

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.job.configuration.seed


def leading(metrics: Mapping[str, str]) -> tuple[str, int]:
    """Return the metric that chooses, and the sign that makes larger values better.

    Examples
    --------
    >>> leading({"loss": "min", "accuracy": "max"})
    ('loss', -1)
    """
    metric, direction = next(iter(metrics.items()))
    return metric, 1 if direction == "max" else -1


def read_run(job: Job, records: Sequence[Record], metrics: Mapping[str, str], averaged: bool = False) -> Run:
    """Return the numbers of a run, or those of its averaged weights as a run of their arm."""
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if averaged:
        job = dataclasses.replace(job, arm=job.arm.of_averages)
        evaluations = [{"step": record["step"], **record["averaged"]} for record in evaluations]
    steps = np.array([record["step"] for record in evaluations])
    curves = {
        part: {
            metric: np.array([_or_nan(record[part][metric]) for record in evaluations], dtype=float)
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


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _best_index(validation: Mapping[str, np.ndarray], metrics: Mapping[str, str]) -> int | None:
    """Return the place of the best value of the first metric, the first of equal ones."""
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
    if len(steps) == 1:
        return float(values[0])
    from scipy import integrate  # here, as each worker imports this module and summarizes nothing

    return float(integrate.trapezoid(values, steps) / (steps[-1] - steps[0]))


def choose(runs: Sequence[Run], figure: str, metrics: Mapping[str, str]) -> tuple[Choice | None, float]:
    """Return the place with the best mean figure on validation data over the seeds.

    And that mean, with its sign turned where the metric is to be small.

    A place at which a run lacks the figure is not chosen; None if no place is left. A run
    that failed lacks all figures. One that diverged has a "best", because stopping early
    would have stopped before.
    """
    metric, sign = leading(metrics)
    values: dict[Choice, list[float]] = {}
    for run in runs:
        pair = run.figures[figure][metric]
        values.setdefault(run.place, []).append(-math.inf if pair is None else sign * pair[0])
    means = {place: float(np.mean(scores)) for place, scores in values.items()}
    best = max(means, key=lambda place: means[place])
    return (best, means[best]) if means[best] > -math.inf else (None, -math.inf)


def why_none(runs: Sequence[Run], figure: str, metric: str) -> str:
    """Say why no configuration of one arm's runs can be chosen by a figure."""
    by_place: dict[Choice, list[Run]] = {}
    for run in runs:
        by_place.setdefault(run.place, []).append(run)
    if any(all(run.finished for run in there) for there in by_place.values()):
        return f"no configuration had a finite {figure} {metric} on validation and test data with every seed"
    return "no configuration came to its end with every seed"


def runs_of(runs: Sequence[Run], arm: Arm) -> list[Run]:
    """Return the runs of an arm."""
    return [run for run in runs if run.job.arm.name == arm.name]


def chosen_runs(runs: Sequence[Run], arm_name: str, chosen: Choice | None) -> list[Run]:
    """Return the runs of an arm at a place of the grid, by seed."""
    there = [run for run in runs if run.job.arm.name == arm_name and run.place == chosen]
    return sorted(there, key=lambda run: run.seed)


@dataclasses.dataclass(frozen=True)
class References:
    """The values that a task gives beside the arms.

    Attributes
    ----------
    test
        `test[name][metric]`, where it is finite with every seed.
    warnings
        What is missing, and why.
    """

    test: Mapping[str, Mapping[str, Estimate]]
    warnings: Sequence[str]


NO_REFERENCES = References({}, [])


def read_references(by_seed: Mapping[int, Sequence[Record]]) -> References:
    """Collect the references from the records of each seed."""
    values: dict[str, dict[str, list[float]]] = {}
    warnings = []
    for seed, records in by_seed.items():
        end = records[-1]
        if end["status"] == "failed":
            warnings.append(f"references: seed {seed} failed: {end['error'].strip().splitlines()[-1]}")
        for record in records[:-1]:
            for metric, value in record["test"].items():
                values.setdefault(record["name"], {}).setdefault(metric, []).append(_or_nan(value))
    test: dict[str, dict[str, Estimate]] = {}
    for name, metrics in values.items():
        test[name] = {
            metric: estimate(by_metric)
            for metric, by_metric in metrics.items()
            if len(by_metric) == len(by_seed) and all(map(math.isfinite, by_metric))
        }
        if len(test[name]) < len(metrics):
            warnings.append(f"references: {name} has no finite value of every metric with every seed.")
    return References(test, warnings)
