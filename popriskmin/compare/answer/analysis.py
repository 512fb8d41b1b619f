"""From the records of all runs to the answer: which configuration each arm chose, and how it did on the test data.

Three figures summarize a run, each on the validation data, where it serves to choose, and on the test data, where it
is reported: "final", the metric after the last step; "best", the metric at the step where the validation metric was
best, which is what stopping there would have given; "area", the mean of the metric over the training.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import integrate, stats

from popriskmin.compare.runs.arms import ADAMW, Arm
from popriskmin.compare.runs.runner import Job
from popriskmin.compare.runs.train import Record
from popriskmin.compare.text import exact

FIGURES = ("final", "best", "area")
RESAMPLES = 9999
FEWEST_SEEDS = 3


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


def read_run(job: Job, records: Sequence[Record], metrics: Mapping[str, str]) -> Run:
    """Collect the evaluations of a run and its figures."""
    evaluations = [record for record in records if record["kind"] == "evaluation"]
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
    metric, direction = next(iter(metrics.items()))
    values = validation[metric] * (1 if direction == "max" else -1)
    return None if not len(values) or np.isnan(values).all() else int(np.nanargmax(values))


def _figure(figure: str, steps: np.ndarray, values: np.ndarray, best: int | None) -> float:
    if best is None:
        return math.nan
    if figure == "final":
        return float(values[-1])
    if figure == "best":
        return float(values[best])
    return float(integrate.trapezoid(values, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(values[0])


def choose(runs: Sequence[Run], figure: str, metrics: Mapping[str, str]) -> tuple[float, float] | None:
    """Return the (lr, weight decay) of one arm's runs with the best mean figure on validation data, over the seeds.

    A configuration of which a run lacks the figure is not chosen; None if that leaves none. A run that failed lacks
    all of them, one that diverged "final" and "area". It has a "best": who stops at the best validation step has
    stopped before.
    """
    metric, direction = next(iter(metrics.items()))
    sign = 1 if direction == "max" else -1
    values: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        configuration = (run.job.configuration.lr, run.job.configuration.weight_decay)
        pair = run.figures[figure][metric]
        values.setdefault(configuration, []).append(-math.inf if pair is None else sign * pair[0])
    means = {configuration: float(np.mean(found)) for configuration, found in values.items()}
    best = max(means, key=lambda configuration: means[configuration])
    return best if means[best] > -math.inf else None


def why_none(runs: Sequence[Run], figure: str, metric: str) -> str:
    """Say why no configuration of one arm's runs can be chosen by a figure."""
    by_configuration: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        by_configuration.setdefault((run.job.configuration.lr, run.job.configuration.weight_decay), []).append(run)
    if any(all(run.finished for run in mine) for mine in by_configuration.values()):
        return f"no configuration had a finite {figure} {metric} on validation and test data with every seed"
    return "no configuration came to its end with every seed"


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Return a 95% bootstrap confidence interval of the mean over seeds.

    A percentile interval at the widened level of Hesterberg, "What Teachers Should Know About the Bootstrap" (The
    American Statistician, 2015), without which it is too narrow for few values: of 5 normal ones it covered the mean
    86% of the time in a simulation, this one 93%. No interval within the range of the values can cover the median of
    their distribution more often than `1 - 2**(1 - n)`: 94% for 5 values, 75% for 3.

    Parameters
    ----------
    values
        One number per seed.

    Returns
    -------
    (low, high), or None for fewer than 3 values, which allow no statement.

    Examples
    --------
    >>> interval([0.7, 0.7, 0.7])
    (0.7, 0.7)
    """
    n = len(values)
    if n < FEWEST_SEEDS:
        return None
    if len(set(values)) == 1:
        return (values[0], values[0])
    half = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.asarray(values),),
            np.mean,
            confidence_level=1 - 2 * half,
            n_resamples=resamples,
            method="percentile",
            random_state=np.random.default_rng(0),
        )
    return (float(result.confidence_interval.low), float(result.confidence_interval.high))


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, interval and the values themselves."""
    return {"mean": float(np.mean(values)), "interval": interval(values), "values": list(map(float, values))}


def difference(
    one: Mapping[int, float], other: Mapping[int, float], direction: str, names: tuple[str, str]
) -> dict[str, Any]:
    """Return the paired difference `one - other` over the seeds both have, with a sentence that says what it means."""
    seeds = sorted(set(one) & set(other))
    found = estimate([one[seed] - other[seed] for seed in seeds])
    found["sentence"] = sentence(found["mean"], found["interval"], len(seeds), direction, names)
    return found


def sentence(
    mean: float, bounds: tuple[float, float] | None, seeds: int, direction: str, names: tuple[str, str]
) -> str:
    """Say in words what a difference with its interval shows.

    Examples
    --------
    >>> sentence(0.02, (0.01, 0.03), 5, "max", ("prm", "adamw"))
    'prm is better than adamw by 0.0200 [0.0100, 0.0300]'
    >>> sentence(0.02, (-0.01, 0.03), 5, "max", ("prm", "adamw"))
    'no clear difference between prm and adamw: +0.0200 [-0.0100, +0.0300]'
    """
    one, other = names
    if bounds is None:
        return f"{seeds} seed{'s are' if seeds != 1 else ' is'} too few to tell {one} from {other} ({mean:+.4f})"
    low, high = bounds
    if low <= 0 <= high:
        return f"no clear difference between {one} and {other}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    better = (mean > 0) == (direction == "max")
    ends = sorted((abs(low), abs(high)))
    return f"{one} is {'better' if better else 'worse'} than {other} by {abs(mean):.4f} [{ends[0]:.4f}, {ends[1]:.4f}]"


def analyse(runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return, for each figure as the one that chooses, what every arm chose and reached.

    Everything in it is determined by the runs' settings: it has no times in it.
    """
    selections = {}
    for figure in FIGURES:
        chosen = {arm.name: choose(_of(runs, arm), figure, metrics) for arm in arms}
        values = {arm.name: _chosen_values(_of(runs, arm), chosen[arm.name], metrics) for arm in arms}
        selections[figure] = {arm.name: _summary(arm, chosen, values, metrics) for arm in arms}
    return selections


def _of(runs: Sequence[Run], arm: Arm) -> list[Run]:
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


Values = dict[str, dict[str, dict[int, float]]]


def _chosen_values(runs: Sequence[Run], chosen: tuple[float, float] | None, metrics: Mapping[str, str]) -> Values:
    """Return the test values by figure, metric and seed, of the chosen configuration.

    A figure that one of its runs does not have, because it diverged, has no values.
    """
    mine = [run for run in runs if chosen == (run.job.configuration.lr, run.job.configuration.weight_decay)]
    values: Values = {figure: {metric: {} for metric in metrics} for figure in FIGURES}
    for figure in FIGURES:
        for metric in metrics:
            pairs = {run.job.configuration.seed: run.figures[figure][metric] for run in mine}
            complete = {seed: pair[1] for seed, pair in pairs.items() if pair is not None}
            if len(complete) == len(pairs):
                values[figure][metric] = complete
    return values


def _summary(
    arm: Arm,
    chosen: Mapping[str, tuple[float, float] | None],
    values: Mapping[str, Values],
    metrics: Mapping[str, str],
) -> dict[str, Any]:
    mine = chosen[arm.name]
    if mine is None:
        return {"chosen": None, "test": None, "against": {}}
    test = {
        figure: {metric: estimate(list(values[arm.name][figure][metric].values())) for metric in metrics}
        for figure in FIGURES
        if all(values[arm.name][figure][metric] for metric in metrics)
    }
    others = [name for name in _rivals(arm) if chosen.get(name) is not None]
    against = {
        other: {
            figure: {
                metric: difference(
                    values[arm.name][figure][metric], values[other][figure][metric], direction, (arm.name, other)
                )
                for metric, direction in metrics.items()
                if set(values[arm.name][figure][metric]) & set(values[other][figure][metric])
            }
            for figure in FIGURES
        }
        for other in others
    }
    return {"chosen": {"lr": mine[0], "weight_decay": mine[1]}, "test": test, "against": against}


def over_grid(runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return each arm's final test metric as its mean over all configurations: what it gives to who does not tune.

    It depends on the grid, so it compares arms and means nothing by itself. An arm of which a run diverged has none.
    """
    metric, direction = next(iter(metrics.items()))
    means: dict[str, dict[int, float]] = {}
    for arm in arms:
        by_seed: dict[int, list[float]] = {}
        for run in _of(runs, arm):
            pair = run.figures["final"][metric]
            by_seed.setdefault(run.job.configuration.seed, []).append(math.nan if pair is None else pair[1])
        found = {seed: float(np.mean(values)) for seed, values in by_seed.items()}
        means[arm.name] = found if all(map(math.isfinite, found.values())) else {}
    return {
        arm.name: {
            "test": estimate(list(means[arm.name].values())) if means[arm.name] else None,
            "against": {
                other: difference(means[arm.name], means[other], direction, (arm.name, other))
                for other in _rivals(arm)
                if means[arm.name] and means.get(other)
            },
        }
        for arm in arms
    }


def _rivals(arm: Arm) -> list[str]:
    """Return whom an arm is compared with: AdamW, and PRM also with the AdamW of equal steps."""
    if arm.kind == "adamw":
        return []
    if arm.kind == "prm":
        options = arm.name.removeprefix("prm")
        return [ADAMW.name, f"adamw-matched{options}", *(["prm"] if options else [])]
    return [ADAMW.name]


def warnings_of(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    selections: Mapping[str, Any],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    metrics: Mapping[str, str],
) -> list[str]:
    """Return what a reader must know before believing the table."""
    found = []
    if len(seeds) < 5:
        given = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        found.append(f"With {given} the intervals are too narrow or missing; use --seeds 5 or more.")
    for arm in arms:
        mine = _of(runs, arm)
        for status in ("diverged", "failed"):
            count = sum(run.end["status"] == status for run in mine)
            if count:
                found.append(f"{arm.name}: {count} of {len(mine)} runs {status}.")
        chosen = selections["final"][arm.name]["chosen"]
        if chosen is None:
            found.append(f"{arm.name}: {why_none(mine, 'final', next(iter(metrics)))}.")
            continue
        edge = _edge(chosen["lr"], learning_rates)
        if edge:
            lr = exact(chosen["lr"])
            found.append(f"{arm.name}: the chosen learning rate {lr} is the {edge} of the grid; extend it with --lr.")
    shown = sum(len(one["against"]) for selection in selections.values() for one in selection.values())
    if len(arms) > 3:
        found.append(f"Of {shown} differences, expect about one in twenty to look clear by chance alone.")
    return found + _unlike_starts(runs, seeds)


def _edge(value: float, grid: Sequence[float]) -> str | None:
    if len(grid) < 2 or min(grid) < value < max(grid):
        return None
    return "smallest" if value == min(grid) else "largest"


def _unlike_starts(runs: Sequence[Run], seeds: Sequence[int]) -> list[str]:
    """Return a warning for each seed with which the arms did not start alike, which makes them incomparable."""
    found = []
    for seed in seeds:
        ends = [run.end for run in runs if run.job.configuration.seed == seed and "initial_weights" in run.end]
        unlike = []
        if len({end["initial_weights"] for end in ends}) > 1:
            unlike.append("initial weights")
        # A run that diverged at once has seen fewer batches than the others.
        if any(len(set(digests)) > 1 for digests in zip(*_padded([end["first_batches"] for end in ends]))):
            unlike.append("batches")
        if unlike:
            what = " and ".join(unlike)
            found.append(f"seed {seed}: the arms did not get the same {what}; trial(seed) must depend on seed alone.")
    return found


def _padded(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the lists at the length of the longest, which lends the others what they lack."""
    longest = max(lists, key=len, default=[])
    return [[*found, *longest[len(found) :]] for found in lists]
