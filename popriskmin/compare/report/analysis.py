"""What every arm chose and reached, at its best, by learning rate, and by how much is tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.run_summary import FIGURES, BySeed, Choice, Run, choose, chosen_runs, leading, runs_of
from popriskmin.compare.report.statistics import Difference, Estimate, difference, estimate, interval
from popriskmin.compare.training.arms import ADAMW, AVERAGED, Arm


@dataclasses.dataclass(frozen=True)
class Selection:
    """What an arm reached at the configuration that it chose.

    Attributes
    ----------
    chosen
        The configuration; None where no configuration can be chosen.
    test
        `test[figure][metric]` on test data, of the figures that all runs there have; None
        where nothing was chosen.
    against
        `against[arm][figure][metric]`, the difference to another arm, paired by seed.
    """

    chosen: Choice | None
    test: Mapping[str, Mapping[str, Estimate]] | None = None
    against: Mapping[str, Mapping[str, Mapping[str, Difference]]] = dataclasses.field(default_factory=dict)


# By the figure that chooses, and by arm.
Selections = Mapping[str, Mapping[str, Selection]]


def analyse(comparison: Comparison, runs: Sequence[Run]) -> dict[str, dict[str, Selection]]:
    """Return, for each figure as the one that chooses, what every arm chose and reached.

    The runs' settings determine all of it: there are no times in it.
    """
    metrics, arms = comparison.task.metrics, comparison.arms
    selections = {}
    for figure in FIGURES:
        choices = {arm.name: choose(runs_of(runs, arm), figure, metrics) for arm in arms}
        chosen = {name: choice for name, (choice, _) in choices.items()}
        best = best_rival(arms, {name: score for name, (_, score) in choices.items()})
        values = {arm.name: _chosen_values(chosen_runs(runs, arm.name, chosen[arm.name]), metrics) for arm in arms}
        selections[figure] = {arm.name: _selection(arm, chosen, values, metrics, best) for arm in arms}
    return selections


def best_rival(arms: Sequence[Arm], scores: Mapping[str, float]) -> str:
    """Return the best optimizer on validation data besides PRM and the matched AdamW."""
    others = [arm.name for arm in arms if arm.kind not in ("prm", "adamw-matched")]
    return max(others, key=lambda name: scores[name])


def _chosen_values(runs: Sequence[Run], metrics: Mapping[str, str]) -> dict[str, BySeed]:
    """Return the test values by figure, metric and seed, of the runs at one configuration.

    A figure that one of the runs lacks, because it diverged, has no values.
    """
    values: dict[str, BySeed] = {figure: {metric: {} for metric in metrics} for figure in FIGURES}
    for figure in FIGURES:
        for metric in metrics:
            pairs = {run.seed: run.figures[figure][metric] for run in runs}
            complete = {seed: pair[1] for seed, pair in pairs.items() if pair is not None}
            if len(complete) == len(pairs):
                values[figure][metric] = complete
    return values


def _selection(
    arm: Arm,
    chosen: Mapping[str, Choice | None],
    values: Mapping[str, Mapping[str, BySeed]],
    metrics: Mapping[str, str],
    best: str,
) -> Selection:
    own = values[arm.name]
    if chosen[arm.name] is None:
        return Selection(None)
    test = {
        figure: {metric: estimate(list(own[figure][metric].values())) for metric in metrics}
        for figure in FIGURES
        if all(own[figure][metric] for metric in metrics)
    }
    against = {
        other: {
            figure: {
                metric: difference(own[figure][metric], values[other][figure][metric])
                for metric in metrics
                if set(own[figure][metric]) & set(values[other][figure][metric])
            }
            for figure in FIGURES
        }
        for other in rivals_of(arm, best)
        if chosen.get(other) is not None
    }
    return Selection(chosen[arm.name], test, against)


def rivals_of(arm: Arm, best: str = ADAMW.name) -> list[str]:
    """Return the arms that an arm is compared with.

    All are compared with AdamW, and PRM also with the best other optimizer and with the
    AdamW of equal steps. Averaged weights are compared with AdamW's and with the arm's plain
    ones.
    """
    if arm.kind != "prm":
        return [] if arm == ADAMW else [ADAMW.name]
    base = ADAMW.of_averages.name if arm.averaged else ADAMW.name
    others = [] if best == base else [best]
    if arm.averaged:
        return [base, *others, arm.name.removesuffix(AVERAGED)]
    options = arm.name.removeprefix("prm")
    return [base, *others, f"adamw-matched{options}", *(["prm"] if options else [])]


@dataclasses.dataclass(frozen=True)
class RateRow:
    """The final test metric of an arm at one learning rate.

    Attributes
    ----------
    lr
        The learning rate.
    weight_decay
        The decay with the best final value on validation data; None where some run diverged
        at every decay.
    mean, interval
        The test metric there.
    """

    lr: float
    weight_decay: float | None = None
    mean: float | None = None
    interval: tuple[float, float] | None = None


def by_learning_rate(comparison: Comparison, runs: Sequence[Run]) -> dict[str, list[RateRow]]:
    """Return, for each arm, the final test metric at each of its learning rates."""
    return {
        arm.name: [_at_rate(comparison, runs, arm, lr) for lr in arm.learning_rates or comparison.learning_rates]
        for arm in comparison.arms
    }


def _at_rate(comparison: Comparison, runs: Sequence[Run], arm: Arm, lr: float) -> RateRow:
    row, top = RateRow(lr), -np.inf
    for decay in arm.weight_decays or comparison.weight_decays:
        there = chosen_runs(runs, arm.name, Choice(lr, decay))
        pairs = [run.figures["final"][comparison.metric] for run in there]
        usable = [pair for pair in pairs if pair is not None]
        if len(usable) < len(pairs) or not usable:
            continue
        score = comparison.sign * float(np.mean([validation for validation, _ in usable]))
        if score > top:
            top, test = score, [value for _, value in usable]
            row = RateRow(lr, decay, float(np.mean(test)), interval(test))
    return row


@dataclasses.dataclass(frozen=True)
class SeededEstimate(Estimate):
    """An estimate with the seeds of its values."""

    seeds: Sequence[int]


@dataclasses.dataclass(frozen=True)
class BudgetRow:
    """What an arm reaches where `k` configurations are tried.

    Attributes
    ----------
    k
        The number of configurations, drawn at random from the grid without replacement.
    test
        The expected final test metric of the one that is best on validation data; None where
        all of them may have diverged.
    """

    k: int
    test: SeededEstimate | None


def by_budget(comparison: Comparison, runs: Sequence[Run]) -> dict[str, list[BudgetRow]]:
    """Return for each arm what it reaches with k = 1, 2, ... configurations of its grid.

    One configuration is no tuning, all of them are the whole grid. It depends on the grid,
    so it compares arms and means nothing by itself. After Dodge et al. ("Show Your Work:
    Improved Reporting of Experimental Results", arXiv:1909.03004), who draw with
    replacement.

    Each seed chooses on its own validation data. A run that diverged is chosen last.
    """
    metric, sign = leading(comparison.task.metrics)
    table = {}
    for arm in comparison.arms:
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for run in runs_of(runs, arm):
            pair = run.figures["final"][metric]
            scores = by_seed.setdefault(run.seed, [])
            scores.append((-math.inf, math.nan) if pair is None else (sign * pair[0], pair[1]))
        seeds = sorted(by_seed)
        expected = [expected_of_the_best(by_seed[seed]) for seed in seeds]
        table[arm.name] = [BudgetRow(k, _if_complete(values, seeds)) for k, values in enumerate(zip(*expected), 1)]
    return table


def _if_complete(values: Sequence[float], seeds: Sequence[int]) -> SeededEstimate | None:
    if not all(map(math.isfinite, values)):
        return None
    mean = estimate(values)
    return SeededEstimate(mean.mean, mean.interval, mean.values, seeds)


def untuned(comparison: Comparison, runs: Sequence[Run]) -> dict[str, float]:
    """Return for each arm its mean final value on validation data, over grid and seeds.

    The sign is turned where the metric is to be small. An arm of which some run diverged
    has minus infinity.
    """
    metric, sign = leading(comparison.task.metrics)
    scores = {}
    for arm in comparison.arms:
        pairs = [run.figures["final"][metric] for run in runs_of(runs, arm)]
        known = [sign * pair[0] for pair in pairs if pair is not None]
        scores[arm.name] = math.fsum(known) / len(known) if len(known) == len(pairs) > 0 else -math.inf
    return scores


def expected_of_the_best(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Return, for k = 1, 2, ..., the expected test value of the best of k pairs.

    A pair is a score on validation data and a value on test data. Of `n` pairs, the i-th
    best is the best of k drawn with probability `C(n - i, k - 1) / C(n, k)`. NaN where a
    pair that may be the best has no value.

    Examples
    --------
    >>> [round(x, 3) for x in expected_of_the_best([(1, 0.1), (2, 0.2), (3, 0.3)])]
    [0.2, 0.267, 0.3]
    """
    n = len(pairs)
    values = [value for _, value in sorted(pairs, key=lambda pair: -pair[0])]
    expected = []
    for k in range(1, n + 1):
        weights = [math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n + 1)]
        expected.append(math.fsum(w * x for w, x in zip(weights, values) if w > 0))
    return expected
