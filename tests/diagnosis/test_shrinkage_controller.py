"""The bound on shrinkage: what it is, that it keeps layers open, and that it resumes bit for bit."""

import math

import numpy as np
import pytest
import torch
from conftest import HOW, SHARDS
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from steps import through_a_file
from torch import nn

from popriskmin import PRM, Masked, ShrinkageController

COUNTS = {"batch_size": 10, "n_dataset": 40}
C = 10 / 30  # b / (n - b)


def optimizer_of(shapes=((6, 5),), shrinkage=3.0, dtype=torch.float32, together=False, **options):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    groups = [{"params": params}] if together else [{"params": [p]} for p in params]
    return PRM(groups, lr=1e-3, shrinkage=shrinkage, **COUNTS, **options)


def run(optimizer, means, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p, mean in zip([p for group in optimizer.param_groups for p in group["params"]], means):
            p.grad = (mean + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()
    return [group["shrinkage"] for group in optimizer.param_groups]


def expected(optimizer, p, share, most, beta1=0.9, rho=0.99):
    """The bound in float64, written down again from the state of a published variance."""
    state = {name: value.double().numpy() for name, value in optimizer.state[p].items() if name != "step"}
    t = int(optimizer.state[p]["step"])
    mean, noise = state["exp_avg"] / (1 - beta1**t), state["exp_avg_var"] / (1 - rho**t)
    return min(most, share * np.max(np.abs(mean) / np.sqrt(C * noise)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask", ["snr", "none", "soft"])
def test_it_is_a_share_of_the_largest_mean_gradient_in_standard_errors(how, mask):
    optimizer = optimizer_of([(300, 200), (4, 3)], mask=mask, **how)
    controller = ShrinkageController(optimizer, share=0.4)
    found = run(optimizer, [0.1, 0.0], 30)
    for group, z, reading in zip(optimizer.param_groups, found, controller.readings):
        assert z == pytest.approx(expected(optimizer, group["params"][0], 0.4, 3.0), rel=1e-5)
        assert z == pytest.approx(min(3.0, 0.4 * reading.largest))
    assert found[0] > found[1] > 0


@settings(max_examples=25)
@given(st.floats(0.05, 0.95), st.floats(0.1, 10), st.floats(-2, 2), st.integers(1, 6))
def test_it_never_exceeds_what_it_was_built_with(share, most, mean, every):
    optimizer = optimizer_of(shrinkage=most)
    ShrinkageController(optimizer, share=share, every=every)
    found = run(optimizer, [mean], 6 * every)[0]
    assert 0 < found <= most
    assert found == pytest.approx(expected(optimizer, optimizer.param_groups[0]["params"][0], share, most), rel=1e-5)


def test_of_several_layers_in_a_group_the_weakest_decides():
    apart, together = optimizer_of([(6, 5), (4, 3)]), optimizer_of([(6, 5), (4, 3)], together=True)
    for optimizer in (apart, together):
        ShrinkageController(optimizer)
    found = run(apart, [2.0, 0.0], 2), run(together, [2.0, 0.0], 2)
    # The first two steps are alike: there is no pull in the first, and none was bounded before the second.
    assert found[1] == [min(found[0])]


def test_biases_are_not_asked():
    optimizer = PRM([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))], shrinkage=3.0, **COUNTS)
    ShrinkageController(optimizer)
    run(optimizer, [5.0, 0.0], 20)
    weight = optimizer.param_groups[0]["params"][0]
    assert optimizer.param_groups[0]["shrinkage"] == pytest.approx(expected(optimizer, weight, 0.5, 3.0), rel=1e-5)


def trained(controlled):
    """A network whose last layer a shrinkage of 3 closes: 40 rows, of 30 columns one says something."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(40, 30, generator=generator)
    y = x[:, 0] + 0.7 * torch.randn(40, generator=generator)
    model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1))
    groups = [{"params": [p]} if p.dim() > 1 else {"params": [p], "shrinkage": 0.0} for p in model.parameters()]
    optimizer = PRM(groups, lr=1e-2, shrinkage=3.0, **COUNTS)
    controller = ShrinkageController(optimizer) if controlled else None
    for _ in range(150):
        for rows in torch.randperm(40, generator=generator).split(10):
            optimizer.zero_grad()
            (model(x[rows])[:, 0] - y[rows]).square().mean().backward()
            optimizer.step()
    fresh = torch.randn(1000, 30, generator=generator)
    error = (model(fresh)[:, 0] - fresh[:, 0]).square().mean().item()
    return optimizer, controller, error


def test_a_layer_that_would_close_stays_open():
    closed, _, error = trained(False)
    assert closed.shrunk(by="group")[2]["scalar_fraction"] == 1.0
    open_, controller, bounded_error = trained(True)
    shares = open_.shrunk(by="group")
    assert shares[2]["scalar_fraction"] < 1.0
    assert shares[0]["scalar_fraction"] > 0.5  # the columns that say nothing are still drawn to zero
    assert bounded_error < 0.7 * error
    assert {reading.group for reading in controller.readings} == {0, 2}
    assert [group["shrinkage"] for group in open_.param_groups if group["params"][0].dim() == 1] == [0.0, 0.0]


def test_a_weight_without_a_gradient_has_no_say():
    optimizer = optimizer_of([(4, 3)])
    controller = ShrinkageController(optimizer)
    p = optimizer.param_groups[0]["params"][0]
    for _ in range(5):
        p.grad = torch.zeros(4, 3)
        optimizer.step()
    assert controller.readings[0].largest == 0.0
    assert 0 < optimizer.param_groups[0]["shrinkage"] < 1e-30


def test_between_corrections_nothing_moves():
    optimizer = optimizer_of()
    ShrinkageController(optimizer, every=4)
    trace = [run(optimizer, [0.0], 1, seed)[0] for seed in range(12)]
    assert trace[:3] == [3.0] * 3
    assert trace[3] == trace[6] != trace[7]


def test_removed_it_does_nothing():
    optimizer = optimizer_of()
    controller = ShrinkageController(optimizer)
    (before,) = run(optimizer, [0.0], 5)
    controller.remove()
    assert run(optimizer, [2.0], 5) == [before]


def test_a_run_that_overflowed_is_left_alone():
    optimizer = optimizer_of()
    controller = ShrinkageController(optimizer)
    (before,) = run(optimizer, [0.0], 5)
    assert run(optimizer, [math.nan], 3) == [before]
    assert math.isnan(controller.readings[0].largest)


def test_a_layer_that_overflowed_speaks_for_its_group():
    for means in ([math.nan, 0.0], [0.0, math.nan]):
        optimizer = optimizer_of([(6, 5), (4, 3)], together=True)
        ShrinkageController(optimizer)
        (before,) = run(optimizer, [0.0, 0.0], 5)
        assert run(optimizer, means, 3) == [before]


def test_a_second_controller_starts_from_the_same_strongest_pull():
    optimizer = optimizer_of()
    ShrinkageController(optimizer).remove()
    assert run(optimizer, [0.0], 5) == [3.0]
    first = ShrinkageController(optimizer)
    assert run(optimizer, [0.0], 5)[0] < 3.0
    first.remove()
    resumed = optimizer_of()
    resumed.load_state_dict(optimizer.state_dict())
    for one in (optimizer, resumed):
        ShrinkageController(one)
        assert run(one, [5.0], 300) == [3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_types(dtype):
    optimizer = optimizer_of(dtype=dtype)
    ShrinkageController(optimizer)
    assert 0 < run(optimizer, [0.1], 20)[0] < 3


@pytest.mark.parametrize("options", [{"debias": True}, {"reduction": "per_tensor"}, {"state_dtype": torch.bfloat16}])
def test_options_of_the_mask(options):
    optimizer = optimizer_of([(30, 30)], **options)
    ShrinkageController(optimizer)
    assert 0 < run(optimizer, [0.1], 20)[0] < 3


def test_a_group_added_later_is_controlled_too():
    optimizer = optimizer_of()
    controller = ShrinkageController(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], "shrinkage": 2.0})
    run(optimizer, [0.0, 0.0], 10)
    assert [reading.group for reading in controller.readings] == [0, 1]
    assert [group["max_shrinkage"] for group in optimizer.param_groups] == [3.0, 2.0]
    del optimizer.param_groups[0]  # what is left keeps its own
    run(optimizer, [5.0], 300)
    assert [reading.shrinkage for reading in controller.readings] == [2.0]
    given_one = optimizer_of([(6, 5), (4, 3)])
    ShrinkageController(given_one, groups=[1])
    found = run(given_one, [0.0, 0.0], 10)
    assert found[0] == 3.0 > found[1]


@pytest.mark.parametrize("every", [1, 3])
def test_resuming_is_bit_for_bit_the_uninterrupted_run(every):
    def make():
        optimizer = optimizer_of([(6, 5), (4, 3)])
        return optimizer, ShrinkageController(optimizer, every=every)

    whole, controller = make()
    run(whole, [0.2, 0.0], 10)
    weights = [group["params"][0].detach().clone() for group in whole.param_groups]
    saved = through_a_file({"optimizer": whole.state_dict(), "controller": controller.state_dict()})
    run(whole, [1.5, 0.0], 40, seed=1)

    resumed, second = make()
    with torch.no_grad():
        for group, value in zip(resumed.param_groups, weights):
            group["params"][0].copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["controller"])
    run(resumed, [1.5, 0.0], 40, seed=1)
    assert second.readings == controller.readings
    assert second.state_dict() == controller.state_dict()
    for a, b in zip(whole.param_groups, resumed.param_groups):
        assert a["shrinkage"] == b["shrinkage"]
        assert torch.equal(a["params"][0], b["params"][0])


def _on_two_ranks(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    traces = []
    for sharded in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))  # the last has no row on the second rank
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        groups = [{"params": [p]} if p.dim() > 1 else {"params": [p], "shrinkage": 0.0} for p in model.parameters()]
        optimizer = PRM(groups, lr=1e-2, shrinkage=3.0, **COUNTS)
        ShrinkageController(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            optimizer.zero_grad()
            x = torch.randn(16, 7, generator=generator)
            (model(x)[:, 0] - x[:, 0]).square().mean().backward()
            optimizer.step()
        traces.append([group["shrinkage"] for group in optimizer.param_groups])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)
    assert min(traces[0][::2]) < 3.0


@pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")
def test_ranks_bound_it_as_one_process_does(tmp_path):
    run_ranks(tmp_path, 2, _on_two_ranks)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0}, "share must be a number between 0 and 1, got 0"),
        ({"share": "half"}, "share must be a number between 0 and 1, got 'half'"),
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"groups": 1}, "groups must be numbers of parameter groups, from 0 to 1, got 1"),
        ({"groups": [1.0]}, "groups must be numbers of parameter groups, from 0 to 1, got 1.0"),
        ({"groups": [3]}, "groups must be numbers of parameter groups, from 0 to 1, got 3"),
        ({"groups": [1]}, "group 1 has shrinkage=0: set the strongest pull that it may have, such as 3"),
        ({"groups": []}, "there is no parameter group to control: all have shrinkage=0"),
    ],
)
def test_bad_arguments(options, match):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = PRM([{"params": [params[0]], "shrinkage": 2.0}, {"params": [params[1]]}], **COUNTS)
    with pytest.raises(ValueError, match=match):
        ShrinkageController(optimizer, **options)


def test_other_optimizers_and_states_are_refused():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="ShrinkageController"):
        ShrinkageController(torch.optim.AdamW([p]))
    with pytest.raises(TypeError, match="got Masked, which has no shrinkage"):
        ShrinkageController(Masked(torch.optim.SGD([p], lr=0.1)))
    with pytest.raises(ValueError, match="all have shrinkage=0"):
        ShrinkageController(PRM([p]))
    controller = ShrinkageController(PRM([p], shrinkage=1.0, **COUNTS))
    with pytest.raises(ValueError, match="a ShrinkageController's state holds steps alone, got softness"):
        controller.load_state_dict({"softness": 1})
