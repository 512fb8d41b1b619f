"""Means over seeds, their intervals, and what may be said of a difference when a page says several things at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

# With fewer no verdict is given, only values: what made the values of 3 or 4 seeds differ cannot be told from chance.
FEWEST_SEEDS = 5
LEVEL = 0.05


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95% confidence interval of the mean over seeds.

    It leaves the mean of normal values out one time in twenty, for any number of them: a bootstrap's percentiles leave
    it out 14% of the time for 5 values, and 8% at the widened level of Hesterberg ("What Teachers Should Know About the
    Bootstrap", The American Statistician, 2015).

    Parameters
    ----------
    values
        One number per seed.

    Returns
    -------
    (low, high), or None for fewer than 3 values, whose interval would say nothing.

    Examples
    --------
    >>> interval([0.7, 0.7, 0.7])
    (0.7, 0.7)
    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    n = len(values)
    if n < 3:
        return None
    if len(set(values)) == 1:
        return (values[0], values[0])
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    return (mean - half, mean + half)


def p_value(differences: Sequence[float]) -> float | None:
    """Return how likely so large a mean difference is by chance: Student's paired test; None for fewer than 5.

    Examples
    --------
    >>> round(p_value([0.01, 0.03, 0.02, 0.00, 0.02]), 3)
    0.035
    """
    n = len(differences)
    if n < FEWEST_SEEDS:
        return None
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(n)
    if error == 0 or len(set(differences)) == 1:
        return 0.0 if len(set(differences)) == 1 and differences[0] != 0 else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for all that are looked at together (Holm, Scandinavian Journal of Statistics, 1979).

    Where nothing differs, one of them falls below 0.05 by chance in one page of twenty at most, however many there are
    and however they depend on each other.

    Examples
    --------
    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, interval and the values themselves."""
    return {"mean": float(np.mean(values)), "interval": interval(values), "values": list(map(float, values))}


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Return the paired difference `one - other` over the seeds both have, and how likely it is by chance."""
    found = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
    return {**estimate(found), "p": p_value(found)}
