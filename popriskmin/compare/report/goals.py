"""The first step at which an arm reached a task's goal, such as 95% accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.run_summary import Choice, Run, chosen_runs, runs_of
from popriskmin.compare.text import exact, number


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When the runs of a configuration reached the goal on test data.

    Attributes
    ----------
    chosen
        The configuration.
    steps
        The first such step by seed; None for a seed that did not get there.
    median
        Their median; None where half of them did not get there.
    """

    chosen: Choice | None
    steps: Sequence[int | None]
    median: float | None

    def text(self, length: int) -> str:
        """Write when that was, for runs of `length` steps."""
        told = ", ".join("never" if step is None else f"{step:,}" for step in self.steps)
        middle = f"not by {length:,}" if self.median is None else f"at {self.median:,.0f}"
        return f"{middle} steps in the median; by seed {told}"

    @property
    def place(self) -> str:
        """The configuration in words."""
        return f"lr {exact(self.chosen.lr)}, decay {exact(self.chosen.weight_decay)}" if self.chosen else "nothing"


@dataclasses.dataclass(frozen=True)
class GoalRow(Arrival):
    """When an arm reached the goal, at the configuration that was there first on validation.

    Attributes
    ----------
    length
        The number of steps of its longest run.
    validated
        Whether any configuration reached the goal on validation data. Without one, nothing
        is chosen.
    on_test
        Then the configuration that was there first on test data, if any was.
    """

    length: int
    validated: bool
    on_test: Arrival | None


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal, and when each arm reached it."""

    goal: float
    arms: Mapping[str, GoalRow]


def first_step(steps: Iterable[int], values: Iterable[float], goal: float, direction: str) -> int | None:
    """Return the first step at which a metric was at its goal or better; None without one.

    Examples
    --------
    >>> first_step([0, 10, 20], [0.1, 0.96, 0.9], 0.95, "max")
    10
    """
    for step, value in zip(steps, values):
        if value >= goal if direction == "max" else value <= goal:
            return int(step)
    return None


def by_goal(comparison: Comparison, runs: Sequence[Run]) -> dict[str, Goal]:
    """Return, for each metric with a goal, when every arm reached it.

    Each arm has the configuration that got there first on validation data, in the median
    over seeds. Seeds that did not get there count as later than any that did.
    """
    table = {}
    for metric, goal in comparison.task.goals.items():
        direction = comparison.task.metrics[metric]
        arms = {arm.name: _row(runs_of(runs, arm), arm.name, metric, goal, direction) for arm in comparison.arms}
        table[metric] = Goal(goal, arms)
    return table


def _row(runs: Sequence[Run], arm: str, metric: str, goal: float, direction: str) -> GoalRow:
    def arrival(chosen: Choice | None) -> Arrival:
        there = chosen_runs(runs, arm, chosen)
        steps = [first_step(run.steps, run.test[metric], goal, direction) for run in there]
        return Arrival(chosen, steps, median(steps))

    def soonest(part: str) -> tuple[Choice | None, bool]:
        curves = [(run.validation if part == "validation" else run.test)[metric] for run in runs]
        steps = [first_step(run.steps, curve, goal, direction) for run, curve in zip(runs, curves)]
        return _soonest([run.place for run in runs], steps)

    length = max((int(run.steps[-1]) for run in runs if len(run.steps)), default=0)
    (chosen, validated), (on_test, reached) = soonest("validation"), soonest("test")
    own = arrival(chosen)
    late = arrival(on_test) if reached and not validated else None
    return GoalRow(own.chosen, own.steps, own.median, length, validated, late)


def _soonest(places: Sequence[Choice], steps: Sequence[int | None]) -> tuple[Choice | None, bool]:
    """Return the place whose runs were first at the goal, and whether any of them was."""
    reached: dict[Choice, list[float]] = {}
    for place, step in zip(places, steps):
        reached.setdefault(place, []).append(math.inf if step is None else step)
    if not reached:
        return None, False
    # Of equal medians, such as none, the place that more seeds reached, and sooner.
    best = min(reached, key=lambda place: (_median(reached[place]), sorted(reached[place])))
    return best, min(reached[best]) < math.inf


def _median(steps: Sequence[float]) -> float:
    ordered = sorted(steps)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return high if math.isinf(high) else float(np.mean([low, high]))


def median(steps: Sequence[int | None]) -> float | None:
    """Return the median, with None as later than any step; None where that is the median.

    Examples
    --------
    >>> median([100, None, 300]), median([100, None, None])
    (300.0, None)
    """
    middle = _median([math.inf if step is None else step for step in steps]) if steps else math.inf
    return None if math.isinf(middle) else middle


def goal_lines(comparison: Comparison, goals: Mapping[str, Goal]) -> list[str]:
    """Return in words when each arm reached the goals."""
    lines = []
    for metric, goal in goals.items():
        sign = "at least" if comparison.task.metrics[metric] == "max" else "at most"
        aim = f"{metric} {sign} {number(goal.goal)}"
        for arm, row in goal.arms.items():
            if row.validated:
                lines.append(f"{arm}: test {aim} first {row.text(row.length)} ({row.place})")
                continue
            late = row.on_test
            there = f"on test data {late.place} did, {late.text(row.length)}" if late else "nor did any on test data"
            lines.append(f"{arm}: none reached {aim} on validation data by {row.length:,} steps; {there}")
    return lines
