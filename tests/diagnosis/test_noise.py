"""Telling a gradient's mean from its variance: against exact expectations, and against simulated gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.diagnosis.noise import mean_and_variance, needed_ratio, weights
from popriskmin.mask import Hyperparameters, corrections

BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99])


def hyperparameters(**options):
    return Hyperparameters.of_group(PRM([torch.zeros(1, requires_grad=True)], **options).param_groups[0])


def expectations(t, mean, variance, beta1, rho):
    """E[m^**2] and E[s^] after t steps, from the weights of every gradient in every deviation."""
    m = torch.zeros(t, dtype=torch.float64)  # the weight of each gradient in m
    s = 0.0
    for step in range(t):
        d = -m
        d[step] += 1
        s = rho * s + (1 - rho) * ((mean * d.sum()) ** 2 + variance * d.square().sum()).item()
        m = beta1 * m
        m[step] += 1 - beta1
    m = m / (1 - beta1**t)
    return ((mean * m.sum()) ** 2 + variance * m.square().sum()).item(), s / (1 - rho**t)


@given(st.integers(2, 60), st.floats(0, 5), st.floats(0.01, 5), BETAS, st.sampled_from([0.0, 0.81, 0.9, 0.99]))
def test_exact_for_independent_gradients(t, mean, variance, beta1, rho):
    signal, noise = expectations(t, mean, variance, beta1, rho)
    w = weights(t, hyperparameters(betas=(beta1, 0.999), rho=rho))
    assert signal == pytest.approx(mean**2 + w.k * variance)
    assert noise == pytest.approx(w.leak * mean**2 + w.own * variance)
    found = mean_and_variance(signal, noise, w)
    assert found == pytest.approx((mean**2, variance), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"debias": True}, {"variance": "given"}, {"bias_correction": False}])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_unbiased_on_the_state_of_prm(options, steps):
    """Gradients of mean 0.3 and variance 4, in 200,000 scalars."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = PRM([p], **options)
    for _ in range(steps):
        p.grad = 0.3 + 2 * torch.randn(200_000, generator=generator)
        if options.get("variance") == "given":
            optimizer.set_variances({p: torch.full_like(p, 4.0)})
        optimizer.step()
    state, hyper = optimizer.state[p], Hyperparameters.of_group(optimizer.param_groups[0])
    c = corrections(steps, hyper._replace(bias_correction=True))
    signal = (state["exp_avg"] / c.bias1).square().mean().item()
    noise = (state["exp_avg_var"] / c.bias_var).mean().item()
    mean_sq, variance = mean_and_variance(signal, noise, weights(steps, hyper))
    assert variance == pytest.approx(4, rel=0.02)
    assert mean_sq == pytest.approx(0.09, abs=0.03)


def test_too_early_is_an_error():
    with pytest.raises(ValueError, match="from step 2 on, got t=1"):
        weights(1, hyperparameters())
    assert weights(1, hyperparameters(variance="given")) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99])
def test_the_state_cannot_tell_drift_from_noise(correlation):
    """Where nothing changes on the whole, `s^ = (v^ - m^**2) / beta1`, however one gradient follows from the last.

    So the three averages are two numbers, from which no third, the drift, can be had.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = PRM([p], betas=(0.9, 0.99), rho=0.99)
    g = torch.randn(2000, generator=generator)
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(1500):
        p.grad = g
        optimizer.step()
        g = correlation * g + (1 - correlation**2) ** 0.5 * torch.randn(2000, generator=generator)
        if step >= 1000:
            state = optimizer.state[p]
            sums += torch.stack(
                [state["exp_avg"].square().mean(), state["exp_avg_sq"].mean(), state["exp_avg_var"].mean()]
            ).double()
    m2, v, s = (sums / 500).tolist()
    assert s == pytest.approx((v - m2) / 0.9, rel=0.04)


def test_the_needed_ratio_is_the_quantile_of_chi_squared():
    stats = pytest.importorskip("scipy.stats")
    for shape, independent in (((50,), 1), ((4, 4), 4), ((16, 16), 16), ((1000, 1000), 32)):
        exact = stats.chi2.isf(1e-4, independent) / independent
        assert needed_ratio(shape) == pytest.approx(max(2, exact), rel=0.08)
    assert needed_ratio(()) == needed_ratio((1,))
