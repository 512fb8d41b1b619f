"""The masks and the boundary's coefficient as functions of numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.mask import (
    MASKS,
    Hyperparameters,
    _one_minus_power,
    boundary_coefficient,
    corrections,
    evaluate,
    evaluate_lists,
    floor,
    hard,
    largest,
    snr,
    soft,
    variance_of_mean,
)

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
    torch.testing.assert_close(signals[0], q, rtol=1e-5, atol=1e-30)


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
@pytest.mark.parametrize("mask", [snr, soft, hard])
def test_more_signal_opens_and_more_noise_shuts(mask, signal, noise, factor):
    signal, noise = torch.tensor([signal]), torch.tensor([noise])
    q = mask(signal, noise, 1.0, 1.0, EPS)
    # Where nearly all is signal or noise the mask rounds to its limit, from either side of it.
    rounding = 1 + 4 * torch.finfo(torch.float32).eps
    assert mask(signal * factor, noise, 1.0, 1.0, EPS) * rounding >= q
    assert mask(signal, noise * factor, 1.0, 1.0, EPS) <= q * rounding


@pytest.mark.parametrize("mask", [snr, soft])
def test_larger_softness_is_more_cautious(mask):
    signal, noise = torch.tensor([3.0]), torch.tensor([1.0])
    q = [mask(signal, noise, 1.0, softness, EPS).item() for softness in (0.3, 1.0, 3.0, 10.0)]
    assert q == sorted(q, reverse=True)
    assert len(set(q)) == 4


@pytest.mark.parametrize("name", MASKS)
def test_no_mask_divides_zero_by_zero(name):
    zero = torch.zeros(1)
    q = MASKS[name].of_tensor(zero, zero, 1.0, 1.0, floor(0.0, torch.float32))
    assert q.item() == (1 if name == "none" else 0)


@pytest.mark.parametrize("name", ["snr", "soft"])
def test_nan_passes_through(name):
    nan = torch.tensor([math.nan])
    assert MASKS[name].of_tensor(nan, torch.ones(1), 1.0, 1.0, EPS).isnan().all()
    assert MASKS[name].of_tensor(torch.ones(1), nan, 1.0, 1.0, EPS).isnan().all()


def hyperparameters(**options):
    return Hyperparameters.of_group(PRM([torch.nn.Parameter(torch.ones(1))], **options).param_groups[0])


@given(signal=normal, noise=normal, min_q=st.floats(0, 1, width=32))
@pytest.mark.parametrize("name", MASKS)
def test_min_q_is_a_floor_and_no_more(name, signal, noise, min_q):
    signals, noises = torch.tensor([signal, 1.0]), torch.tensor([noise, 0.5])
    bare, floored = hyperparameters(mask=name), hyperparameters(mask=name, min_q=min_q)
    c = corrections(5, bare)
    q, expected = evaluate(signals, noises, c, floored), evaluate(signals, noises, c, bare).clamp(min=min_q)
    assert torch.equal(q, expected)
    (listed,) = evaluate_lists([signals.clone()], [noises.clone()], floored)
    torch.testing.assert_close(listed, expected, rtol=1e-5, atol=1e-30)
    assert listed.min() >= min_q


@pytest.mark.parametrize("name", ["snr", "soft"])
def test_the_floor_lets_nan_pass(name):
    hyper = hyperparameters(mask=name, min_q=0.5)
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    assert evaluate(nan, one, corrections(2, hyper), hyper).isnan().all()
    assert evaluate_lists([nan.clone()], [one.clone()], hyper)[0].isnan().all()


@pytest.mark.parametrize("t", [1, torch.tensor([1.0])])
def test_the_floor_leaves_warmup_open(t):
    hyper = hyperparameters(min_q=0.5, warmup_steps=1)
    assert evaluate(torch.zeros(1), torch.ones(1), corrections(t, hyper), hyper) == 1
    assert evaluate(torch.zeros(1), torch.ones(1), corrections(t + 1, hyper), hyper) == 0.5


@pytest.mark.parametrize("debias", [False, True])
def test_a_given_variance_is_an_estimate_from_the_first_step_on(debias):
    for t in (1, 7):
        given = corrections(t, hyperparameters(debias=debias, variance="given"))
        assert given.open is False
        assert given.blend == pytest.approx(0.01)
        assert given.bias_var == pytest.approx(1 - 0.99**t)
        assert given.k == (variance_of_mean(0.9, t) if debias else 0)
    assert corrections(1, hyperparameters(debias=True)).open is True


def test_boundary_coefficient():
    assert boundary_coefficient("batch", 10, 5) == 1
    assert boundary_coefficient("empirical", 32, 1032) == 0.032
    with pytest.raises(ValueError, match=r"batch, empirical, got 'fresh'"):
        boundary_coefficient("fresh", None, None)
    with pytest.raises(ValueError, match="needs batch_size and n_dataset, got batch_size=4 and n_dataset=None"):
        boundary_coefficient("empirical", 4, None)
    with pytest.raises(ValueError, match="n_dataset=4 and batch_size=4"):
        boundary_coefficient("empirical", 4, 4)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_variance_of_mean_against_the_weights(beta1):
    """k(t) is the sum of the squared weights that m^ gives to the t gradients."""
    for t in (1, 2, 3, 10, 100):
        weights = (1 - beta1) * beta1 ** np.arange(t)[::-1] / (1 - beta1**t)
        assert variance_of_mean(beta1, t) == pytest.approx((weights**2).sum())
    steps = torch.arange(1.0, 50.0)
    expected = [variance_of_mean(beta1, t) for t in range(1, 50)]
    np.testing.assert_allclose(variance_of_mean(beta1, steps).numpy(), expected, rtol=1e-5)


def test_bias_corrections_keep_their_digits_in_float32():
    """1 - 0.999**t as plain float32 powers is off by 5e-5 at the first step."""
    for beta in (0.0, 0.9, 0.999):
        exact = [1 - beta**t for t in range(1, 1000)]
        computed = _one_minus_power(beta, torch.arange(1.0, 1000.0)).numpy()
        np.testing.assert_allclose(computed, exact, rtol=3e-7)
