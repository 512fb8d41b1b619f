"""State is not the optimizer's alone: users keep notes and norms in it, before the first step and after it."""

import copy

import pytest
import torch
from steps import through_a_file

from popriskmin import PRM, Masked, RiskMonitor, SoftnessController, diagnose
from popriskmin.integrations import log

BUILDS = {
    "PRM": PRM,
    "foreach": lambda params: PRM(params, fused=False),
    "Masked": lambda params: Masked(torch.optim.AdamW(params)),
}


def made(build):
    params = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(3))]
    return params, BUILDS[build](params)


def note(optimizer, p):
    optimizer.state[p].update({"note": "mine", "norm": torch.tensor(2.0), "history": torch.ones(7)})


def step(params, optimizer, times=1):
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("build", ["PRM", "foreach"])
def test_notes_change_nothing_of_the_run_before_the_first_step_and_after(build):
    results = []
    for noting in (False, True):
        params, optimizer = made(build)
        monitor = RiskMonitor(optimizer, every=1)
        controller = SoftnessController(optimizer, mean_q=0.5, every=1)
        if noting:
            note(optimizer, params[0])
            assert optimizer.get_mask_stats() is None
            assert log(optimizer) == {}
            assert diagnose(optimizer).rows == []
        step(params, optimizer, 30)
        if noting:
            note(optimizer, params[1])
        step(params, optimizer, 2)
        results.append((optimizer.get_mask_stats(), diagnose(optimizer).rows, monitor.samples, controller.readings))
        if noting:
            assert optimizer.state[params[0]]["note"] == "mine"
    assert results[0] == results[1]


@pytest.mark.parametrize("build", BUILDS)
def test_a_note_on_a_parameter_that_never_steps(build):
    params, optimizer = made(build)
    if build == "Masked":  # whose inner AdamW takes a parameter with notes for one that it knows
        params[1].requires_grad_(False)
    note(optimizer, params[1])
    monitor = RiskMonitor(optimizer, every=1) if build != "Masked" else None
    SoftnessController(optimizer, mean_q=0.5, every=1)
    step(params[:1], optimizer, 30)
    assert set(optimizer.get_mask_stats(by="parameter")) == {0}
    assert diagnose(optimizer).rows[0].step == 30
    assert monitor is None or len(monitor.samples) == 29


@pytest.mark.parametrize("build", BUILDS)
def test_checkpoints_take_notes_along_as_those_of_adamw(build):
    params, optimizer = made(build)
    step(params[:1], optimizer, 3)
    params[1].grad = None
    own = params[:1] if build == "Masked" else params  # AdamW itself fails on a note beside no step
    for p in own:
        note(optimizer, p)
    optimizer.state["of the whole"] = 5
    fresh_params, fresh = made(build)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in fresh_params[: len(own)]:
        if build != "Masked":  # the inner optimizer's loading makes a generator of a text
            assert fresh.state[p]["note"] == "mine"
        assert fresh.state[p]["norm"] == 2
        assert torch.equal(fresh.state[p]["history"], torch.ones(7))
    assert fresh.state["of the whole"] == 5
    step(fresh_params[:1], fresh)
    assert fresh.get_mask_stats(by="parameter").keys() == {0}
    assert copy.deepcopy(fresh).state["of the whole"] == 5


def test_state_of_another_optimizer_is_still_refused():
    params, optimizer = made("PRM")
    for other in (torch.optim.SGD(params, lr=0.1, momentum=0.9), torch.optim.Adamax(params)):
        step(params, other)
        with pytest.raises(ValueError, match="load_state_dict takes the state of PRM, AdamW or Adam"):
            optimizer.load_state_dict(other.state_dict())
