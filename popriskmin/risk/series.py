"""What the samples of one run, or of one part of its parameters, add up to."""

from __future__ import annotations

import math
from typing import NamedTuple

from popriskmin.risk.smoothing import Smoothed

# A mean of fewer samples has no standard error to speak of.
FEWEST_SAMPLES = 20

# Correlation of the samples of neighbouring steps: the larger part of one of the two products is the same.
NEIGHBOURS = 0.5


class Sample(NamedTuple):
    """The terms of one step: the expected fall but for the training set's own noise, and what that takes at most."""

    step: int
    fresh: float
    influence: float


class RiskEstimate(NamedTuple):
    """What `RiskMonitor.estimate` returns; falls of the population risk in units of the loss, positive where it falls.

    Where a data set is used again and again there is no one estimate but two ends, between which the truth is expected
    but for what weight decay undoes. Where every batch is fresh both are the same.

    Attributes
    ----------
    fresh
        The expected fall in one step as if the training set were the world, smoothed over the last steps.
    reused
        The same as if nothing of the training set's own noise had been fitted yet.
    fresh_stderr, reused_stderr
        Their standard errors, from how the samples scatter; the biases in docs/risk.md come on top.
    fresh_total, reused_total
        The expected fall since the monitor was attached, by either end.
    steps
        The steps seen.
    """

    fresh: float
    reused: float
    fresh_stderr: float
    reused_stderr: float
    fresh_total: float
    reused_total: float
    steps: int


class Series:
    """Samples in the order of their steps, their smoothed means and their totals.

    Parameters
    ----------
    smoothing
        Horizon of the means in steps.
    """

    def __init__(self, smoothing: int) -> None:
        self.smoothing = smoothing
        self.samples: list[Sample] = []
        self.finite = True  # whether the last sample was
        self._ends = (Smoothed(FEWEST_SAMPLES), Smoothed(FEWEST_SAMPLES))
        self._totals = [0.0, 0.0]

    def add(self, sample: Sample) -> None:
        """Take in the sample of a later step; of one that is not finite only the fact is noted."""
        self.finite = math.isfinite(sample.fresh) and math.isfinite(sample.influence)
        if not self.finite:
            return
        before = self.samples[-1] if self.samples else sample._replace(step=0)
        gap = sample.step - before.step
        values = (sample.fresh, sample.fresh - sample.influence)
        for i, (value, last) in enumerate(zip(values, (before.fresh, before.fresh - before.influence))):
            self._ends[i].add(gap / self.smoothing, NEIGHBOURS if gap == 1 else 0.0, value)
            # Between samples the fall is taken to change evenly.
            self._totals[i] += gap * (value + last) / 2
        self.samples.append(sample)

    def estimate(self, steps: int) -> RiskEstimate:
        """Return what the samples say after `steps` steps; NaN after a sample that is not finite."""
        fresh, reused = self._ends
        found = [fresh.mean, reused.mean, fresh.stderr, reused.stderr, *self._totals]
        return RiskEstimate._make([*(found if self.finite else [math.nan] * len(found)), steps])
