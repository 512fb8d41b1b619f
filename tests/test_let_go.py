"""Nothing outlives its parameter: what users remove, replace or move is free at once, in everything that watches."""

import gc
import weakref

import pytest
import torch
from simulated import Rows, mean_loss
from steps import noisy_steps as step

from popriskmin import PRM, Masked, RiskMonitor, SoftnessController, diagnose
from popriskmin.variance import Examples, Microbatches

IMPLEMENTATIONS = {"fused": {}, "foreach": {"fused": False}, "loop": {"foreach": False}}


def masked(groups, **options):
    return Masked(torch.optim.AdamW(groups, lr=0.1), **options)


BUILDS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    **{name: lambda groups, how=how: PRM(groups, lr=0.1, **how) for name, how in IMPLEMENTATIONS.items()},
    "start": lambda groups: PRM(groups, lr=0.1, shrinkage=1.0, shrink_to="start", batch_size=2, n_dataset=9),
    "Masked": masked,
}


def parameter():
    return torch.nn.Parameter(torch.ones(5, 5))


def refs_of(optimizer, p):
    return [weakref.ref(value) for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]


def remove_state(optimizer, p):
    p.grad = None
    del optimizer.state[p]


def remove_group(optimizer, p):
    del optimizer.param_groups[0], optimizer.state[p]


def remove_parameter(optimizer, p):
    optimizer.param_groups[0]["params"].remove(p)
    del optimizer.state[p]


def clone_state(optimizer, p):
    state = optimizer.state[p]
    state.update({name: value.clone() for name, value in list(state.items()) if isinstance(value, torch.Tensor)})


def replace_parameter(optimizer, p):
    """As where splats are made denser."""
    del optimizer.state[p]
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(7, 5))


WAYS = [remove_state, remove_group, remove_parameter, clone_state, replace_parameter]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", BUILDS)
def test_what_is_taken_out_of_an_optimizer_is_free_at_once(build, way):
    a, b = parameter(), parameter()
    optimizer = BUILDS[build]([{"params": [a]}, {"params": [b]}])
    step(optimizer, 3)
    refs = refs_of(optimizer, a)
    assert len(refs) > 2
    if way in (remove_group, remove_parameter, replace_parameter):
        refs.append(weakref.ref(a))
    way(optimizer, a)
    del a
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    if way is not remove_state:
        step(optimizer, 2)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_parameter_can_be_swapped_as_modules_of_sharded_ones_do(how):
    """Which torch refuses where a weak reference is held."""
    p = parameter()
    optimizer = PRM([("p", p)], lr=0.1, **IMPLEMENTATIONS[how])
    monitor = RiskMonitor(optimizer, every=1)
    step(optimizer, 2)
    optimizer.zero_grad()
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.zeros(5, 5)))
    step(optimizer)
    assert 0 < p.abs().max() < 0.2
    assert set(optimizer.get_mask_stats(by="parameter")) == {"p"}
    assert len(monitor.samples) == 2


@pytest.mark.parametrize("build", [PRM, torch.optim.AdamW])
def test_a_monitor_and_a_controller_hold_no_parameter(build):
    """At once, whether or not the monitor waits for the gradients of the next step."""
    a, b = parameter(), parameter()
    optimizer = build([{"params": [a]}, {"params": [b]}], lr=0.1)
    monitor = RiskMonitor(optimizer, every=1, by="parameter")
    if build is PRM:
        SoftnessController(optimizer, mean_q=0.5, every=1)
    step(optimizer, 25)
    if build is PRM:
        diagnose(optimizer)
    refs = [weakref.ref(a), *refs_of(optimizer, a)]
    remove_group(optimizer, a)
    del a
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    step(optimizer, 2)
    assert len(monitor.samples) > 24


def test_a_monitor_leaves_out_what_was_replaced_by_another_shape():
    p = parameter()
    optimizer = PRM([p], lr=0.1)
    monitor = RiskMonitor(optimizer, every=1)
    step(optimizer, 2)
    state = optimizer.state.pop(p)
    p.data = torch.ones(7, 5)
    state.update({name: torch.ones(7, 5) for name, value in list(state.items()) if value.dim()})
    optimizer.state[p] = state
    step(optimizer, 3)
    assert [sample.step for sample in monitor.samples] == [1, 3, 4]


@pytest.mark.parametrize("kind", [Microbatches, Examples])
def test_a_source_lets_go_of_what_left_the_optimizer_at_the_next_step(kind):
    """Not before: a hook needs the node that it sits at, and that holds its parameter."""
    model = Rows(6)
    extra = torch.nn.Parameter(torch.ones(6))
    model.extra = extra
    optimizer = PRM([{"params": [extra]}, {"params": [p for p in model.parameters() if p is not extra]}],
                    lr=0.1, variance="given")  # fmt: skip

    def loss(model, x):
        value = mean_loss(model, x)
        return value if model.extra is None else value + (x * model.extra).mean()

    source = kind(optimizer) if kind is Microbatches else kind(optimizer, model, loss)

    def train():
        optimizer.zero_grad()
        for x in torch.randn(3, 4, 6):
            if kind is Microbatches:
                loss(model, x).backward()
            else:
                source.backward(x)
        optimizer.step()

    train()
    refs = [weakref.ref(extra), *refs_of(optimizer, extra)]
    remove_group(optimizer, extra)
    model.extra = None
    del extra
    train()
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    source.remove()
