"""Statements on pairs of arms, with p-values that are corrected for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.analysis import BudgetRow, Selections, rivals_of
from popriskmin.compare.report.statistics import FEWEST_SEEDS, LEVEL, Difference, Estimate, difference, holm
from popriskmin.compare.report.train_on_validation import STOPPED, JoinedRow
from popriskmin.compare.text import number
from popriskmin.compare.training.arms import ADAMW

OPENINGS = {
    "final": "Trained to the end",
    "best": "Stopped at the best validation step",
    "area": "Averaged over the training",
}
ALL_OPENINGS = OPENINGS | {
    "budget 1": "Trained to the end with one configuration, drawn at random from the grid",
    "joined": "Trained to the end on training and validation data joined, or stopped at the best validation step",
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """A comparison of two arms by one metric.

    Attributes
    ----------
    opening
        The situation in words.
    figure
        "final", "best" or "area"; "budget 1" for one configuration, drawn at random;
        "joined" for training on the validation data too.
    value, rival_value
        Means on test data over the seeds that both have.
    difference, interval
        Their difference, paired by seed, and its 95% interval.
    p
        The probability of so large a difference by chance, corrected for all statements;
        None with fewer than 5 seeds.
    verdict
        "better", "worse", "unclear", or None with fewer than 5 seeds.
    """

    opening: str
    figure: str
    arm: str
    rival: str
    metric: str
    direction: str
    value: float
    rival_value: float
    difference: float
    interval: tuple[float, float] | None
    seeds: int
    p: float | None = None

    @property
    def verdict(self) -> str | None:
        """What the difference shows."""
        if self.p is None:
            return None
        if self.p >= LEVEL:
            return "unclear"
        return "better" if (self.difference > 0) == (self.direction == "max") else "worse"

    @property
    def sentence(self) -> str:
        """The statement in words, with the metric, its direction and both values.

        Examples
        --------
        >>> Statement("", "final", "a", "b", "accuracy", "max", 0.934, 0.925, 0.009, (0.001, 0.017), 5, 0.03).sentence
        'a is better than b: test accuracy 0.934 against 0.925 (higher is better), +0.0090 [+0.0010, +0.0170], p = 0.03'
        """
        better = "higher" if self.direction == "max" else "lower"
        values = f"test {self.metric} {number(self.value)} against {number(self.rival_value)} ({better} is better)"
        told = f"{values}, {self._difference_in_words()}"
        if self.p is None:
            lack = f"{self.seeds} seed{'s are' if self.seeds != 1 else ' is'} too few for a verdict"
            return f"{self.arm} and {self.rival}: {told}; {lack}, {FEWEST_SEEDS} would do"
        if self.verdict == "unclear":
            side = f"{self.side} {self.rival}, not proven" if self.difference else f"level with {self.rival}"
            return f"{self.arm} is {side}: {told}, {self.chance}"
        return f"{self.arm} is {self.verdict} than {self.rival}: {told}, {self.chance}"

    def _difference_in_words(self) -> str:
        """Write the difference and its interval, with equally many decimal places."""
        largest = max(map(abs, (self.difference, *(self.interval or ()))))
        small = max(abs(self.value), abs(self.rival_value)) < 0.0995 or 0 < largest < 0.00005
        style = "+.3g" if small else "+.4f"
        ends = "" if self.interval is None else f" [{', '.join(format(end, style) for end in self.interval)}]"
        return f"{self.difference:{style}}{ends}"

    @property
    def side(self) -> str:
        """The side of its rival on which the arm's mean is, "ahead of" or "behind"."""
        return "ahead of" if (self.difference > 0) == (self.direction == "max") else "behind"

    @property
    def chance(self) -> str:
        """The p-value in words; empty with fewer than 5 seeds."""
        if self.p is None:
            return ""
        # One more digit near the level, so that no p of 0.05 is called clear.
        return "p < 0.001" if self.p < 0.001 else f"p = {self.p:.{3 if 0.04 < self.p < 0.06 else 2}g}"


def statements(
    comparison: Comparison,
    selections: Selections,
    budget: Mapping[str, Sequence[BudgetRow]],
    best_untuned: str,
    joined: Mapping[str, JoinedRow],
) -> list[Statement]:
    """Return the statements on every PRM arm and each of its rivals.

    Parameters
    ----------
    selections
        The result of `analyse`.
    budget
        The result of `by_budget`.
    best_untuned
        The best rival of an arm with one configuration, drawn at random.
    joined
        The result of `by_joined`; empty without runs on joined data.
    """
    pairs = [
        *_tuned(comparison, selections),
        *_untuned(comparison, budget, best_untuned),
        *_joined(comparison, joined),
    ]
    return [dataclasses.replace(one, p=p) for one, p in zip(pairs, holm([one.p for one in pairs]))]


def _statement(
    comparison: Comparison, figure: str, arms: tuple[str, str], values: tuple[Estimate, Estimate], apart: Difference
) -> Statement:
    """Return a statement on two means and their paired difference; its p is not corrected."""
    return Statement(
        opening=ALL_OPENINGS[figure],
        figure=figure,
        arm=arms[0],
        rival=arms[1],
        metric=comparison.metric,
        direction=comparison.direction,
        value=values[0].mean,
        rival_value=values[1].mean,
        difference=apart.mean,
        interval=apart.interval,
        seeds=len(apart.values),
        p=apart.p,
    )


def _prm_arms(comparison: Comparison) -> list[str]:
    return [arm.name for arm in comparison.arms if arm.kind == "prm"]


def _tuned(comparison: Comparison, selections: Selections) -> Iterator[Statement]:
    metric = comparison.metric
    for figure in OPENINGS:
        by_arm = selections[figure]
        for arm in _prm_arms(comparison):
            for rival, by_figure in by_arm[arm].against.items():
                if metric in by_figure[figure]:
                    one, other = ((by_arm[name].test or {})[figure][metric] for name in (arm, rival))
                    yield _statement(comparison, figure, (arm, rival), (one, other), by_figure[figure][metric])


def _untuned(
    comparison: Comparison, budget: Mapping[str, Sequence[BudgetRow]], best_untuned: str
) -> Iterator[Statement]:
    for arm in comparison.arms:
        rivals = rivals_of(arm, best_untuned) if arm.kind == "prm" else []
        for rival in (name for name in rivals if name in budget):
            one, other = budget[arm.name][0].test, budget[rival][0].test
            if one is not None and other is not None:
                apart = difference(*(dict(zip(mean.seeds, mean.values)) for mean in (one, other)))
                yield _statement(comparison, "budget 1", (arm.name, rival), (one, other), apart)


def _joined(comparison: Comparison, joined: Mapping[str, JoinedRow]) -> Iterator[Statement]:
    metric = comparison.metric
    for arm in (name for name in (ADAMW.name, *_prm_arms(comparison)) if name in joined):
        row = joined[arm]
        final, stopped = row.test[metric], row.stopped[metric]
        names = (f"{arm} joined", f"{arm} stopped")
        yield _statement(comparison, "joined", names, (final, stopped), row.against[STOPPED][metric])
        if ADAMW.name in row.against:
            names = (f"{arm} joined", f"{ADAMW.name} joined")
            other = joined[ADAMW.name].test[metric]
            yield _statement(comparison, "joined", names, (final, other), row.against[ADAMW.name][metric])
