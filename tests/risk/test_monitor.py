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
from popriskmin.risk.monitor import FEWEST_FOR_A_VERDICT, RiskMonitor
from popriskmin.risk.series import RiskEstimate, Sample

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


class Memorizer:
    """Labels that are noise, few of them, used again and again: all there is to learn is how they came out."""

    def __init__(self, build, lr=3e-3, **options):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(120, 40), torch.randn(120, 1)
        self.model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
        self.optimizer = build(self.model.parameters(), lr=lr)
        if "keep_best" in options:
            options["keep_best"] = self.model
        if "held_out" in options:
            options["held_out"] = self.losses
        self.monitor = RiskMonitor(self.optimizer, every=2, n_dataset=60, batch_size=10, **options)

    def losses(self):
        self.model.eval()
        losses = (self.model(self.x[60:]) - self.y[60:]).square()[:, 0]
        self.model.train()
        return losses

    def passes(self, count):
        for _ in range(count):
            for rows in torch.randperm(60).split(10):
                self.optimizer.zero_grad()
                nn.functional.mse_loss(self.model(self.x[rows]), self.y[rows]).backward()
                self.optimizer.step()
        return self


@pytest.mark.parametrize("name", ["PRM", "AdamW"])
def test_without_held_out_examples_it_does_not_claim_to_know(name):
    """What the network learns by heart lies between the ends; no constant decides."""
    memorizer = Memorizer(BUILDS[name])
    said = [memorizer.passes(1).monitor.verdict for _ in range(60)]
    estimate = memorizer.monitor.estimate()
    assert estimate.reused < 0 < estimate.fresh
    assert "overfitting" not in said
    assert said[-1] == "unclear"
    assert said[:16] == [None] * 16  # 16 passes of 6 steps are 48 samples
    assert said[16] is not None


@pytest.mark.parametrize("name", ["PRM", "AdamW"])
def test_with_them_it_says_overfitting_and_gives_the_best_weights_back(name):
    memorizer = Memorizer(BUILDS[name], held_out=True, held_out_every=2, keep_best=True)
    monitor = memorizer.monitor
    for _ in range(60):
        memorizer.passes(1)
        if monitor.overfitting:
            break
    assert monitor.verdict == "overfitting"
    memorizer.passes(20)
    worse = memorizer.losses().mean()
    step = monitor.restore_best()
    assert step == monitor.best_step < 60
    curve = dict(monitor.held_out_curve)
    with torch.no_grad():
        assert memorizer.losses().mean().item() == pytest.approx(curve[step], rel=1e-5)
    assert curve[step] < worse


def test_looks_come_once_a_pass_where_that_is_known():
    memorizer = Memorizer(PRM, held_out=True).passes(5)
    assert [step for step, _ in memorizer.monitor.held_out_curve] == [0, 6, 12, 18, 24, 30]


def test_held_out_examples_change_nothing_but_the_verdict():
    plain, watched = Memorizer(PRM), Memorizer(PRM, held_out=True, held_out_every=3)
    torch.manual_seed(1)
    plain.passes(5)
    torch.manual_seed(1)
    watched.passes(5)
    for a, b in zip(plain.model.parameters(), watched.model.parameters()):
        assert torch.equal(a, b)
    assert plain.monitor.samples == watched.monitor.samples
    assert watched.monitor.held_out_curve[0][0] == 0
    assert plain.monitor.held_out_curve == []
    assert plain.monitor.best_step is None


def test_fresh_data_is_never_said_to_be_overfitted():
    """What is seen once cannot be learnt by heart, even where steps do harm."""
    line = Line(torch.optim.AdamW, every=1).train(100)
    line.optimizer.param_groups[0]["lr"] = -1e-2  # uphill
    line.train(200)
    estimate = line.monitor.estimate()
    assert estimate.fresh + 4 * estimate.fresh_stderr < 0
    assert line.monitor.verdict == "unclear"


def test_steps_that_go_uphill_on_the_training_set_are_said_to_do_harm():
    """Both ends below 0: training that climbs, which the verdict has no other word for."""
    line = Line(torch.optim.AdamW, every=1, n_dataset=320, batch_size=16, replacement=True).train(100)
    assert line.monitor.verdict == "improving"
    line.optimizer.param_groups[0]["lr"] = -1e-2
    line.train(200)
    assert line.monitor.overfitting


def test_nothing_is_said_before_a_whole_pass_and_fifty_samples():
    line = Line(every=1, n_dataset=960, batch_size=16).train(59)
    assert line.monitor.verdict is None
    assert line.train(1).monitor.verdict == "improving"
    line = Line(every=2, n_dataset=32, batch_size=16).train(2 * FEWEST_FOR_A_VERDICT)
    assert line.monitor.verdict is None
    assert line.train(1).monitor.verdict is not None  # it brings the gradients of the fiftieth


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


def saved_and_loaded(parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [29, 30])  # between the two steps of a sample, and not
@pytest.mark.parametrize("name", BUILDS)
def test_going_on_from_a_checkpoint_is_the_uninterrupted_run(name, at):
    options = {"n_dataset": 100, "batch_size": 16, "by": "parameter"}
    whole = Line(BUILDS[name], **options).train(60)
    half = Line(BUILDS[name], **options).train(at)
    states = saved_and_loaded([half.model, half.optimizer, half.monitor])
    resumed = Line(BUILDS[name], every=7, **options)
    resumed.generator = half.generator
    for part, state in zip((resumed.model, resumed.optimizer, resumed.monitor), states):
        part.load_state_dict(state)
    resumed.train(60 - at)
    assert resumed.monitor.estimate() == whole.monitor.estimate()
    assert resumed.monitor.samples == whole.monitor.samples
    assert resumed.monitor.parts == whole.monitor.parts


def test_held_out_judgements_go_on_from_a_checkpoint():
    options = {"held_out": True, "held_out_every": 2, "keep_best": True}
    half = Memorizer(PRM, **options).passes(4)
    states = saved_and_loaded([half.model, half.optimizer, half.monitor])
    resumed = Memorizer(PRM, **options)
    for part, state in zip((resumed.model, resumed.optimizer, resumed.monitor), states):
        part.load_state_dict(state)
    for memorizer in (half, resumed):
        torch.manual_seed(2)
        memorizer.passes(20)
    assert resumed.monitor.held_out_curve == half.monitor.held_out_curve
    assert resumed.monitor.verdict == half.monitor.verdict
    assert resumed.monitor.restore_best() == half.monitor.restore_best()
    for a, b in zip(resumed.model.parameters(), half.model.parameters()):
        assert torch.equal(a, b)


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost():
    line = Line().train(20)
    before = line.monitor.estimate()
    wrong = {**line.monitor.state_dict()["kept"], "gradients": {0: torch.ones(3)}}
    for part, message in (
        ({"every": 0}, "every is 0"),
        ({"format": 99}, r"format 99.*up to 1"),
        ({"kept": wrong}, r"parameter 0 has a gradient of shape \(3,\), expected \(1, 20\)"),
    ):
        with pytest.raises(ValueError, match=message):
            line.monitor.load_state_dict({**line.monitor.state_dict(), **part})
    assert line.monitor.estimate() == before


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
    with pytest.raises(TypeError, match=r"reads popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, got SGD"):
        RiskMonitor(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(TypeError, match="held_out must be a function that returns losses, got Tensor"):
        RiskMonitor(torch.optim.AdamW([w]), held_out=torch.ones(3))


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


def test_the_pace_goes_on_from_a_checkpoint():
    line = Line(every=None).train(10)
    resumed = Line(every=None)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._sampler._pace is not None
    line.train(60)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._sampler._pace is None
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
                values.append(monitor.estimate().fresh)
                errors.append(monitor.estimate().fresh_stderr)
    spread = torch.tensor(values).std().item()
    assert 0.6 < torch.tensor(errors).mean().item() / spread < 1.7
