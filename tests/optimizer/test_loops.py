"""How `PRM` lives in ordinary training loops: closures, hooks, schedulers, accumulation, clipping, mixed precision."""

import pytest
import torch
from conftest import TORCH

from popriskmin import PRM


def a_parameter(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, **kwargs))


def test_closure_returns_the_loss_and_sees_gradients_enabled():
    w = a_parameter(3)
    optimizer = PRM([w])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3
    assert optimizer.step() is None


def test_hooks_before_and_after_the_step():
    w = a_parameter(2)
    optimizer = PRM([w])
    w.grad = torch.ones(2)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", w.detach().clone())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", w.detach().clone())))
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], torch.ones(2))
    assert torch.equal(seen[1][1], w)


SCHEDULERS = {
    "warmup and cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 7)],
        milestones=[3],
    ),
    "one cycle, which also moves betas": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cyclic, with betas": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(name, tensor_lr):
    """As with AdamW, whatever torch's schedulers do: those of 2.7 err on a tensor."""
    w, adam_w = a_parameter(4), a_parameter(4)
    lrs = [torch.tensor(0.1) if tensor_lr else 0.1 for _ in range(2)]
    optimizer = PRM([w], lr=lrs[0], mask="none")
    adam = torch.optim.AdamW([adam_w], lr=lrs[1], foreach=False)
    try:
        adam_schedule = SCHEDULERS[name](adam)
    except ValueError:
        if TORCH >= (2, 3) or not name.startswith("cyclic"):
            raise
        pytest.skip("CyclicLR of older torch cycles only SGD's momentum")
    schedules = [SCHEDULERS[name](optimizer), adam_schedule]
    torch.manual_seed(0)
    for _ in range(10):
        w.grad = torch.randn(4)
        adam_w.grad = w.grad.clone()
        for o, schedule in zip((optimizer, adam), schedules):
            o.step()
            schedule.step()
    torch.testing.assert_close(w, adam_w)


def test_gradient_accumulation_is_the_large_batch():
    x, y = torch.randn(32, 5), torch.randn(32, 1)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 1)
        optimizer = PRM(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts)):
                (torch.nn.functional.mse_loss(model(a), b) / parts).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_clipping():
    model = torch.nn.Linear(5, 1)
    optimizer = PRM(model.parameters())
    (1e6 * model(torch.ones(2, 5)).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), clipped):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * g)


def test_grad_scaler_unscales_and_skips_overflows():
    scaler_class = getattr(torch.amp, "GradScaler", None)
    if scaler_class is None:
        pytest.skip("torch before 2.3 has no GradScaler for the CPU")
    scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=1)
    w, plain = a_parameter(4), a_parameter(4)
    optimizer, other = PRM([w], lr=0.1), PRM([plain], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        other.zero_grad()
        loss = (w * (step + 1)).sum()
        scaler.scale(loss).backward()
        if step == 2:
            w.grad[0] = float("inf")
        else:
            (plain * (step + 1)).sum().backward()
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(w, plain)
    assert optimizer.state[w]["step"] == 4


def test_autocast_training_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = PRM(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
