"""The first step at which a run reached a task's goal, such as 95% accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from popriskmin.compare.report.run_summary import Run, chosen_runs, runs_of
from popriskmin.compare.training.arms import Arm


def first_step(steps: Iterable[int], values: Iterable[float], goal: float, direction: str) -> int | None:
    """Return the first step at which a metric was at its goal or better; None where it never was.

    Examples
    --------
    >>> first_step([0, 10, 20], [0.1, 0.96, 0.9], 0.95, "max")
    10
    """
    for step, value in zip(steps, values):
        if value >= goal if direction == "max" else value <= goal:
            return int(step)
    return None


def by_goal(
    runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str], goals: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return, for each metric with a goal, what every arm chose and when it got there.

    The configuration is the one that got there soonest on validation data, in the median over seeds; seeds that did not
    get there count as later than any that did.

    Returns
    -------
    dict
        `table[metric] = {"goal": ..., "arms": {arm: {"chosen", "steps", "median", "length"}}}`: `steps` are the first
        steps on test data by seed, None for a seed that was not there by the last step, `length`; `median` is None
        where half of them were not.
    """
    table = {}
    for metric, goal in goals.items():
        direction = metrics[metric]
        rows = {}
        for arm in arms:
            chosen = _soonest(runs_of(runs, arm), metric, goal, direction)
            mine = chosen_runs(runs, arm.name, chosen)
            steps = [first_step(run.steps, run.test[metric], goal, direction) for run in mine]
            length = max((int(run.steps[-1]) for run in runs_of(runs, arm) if len(run.steps)), default=0)
            rows[arm.name] = {"chosen": chosen, "steps": steps, "median": median(steps), "length": length}
        table[metric] = {"goal": goal, "arms": rows}
    return table


def _soonest(runs: Sequence[Run], metric: str, goal: float, direction: str) -> dict[str, float] | None:
    reached: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        step = first_step(run.steps, run.validation[metric], goal, direction)
        place = (run.job.configuration.lr, run.job.configuration.weight_decay)
        reached.setdefault(place, []).append(math.inf if step is None else step)
    if not reached:
        return None
    # Of equal medians, such as none at all, the one that more seeds reached, and sooner.
    best = min(reached, key=lambda place: (_median(reached[place]), sorted(reached[place])))
    return {"lr": best[0], "weight_decay": best[1]}


def _median(steps: Sequence[float]) -> float:
    ordered = sorted(steps)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return high if math.isinf(high) else float(np.mean([low, high]))


def median(steps: Sequence[int | None]) -> float | None:
    """Return the median, with None as later than any; None where that is the median.

    Examples
    --------
    >>> median([100, None, 300]), median([100, None, None])
    (300.0, None)
    """
    found = _median([math.inf if step is None else step for step in steps]) if steps else math.inf
    return None if math.isinf(found) else found
