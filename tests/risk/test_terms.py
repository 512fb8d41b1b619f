"""The terms of the risk estimate: against the definition in float64, and against the truth on simulated gradients."""

import itertools
import math

import pytest
import torch
from conftest import TORCH
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.mask import corrections, variance_of_mean
from popriskmin.risk import terms
from popriskmin.risk.adam_variance import Variances
from popriskmin.risk.terms import (
    fall_and_influence,
    hyperparameters,
    mask_and_derivative,
    moments,
    read,
    same_pass,
)

ADAMS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
    (torch.optim.AdamW, {"amsgrad": True, "eps": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.3}),
    (torch.optim.Adam, {"weight_decay": 0.3, "maximize": True}),
]


def sums_of(optimizer):
    """Return fall and influence of the last step, over all groups; Adam's variance is that of the last gradient."""
    total = torch.zeros(2, dtype=torch.float64)
    for group in optimizer.param_groups:
        hyper = hyperparameters(optimizer, group)
        kept = Variances()
        if not isinstance(optimizer, PRM):
            kept.update(group["params"], optimizer, hyper, step=1)
        for entry in moments(group["params"], optimizer, hyper, kept.tensors):
            total += fall_and_influence(entry, hyper)
    return total


def train(optimizer, params, gradients):
    for gradient in gradients:
        for param, g in zip(params, gradient):
            param.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize(("kind", "options"), ADAMS)
def test_adam_against_the_definition(kind, options):
    torch.manual_seed(0)
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)
    optimizer = kind([w], lr=0.01, **options)
    m = v = highest = torch.zeros(40, dtype=torch.float64)
    decay, coupled = options.get("weight_decay", 0.01 if kind is torch.optim.AdamW else 0.0), kind is torch.optim.Adam
    for t in range(1, 8):
        before = w.detach().clone()
        g = torch.randn(40, dtype=torch.float64) + 0.3
        w.grad = g.clone()
        optimizer.step()
        # The penalty is read at the weights after the step; the difference is of second order in lr.
        signed = (-g if options.get("maximize") else g) + (decay * before if coupled else 0)
        m_before = m / (1 - 0.9 ** (t - 1)) if t > 1 else m
        m, v = 0.9 * m + 0.1 * signed, 0.999 * v + 0.001 * signed**2
        highest = torch.maximum(highest, v)
    mean = m / (1 - 0.9**7)
    rate = 0.01 / (((highest if options.get("amsgrad") else v) / (1 - 0.999**7)).sqrt() + options.get("eps", 1e-8))
    z = (signed - m_before) ** 2 / (1 + variance_of_mean(0.9, 6))
    of_loss = mean - decay * w.detach() if coupled else mean
    fall = (rate * (mean * of_loss - variance_of_mean(0.9, 7) * z)).sum()
    if not coupled:
        fall += (0.01 * decay * w.detach() * mean).sum()
    expected = torch.stack([fall, (rate * z).sum()])
    torch.testing.assert_close(sums_of(optimizer), expected, rtol=2e-2 if coupled else 1e-9, atol=1e-9)


@given(
    mask=st.sampled_from(["snr", "soft", "threshold", "none"]),
    reduction=st.sampled_from(["per_param", "per_tensor"]),
    debias=st.booleans(),
    min_q=st.sampled_from([0.0, 0.2]),
    softness=st.sampled_from([0.3, 2.0]),
    seed=st.integers(0, 100),
)
def test_the_slope_is_the_derivative_of_what_moves(mask, reduction, debias, min_q, softness, seed):
    torch.manual_seed(seed)
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = PRM([w], mask=mask, reduction=reduction, debias=debias, min_q=min_q, softness=softness)
    train(optimizer, [w], [[torch.randn(6, dtype=torch.float64) + 1] for _ in range(5)])
    hyper = hyperparameters(optimizer, optimizer.param_groups[0])
    entry = read(w, optimizer, hyper)
    q, dq = mask_and_derivative(entry, hyper)
    slope = q + entry.exp_avg / corrections(5, hyper).bias1 * dq
    step = 1e-6 * entry.exp_avg.abs().max()
    for i in range(6):
        moved = []
        for sign in (1, 0, -1):
            m = entry.exp_avg.clone()
            m[i] += sign * step
            q, _ = mask_and_derivative(entry._replace(exp_avg=m), hyper)
            moved.append((q * m)[i])
        ahead, behind = ((a - b).item() / step for a, b in itertools.pairwise(moved))
        if abs(ahead - behind) > 1e-3 * (1 + abs(ahead)):
            continue  # a mask that just opens has a kink there, and no derivative
        expected = (ahead + behind) / 2
        assert expected == pytest.approx(torch.as_tensor(slope).expand(6)[i].item(), rel=1e-4, abs=1e-4)


def test_a_hard_mask_counts_as_its_value():
    w = torch.zeros(4, requires_grad=True)
    optimizer = PRM([w], mask="hard")
    train(optimizer, [w], [[torch.tensor([1.0, 0.9, -1.0, 0.1]) + 0.1 * k] for k in range(4)])
    hyper = hyperparameters(optimizer, optimizer.param_groups[0])
    q, dq = mask_and_derivative(read(w, optimizer, hyper), hyper)
    assert dq == 0
    assert set(q.tolist()) <= {0.0, 1.0}


SCALARS = 40_000
SIMULATED = {
    "AdamW": lambda w: torch.optim.AdamW([w], lr=0.01, weight_decay=0.0),
    "snr": lambda w: PRM([w], lr=0.01, weight_decay=0.0),
    "snr, debias": lambda w: PRM([w], lr=0.01, weight_decay=0.0, debias=True),
    "soft": lambda w: PRM([w], lr=0.01, weight_decay=0.0, mask="soft", softness=0.3, boundary="empirical",
                          batch_size=1, n_dataset=20),
    "per_tensor": lambda w: PRM([w], lr=0.01, weight_decay=0.0, reduction="per_tensor"),
    "decay": lambda w: PRM([w], lr=0.001, weight_decay=1.0),
    "mask_decay": lambda w: PRM([w], lr=0.001, weight_decay=1.0, mask_decay=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
def test_the_fall_is_what_the_step_gains_along_the_true_gradient(name, signal):
    """Independent gradients of mean `signal` and variance 1: the risk falls by `signal` times the way back."""
    torch.manual_seed(0)
    w = torch.ones(SCALARS, requires_grad=True)
    optimizer = SIMULATED[name](w)
    expected = measured = unmasked = 0.0
    for t in range(300):
        before = w.detach().clone()
        w.grad = torch.randn(SCALARS) + signal
        optimizer.step()
        if t >= 250:
            expected += signal * (before - w.detach()).sum().item()
            fall, influence = sums_of(optimizer).tolist()
            measured += fall
            unmasked += influence
    # In units of what one step would gain without any noise to take out.
    scale = unmasked * variance_of_mean(0.9, 300)
    # The decay's part is the sum of the means themselves, whose own noise these 50 steps share.
    noise = 3 * 0.001 * 50 * (SCALARS * variance_of_mean(0.9, 300) / 3) ** 0.5 if "decay" in name else 0.0
    assert abs(measured - expected) < 0.1 * scale + 0.05 * abs(expected) + noise


def test_without_the_slope_the_mask_would_flatter_itself():
    """The mask opens where noise is large by chance; only its derivative takes that out."""
    torch.manual_seed(0)
    w = torch.zeros(SCALARS, requires_grad=True)
    optimizer = SIMULATED["snr"](w)
    train(optimizer, [w], [[torch.randn(SCALARS)] for _ in range(300)])
    hyper = hyperparameters(optimizer, optimizer.param_groups[0])
    entry = read(w, optimizer, hyper)
    q, dq = mask_and_derivative(entry, hyper)
    slope = q + entry.exp_avg / corrections(300, hyper).bias1 * dq
    assert (slope.sum() / q.sum()).item() > 2
    fall, influence = sums_of(optimizer).tolist()
    naive = fall + influence * variance_of_mean(0.9, 300) * (1 - (q.sum() / slope.sum()).item())
    assert abs(fall) < 0.2 * naive


@pytest.mark.parametrize("replacement", [False, True])
def test_reused_data_leaves_between_the_training_set_and_the_population(replacement):
    """Gradients that do not depend on the weights: the two corrections are exact."""
    generator = torch.Generator().manual_seed(0)
    n, b, scalars = 60, 6, 3000
    u = 0.1
    examples = u + torch.randn(n, scalars, generator=generator)
    a, z = b / (n - b), 1 / b
    w = torch.zeros(scalars, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.0, eps=1e3)  # so that the rate is the same for all
    got = []
    for step in range(3000):
        if step % (n // b) == 0:
            order = torch.randperm(n, generator=generator)
        rows = torch.randint(n, (b,), generator=generator) if replacement else order[step % (n // b) * b :][:b]
        w.grad = examples[rows].mean(0)
        optimizer.step()
        if step >= 50:
            got.append(sums_of(optimizer))
    fall, influence = torch.stack(got).mean(0).tolist()
    rate = 0.01 / 1e3
    assert influence == pytest.approx(rate * scalars * z, rel=0.15)
    fresh = fall + (0.0 if replacement else a * same_pass(0.9, n / b)) * influence
    on_training_set = rate * examples.mean(0).square().sum().item()
    # In units of what the training set's noise adds to the gradient, the quantity in question.
    unit = rate * scalars * z * a
    assert fresh == pytest.approx(on_training_set, abs=0.15 * unit)
    assert fresh - a * influence == pytest.approx(rate * scalars * u**2, abs=0.25 * unit)


@pytest.mark.parametrize("pass_steps", [1.0, 3.7, 15.6, 200.0])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_same_pass_against_a_count(beta1, pass_steps):
    weights = [(1 - beta1) * beta1**i for i in range(400)]
    expected = math.fsum(
        weights[i] * weights[j] * max(0.0, 1 - abs(i - j) / pass_steps)
        for i, j in itertools.product(range(400), repeat=2)
        if i != j
    )
    assert same_pass(beta1, pass_steps) == pytest.approx(expected, abs=1e-9)


def test_joined_and_single_tensors_give_the_same():
    torch.manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 2, 2), (0,)]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    for build in (PRM, torch.optim.AdamW, lambda params: PRM(params, reduction="per_tensor", weight_decay=0.1)):
        together = [torch.ones(shape, requires_grad=True) for shape in shapes]
        optimizer = build(together)
        train(optimizer, together, gradients)
        alone = torch.zeros(2, dtype=torch.float64)
        for i in range(len(shapes)):
            param = torch.ones(shapes[i], requires_grad=True)
            single = build([param])
            train(single, [param], [[gradient[i]] for gradient in gradients])
            alone += sums_of(single)
        torch.testing.assert_close(sums_of(optimizer), alone, rtol=1e-5, atol=1e-9)


def test_the_first_step_is_left_out():
    w = torch.ones(3, requires_grad=True)
    for optimizer in (PRM([w]), torch.optim.AdamW([w])):
        train(optimizer, [w], [[torch.ones(3)]])
        assert list(moments([w], optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), {})) == []


def test_large_tensors_are_read_in_blocks(monkeypatch):
    torch.manual_seed(0)
    gradients = [[torch.randn(50, 7)] for _ in range(4)]
    for build in (PRM, torch.optim.AdamW):
        w = torch.ones(50, 7, requires_grad=True)
        optimizer = build([w])
        train(optimizer, [w], gradients)
        whole = sums_of(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(terms, "JOINED", 10)
            patch.setattr(terms, "BLOCK", 40)
            hyper = hyperparameters(optimizer, optimizer.param_groups[0])
            sizes = [e.param.numel() for e in moments([w], optimizer, hyper, {w: torch.ones_like(w)})]
            assert sizes == [40] * 8 + [30]
            torch.testing.assert_close(sums_of(optimizer), whole)


def test_what_did_not_move_does_not_count():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    for build in (PRM, torch.optim.AdamW):
        optimizer = build([a, b])
        train(optimizer, [a, b], [[torch.ones(3), torch.ones(3)]] * 4)
        both = sums_of(optimizer)
        b.grad = None
        torch.testing.assert_close(2 * sums_of(optimizer), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    w = torch.ones(50, dtype=dtype, requires_grad=True)
    for optimizer in (PRM([w]), torch.optim.AdamW([w])):
        if isinstance(optimizer, torch.optim.AdamW) and dtype == torch.float16 and TORCH < (2, 1):
            continue  # torch's own step does not take it on the CPU
        train(optimizer, [w], [[torch.randn(50).to(dtype) + 1] for _ in range(4)])
        fall, influence = sums_of(optimizer).tolist()
        assert math.isfinite(fall)
        assert influence > 0


def test_capturable_counts_on_the_device_are_read_there():
    w = torch.ones(5, requires_grad=True)
    optimizer = PRM([w], capturable=True)
    train(optimizer, [w], [[torch.randn(5)] for _ in range(4)])
    assert torch.isfinite(sums_of(optimizer)).all()


def test_nan_in_the_gradient_is_nan_in_the_estimate():
    w = torch.ones(5, requires_grad=True)
    optimizer = torch.optim.AdamW([w])
    train(optimizer, [w], [[torch.ones(5)], [torch.full((5,), math.nan)]])
    assert all(map(math.isnan, sums_of(optimizer).tolist()))
