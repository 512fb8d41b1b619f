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
        `table[metric] = {"goal": ..., "arms": {arm: {"chosen", "steps", "median", "length", "validated", "on_test"}}}`:
        `steps` are the first steps on test data by seed, None for a seed that was not there by the last step, `length`;
        `median` is None where half of them were not. `validated` tells whether any configuration got there on
        validation data; where none did, nothing chooses, and `on_test` has "chosen", "steps" and "median" of the one
        that was soonest on test data, or is None where none was there either.
    """
    table = {}
    for metric, goal in goals.items():
        direction = metrics[metric]
        rows = {}
        for arm in arms:
            mine = runs_of(runs, arm)
            length = max((int(run.steps[-1]) for run in mine if len(run.steps)), default=0)
            chosen, validated = _soonest(mine, "validation", metric, goal, direction)
            row: dict[str, Any] = {**_when(mine, arm, chosen, metric, goal, direction), "length": length}
            on_test, there = _soonest(mine, "test", metric, goal, direction)
            late = _when(mine, arm, on_test, metric, goal, direction) if there and not validated else None
            rows[arm.name] = {**row, "validated": validated, "on_test": late}
        table[metric] = {"goal": goal, "arms": rows}
    return table


def _when(
    runs: Sequence[Run], arm: Arm, chosen: Mapping[str, float] | None, metric: str, goal: float, direction: str
) -> dict[str, Any]:
    """Return when the runs of a configuration were at the goal on test data."""
    mine = chosen_runs(runs, arm.name, chosen)
    steps = [first_step(run.steps, run.test[metric], goal, direction) for run in mine]
    return {"chosen": chosen, "steps": steps, "median": median(steps)}


def _soonest(
    runs: Sequence[Run], part: str, metric: str, goal: float, direction: str
) -> tuple[dict[str, float] | None, bool]:
    """Return the configuration that was soonest at the goal on one part of the data, and whether it was at all."""
    reached: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        values = run.validation[metric] if part == "validation" else run.test[metric]
        step = first_step(run.steps, values, goal, direction)
        place = (run.job.configuration.lr, run.job.configuration.weight_decay)
        reached.setdefault(place, []).append(math.inf if step is None else step)
    if not reached:
        return None, False
    # Of equal medians, such as none at all, the one that more seeds reached, and sooner.
    best = min(reached, key=lambda place: (_median(reached[place]), sorted(reached[place])))
    return {"lr": best[0], "weight_decay": best[1]}, min(reached[best]) < math.inf


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
