"""From signal and noise to `q`: the floor, the warmup, and both forms alike."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.mask import MASKS, Hyperparameters, corrections, evaluate, evaluate_lists, largest, signal_and_noise

# Products of the smallest numbers are denormal and have few digits to agree in.
normal = st.just(0.0) | st.floats(2.0**-90, largest(torch.float32), width=32)


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
    given = noises * c.k if MASKS[name].of_mean else noises.clone()
    (listed,) = evaluate_lists([signals.clone()], [given], floored)
    torch.testing.assert_close(listed, expected, rtol=1e-5, atol=1e-6 if name == "threshold" else 1e-30)
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


def test_the_threshold_judges_the_mean_by_its_own_variance_with_debias_or_without():
    """After many steps of independent gradients: `z` standard errors of the mean, whose variance is `k` times one's."""
    n = 20_000
    p = torch.nn.Parameter(torch.zeros(n))
    generator = torch.Generator().manual_seed(0)
    for debias in (False, True):
        optimizer = PRM([p], lr=0.0, mask="threshold", softness=4.0, debias=debias, rho=0.999)
        for _ in range(300):
            p.grad = torch.randn(n, generator=generator)
            optimizer.step()
        state, hyper = optimizer.state[p], optimizer._applied[0]
        c = corrections(300, hyper)
        q = evaluate(*signal_and_noise(state["exp_avg"], state["exp_avg_var"], c, hyper), c, hyper)
        assert (q > 0).float().mean().item() == pytest.approx(0.0455, rel=0.15)
