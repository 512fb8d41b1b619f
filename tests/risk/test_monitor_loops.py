"""The risk monitor in training loops of every kind: closures, scalers, groups, a compiled step."""

import copy
import math

import pytest
import torch
from conftest import TORCH
from monitored import BUILDS, Line
from torch import nn

from popriskmin import PRM
from popriskmin.risk.monitor import RiskMonitor


def test_a_group_that_comes_in_later():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([model.weight])
    monitor = RiskMonitor(optimizer, every=1, by="parameter")
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": [model.bias]})
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    # The sample of a step is finished by the next.
    assert {name: len(samples) for name, samples in monitor.parts.items()} == {"0": 7, "1": 3}


@pytest.mark.parametrize("name", BUILDS)
def test_a_closure_makes_the_gradients_within_the_step(name):
    plain, closed = Line(BUILDS[name], every=1), Line(BUILDS[name], every=1)
    plain.train(12)
    for i in range(12):

        def closure():
            x = torch.randn(16, 20, generator=closed.generator)
            y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=closed.generator)
            closed.optimizer.zero_grad()
            loss = nn.functional.mse_loss(closed.model(x), y)
            loss.backward()
            return loss

        loss = closed.optimizer.step(closure) if i % 2 else closed.optimizer.step(closure=closure)
        assert loss.item() > 0
    assert closed.monitor.samples == plain.monitor.samples


def test_after_detach_it_sees_no_more():
    line = Line().train(10)
    line.monitor.detach()
    assert line.train(10).monitor.estimate().steps == 10


def test_several_groups_and_frozen_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": [*model[1].parameters(), *model[2].parameters()]},
    ]
    for build in BUILDS.values():
        optimizer = build(copy.deepcopy([{**group, "params": list(group["params"])} for group in groups]))
        monitor = RiskMonitor(optimizer, every=1)
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        for _ in range(4):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        assert monitor.estimate().fresh > 0


def test_gradients_that_a_scaler_has_scaled():
    scaled, plain = Line(torch.optim.AdamW, every=1), Line(torch.optim.AdamW, every=1).train(20)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if hasattr(torch.amp, "GradScaler") else None
    if scaler is None:
        pytest.skip("this torch scales gradients on CUDA only")
    for _ in range(20):
        x = torch.randn(16, 20, generator=scaled.generator)
        y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=scaled.generator)
        scaled.optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(scaled.model(x), y)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert scaled.monitor.estimate() == pytest.approx(plain.monitor.estimate(), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_seen():
    line = Line(every=1).train(10)
    line.model.weight.grad = torch.full_like(line.model.weight, math.nan)
    line.optimizer.step()
    assert math.isnan(line.monitor.estimate().fresh)
    assert line.monitor.verdict is None


def test_a_step_that_a_loss_scaler_leaves_out_spoils_nothing():
    """The fused step is called with infinite gradients and leaves the weights alone; hooks run all the same."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales gradients on CUDA only")
    line = Line(lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True), every=1).train(10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, math.inf, 1.0, 1.0):
        x = torch.randn(16, 20, generator=line.generator)
        line.optimizer.zero_grad()
        scaler.scale(factor * line.model(x).square().mean()).backward()
        scaler.step(line.optimizer)
        scaler.update()
    assert all(torch.isfinite(p).all() for p in line.model.parameters())
    assert all(map(math.isfinite, line.train(10).monitor.estimate()))


@pytest.mark.skipif(TORCH < (2, 4), reason="older dynamos cannot trace an optimizer's hooks around a graph break")
@pytest.mark.parametrize("name", BUILDS)
def test_under_a_compiled_step(name):
    line, plain = Line(BUILDS[name], every=2), Line(BUILDS[name], every=2).train(8)
    line.optimizer.step = torch.compile(line.optimizer.step, backend="eager")
    assert line.train(8).monitor.estimate() == pytest.approx(plain.monitor.estimate(), rel=1e-3)


def test_conjugate_gradients():
    """Gradients that are views with the conjugation still to be done; torch's own AdamW does not take them."""
    w = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = PRM([w])
    monitor = RiskMonitor(optimizer, every=1)
    for _ in range(4):
        w.grad = torch.randn(3, dtype=torch.complex64).conj()
        optimizer.step()
    assert math.isfinite(monitor.estimate().fresh)


def test_steps_before_it_was_attached_count_as_a_pass():
    line = Line(monitored=False).train(40)
    monitor = RiskMonitor(line.optimizer, every=2, n_dataset=100, batch_size=16)
    line.train(4)
    assert monitor.samples[-1].influence != 0
