"""What samples add up to."""

import math

import pytest

from popriskmin.risk.series import Sample, Series


def series(*rows):
    filled = Series(smoothing=50)
    for row in rows:
        filled.add(Sample(*row))
    return filled


def test_the_two_ends_and_their_totals():
    estimate = series((2, 1.0, 0.4), (4, 1.0, 0.4), (8, 3.0, 0.4)).estimate(9)
    # From the start to the first sample the fall is taken to be that of the first; between samples it changes evenly.
    assert estimate.fresh_total == pytest.approx(2 * 1.0 + 2 * 1.0 + 4 * 2.0)
    assert estimate.reused_total == pytest.approx(estimate.fresh_total - 8 * 0.4)
    assert estimate.fresh - estimate.reused == pytest.approx(0.4)
    assert estimate.fresh_stderr == pytest.approx(estimate.reused_stderr)
    assert 1 < estimate.fresh < 3
    assert estimate.steps == 9


def test_neighbours_that_share_a_product_count_for_less():
    values = [1.0, 2.0, 0.0, 1.5, 0.5, 2.0]
    near = series(*[(i + 1, value, 0.0) for i, value in enumerate(values)]).estimate(6)
    far = Series(smoothing=100)  # the same ages
    for i, value in enumerate(values):
        far.add(Sample(2 * i + 2, value, 0.0))
    assert near.fresh == pytest.approx(far.estimate(12).fresh)
    assert near.fresh_stderr == pytest.approx(2 * far.estimate(12).fresh_stderr)


@pytest.mark.parametrize("wrong", [(3, math.nan, 0.0), (3, math.inf, 0.0), (3, 0.0, math.nan)])
def test_a_sample_that_is_not_finite_is_noted_and_left_out(wrong):
    broken = series((1, 1.0, 0.0), (2, 1.0, 0.0), wrong)
    assert not broken.finite
    estimate = broken.estimate(3)
    assert all(map(math.isnan, estimate[:-1]))
    broken.add(Sample(4, 1.0, 0.0))
    assert broken.finite
    assert broken.estimate(4) == series((1, 1.0, 0.0), (2, 1.0, 0.0), (4, 1.0, 0.0)).estimate(4)


def test_before_the_second_sample_there_is_no_standard_error():
    assert math.isnan(series((1, 1.0, 0.0)).estimate(1).fresh_stderr)
    assert math.isnan(series().estimate(0).fresh)
