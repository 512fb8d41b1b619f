"""What an arm gives to who tries so many configurations of its grid.

For `k` configurations drawn at random from the grid, without one twice: the expected test metric of the one that is
best on validation data (Dodge et al., "Show Your Work: Improved Reporting of Experimental Results", arXiv:1909.03004,
who draw with replacement). One configuration is no tuning, all of them are the whole grid's. It depends on the grid, so
it compares arms and means nothing by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from popriskmin.compare.report.run_summary import Run, leading, runs_of
from popriskmin.compare.report.statistics import estimate
from popriskmin.compare.training.arms import Arm


def by_budget(runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return for each arm a row for k = 1, 2, ...: `k` and `test`, the expected final test metric with its values.

    Each seed is a comparison of its own, which chooses on its own validation data. A run that diverged is the last to
    be chosen; where it may be all there is, because no more were drawn than diverged, `test` is None.
    """
    metric, sign = leading(metrics)
    table = {}
    for arm in arms:
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for run in runs_of(runs, arm):
            pair = run.figures["final"][metric]
            mine = by_seed.setdefault(run.job.configuration.seed, [])
            mine.append((-math.inf, math.nan) if pair is None else (sign * pair[0], pair[1]))
        seeds = sorted(by_seed)
        expected = [expected_of_the_best(by_seed[seed]) for seed in seeds]
        rows = []
        for k, values in enumerate(zip(*expected), 1):
            complete = all(map(math.isfinite, values))
            test = {**estimate(values), "seeds": seeds} if complete else None
            rows.append({"k": k, "test": test})
        table[arm.name] = rows
    return table


def untuned(runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str]) -> dict[str, float]:
    """Return for each arm what one configuration of its grid gives on validation data: its mean over grid and seeds.

    With its sign turned where the metric is to be small; minus infinity for an arm of which some run diverged.
    """
    metric, sign = leading(metrics)
    scores = {}
    for arm in arms:
        pairs = [run.figures["final"][metric] for run in runs_of(runs, arm)]
        known = [sign * pair[0] for pair in pairs if pair is not None]
        scores[arm.name] = math.fsum(known) / len(known) if len(known) == len(pairs) > 0 else -math.inf
    return scores


def expected_of_the_best(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Return, for k = 1, 2, ..., the expected second number of the pair whose first is the largest of k drawn.

    Of `n` pairs, the i-th best is the best of k drawn with probability `C(n - i, k - 1) / C(n, k)`. NaN where a pair
    that may be the best has none.

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
