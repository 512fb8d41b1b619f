"""What is read off the state, against a direct calculation in double precision."""

import math

import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.diagnosis.evidence import read
from popriskmin.mask import variance_of_mean


def trained(steps=40, **options):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(30, 20))
    optimizer = PRM([("w", p)], lr=1e-3, weight_decay=0.1, **options)
    for _ in range(steps):
        p.grad = 0.3 + torch.randn(30, 20)
        p.grad[:5] = 0
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_sums_are_those_of_the_scalars(reduction, amsgrad):
    t, a = 40, 10 / 30
    boundary = {"boundary": "empirical", "batch_size": 10, "n_dataset": 40}
    optimizer, p = trained(t, reduction=reduction, amsgrad=amsgrad, softness=2.0, mask_eps=0.1, **boundary)
    state = {name: value.double() for name, value in optimizer.state[p].items()}
    mean = state["exp_avg"] / (1 - 0.9**t)
    s = state["exp_avg_var"] / (1 - 0.99**t)
    root = (state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"] / (1 - 0.999**t)).sqrt()
    signal, noise = mean.square(), s
    if reduction == "per_tensor":
        signal, noise = torch.full_like(mean, signal.mean()), torch.full_like(s, s.mean())
    q = signal / (signal + 2 * a * noise + 0.1)
    live = torch.ones(30, 20, dtype=torch.bool)
    live[:5] = False
    step = mean / (root + 1e-8)
    (found,) = read([optimizer])
    assert (found.name, found.group, found.shape, found.scalars, found.step) == ("w", 0, (30, 20), 600, t)
    expected = {
        "q": q.sum(), "active": (signal > a * noise).sum(), "signal": signal.sum(), "noise": a * noise.sum(),
        "v": state["exp_avg_sq"].sum() / (1 - 0.999**t), "weight_sq": p.double().square().sum(),
        "nonzero": (p != 0).sum(), "live_nonzero": (p[live] != 0).sum(),
        "step_sq": step.square().sum(), "masked_step_sq": (q * step).square().sum(),
        "live": live.sum(), "live_q": q[live].sum(),
        "live_q_without_eps": (signal / (signal + 2 * a * noise))[live].sum(),
        "live_q_plain": (signal / (signal + noise))[live].sum(),
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(found.sums, name) == pytest.approx(value.item(), rel=1e-4), name
    assert found.zero_fraction == pytest.approx(1 / 6)
    assert found.decay_ratio() == pytest.approx((0.1 * p.norm() / (q * step).norm()).item(), rel=1e-4)
    assert found.decay_ratio(masked=False) == pytest.approx((0.1 * p.norm() / step.norm()).item(), rel=1e-4)


def test_over_noise_is_in_units_of_what_noise_gives():
    """With a mean of 0.3 and a variance of 1: `(0.09 + k) / k`, less what the cut at 1 takes off."""
    optimizer, _ = trained(200)
    k = variance_of_mean(0.9, 200)
    assert read([optimizer])[0].over_noise == pytest.approx((0.09 + k) / k, rel=0.1)


def test_what_has_not_stepped():
    p, frozen, empty = (nn.Parameter(torch.zeros(n)) for n in (3, 3, 0))
    frozen.requires_grad_(False)
    optimizer = PRM([("p", p), ("frozen", frozen), ("empty", empty)])
    (found,) = read([optimizer])
    assert (found.name, found.sums, found.zero_fraction) == ("p", None, 1.0)
    assert math.isnan(found.over_noise)
    assert math.isnan(found.decay_ratio())
