"""Users edit lists that run side by side with others: each name and option still belongs to its parameter or group."""

import copy

import pytest
import torch
from steps import noisy_steps as step

from popriskmin import PRM, Masked, RiskMonitor, diagnose

BUILDS = {
    "PRM": PRM,
    "Masked": lambda groups, softness=1.0, **options: Masked(torch.optim.AdamW(groups, **options), softness=softness),
}


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape or (3,)))


def sizes(optimizer):
    """The scalars of each part by its name: what tells which parameter a name stands for."""
    stats = {name: row["parameter_count"] for name, row in optimizer.get_mask_stats(by="parameter").items()}
    assert stats == {row.name: row.parameter_count for row in diagnose(optimizer).rows}
    return stats


@pytest.mark.parametrize("build", BUILDS)
def test_a_name_belongs_to_its_parameter_and_one_without_is_called_by_its_place(build):
    a, b, c = parameter(1), parameter(2), parameter(3)
    optimizer = BUILDS[build]([("a", a), ("b", b)], lr=0.1)
    step(optimizer)
    assert sizes(optimizer) == {"a": 1, "b": 2}
    optimizer.param_groups[0]["params"] = [b, c]
    step(optimizer)
    assert sizes(optimizer) == {"b": 2, 1: 3}
    optimizer.param_groups[0]["params"].append(parameter(4))
    optimizer.param_groups[0]["params"].insert(0, parameter(5))
    step(optimizer)
    assert sizes(optimizer) == {0: 5, "b": 2, 2: 3, 3: 4}
    optimizer.add_param_group({"params": [("d", parameter(6))]})
    step(optimizer)
    assert sizes(optimizer) == {0: 5, "b": 2, 2: 3, 3: 4, "d": 6}


def test_names_that_were_edited_with_their_parameters_are_taken():
    b, c = parameter(2), parameter(3)
    optimizer = PRM([("a", parameter(1)), ("b", b)])
    group = optimizer.param_groups[0]
    group["params"][0], group["param_names"][0] = c, "c"
    step(optimizer)
    assert sizes(optimizer) == {"c": 3, "b": 2}
    group["params"], group["param_names"] = [b, c], ["one", "two"]
    assert sizes(optimizer) == {"one": 2, "two": 3}


@pytest.mark.parametrize("how", [copy.deepcopy, None])
def test_copies_and_checkpoints_have_each_name_at_its_place(how, tmp_path):
    b, c = parameter(2), parameter(3)
    optimizer = PRM([("a", parameter(1)), ("b", b)])
    optimizer.param_groups[0]["params"] = [b, c]
    step(optimizer)
    if how is not None:
        assert sizes(how(optimizer)) == {"b": 2, "1": 3}
        return
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["param_groups"][0]["param_names"] == ["b", "1"]
    fresh = PRM([("x", parameter(2)), ("y", parameter(3))])
    fresh.load_state_dict(state)
    assert sizes(fresh) == {"b": 2, "1": 3}


@pytest.mark.parametrize("build", BUILDS)
def test_after_a_group_is_deleted_the_others_keep_what_they_stepped_with(build):
    """Also where a schedule has moved on since, and where a new group takes the place of the deleted one."""
    groups = [{"params": [parameter(1)], "softness": 9.0}, {"params": [parameter(2)], "softness": 0.5}]
    optimizer = BUILDS[build](groups, lr=0.1)
    step(optimizer)
    expected = optimizer.get_mask_stats(by="group")
    assert expected[0]["mean_q"] != pytest.approx(expected[1]["mean_q"])
    optimizer.param_groups[1]["softness"] = 3.0
    del optimizer.param_groups[0]
    assert optimizer.get_mask_stats(by="group") == {0: expected[1]}
    optimizer.add_param_group({"params": [parameter(3)]})
    assert optimizer.get_mask_stats(by="group") == {0: expected[1]}


@pytest.mark.parametrize("build", [PRM, torch.optim.AdamW])
def test_the_monitor_keeps_each_part_under_the_name_that_it_had(build):
    a, b, c = parameter(1), parameter(2), parameter(3)
    optimizer = build([{"params": [("a", a)]}, {"params": [("b", b)]}], lr=0.1)
    monitor = RiskMonitor(optimizer, every=1, by="parameter")
    step(optimizer, 3)
    before = monitor.parts
    assert set(before) == {"a", "b"}
    # Between a sampled step and the next gradients.
    del optimizer.param_groups[0]
    optimizer.param_groups[0]["params"].append(c)
    step(optimizer, 4)
    parts = monitor.parts
    assert {name: samples[: len(before[name])] for name, samples in parts.items() if name in before} == before
    assert parts["a"] == before["a"]
    if build is PRM:
        assert set(parts) == {"a", "b", "1"}
        assert sum(sample.fresh for sample in parts["1"]) != 0
    resumed = RiskMonitor(optimizer, every=1, by="parameter")
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.parts == parts
    assert resumed.estimate(by="parameter") == monitor.estimate(by="parameter")
