"""When samples are taken, what they add up to, and the pace that keeps them to a share of the time."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.risk import samples
from popriskmin.risk.samples import Pace, Sample, Sampler, Series, Smoothed, by_part


def run(sampler, optimizer, steps):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        sampler.gradients_ready()
        optimizer.step()
        sampler.step_ended()
    return sampler


def sampler_of(optimizer, every=2, counts=(None, None), by=None):
    return Sampler(optimizer, every, counts, replacement=False, smoothing=50, by=by)


def test_a_sample_is_finished_by_the_gradients_of_the_next_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    sampler = run(sampler_of(optimizer, every=3), optimizer, 3)
    assert sampler.awaits_gradients
    assert sampler.series().samples == []
    run(sampler, optimizer, 1)
    assert not sampler.awaits_gradients
    assert [sample.step for sample in sampler.series().samples] == [3]


def test_passes_are_those_of_the_group_that_has_seen_least():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = PRM([{"params": [first], "n_dataset": 40, "batch_size": 10}, {"params": [second]}])
    sampler = run(sampler_of(optimizer), optimizer, 6)
    assert sampler.passes() == 1.5
    assert run(sampler_of(optimizer, counts=(10, 120)), optimizer, 6).passes() == 1.0  # of twelve steps in all
    optimizer.param_groups[1].update(n_dataset=240, batch_size=10)
    assert sampler.passes() == 0.5
    assert sampler.steps_of_a_pass() == 24
    assert sampler_of(optimizer, counts=(10, 125)).steps_of_a_pass() == 13
    without = sampler_of(torch.optim.AdamW([first]))
    assert without.passes() is without.steps_of_a_pass() is None


@pytest.mark.parametrize("by", ["group", "parameter"])
def test_rows_of_parts_do_not_hold_on_to_the_whole_table(by):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
    sampler = run(sampler_of(optimizer, every=1, by=by), optimizer, 20)
    assert {len(samples) for samples in sampler.parts(by).values()} == {19}
    assert all(rows.untyped_storage().nbytes() == rows.numel() * 8 for rows in sampler.state_dict()["rows"])


def series(*rows):
    filled = Series(smoothing=50)
    for row in rows:
        filled.add(Sample(*row))
    return filled


def test_the_two_ends_and_their_totals():
    estimate = series((2, 1.0, 0.4), (4, 1.0, 0.4), (8, 3.0, 0.4)).estimate(9)
    # From the start to the first sample the fall is taken to be that of the first; between samples it changes evenly.
    assert estimate.fresh_total == pytest.approx(2 * 1.0 + 2 * 1.0 + 4 * 2.0)
    assert estimate.reused_total == pytest.approx(estimate.fresh_total - 8 * 0.4)
    assert estimate.fresh - estimate.reused == pytest.approx(0.4)
    assert estimate.fresh_stderr == pytest.approx(estimate.reused_stderr)
    assert 1 < estimate.fresh < 3
    assert estimate.steps == 9


def test_neighbours_that_share_a_product_count_for_less():
    values = [1.0, 2.0, 0.0, 1.5, 0.5, 2.0]
    near = series(*[(i + 1, value, 0.0) for i, value in enumerate(values)]).estimate(6)
    far = Series(smoothing=100)  # the same ages
    for i, value in enumerate(values):
        far.add(Sample(2 * i + 2, value, 0.0))
    assert near.fresh == pytest.approx(far.estimate(12).fresh)
    assert near.fresh_stderr == pytest.approx(2 * far.estimate(12).fresh_stderr)


@pytest.mark.parametrize("wrong", [(3, math.nan, 0.0), (3, math.inf, 0.0), (3, 0.0, math.nan)])
def test_a_sample_that_is_not_finite_is_noted_and_left_out(wrong):
    broken = series((1, 1.0, 0.0), (2, 1.0, 0.0), wrong)
    assert not broken.finite
    estimate = broken.estimate(3)
    assert all(map(math.isnan, estimate[:-1]))
    broken.add(Sample(4, 1.0, 0.0))
    assert broken.finite
    assert broken.estimate(4) == series((1, 1.0, 0.0), (2, 1.0, 0.0), (4, 1.0, 0.0)).estimate(4)


def test_before_the_second_sample_there_is_no_standard_error():
    assert math.isnan(series((1, 1.0, 0.0)).estimate(1).fresh_stderr)
    assert math.isnan(series().estimate(0).fresh)


def test_the_mean_is_weighted_by_age():
    smoothed = Smoothed(fewest=1)
    for value in (4.0, 1.0):
        smoothed.add(0.5, 0.0, value)
    weight = math.exp(-0.5)
    assert smoothed.mean == pytest.approx((4 * weight + 1) / (weight + 1))
    assert smoothed.count == 2


def test_long_gaps_still_leave_the_fewest_samples():
    smoothed = Smoothed(fewest=5)
    for value in range(1000):
        smoothed.add(1e9, 0.0, float(value))
    assert 999 - smoothed.mean == pytest.approx(1 / (math.exp(1 / 5) - 1), rel=1e-6)


@pytest.mark.parametrize("trend", [0.0, 0.05])
def test_the_standard_error_is_that_of_the_mean(trend):
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        smoothed = Smoothed(fewest=1)
        for i in range(100):
            smoothed.add(0.1, 0.0, trend * i + rng.normal())
        means.append(smoothed.mean)
        errors.append(smoothed.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_standard_error_of_neighbours_that_are_alike(share):
    """Neighbours share a part of their noise, and those further apart nothing."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    correlation = share / (1 + share**2)
    for _ in range(300):
        smoothed, noise = Smoothed(fewest=1), rng.normal(size=301)
        for value in noise[1:] + share * noise[:-1]:
            smoothed.add(0.02, correlation, value)
        means.append(smoothed.mean)
        errors.append(smoothed.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_one_sample_has_no_standard_error():
    smoothed = Smoothed(fewest=3)
    smoothed.add(1.0, 0.0, 2.0)
    assert math.isnan(smoothed.stderr)
    assert math.isnan(Smoothed(fewest=3).mean)


A, B, C = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
NAMED = [{"params": [A, B], "param_names": ["a", "b"]}, {"params": [C], "param_names": ["c"]}]
SAMPLES = [Sample(2, 6.0, 0.6), Sample(4, 60.0, 0.0)]
ROWS = [torch.tensor([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]), torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])]


def values(found):
    return {name: [(sample.step, round(sample.fresh, 6)) for sample in samples] for name, samples in found.items()}


def test_parameters_by_name_and_groups_as_their_sums():
    found = by_part(SAMPLES, ROWS, NAMED, "parameter", "parameter")
    assert values(found) == {"a": [(2, 1), (4, 10)], "b": [(2, 2), (4, 20)], "c": [(2, 3), (4, 30)]}
    assert found["b"][0].influence == ROWS[0][1, 1].item()
    assert values(by_part(SAMPLES, ROWS, NAMED, "parameter", "group")) == {
        "group 0": [(2, 3), (4, 30)],
        "group 1": [(2, 3), (4, 30)],
    }


def test_without_names_places_stand_for_them():
    unnamed = [{"params": [A, B]}, {"params": [C]}]
    assert list(by_part(SAMPLES, ROWS, unnamed, "parameter", "parameter")) == ["0", "1", "2"]


def test_what_came_in_later_has_samples_from_then_on():
    found = by_part(SAMPLES, [ROWS[0][:2], ROWS[1]], NAMED, "parameter", "parameter")
    assert values(found) == {"a": [(2, 1), (4, 10)], "b": [(2, 2), (4, 20)], "c": [(4, 30)]}
    groups = by_part(SAMPLES, [ROWS[0][:1], ROWS[1][:2]], NAMED, "group", "group")
    assert values(groups) == {"group 0": [(2, 1), (4, 10)], "group 1": [(4, 20)]}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("step", "sample", "share", "every"),
    [
        (1.0, 0.001, 0.01, 1),
        (1.0, 0.0099, 0.01, 1),
        (1.0, 0.011, 0.01, 2),
        (1.0, 1.0, 0.01, 128),
        (0.001, 0.01, 0.01, 1024),
        (1.0, 1.0, 0.05, 32),
    ],
)
def test_the_smallest_power_of_two_within_the_share(clock, step, sample, share, every):
    timed = Pace(share)
    for i in range(1, 1000):
        clock[0] += step
        timed.step_ended()
        if timed.known:
            break
        if i % 8 == 0:  # half of it after a step, half before the next
            with timed.spending():
                clock[0] += sample / 2
            with timed.spending():
                clock[0] += sample / 2
    assert i == 8 * samples.TIMED + 1
    assert timed.every() == every


def test_a_clock_that_stands_still_is_no_division_by_zero(clock):
    timed = Pace()
    for _ in range(samples.TIMED + 2):
        timed.step_ended()
        with timed.spending():
            pass
    assert timed.known
    assert timed.every() == 1


def test_steps_without_samples_are_not_enough(clock):
    timed = Pace()
    for _ in range(100):
        clock[0] += 1
        timed.step_ended()
    assert not timed.known
