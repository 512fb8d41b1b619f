"""The verdict on an estimate with two ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.risk.series import RiskEstimate
from popriskmin.risk.verdict import IMPROVING, OVERFITTING, UNCLEAR, of_ends, quantile_over_looks


def estimate(fresh, reused, stderr=0.1):
    return RiskEstimate(fresh, reused, stderr, stderr, 0.0, 0.0, 100)


@pytest.mark.parametrize(
    ("fresh", "reused", "said"),
    [
        (1.0, 0.5, IMPROVING),
        (1.0, 0.1, UNCLEAR),  # 0.1 is one standard error
        (1.0, -0.5, UNCLEAR),
        (0.1, -0.5, UNCLEAR),
        (-0.1, -0.5, UNCLEAR),
        (-0.5, -1.0, OVERFITTING),
    ],
)
def test_both_ends_have_to_agree(fresh, reused, said):
    assert of_ends(estimate(fresh, reused), 0.95, looks=1, reused=True) == said


def test_what_comes_once_cannot_be_overfitted():
    assert of_ends(estimate(-1.0, -1.0), 0.95, looks=1, reused=False) == UNCLEAR
    assert of_ends(estimate(1.0, 1.0), 0.95, looks=1, reused=False) == IMPROVING


def test_the_more_looks_the_more_an_alarm_has_to_show():
    assert of_ends(estimate(-0.3, -0.3), 0.95, looks=1, reused=True) == OVERFITTING
    assert of_ends(estimate(-0.3, -0.3), 0.95, looks=100, reused=True) == UNCLEAR
    assert of_ends(estimate(0.3, 0.3), 0.95, looks=100, reused=True) == IMPROVING


@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0.6, 0.95]), st.integers(1, 1000), st.booleans())
def test_without_a_standard_error_nothing_is_claimed(fresh, reused, confidence, looks, again):
    assert of_ends(estimate(fresh, reused, math.nan), confidence, looks, again) == UNCLEAR
    assert of_ends(estimate(math.nan, math.nan), confidence, looks, again) == UNCLEAR


@given(st.floats(0.51, 0.999))
def test_all_looks_together_err_with_no_more_than_the_confidence_leaves(confidence):
    chances = [0.5 * math.erfc(quantile_over_looks(confidence, n) / math.sqrt(2)) for n in range(1, 400)]
    assert sum(chances) == pytest.approx((1 - confidence) * (1 - 1 / 400), rel=1e-3)
