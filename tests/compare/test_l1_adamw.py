"""AdamW with an L1 penalty, as an arm of a comparison."""

import copy

import pytest
import torch
from tiny import Tiny
from torch import nn

from popriskmin.compare import compare
from popriskmin.compare.l1_adamw import L1AdamW

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")


@pytest.mark.parametrize("l1", [0.0, 0.1])
def test_it_is_adamw_on_the_penalized_loss(l1):
    torch.manual_seed(0)
    x, y = torch.randn(32, 5), torch.randn(32, 1)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    theirs = copy.deepcopy(ours)
    optimizer = L1AdamW(ours.parameters(), lr=0.01, l1=l1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (ours(x) - y).square().mean().backward()
        optimizer.step()
        reference.zero_grad()
        penalty = l1 * (theirs[0].weight.abs().sum() + theirs[1].weight.abs().sum())
        ((theirs(x) - y).square().mean() + penalty).backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_decoupled_it_is_drawn_off_after_the_step_and_stops_at_zero():
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(50, 4) / 10), nn.Parameter(torch.ones(4))
    start = [w.detach().clone(), b.detach().clone()]
    optimizer = L1AdamW([w, b], lr=0.1, l1=0.5, decoupled=True)
    reference = [nn.Parameter(p.clone()) for p in start]
    plain = torch.optim.AdamW(reference, lr=0.1)
    for p, other in zip((w, b), reference):
        p.grad = torch.randn_like(p)
        other.grad = p.grad.clone()
    optimizer.step()
    plain.step()
    moved = reference[0].detach()
    torch.testing.assert_close(w.detach(), moved.sign() * (moved.abs() - 0.05).clamp(min=0))
    assert ((w == 0) == (moved.abs() <= 0.05)).all()
    assert 0 < int((w == 0).sum()) < w.numel()
    assert torch.equal(b, reference[1])


def test_a_closure_is_called_once_with_gradients():
    w = nn.Parameter(torch.ones(2, 2))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        w.grad = torch.ones_like(w)
        return 3.0

    assert L1AdamW([w]).step(closure) == 3.0
    assert calls == [True]


def test_hooks_run_once_and_gradients_stay():
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.zeros_like(w)
    torch.optim.AdamW([w])  # torch then wraps the step of this class too
    optimizer = L1AdamW([w], l1=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    optimizer.step()
    assert steps == [1]
    assert (w < 1).all()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("l1", [-1e-3, float("nan"), float("inf")])
def test_a_bad_strength_is_named(l1):
    with pytest.raises(ValueError, match=f"l1 must be a finite number of at least 0, got {l1!r}"):
        L1AdamW([nn.Parameter(torch.ones(1))], l1=l1)


def test_it_is_an_arm_of_a_comparison(tmp_path):
    arms = {"l1": (L1AdamW, {"l1": 0.05})}
    results = compare(Tiny(), lr=[0.1], weight_decay=[0.0], seeds=2, arms=arms, out=tmp_path, progress=False)
    found = results.frame.set_index("arm")["test final error"]
    assert set(found.loc["l1"]) != set(found.loc["adamw"])
    with pytest.raises(ValueError, match="the arm l1: .*l1 must be a finite number of at least 0, got -1"):
        compare(Tiny(), arms={"l1": (L1AdamW, {"l1": -1})}, out=tmp_path, progress=False)
