"""The 8-bit code of the state: what it keeps, how it rounds, and what it does with what is no number."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from popriskmin.step.codes import BLOCK, BYTES, Moments, blocks_of, decode, encode


def blocks(mean, square, variance, stochastic=True, codes=None):
    """Encode rows of 128 scalars and return the blocks."""
    codes = torch.zeros(mean.shape[0], BYTES, dtype=torch.uint8) if codes is None else codes
    encode(Moments(mean, square, variance), codes, 0, stochastic)
    return codes


def spread(octaves, rows=64, seed=0):
    """Return squared gradients that span so many octaves in each block, and means beside them."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.exp2(octaves * (torch.rand(rows, BLOCK, generator=generator) - 0.5))
    return 0.3 * torch.randn(rows, BLOCK, generator=generator) * square.sqrt(), square


@settings(max_examples=20)
@given(st.sampled_from([0.0, 3.0, 7.0, 15.0, 30.0]), st.integers(-50, 50), st.integers(0, 9))
def test_errors_stay_within_a_step_that_follows_the_range(octaves, scale, seed):
    """A step of v and s is 1/32 of the number at most over 7 octaves and 1/8 over 30; m's is one of its own sqrt(v)."""
    mean, square = spread(octaves, 4, seed)
    mean, square = mean * 2.0**scale, square * 4.0**scale
    for stochastic in (True, False):
        m, v, s = decode(blocks(mean, square, 2 * square, stochastic))
        step = 1 / 32 if octaves <= 6 else 1 / 16 if octaves <= 14 else 1 / 8
        assert ((v / square - 1).abs() < step * 1.001).all()
        assert ((s / (2 * square) - 1).abs() < step * 1.001).all()
        assert ((m - mean).abs() <= square.sqrt() / 32 + mean.abs() / 16).all()


def test_rounding_is_right_in_the_mean():
    """Over many draws the mean of what is stored is what was to be stored; to nearest it would stand a step away."""
    mean, square = spread(4.0, 1)
    codes, total = torch.zeros(1, BYTES, dtype=torch.uint8), torch.zeros(3, 1, BLOCK)
    draws = 400
    for _ in range(draws):
        total += torch.stack(decode(blocks(mean, square, square, codes=codes)))
    m, v, s = total / draws
    for found, wanted, step in ((v, square, square / 32), (s, square, square / 32), (m, mean, square.sqrt() / 16)):
        assert ((found - wanted).abs() < 5 * step / draws**0.5).all()
    assert codes.view(torch.int32)[0, -1] == draws


def test_at_the_first_step_no_mask_opens_by_rounding():
    """There `m**2` is `s`: stored, it is hardly ever above."""
    gradient = torch.randn(64, BLOCK, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(64, BYTES, dtype=torch.uint8)
    square = gradient.square()
    for number in range(2):
        m, _, s = decode(blocks(gradient, square, square, codes=codes))
        above = (m.square() > s * 1.001).double().mean()
        assert above == 0 if number == 0 else above > 0.3


def test_a_slow_average_moves_where_each_change_is_less_than_a_step():
    """With decay 0.999 an average follows its target, which nearest rounding would hold back for ever."""
    codes = torch.zeros(1, BYTES, dtype=torch.uint8)
    spread_out = torch.linspace(1, 8, BLOCK).view(1, BLOCK)  # so that a step is wide
    value = spread_out.clone()
    for _ in range(300):
        value = decode(blocks(torch.zeros(1, BLOCK), value.lerp(4 * spread_out, 0.001), spread_out, codes=codes)).square
    # By as much as the exact average; nearest rounding would hold it where it was.
    assert (value / spread_out).mean() - 1 == pytest.approx(3 * (1 - 0.999**300), rel=0.15)


def test_a_small_mean_beside_a_large_one_keeps_its_digits():
    """Each m is coded beside its own sqrt(v): one of a millionth of the others is neither lost nor noise."""
    mean, square = torch.full((1, BLOCK), 0.2), torch.ones(1, BLOCK)
    mean[0, 7], square[0, 7] = 2e-5, 1e-8
    m, v, _ = decode(blocks(mean, square, square))
    assert abs(m[0, 7] - 2e-5) < 1e-5 / 16
    assert abs(v[0, 7] - 1e-8) < 1e-8 / 8


def test_zeros_stay_zeros_and_what_is_no_number_stays_none():
    """Beside it the others keep theirs; a negative variance, which is none, becomes zero."""
    mean, square = spread(3.0, 1)
    mean[0, :4] = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf])
    square[0, :4] = torch.tensor([0.0, torch.nan, torch.inf, -1.0])
    m, v, s = decode(blocks(mean, square, square))
    assert m[0, 0] == 0
    assert m[0, 1].isnan()
    assert m[0, 2] == torch.inf
    assert m[0, 3] == -torch.inf
    for x in (v, s):
        assert x[0, 0] == 0
        assert x[0, 1].isnan()
        assert x[0, 2] == torch.inf
        assert x[0, 3] == 0
        assert ((x[0, 4:] / square[0, 4:] - 1).abs() < 1 / 16).all()
    assert ((m[0, 4:] - mean[0, 4:]).abs() < square[0, 4:].sqrt() / 8).all()


def test_what_is_too_small_for_a_block_is_raised():
    """A v far below the others makes a shorter step, never a longer one; s tightens the mask."""
    square = torch.ones(1, BLOCK)
    square[0, 3] = 1e-30
    _, v, s = decode(blocks(torch.zeros(1, BLOCK), square, square))
    assert 1e-30 < v[0, 3] < 1e-8
    assert v[0, 3] == s[0, 3]


def test_rounded_to_nearest_what_was_decoded_is_encoded_as_it_was():
    """But for blocks whose largest number was rounded up out of its range."""
    mean, square = spread(5.0)
    first = decode(blocks(mean, square, 3 * square, stochastic=False))
    again = decode(blocks(*first, stochastic=False))
    assert sum(torch.equal(x, y) for x, y in zip(first.square, again.square)) >= 60
    assert (again.square / first.square - 1).abs().max() < 1 / 32


def test_blocks():
    """The last block may be less than full."""
    assert [blocks_of(n) for n in (0, 1, 128, 129)] == [0, 1, 1, 2]
