"""The masks as functions of numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.mask import MASKS, floor, hard, largest, snr, soft, threshold

EPS = floor(1e-16, torch.float32)
positive = st.floats(1e-6, 1e6)
numbers = st.floats(0, largest(torch.float32), width=32)
# Products of the smallest numbers are denormal and have few digits to agree in.
normal = st.just(0.0) | st.floats(2.0**-90, largest(torch.float32), width=32)


@given(signal=numbers, noise=numbers, a=st.floats(1e-4, 1e3), softness=st.floats(0, 1e6), eps=st.floats(0, 1.0))
@pytest.mark.parametrize("name", MASKS)
def test_q_lies_between_0_and_1(name, signal, noise, a, softness, eps):
    values = (torch.tensor([signal]), torch.tensor([noise]))
    q = MASKS[name].of_tensor(*values, a, softness, floor(eps, torch.float32))
    assert 0 <= q.item() <= 1


@given(signal=normal, noise=normal, a=st.floats(1e-4, 1e3), softness=st.floats(0, 1e6), eps=st.floats(0, 1.0))
@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask.of_lists is not None])
def test_both_forms_of_a_mask_agree(name, signal, noise, a, softness, eps):
    s, n = torch.tensor([signal, 1.0]), torch.tensor([noise, 0.5])
    q = MASKS[name].of_tensor(s, n, a, softness, floor(eps, torch.float32))
    signals = [s.clone()]
    MASKS[name].of_lists(signals, [n.clone()], a, softness, floor(eps, torch.float32))
    torch.testing.assert_close(signals[0], q, rtol=1e-5, atol=1e-6 if name == "threshold" else 1e-30)


@given(noise=positive, a=st.floats(1e-3, 1e3), softness=st.floats(1e-3, 1e3))
def test_on_the_boundary(noise, a, softness):
    noise = torch.tensor([noise])
    signal = noise * a
    assert soft(signal, noise, a, softness, EPS).item() == 0
    assert hard(signal, noise, a, softness, EPS).item() == 0
    assert snr(signal, noise, a, 1.0, EPS).item() == pytest.approx(0.5, rel=1e-5)
    signals = [signal.clone()]
    MASKS["soft"].of_lists(signals, [noise.clone()], a, softness, EPS)
    assert signals[0].item() == 0


@given(signal=positive, noise=positive, factor=st.floats(1.01, 100))
@pytest.mark.parametrize("mask", [snr, soft, hard, threshold])
def test_more_signal_opens_and_more_noise_shuts(mask, signal, noise, factor):
    signal, noise = torch.tensor([signal]), torch.tensor([noise])
    q = mask(signal, noise, 1.0, 1.0, EPS)
    # Where nearly all is signal or noise the mask rounds to its limit, from either side of it.
    rounding = 1 + 4 * torch.finfo(torch.float32).eps
    assert mask(signal * factor, noise, 1.0, 1.0, EPS) * rounding >= q
    assert mask(signal, noise * factor, 1.0, 1.0, EPS) <= q * rounding


@pytest.mark.parametrize("mask", [snr, soft, threshold])
def test_larger_softness_is_more_cautious(mask):
    signal, noise = torch.tensor([30.0]), torch.tensor([1.0])
    q = [mask(signal, noise, 1.0, softness, EPS).item() for softness in (0.3, 1.0, 3.0, 10.0)]
    assert q == sorted(q, reverse=True)
    assert len(set(q)) == 4


@pytest.mark.parametrize("name", MASKS)
def test_no_mask_divides_zero_by_zero(name):
    zero = torch.zeros(1)
    q = MASKS[name].of_tensor(zero, zero, 1.0, 1.0, floor(0.0, torch.float32))
    assert q.item() == (1 if name == "none" else 0)


@pytest.mark.parametrize("name", ["snr", "soft", "threshold"])
def test_nan_passes_through(name):
    nan = torch.tensor([math.nan])
    assert MASKS[name].of_tensor(nan, torch.ones(1), 1.0, 1.0, EPS).isnan().all()
    assert MASKS[name].of_tensor(torch.ones(1), nan, 1.0, 1.0, EPS).isnan().all()


@given(mean=st.floats(-100, 100), z=st.floats(0, 5), noise=st.floats(1e-3, 1e3))
def test_the_threshold_takes_standard_errors_from_the_mean(mean, z, noise):
    """`q * m` is the soft threshold of `m` at `z` of its standard errors."""
    m = torch.tensor(mean, dtype=torch.float64)
    q = threshold(m.square(), torch.tensor(noise, dtype=torch.float64), 1.0, z * z, 1e-30)
    expected = math.copysign(max(abs(mean) - z * noise**0.5, 0), mean)
    assert (q * m).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("softness", "share"), [(1.0, 0.317), (4.0, 0.0455), (9.0, 0.0027)])
def test_the_threshold_lets_its_share_of_noise_through(softness, share):
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    passed = (threshold(noise.square(), torch.ones(()), 1.0, softness, EPS) > 0).float().mean().item()
    assert passed == pytest.approx(share, rel=0.1)
