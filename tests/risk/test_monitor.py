"""The risk monitor: what it estimates, that it changes nothing, and what it refuses."""

import itertools

import pytest
import torch
from monitored import BUILDS, Line
from torch import nn

from popriskmin import PRM
from popriskmin.risk.monitor import RiskMonitor
from popriskmin.risk.samples import RiskEstimate, Sample


@pytest.mark.parametrize("name", BUILDS)
def test_it_follows_the_risk_on_fresh_data(name):
    line = Line(BUILDS[name])
    start = line.risk()
    line.train(150)
    estimate = line.monitor.estimate()
    assert isinstance(estimate, RiskEstimate)
    assert estimate.steps == 150
    assert estimate.fresh_total == pytest.approx(start - line.risk(), rel=0.15)
    assert estimate.fresh == estimate.reused
    assert estimate.fresh_total == estimate.reused_total
    assert 0 < estimate.fresh_stderr == estimate.reused_stderr < estimate.fresh
    assert line.monitor.verdict == "improving"
    assert not line.monitor.overfitting


@pytest.mark.parametrize("name", BUILDS)
def test_it_changes_nothing(name):
    watched, alone = Line(BUILDS[name], every=1).train(20), Line(BUILDS[name], monitored=False).train(20)
    assert watched.monitor.estimate().steps == 20
    for a, b in zip(watched.model.parameters(), alone.model.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(watched.optimizer.state.values(), alone.optimizer.state.values()):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_reuse_sets_the_two_ends():
    fresh, passes, drawn = (
        Line(n_dataset=n, batch_size=16 if n else None, replacement=replacement).train(60).monitor.estimate()
        for n, replacement in ((None, False), (100, False), (100, True))
    )
    assert passes.reused < fresh.fresh < passes.fresh
    # Batches with replacement may share examples, so nothing of their products is missing.
    assert drawn.fresh == pytest.approx(fresh.fresh)
    assert drawn.reused < drawn.fresh


def test_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 1e-2}]
    optimizer = PRM(groups, lr=1e-3)
    by_parameter, by_group = (RiskMonitor(optimizer, every=2, by=by) for by in ("parameter", "group"))
    plain = RiskMonitor(optimizer, every=2)
    for _ in range(41):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
        optimizer.step()
    whole = plain.estimate()
    for monitor, by in ((by_parameter, "parameter"), (by_parameter, "group"), (by_group, "group")):
        found = monitor.estimate(by=by)
        assert len(found) == {"parameter": 4, "group": 2}[by]
        assert sum(part.fresh for part in found.values()) == pytest.approx(whole.fresh, rel=1e-4)
        assert sum(part.fresh_total for part in found.values()) == pytest.approx(whole.fresh_total, rel=1e-4)
    assert by_parameter.estimate(by="group")["group 1"].fresh == pytest.approx(
        by_group.estimate(by="group")["group 1"].fresh, rel=1e-4
    )
    parts = by_parameter.parts
    assert [len(samples) for samples in parts.values()] == [20] * 4
    total = [sum(samples[i].fresh for samples in parts.values()) for i in range(20)]
    assert total == pytest.approx([sample.fresh for sample in plain.samples], rel=1e-4, abs=1e-9)
    with pytest.raises(ValueError, match=r"by='parameter' is not kept by a RiskMonitor with by='group'"):
        by_group.estimate(by="parameter")
    with pytest.raises(ValueError, match=r"by='layer' is not kept"):
        by_parameter.estimate(by="layer")
    with pytest.raises(RuntimeError, match='give it by="parameter"'):
        _ = plain.parts


def test_parameters_are_called_by_their_names():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = PRM(model.named_parameters())
    monitor = RiskMonitor(optimizer, every=1, by="parameter")
    for _ in range(4):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert list(monitor.estimate(by="parameter")) == ["weight", "bias"]


def test_the_first_pass_over_the_data_is_fresh():
    line = Line(n_dataset=640, batch_size=16).train(41)
    assert all(sample.influence == 0 for sample in line.monitor.samples)
    assert line.train(10).monitor.samples[-1].influence != 0


def test_counts_come_from_the_groups_of_prm_as_they_stand():
    line = Line(lambda params, lr: PRM(params, lr=lr, n_dataset=32, batch_size=16))
    assert line.train(11).monitor.samples[-1].influence != 0
    line.optimizer.param_groups[0]["n_dataset"] = None
    assert line.train(2).monitor.samples[-1].influence == 0


def test_samples_are_kept_and_add_up_to_the_total():
    line = Line(every=5).train(23)
    samples = line.monitor.samples
    assert [sample.step for sample in samples] == [5, 10, 15, 20]
    assert isinstance(samples[0], Sample)
    fresh = [samples[0].fresh, *(sample.fresh for sample in samples)]
    trapezoid = sum(5 * (a + b) / 2 for a, b in itertools.pairwise(fresh))
    assert line.monitor.estimate().fresh_total == pytest.approx(trapezoid)


def test_many_samples_do_not_pile_up_on_the_device():
    line = Line(every=1).train(600)
    assert len(line.monitor._sampler._waiting) < 300
    assert len(line.monitor.samples) == 599


def test_before_the_first_sample():
    line = Line(every=10)
    with pytest.raises(RuntimeError, match=r"no sample yet: the optimizer has taken 0 steps.*every 10"):
        line.monitor.estimate()
    line.train(9)
    assert not line.monitor.overfitting
    with pytest.raises(RuntimeError, match="has taken 9 steps"):
        line.monitor.estimate()
    with pytest.raises(RuntimeError, match="has taken 10 steps"):
        line.train(1).monitor.estimate()
    assert line.train(1).monitor.estimate().steps == 11
    with pytest.raises(RuntimeError, match="give RiskMonitor held_out and keep_best"):
        line.monitor.restore_best()


def test_without_a_number_it_finds_its_own_pace():
    line = Line(every=None).train(9)
    assert [sample.step for sample in line.monitor.samples] == [8]
    every = line.train(48).monitor.every
    assert every >= 1
    assert every & (every - 1) == 0
    line.train(2 * every + 1)
    assert line.monitor.samples[-1].step % every == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"every": 2.5}, "every must be a whole number >= 1, got 2.5"),
        ({"smoothing": -1}, "smoothing must be a whole number >= 1, got -1"),
        ({"by": "layer"}, "by must be one of group, parameter, or None, got 'layer'"),
        ({"held_out_every": 0}, "held_out_every must be a whole number >= 1, got 0"),
        ({"held_out_every": 5}, "give held_out too"),
        ({"keep_best": nn.Linear(1, 1)}, "give held_out too"),
        ({"confidence": 0.5}, "confidence must be between 0.5 and 1, got 0.5"),
        ({"confidence": "high"}, "confidence must be between 0.5 and 1, got 'high'"),
        ({"replacement": "no"}, "replacement must be True or False, got 'no'"),
        ({"n_dataset": 100.5, "batch_size": 10}, "n_dataset must be a whole number >= 1, got 100.5"),
        ({"n_dataset": 100, "batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"n_dataset": 100}, "n_dataset and batch_size are needed together, got n_dataset=100 and batch_size=None"),
        ({"n_dataset": 10, "batch_size": 10}, "n_dataset must be larger than batch_size"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Line(**options)


def test_optimizers_that_it_cannot_read():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(
        TypeError, match=r"popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, .* give it held_out, got SGD"
    ):
        RiskMonitor(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(TypeError, match="held_out must be a function that returns losses, got Tensor"):
        RiskMonitor(torch.optim.AdamW([w]), held_out=torch.ones(3))


@pytest.mark.parametrize("every", [1, 2, 8])
def test_the_standard_error_allows_for_samples_that_share_gradients(every):
    """At rest, on noise alone, smoothed estimates scatter as their standard error says."""
    torch.manual_seed(0)
    values, errors = [], []
    for _ in range(15):
        w = nn.Parameter(torch.zeros(200))
        optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0)
        monitor = RiskMonitor(optimizer, every=every)
        for step in range(1, 401):
            w.grad = torch.randn(200)
            optimizer.step()
            if step % 100 == 0 and step > 100:
                values.append(monitor.estimate().fresh)
                errors.append(monitor.estimate().fresh_stderr)
    spread = torch.tensor(values).std().item()
    assert 0.6 < torch.tensor(errors).mean().item() / spread < 1.7
