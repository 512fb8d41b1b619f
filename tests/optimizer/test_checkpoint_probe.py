"""torch's distributed checkpoints step a new optimizer so that it has a state: no step of the training."""

import copy

import pytest
import torch
from conftest import HOW, TORCH
from torch import nn

from popriskmin import PRM, Examples, Microbatches, RiskMonitor, SoftnessController, diagnose
from popriskmin.optimizer.checkpoint_probe import made_state_alone, makes_state_alone

pytestmark = pytest.mark.skipif(TORCH < (2, 5), reason="older torch did not set the learning rate to 0")


def layer_and(optimizer=PRM, **options):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    return layer, optimizer(layer.parameters(), lr=0.01, **options)


def backward(layer, times=1):
    layer.zero_grad()
    for _ in range(times):
        layer(torch.randn(16, 8)).square().mean().backward()


def dcp():
    return pytest.importorskip("torch.distributed.checkpoint.state_dict")


@pytest.mark.parametrize("options", [{}, {"lr": torch.tensor(0.01)}, {"variance": "given"}, {"amsgrad": True},
                                     {"capturable": True}, *HOW])  # fmt: skip
def test_asking_for_the_state_of_a_new_optimizer_leaves_the_training_as_it_was(options):
    results = []
    for asks in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4)
        before = copy.deepcopy(layer.state_dict())
        optimizer = PRM(layer.parameters(), **{"lr": 0.01, **options})
        monitor = RiskMonitor(optimizer, every=1)
        controller = SoftnessController(optimizer, mean_q=0.5)
        if asks:
            saved = dcp().get_optimizer_state_dict(layer, optimizer)
            assert "exp_avg_var" in saved["state"]["weight"]
            assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())
            assert optimizer.get_mask_stats() is None
            assert diagnose(optimizer).rows == []
        assert controller.state_dict()["steps"] == monitor.state_dict()["steps"] == 0
        for _ in range(3):
            backward(layer)
            if "variance" in options:
                optimizer.set_variances({p: torch.rand_like(p) for p in layer.parameters()})
            optimizer.step()
        assert controller.state_dict()["steps"] == monitor.state_dict()["steps"] == 3
        results.append(([p.detach().clone() for p in layer.parameters()], optimizer.state_dict()["state"]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
    for i, state in results[0][1].items():
        assert all(torch.equal(value, results[1][1][i][name]) for name, value in state.items())


@pytest.mark.parametrize("source", ["microbatches", "examples"])
def test_a_checkpoint_goes_into_a_new_optimizer_with_a_source(source):
    def build():
        layer, optimizer = layer_and(variance="given")
        if source == "microbatches":
            Microbatches(optimizer)
            return layer, optimizer, lambda: backward(layer, 2)
        found = Examples(optimizer, layer, lambda model, x: model(x).square().mean())
        return layer, optimizer, lambda: (layer.zero_grad(), found.backward(torch.randn(16, 8)))

    layer, optimizer, work = build()
    for _ in range(3):
        work()
        optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(dcp().get_optimizer_state_dict(layer, optimizer))
    weights = copy.deepcopy(layer.state_dict())
    other, fresh, fresh_work = build()
    dcp().set_optimizer_state_dict(other, fresh, saved)
    other.load_state_dict(weights)
    for one, step in ((work, optimizer.step), (fresh_work, fresh.step)):
        torch.manual_seed(1)
        one()
        step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_monitor_of_adam_does_not_count_it_either(kind):
    layer, optimizer = layer_and(kind)
    monitor = RiskMonitor(optimizer, every=1)
    dcp().get_optimizer_state_dict(layer, optimizer)
    assert monitor.state_dict()["steps"] == 0
    backward(layer)
    optimizer.step()
    assert monitor.state_dict()["steps"] == 1


def test_steps_of_the_training_are_not_taken_for_it():
    layer, optimizer = layer_and()
    monitor = RiskMonitor(optimizer, every=1)
    backward(layer)
    optimizer.param_groups[0]["lr"] = 0.0  # a warmup's first step
    assert not makes_state_alone(optimizer)
    optimizer.step()
    assert not made_state_alone(optimizer, counted=0)
    optimizer.zero_grad(set_to_none=False)
    assert not makes_state_alone(optimizer)
    optimizer.step()
    assert optimizer.state[layer.weight]["step"] == monitor.state_dict()["steps"] == 2
    # Zero gradients at a learning rate: the weights decay, as in AdamW.
    layer, optimizer = layer_and()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert optimizer.state[layer.weight]["step"] == 1
    assert not torch.equal(before, layer.weight)


def test_no_gradient_is_read_where_there_is_a_learning_rate():
    p = nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros_like(p)  # whose values cannot be read
    for lr in (0.01, 0.0, torch.tensor(0.0), torch.zeros((), device="meta")):
        optimizer = PRM([p], lr=0.01)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert optimizer.state[p]["step"] == 1
