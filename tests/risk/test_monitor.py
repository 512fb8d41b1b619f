"""The risk monitor: what it says, that it changes nothing, and what it refuses."""

import copy
import io
import itertools
import math

import pytest
import torch
from conftest import TORCH
from torch import nn

from popriskmin import PRM
from popriskmin.risk.monitor import FEWEST_SAMPLES, RiskEstimate, RiskMonitor, Sample

BUILDS = {"PRM": PRM, "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


class Line:
    """A noisy linear regression on fresh data, with what a monitor is asked for."""

    def __init__(self, build=PRM, monitored=True, every=2, **options):
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Linear(20, 1)
        self.optimizer = build(self.model.parameters(), lr=1e-2)
        self.monitor = RiskMonitor(self.optimizer, every=every, **options) if monitored else None

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(16, 20, generator=self.generator)
            y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=self.generator)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def risk(self):
        """The population risk of the model, exactly."""
        return ((self.model.weight - 1).square().sum() + self.model.bias.square().sum() + 1).item()


@pytest.mark.parametrize("name", BUILDS)
def test_it_follows_the_risk_on_fresh_data(name):
    line = Line(BUILDS[name])
    start = line.risk()
    line.train(150)
    estimate = line.monitor.estimate()
    assert isinstance(estimate, RiskEstimate)
    assert estimate.steps == 150
    assert estimate.total == pytest.approx(start - line.risk(), rel=0.15)
    assert estimate.fresh == estimate.reused == estimate.per_step
    assert 0 < estimate.stderr < estimate.per_step
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


@pytest.mark.parametrize("name", ["PRM", "AdamW"])
def test_it_says_overfitting_when_only_noise_is_left_to_fit(name):
    """Labels that are noise, few of them, used again and again: all there is to learn is how they came out."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 40), torch.randn(60, 1)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = BUILDS[name](model.parameters(), lr=3e-3)
    monitor = RiskMonitor(optimizer, every=2, n_dataset=60, batch_size=10, unfitted=1.0)
    first = None
    for epoch in range(40):
        for rows in torch.randperm(60).split(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if first is None and monitor.overfitting:
            first = epoch
    assert first is not None
    estimate = monitor.estimate()
    assert estimate.reused < estimate.fresh
    assert estimate.per_step == pytest.approx(estimate.reused)


def test_the_share_that_is_unfitted_places_the_estimate_between_its_ends():
    def estimate(**options):
        return Line(n_dataset=100, batch_size=16, **options).train(60).monitor.estimate()

    half, none, whole = (estimate(unfitted=share) for share in (0.5, 0.0, 1.0))
    assert half.fresh == none.fresh == none.per_step
    assert half.reused == pytest.approx(whole.per_step)
    assert whole.per_step < half.per_step < half.fresh
    assert half.per_step == pytest.approx((half.fresh + half.reused) / 2)
    # Batches with replacement may share examples, so nothing of their products is missing.
    assert estimate(replacement=True).fresh < half.fresh


def test_the_first_pass_over_the_data_is_fresh():
    line = Line(n_dataset=640, batch_size=16).train(40)
    assert all(sample.influence == 0 for sample in line.monitor.samples)
    assert line.train(10).monitor.samples[-1].influence > 0


def test_counts_come_from_the_groups_of_prm_as_they_stand():
    line = Line(lambda params, lr: PRM(params, lr=lr, n_dataset=32, batch_size=16))
    assert line.train(10).monitor.samples[-1].influence > 0
    line.optimizer.param_groups[0]["n_dataset"] = None
    assert line.train(2).monitor.samples[-1].influence == 0


def test_samples_are_kept_and_add_up_to_the_total():
    line = Line(every=5).train(23)
    samples = line.monitor.samples
    assert [sample.step for sample in samples] == [5, 10, 15, 20]
    assert isinstance(samples[0], Sample)
    fresh = [samples[0].fresh, *(sample.fresh for sample in samples)]
    trapezoid = sum(5 * (a + b) / 2 for a, b in itertools.pairwise(fresh))
    assert line.monitor.estimate().total == pytest.approx(trapezoid)


def test_many_samples_do_not_pile_up_on_the_device():
    line = Line(every=1).train(600)
    assert len(line.monitor._waiting) < 300
    assert len(line.monitor.samples) == 599


@pytest.mark.parametrize("name", BUILDS)
def test_going_on_from_a_checkpoint_is_the_uninterrupted_run(name):
    whole = Line(BUILDS[name], n_dataset=100, batch_size=16).train(60)
    half = Line(BUILDS[name], n_dataset=100, batch_size=16).train(30)
    file = io.BytesIO()
    parts = [half.model, half.optimizer, half.monitor]
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    resumed = Line(BUILDS[name], every=7, n_dataset=100, batch_size=16)
    resumed.generator = half.generator
    states = torch.load(file, weights_only=True)
    for part, state in zip((resumed.model, resumed.optimizer, resumed.monitor), states):
        part.load_state_dict(state)
    resumed.train(30)
    assert resumed.monitor.estimate() == whole.monitor.estimate()
    assert resumed.monitor.samples == whole.monitor.samples


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost():
    line = Line().train(20)
    before = line.monitor.estimate()
    with pytest.raises(ValueError, match="it lacks every, format, pace, samples, steps, variances"):
        line.monitor.load_state_dict({})
    with pytest.raises(ValueError, match=r"format 99.*up to 1"):
        line.monitor.load_state_dict({**line.monitor.state_dict(), "format": 99})
    for part, message in (
        ({"every": 0}, "every is 0"),
        ({"samples": torch.ones(3)}, "samples is no table"),
        ({"format": None}, "format None"),
    ):
        with pytest.raises(ValueError, match=message):
            line.monitor.load_state_dict({**line.monitor.state_dict(), **part})
    assert line.monitor.estimate() == before


@pytest.mark.parametrize(("count", "said"), [(FEWEST_SAMPLES - 1, False), (FEWEST_SAMPLES, True)])
def test_overfitting_is_not_said_of_a_handful_of_samples(count, said):
    line = Line(every=2)
    samples = [[2.0 * i, -1.0 - 0.01 * (i % 2), 0.0] for i in range(1, count + 1)]
    line.monitor.load_state_dict({**line.monitor.state_dict(), "samples": torch.tensor(samples, dtype=torch.float64)})
    assert line.monitor.overfitting is said


def test_overfitting_needs_confidence():
    line = Line(every=2, confidence=0.95)
    scattered = [[2.0 * i, -0.2 + (-1.0) ** i, 0.0] for i in range(1, 40)]
    line.monitor.load_state_dict({**line.monitor.state_dict(), "samples": torch.tensor(scattered, dtype=torch.float64)})
    assert line.monitor.estimate().per_step < 0
    assert not line.monitor.overfitting
    line.monitor.confidence = 0.51
    assert line.monitor.overfitting


def test_before_the_first_sample():
    line = Line(every=10)
    with pytest.raises(RuntimeError, match=r"no sample yet: the optimizer has taken 0 steps.*every 10"):
        line.monitor.estimate()
    line.train(9)
    assert not line.monitor.overfitting
    with pytest.raises(RuntimeError, match="has taken 9 steps"):
        line.monitor.estimate()


def test_without_a_number_it_finds_its_own_pace():
    line = Line(every=None).train(8)
    assert [sample.step for sample in line.monitor.samples] == [8]
    every = line.train(40).monitor.every
    assert every >= 1
    assert every & (every - 1) == 0
    line.train(2 * every)
    assert line.monitor.samples[-1].step % every == 0


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
        assert monitor.estimate().per_step > 0


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"every": 2.5}, "every must be a whole number >= 1, got 2.5"),
        ({"smoothing": -1}, "smoothing must be a whole number >= 1, got -1"),
        ({"unfitted": 2}, "unfitted must be a share from 0 to 1, got 2"),
        ({"unfitted": "a"}, "unfitted must be a share from 0 to 1, got 'a'"),
        ({"confidence": 0.5}, "confidence must be between 0.5 and 1, got 0.5"),
        ({"confidence": None}, "confidence must be between 0.5 and 1, got None"),
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
    with pytest.raises(TypeError, match=r"reads popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, got SGD"):
        RiskMonitor(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(ValueError, match=r"betas\[0\] > 0.*got 0"):
        RiskMonitor(torch.optim.AdamW([w], betas=(0.0, 0.9)))
    optimizer = torch.optim.AdamW([w])
    RiskMonitor(optimizer, every=1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": (0.0, 0.9)})
    with pytest.raises(ValueError, match=r"betas\[0\] > 0.*got 0"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_is_seen():
    line = Line(every=1).train(10)
    line.model.weight.grad = torch.full_like(line.model.weight, math.nan)
    line.optimizer.step()
    assert math.isnan(line.monitor.estimate().per_step)
    assert not line.monitor.overfitting


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
    assert math.isfinite(monitor.estimate().per_step)


def test_steps_before_it_was_attached_count_as_a_pass():
    line = Line(monitored=False).train(40)
    monitor = RiskMonitor(line.optimizer, every=2, n_dataset=100, batch_size=16)
    line.train(4)
    assert monitor.samples[-1].influence > 0


def test_the_pace_goes_on_from_a_checkpoint():
    line = Line(every=None).train(10)
    resumed = Line(every=None)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._pace is not None
    line.train(50)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._pace is None
    assert resumed.monitor.every == line.monitor.every


@pytest.mark.parametrize("every", [1, 2, 8])
def test_the_standard_error_allows_for_samples_that_share_gradients(every):
    """At rest, on noise alone, smoothed estimates scatter as their standard error says."""
    torch.manual_seed(0)
    values, errors = [], []
    for _ in range(25):
        w = nn.Parameter(torch.zeros(200))
        optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0)
        monitor = RiskMonitor(optimizer, every=every)
        for step in range(1, 401):
            w.grad = torch.randn(200)
            optimizer.step()
            if step % 100 == 0 and step > 100:
                values.append(monitor.estimate().per_step)
                errors.append(monitor.estimate().stderr)
    spread = torch.tensor(values).std().item()
    assert 0.6 < torch.tensor(errors).mean().item() / spread < 1.7
