"""Intervals and p-values against scipy, simulated null data, and Holm's correction against its definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from popriskmin.compare.report.statistics import difference, holm, interval, p_value

values = st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=12)


@given(values)
def test_the_interval_and_the_p_value_are_students(found):
    if len(set(found)) == 1 or np.std(found) < 1e-6:
        return
    result = stats.ttest_1samp(found, 0.0)
    assert p_value(found) == pytest.approx(result.pvalue, rel=1e-6, abs=1e-12)
    low, high = result.confidence_interval(0.95)
    assert interval(found) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(values)
def test_the_interval_excludes_0_where_the_p_value_is_below_a_twentieth(found):
    if np.std(found) < 1e-6:
        return
    low, high = interval(found)
    p = p_value(found)
    if abs(p - 0.05) > 1e-6:
        assert (low <= 0 <= high) == (p >= 0.05)


def test_values_that_are_all_equal():
    assert interval([0.3] * 5) == pytest.approx((0.3, 0.3))
    assert p_value([0.3] * 5) == 0.0
    assert p_value([0.0] * 5) == 1.0


def test_too_few_values_say_nothing():
    assert interval([0.1, 0.2]) is None
    assert interval([0.1, 0.2, 0.3]) is not None
    assert p_value([0.1, 0.2, 0.3, 0.4]) is None
    assert difference({0: 0.9, 1: 0.8}, {0: 0.1, 2: 0.1}).values == pytest.approx([0.8])


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace", "accuracies"])
def test_null_data_makes_a_false_claim_one_time_in_twenty(seeds, kind):
    """Of 4,000 comparisons of two arms that do not differ; accuracies are shares of 500 test examples."""
    rng = np.random.default_rng(0)
    size = (4000, seeds)
    draws = {
        "normal": lambda: rng.normal(size=size),
        "uniform": lambda: rng.uniform(-1, 1, size=size),
        "laplace": lambda: rng.laplace(size=size),
        "accuracies": lambda: (rng.binomial(500, 0.93, size=size) - rng.binomial(500, 0.93, size=size)) / 500,
    }
    false = np.mean([p_value(row) < 0.05 for row in draws[kind]()])
    assert 0.03 < false < 0.065


def test_a_page_of_eight_statements_about_nothing_makes_a_false_claim_one_time_in_twenty():
    """However they depend on each other: here on a shared part."""
    rng = np.random.default_rng(1)
    for share in (0.0, 0.7):
        pages = []
        for _ in range(1500):
            common = rng.normal(size=5)
            rows = share * common + math.sqrt(1 - share**2) * rng.normal(size=(8, 5))
            pages.append(min(holm([p_value(row) for row in rows])) < 0.05)
        assert np.mean(pages) < 0.065


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=10))
def test_holm_is_what_its_definition_says(p_values):
    """A hypothesis is rejected if it and all smaller ones pass p * (number not yet rejected) < level."""
    adjusted = holm(p_values)
    assert [a is None for a in adjusted] == [p is None for p in p_values]
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, (p, i) in enumerate(known):
            if p * (len(known) - rank) >= level:
                break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a is not None and a < level} == rejected
