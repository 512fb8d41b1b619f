"""Exponentially smoothed means of a series of samples, and their standard errors."""

from __future__ import annotations

import math


class Smoothed:
    """Exponentially weighted mean of a series, and its standard error.

    The scatter of a sample is taken from the differences of neighbours, which a slow trend leaves alone. Where
    neighbours alone are alike, with the correlation `r`, those differences are too small by `1 - r`, and the mean's
    variance is larger by `1 + 2 * r`.

    Parameters
    ----------
    fewest
        About so many samples weigh at least.
    """

    def __init__(self, fewest: int) -> None:
        self._most_forgotten = math.exp(-1 / fewest)
        self.count = 0
        self._sum = 0.0
        self._weight = 0.0
        self._squared_weight = 0.0
        self._last = 0.0
        self._squares = 0.0
        self._squares_weight = 0.0

    def add(self, age: float, correlation: float, value: float) -> None:
        """Take in the next sample.

        Parameters
        ----------
        age
            The time since the sample before, in units of the horizon.
        correlation
            With the sample before, in [0, 1).
        value
            The sample.
        """
        kept = max(math.exp(-age), self._most_forgotten)
        if self.count:
            # Half the square of a difference has one sample's variance.
            inflation = (1 + 2 * correlation) / (1 - correlation)
            self._squares = kept * self._squares + inflation * (value - self._last) ** 2 / 2
            self._squares_weight = kept * self._squares_weight + 1
        self._sum = kept * self._sum + value
        self._weight = kept * self._weight + 1
        self._squared_weight = kept**2 * self._squared_weight + 1
        self._last = value
        self.count += 1

    @property
    def mean(self) -> float:
        """The weighted mean; NaN before the first sample."""
        return self._sum / self._weight if self.count else math.nan

    @property
    def stderr(self) -> float:
        """The standard error of the mean; NaN before the second sample."""
        if self._squares_weight == 0:
            return math.nan
        return math.sqrt(self._squares / self._squares_weight * self._squared_weight) / self._weight
