"""What may be said of an estimate that has two ends: improving, overfitting, or neither."""

from __future__ import annotations

import math
from statistics import NormalDist

from popriskmin.risk.series import RiskEstimate

IMPROVING, OVERFITTING, UNCLEAR = "improving", "overfitting", "unclear"


def of_ends(estimate: RiskEstimate, confidence: float, looks: int, reused: bool) -> str:
    """Return the verdict on an estimate.

    Parameters
    ----------
    estimate
        Its two ends and their standard errors.
    confidence
        Of "improving" at one look, and of "overfitting" over all looks together.
    looks
        How many separate looks there have been: the `n`-th one may err with the `n * (n + 1)`-th part of what the
        confidence leaves, so that all together may err with no more than it leaves.
    reused
        Whether examples have come more than once. What came once cannot be overfitted.
    """
    one, all_looks = NormalDist().inv_cdf(confidence), quantile_over_looks(confidence, looks)
    if estimate.reused - one * estimate.reused_stderr > 0 and estimate.fresh - one * estimate.fresh_stderr > 0:
        return IMPROVING
    highest = [estimate.fresh + all_looks * estimate.fresh_stderr, estimate.reused + all_looks * estimate.reused_stderr]
    if reused and max(highest) < 0 and not any(map(math.isnan, highest)):
        return OVERFITTING
    return UNCLEAR


def quantile_over_looks(confidence: float, looks: int) -> float:
    """Return how many standard errors the `looks`-th look has to ask for, so that all may err with `1 - confidence`.

    Examples
    --------
    >>> [round(quantile_over_looks(0.95, looks), 2) for looks in (1, 10, 100)]
    [1.96, 3.32, 4.42]
    """
    return -NormalDist().inv_cdf((1 - confidence) / (looks * (looks + 1)))
