"""Smoothed means and their standard error."""

import math

import numpy as np
import pytest

from popriskmin.risk.smoothing import Smoothed


def test_the_mean_is_weighted_by_age():
    smoothed = Smoothed(fewest=1)
    for value in (4.0, 1.0):
        smoothed.add(0.5, 0.0, value)
    weight = math.exp(-0.5)
    assert smoothed.mean == pytest.approx((4 * weight + 1) / (weight + 1))
    assert smoothed.count == 2


def test_long_gaps_still_leave_the_fewest_samples():
    smoothed = Smoothed(fewest=5)
    for value in range(1000):
        smoothed.add(1e9, 0.0, float(value))
    assert 999 - smoothed.mean == pytest.approx(1 / (math.exp(1 / 5) - 1), rel=1e-6)


@pytest.mark.parametrize("trend", [0.0, 0.05])
def test_the_standard_error_is_that_of_the_mean(trend):
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        smoothed = Smoothed(fewest=1)
        for i in range(100):
            smoothed.add(0.1, 0.0, trend * i + rng.normal())
        means.append(smoothed.mean)
        errors.append(smoothed.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_standard_error_of_neighbours_that_are_alike(share):
    """Neighbours share a part of their noise, and those further apart nothing."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    correlation = share / (1 + share**2)
    for _ in range(300):
        smoothed, noise = Smoothed(fewest=1), rng.normal(size=301)
        for value in noise[1:] + share * noise[:-1]:
            smoothed.add(0.02, correlation, value)
        means.append(smoothed.mean)
        errors.append(smoothed.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_one_sample_has_no_standard_error():
    smoothed = Smoothed(fewest=3)
    smoothed.add(1.0, 0.0, 2.0)
    assert math.isnan(smoothed.stderr)
    assert math.isnan(Smoothed(fewest=3).mean)
