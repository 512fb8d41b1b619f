"""The controller: it reaches its target where there is signal, follows no noise, and resumes bit for bit."""

import copy
import itertools
import math

import pytest
import torch
from conftest import HOW
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import through_a_file
from torch import nn

from popriskmin import PRM
from popriskmin.diagnosis.controller import SoftnessController


def optimizer_of(shapes=((64, 64),), **options):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return PRM(params, **{"lr": 1e-3, **options})


def step(optimizer, means, generator, deviation=1.0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, mean in zip(params, means):
        p.grad = mean + deviation * torch.randn(p.shape, generator=generator)
    optimizer.step()


def run(optimizer, means, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    trace = []
    for _ in range(steps):
        step(optimizer, means, generator)
        trace.append([group["softness"] for group in optimizer.param_groups])
    return trace


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", [{}, {"mask": "soft"}, {"debias": True}, {"reduction": "per_tensor"}])
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_mean_q_reaches_its_target(how, options, target):
    optimizer = optimizer_of(**options, **how)
    SoftnessController(optimizer, mean_q=target)
    run(optimizer, [1.2], 400)
    assert optimizer.get_mask_stats()["mean_q"] == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize("target", [0.25, 0.8])
def test_the_active_fraction_reaches_its_target(target):
    optimizer = optimizer_of()
    SoftnessController(optimizer, active_fraction=target)
    run(optimizer, [0.7], 500)
    p = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[p]
    signal, noise = state["exp_avg"].square(), state["exp_avg_var"] / (1 - 0.99**500)
    q = signal / (signal + optimizer.param_groups[0]["softness"] * noise)
    assert (q >= 0.5).float().mean() == pytest.approx(target, abs=0.08)


def test_with_softness_one_active_is_what_the_statistics_call_so():
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, active_fraction=0.5, every=1, rate=1e-12)
    run(optimizer, [1.0], 50)
    assert controller.readings[0].measured == pytest.approx(optimizer.get_mask_stats()["active_fraction"])


def test_pooled_masks_count_whole_tensors():
    optimizer = optimizer_of([(10, 10), (30, 10)], reduction="per_tensor")
    controller = SoftnessController(optimizer, active_fraction=0.5, rate=1e-12)
    run(optimizer, [3.0, 0.0], 50)
    assert controller.readings[0].measured == 0.25


@pytest.mark.parametrize("options", [{}, {"debias": True}, {"reduction": "per_tensor"}, {"mask": "soft"}])
def test_the_mask_is_not_opened_to_noise(options):
    optimizer = optimizer_of(**options)
    controller = SoftnessController(optimizer, mean_q=0.3)
    trace = run(optimizer, [0.0], 400)
    assert {softness for (softness,) in trace} == {1.0}
    assert controller.readings[0].held
    assert controller.readings[0].snr == pytest.approx(0, abs=0.01)
    assert controller.readings[0].measured < 0.1


def test_without_a_floor_noise_is_followed():
    """The floor is what keeps the mask shut above, not something else."""
    optimizer = optimizer_of()
    SoftnessController(optimizer, mean_q=0.3, floor=1e-9)
    optimizer_of_none = optimizer_of()
    SoftnessController(optimizer_of_none, mean_q=0.3, floor=0)
    for one in (optimizer, optimizer_of_none):
        run(one, [0.02], 400)
        assert one.param_groups[0]["softness"] < 0.5


def test_noise_may_still_close_the_mask():
    optimizer = optimizer_of(softness=0.01)
    SoftnessController(optimizer, mean_q=0.1)
    run(optimizer, [0.0], 600)
    assert optimizer.get_mask_stats()["mean_q"] == pytest.approx(0.1, abs=0.03)
    assert optimizer.param_groups[0]["softness"] > 0.1


def test_where_the_signal_ends_the_softness_goes_back():
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, mean_q=0.6)
    run(optimizer, [0.5], 400)
    opened = optimizer.param_groups[0]["softness"]
    assert opened < 0.3
    run(optimizer, [0.0], 600)
    assert optimizer.param_groups[0]["softness"] == pytest.approx(1.0)
    assert controller.readings[0].held


def test_a_few_scalars_of_noise_do_not_wander_off():
    """One scalar's noise is above the floor now and then; it goes back more often than it falls."""
    optimizer = optimizer_of([()])
    SoftnessController(optimizer, mean_q=0.5)
    trace = [softness for (softness,) in run(optimizer, [0.0], 3000)]
    assert sum(softness < 0.4 for softness in trace) < 0.1 * len(trace)


@settings(max_examples=15)
@given(st.integers(1, 20), st.floats(1e-3, 0.1), st.floats(0.05, 0.95), st.floats(0, 3))
def test_no_step_is_larger_than_the_rate(every, rate, target, mean):
    optimizer = optimizer_of([(8, 8)])
    SoftnessController(optimizer, mean_q=target, every=every, rate=rate, bounds=(0.2, 5))
    trace = [1.0] + [softness for (softness,) in run(optimizer, [mean], 80)]
    changes = [abs(math.log(b / a)) for a, b in itertools.pairwise(trace)]
    assert max(changes) <= rate * every * (1 + 1e-9)
    assert all(change == 0 for number, change in enumerate(changes, 1) if number % every)
    assert all(0.2 <= softness <= 5 for softness in trace)


def test_the_bounds_hold():
    for target, expected in ((0.99, 0.5), (0.01, 2.0)):
        optimizer = optimizer_of()
        SoftnessController(optimizer, mean_q=target, rate=0.1, bounds=(0.5, 2.0))
        run(optimizer, [1.0], 200)
        assert optimizer.param_groups[0]["softness"] == expected


def test_each_group_by_itself_and_open_ones_not_at_all():
    params = [nn.Parameter(torch.zeros(40, 40)) for _ in range(3)]
    optimizer = PRM(
        [{"params": [params[0]]}, {"params": [params[1]], "mask": "none"}, {"params": [params[2]], "softness": 3.0}]
    )
    controller = SoftnessController(optimizer, mean_q=0.4)
    run(optimizer, [2.0, 1.0, 0.7], 500)
    assert [reading.group for reading in controller.readings] == [0, 2]
    stats = optimizer.get_mask_stats(by="group")
    assert stats[0]["mean_q"] == pytest.approx(0.4, abs=0.05)
    assert stats[2]["mean_q"] == pytest.approx(0.4, abs=0.05)
    assert optimizer.param_groups[1]["softness"] == 1.0


def test_only_the_groups_that_were_given():
    params = [nn.Parameter(torch.zeros(40, 40)) for _ in range(2)]
    optimizer = PRM([{"params": [p]} for p in params])
    SoftnessController(optimizer, mean_q=0.2, groups=[1])
    trace = run(optimizer, [1.0, 1.0], 100)
    assert trace[-1][0] == 1.0 < trace[-1][1]


def test_a_group_added_later_is_controlled_too():
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, mean_q=0.2)
    run(optimizer, [1.0], 20)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(20, 20))]})
    run(optimizer, [1.0, 1.0], 60)
    assert [reading.group for reading in controller.readings] == [0, 1]


def test_a_schedule_of_the_learning_rate_makes_no_difference():
    traces = []
    for power in (0, 1):
        optimizer = optimizer_of()
        SoftnessController(optimizer, mean_q=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, power=power: (1 + t) ** -power)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            step(optimizer, [0.5], generator)
            schedule.step()
        traces.append(optimizer.param_groups[0]["softness"])
    assert traces[0] == traces[1] != 1.0


def test_no_correction_before_there_is_something_to_go_by():
    optimizer = optimizer_of(warmup_steps=40)
    SoftnessController(optimizer, mean_q=0.2, every=1)
    trace = run(optimizer, [1.0], 45)
    assert [softness == 1.0 for (softness,) in trace] == [True] * 40 + [False] * 5
    optimizer = optimizer_of()
    SoftnessController(optimizer, mean_q=0.2, every=1)
    trace = run(optimizer, [1.0], 25)
    assert [softness == 1.0 for (softness,) in trace] == [True] * 19 + [False] * 6


@pytest.mark.parametrize("at", [95, 103])
def test_resuming_is_bit_for_bit_the_uninterrupted_run(at):
    def make():
        optimizer = optimizer_of([(16, 16), (7,)])
        return optimizer, SoftnessController(optimizer, mean_q=0.5, every=10)

    def steps(optimizer, generator, count):
        for _ in range(count):
            step(optimizer, [0.6, 0.0], generator)

    generator = torch.Generator().manual_seed(0)
    whole, controller = make()
    steps(whole, generator, at)
    weights = [p.detach().clone() for p in whole.param_groups[0]["params"]]
    saved = through_a_file({"optimizer": whole.state_dict(), "controller": controller.state_dict()})
    drawn = generator.get_state()
    steps(whole, generator, 60)

    resumed, second = make()
    with torch.no_grad():
        for p, value in zip(resumed.param_groups[0]["params"], weights):
            p.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["controller"])
    generator.set_state(drawn)
    steps(resumed, generator, 60)
    assert resumed.param_groups[0]["softness"] == whole.param_groups[0]["softness"] != 1.0
    assert second.readings == controller.readings
    assert second.state_dict() == controller.state_dict()
    for a, b in zip(whole.param_groups[0]["params"], resumed.param_groups[0]["params"]):
        assert torch.equal(a, b)


def test_the_way_back_is_remembered():
    """Where the softness goes back to without signal is what it was at the start of the whole run."""
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, mean_q=0.6)
    run(optimizer, [0.5], 300)
    saved = copy.deepcopy((optimizer.state_dict(), controller.state_dict()))
    resumed = optimizer_of()
    second = SoftnessController(resumed, mean_q=0.6)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert resumed.param_groups[0]["softness"] < 0.5
    run(resumed, [0.0], 600)
    assert resumed.param_groups[0]["softness"] == pytest.approx(1.0)


def test_nothing_is_read_back_between_corrections(monkeypatch):
    optimizer = optimizer_of([(4, 4)] * 5)
    SoftnessController(optimizer, mean_q=0.5, every=10)
    run(optimizer, [1.0] * 5, 49)
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self) or original(self))
    run(optimizer, [1.0] * 5, 1)
    assert len(calls) == 2  # the step counts, and the sums
    run(optimizer, [1.0] * 5, 9)
    assert len(calls) == 2


def test_large_tensors_are_sampled():
    """They weigh as much as if all of their scalars had been looked at."""
    optimizer = optimizer_of([(500, 400), (100, 200)])
    controller = SoftnessController(optimizer, mean_q=0.5, rate=1e-12)
    run(optimizer, [0.2, 2.0], 50)
    assert controller.readings[0].measured == pytest.approx(optimizer.get_mask_stats()["mean_q"], rel=0.01)
    # The squared means 0.04 and 4 and the variance 1, weighted by the numbers of scalars.
    assert controller.readings[0].snr == pytest.approx((0.04 * 10 + 4) / 11, rel=0.05)
    # A quarter in columns, which counting through must not hit or miss as a whole.
    p = nn.Parameter(torch.zeros(512, 512))
    optimizer = PRM([p])
    controller = SoftnessController(optimizer, mean_q=0.5, every=1, rate=1e-12)
    for _ in range(30):
        p.grad = torch.randn(512, 512)
        p.grad[:, ::4] += 10
        optimizer.step()
    assert controller.readings[0].measured == pytest.approx(optimizer.get_mask_stats()["mean_q"], rel=0.05)


def test_removed_it_does_nothing():
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, mean_q=0.2, every=1)
    run(optimizer, [1.0], 30)
    controller.remove()
    before = optimizer.param_groups[0]["softness"]
    assert before != 1.0
    run(optimizer, [1.0], 30)
    assert optimizer.param_groups[0]["softness"] == before


def test_a_run_that_overflowed_is_left_alone():
    optimizer = optimizer_of()
    controller = SoftnessController(optimizer, mean_q=0.5)
    run(optimizer, [math.nan], 40)
    assert optimizer.param_groups[0]["softness"] == 1.0
    assert controller.readings[0].held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_types(dtype):
    p = nn.Parameter(torch.zeros(32, 32, dtype=dtype))
    optimizer = PRM([p])
    controller = SoftnessController(optimizer, mean_q=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        real = [0.8 + torch.randn(32, 32, generator=generator) for _ in range(2)]
        p.grad = torch.complex(*real) if dtype.is_complex else real[0].to(dtype)
        optimizer.step()
    assert optimizer.get_mask_stats()["mean_q"] == pytest.approx(0.5, abs=0.05)
    assert controller.readings[0].snr == pytest.approx(0.64, rel=0.2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give one target, mean_q or active_fraction, got mean_q=None and active_fraction=None"),
        ({"mean_q": 0.3, "active_fraction": 0.3}, "give one target"),
        ({"mean_q": 1.0}, "mean_q must be a number between 0 and 1, got 1.0"),
        ({"active_fraction": "half"}, "active_fraction must be a number between 0 and 1, got 'half'"),
        ({"mean_q": 0.3, "every": 0}, "every must be a whole number >= 1, got 0"),
        ({"mean_q": 0.3, "every": 2.5}, "every must be a whole number >= 1, got 2.5"),
        ({"mean_q": 0.3, "rate": 0}, "rate must be a number above 0, and finite, got 0"),
        ({"mean_q": 0.3, "floor": -1}, "floor must be a number above 0, and finite, got -1"),
        ({"mean_q": 0.3, "bounds": (0, 1)}, r"bounds\[0\] must be a number above 0"),
        ({"mean_q": 0.3, "bounds": (3, 2)}, r"bounds must be the least and the largest softness, got \(3, 2\)"),
        ({"mean_q": 0.3, "bounds": (2, 3)}, r"group 0 has softness=1.0, which is not within bounds=\(2.0, 3.0\)"),
        ({"mean_q": 0.3, "groups": [1]}, "groups must be numbers of parameter groups, from 0 to 0, got 1"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        SoftnessController(optimizer_of(), **options)


@pytest.mark.parametrize(
    ("group", "options", "match"),
    [
        ({"mask": "hard"}, {"mean_q": 0.3}, "group 0 has mask='hard', which does not depend on the softness"),
        ({"mask": "none"}, {"mean_q": 0.3}, "no parameter group to control: all have mask='none'"),
        ({"mask": "none"}, {"mean_q": 0.3, "groups": [0]}, "group 0 has mask='none', which does not depend"),
        ({"softness": 0.0}, {"mean_q": 0.3}, "group 0 has softness=0.0: start from one above 0"),
        ({"min_q": 0.3}, {"mean_q": 0.3}, "group 0 has min_q=0.3, which is not below 0.3"),
        ({"min_q": 0.5}, {"active_fraction": 0.3}, "group 0 has min_q=0.5, which is not below 0.5"),
    ],
)
def test_groups_that_cannot_be_controlled(group, options, match):
    with pytest.raises(ValueError, match=match):
        SoftnessController(optimizer_of(**group), **options)


def test_a_group_that_can_be_controlled_no_longer():
    optimizer = optimizer_of()
    SoftnessController(optimizer, mean_q=0.3, every=1)
    optimizer.param_groups[0]["mask"] = "hard"
    with pytest.raises(ValueError, match="group 0 has mask='hard'"):
        run(optimizer, [1.0], 1)


def test_another_optimizer_and_another_state():
    with pytest.raises(TypeError, match=r"needs a popriskmin.PRM, got AdamW"):
        SoftnessController(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), mean_q=0.3)
    controller = SoftnessController(optimizer_of(), mean_q=0.3)
    with pytest.raises(ValueError, match="holds steps alone, got state, param_groups"):
        controller.load_state_dict(controller.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"steps must be a whole number >= 0, got 1\.5"):
        controller.load_state_dict({"steps": 1.5})


def test_the_first_softness_stays_with_its_group():
    """Without its first group, the second goes back to its own start and not to that of the first."""
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
    optimizer = PRM([{"params": [part], "softness": softness} for part, softness in zip(parts, (4.0, 0.5))])
    controller = SoftnessController(optimizer, mean_q=0.9, every=1, rate=0.1, floor=0.5)

    def step():
        for group in optimizer.param_groups:
            (part,) = group["params"]
            part.grad = torch.randn_like(part)  # no signal: the softness may not fall below the start
        optimizer.step()

    for _ in range(20):
        step()
    assert [group["first_softness"] for group in optimizer.param_groups] == [4.0, 0.5]
    del optimizer.param_groups[0]
    optimizer.param_groups[0]["softness"] = 0.25
    for _ in range(20):
        step()
    assert optimizer.param_groups[0]["softness"] == pytest.approx(0.5)
    assert controller.readings[0].held
