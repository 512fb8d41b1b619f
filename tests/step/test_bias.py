"""Whether the estimates of the mean and the variance are right on average, at every step."""

import math

import pytest
import torch

from popriskmin import PRM


def simulated(debias, steps, n, mean, deviation, drift=0.0, betas=(0.9, 0.999), rho=0.99, examples=None):
    """Yield `s^` and the signal before clipping, over n scalars with independent gradients, at each step.

    With `examples` each gradient is the mean over so many, and their variance is given.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = PRM([w], lr=0.0, debias=debias, betas=betas, rho=rho, variance="given" if examples else "streaming")
    for t in range(1, steps + 1):
        each = torch.randn(examples or 1, n, generator=generator, dtype=torch.float64)
        each = mean + drift * t + deviation * (examples or 1) ** 0.5 * each
        w.grad = each.mean(0)
        if examples:
            optimizer.set_variances({w: each.var(0) / examples})
        optimizer.step()
        state = optimizer.state[w]
        m_hat = state["exp_avg"] / (1 - betas[0] ** t)
        if t > 1 or examples:
            k = (1 - betas[0]) / (1 + betas[0]) * (1 + betas[0] ** t) / (1 - betas[0] ** t)
            s_hat = state["exp_avg_var"] / (1 - rho ** (t if examples else t - 1))
            yield t, s_hat, m_hat**2 - k * s_hat


def test_debias_is_unbiased_at_every_step():
    """The mean of s^ is the variance, and that of m^**2 - k s^ the squared mean, at every step from 2 to 200."""
    n, mean, deviation = 20_000, 0.3, 1.5
    worst = 0.0
    for _, s_hat, signal in simulated(True, 200, n, mean, deviation):
        for values, truth in ((s_hat, deviation**2), (signal, mean**2)):
            standard_error = values.std() / math.sqrt(n)
            worst = max(worst, float(abs(values.mean() - truth) / standard_error))
    # 398 strongly correlated comparisons: under the hypothesis the largest stays well below 5.
    assert worst < 5


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_given_variances_are_unbiased_from_the_first_step_on_and_know_no_drift(drift):
    n, mean, deviation = 10_000, 0.3, 1.5
    for t, s_hat, signal in simulated(True, 40, n, mean, deviation, drift, examples=4):
        assert abs(s_hat.mean() - deviation**2) < 5 * s_hat.std() / math.sqrt(n)
        if not drift:
            assert abs(signal.mean() - mean**2) < 5 * signal.std() / math.sqrt(n), t
    # The streaming estimate takes the drift for noise: the mean lags behind by ten steps' worth of it.
    *_, (_, streaming, _) = simulated(True, 200, n, mean, deviation, 0.5)
    assert streaming.mean() > 5 * deviation**2


def test_without_debias_the_first_steps_are_biased():
    """The test above can tell: the plain estimate holds the squared mean of the first gradient."""
    w = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = PRM([w], lr=0.0)
    w.grad = 3.0 + torch.randn_like(w)
    optimizer.step()
    s_hat = optimizer.state[w]["exp_avg_var"] / (1 - 0.99)
    assert s_hat.mean() > 5 * 1.0
