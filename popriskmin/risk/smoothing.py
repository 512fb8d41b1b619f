"""Exponentially smoothed means of a series of samples, and their standard error."""

from __future__ import annotations

import math


class Smoothed:
    """Exponentially weighted means of several series, and the standard error of the first.

    The scatter of a sample is taken from the differences of neighbours, which a slow trend leaves alone. Where
    neighbours are alike, those differences are too small and the samples tell less than their number says: with the
    correlation `r`, both together make the standard error `sqrt(1 + r) / (1 - r)` times as large.

    Parameters
    ----------
    fewest
        About so many samples weigh at least.
    """

    def __init__(self, fewest: int) -> None:
        self._most_forgotten = math.exp(-1 / fewest)
        self.count = 0
        self._sums: list[float] = []
        self._weight = 0.0
        self._squared_weight = 0.0
        self._last = 0.0
        self._squares = 0.0
        self._squares_weight = 0.0

    def add(self, age: float, correlation: float, *values: float) -> None:
        """Take in the next sample of each series.

        Parameters
        ----------
        age
            The time since the sample before, in units of the horizon.
        correlation
            With the sample before, in [0, 1).
        values
            One for each series.
        """
        kept = max(math.exp(-age), self._most_forgotten)
        if self.count:
            # Half the square of a difference has one sample's variance.
            inflation = (1 + correlation) / (1 - correlation) ** 2
            self._squares = kept * self._squares + inflation * (values[0] - self._last) ** 2 / 2
            self._squares_weight = kept * self._squares_weight + 1
        else:
            self._sums = [0.0] * len(values)
        self._sums = [kept * held + value for held, value in zip(self._sums, values)]
        self._weight = kept * self._weight + 1
        self._squared_weight = kept**2 * self._squared_weight + 1
        self._last = values[0]
        self.count += 1

    @property
    def means(self) -> list[float]:
        """The weighted means."""
        return [held / self._weight for held in self._sums]

    @property
    def stderr(self) -> float:
        """The standard error of the first mean; NaN before the second sample."""
        if self._squares_weight == 0:
            return math.nan
        return math.sqrt(self._squares / self._squares_weight * self._squared_weight) / self._weight
