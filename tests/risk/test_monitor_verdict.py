"""The risk monitor's verdict, with held-out examples and without."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monitored import BUILDS, Line, Memorizer

from popriskmin import PRM
from popriskmin.risk import RiskEstimate
from popriskmin.risk.held_out import IMPROVING, OVERFITTING, UNCLEAR
from popriskmin.risk.monitor import FEWEST_FOR_A_VERDICT, of_ends, quantile_over_looks


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


def estimate(fresh, reused, stderr=0.1):
    return RiskEstimate(fresh, reused, stderr, stderr, 0.0, 0.0, 100)


@pytest.mark.parametrize(
    ("fresh", "reused", "said"),
    [
        (1.0, 0.5, IMPROVING),
        (1.0, 0.1, UNCLEAR),  # 0.1 is one standard error
        (1.0, -0.5, UNCLEAR),
        (0.1, -0.5, UNCLEAR),
        (-0.1, -0.5, UNCLEAR),
        (-0.5, -1.0, OVERFITTING),
    ],
)
def test_both_ends_have_to_agree(fresh, reused, said):
    assert of_ends(estimate(fresh, reused), 0.95, looks=1, reused=True) == said


def test_what_comes_once_cannot_be_overfitted():
    assert of_ends(estimate(-1.0, -1.0), 0.95, looks=1, reused=False) == UNCLEAR
    assert of_ends(estimate(1.0, 1.0), 0.95, looks=1, reused=False) == IMPROVING


def test_the_more_looks_the_more_an_alarm_has_to_show():
    assert of_ends(estimate(-0.3, -0.3), 0.95, looks=1, reused=True) == OVERFITTING
    assert of_ends(estimate(-0.3, -0.3), 0.95, looks=100, reused=True) == UNCLEAR
    assert of_ends(estimate(0.3, 0.3), 0.95, looks=100, reused=True) == IMPROVING


@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0.6, 0.95]), st.integers(1, 1000), st.booleans())
def test_without_a_standard_error_nothing_is_claimed(fresh, reused, confidence, looks, again):
    assert of_ends(estimate(fresh, reused, math.nan), confidence, looks, again) == UNCLEAR
    assert of_ends(estimate(math.nan, math.nan), confidence, looks, again) == UNCLEAR


@given(st.floats(0.51, 0.999))
def test_all_looks_together_err_with_no_more_than_the_confidence_leaves(confidence):
    chances = [0.5 * math.erfc(quantile_over_looks(confidence, n) / math.sqrt(2)) for n in range(1, 400)]
    assert sum(chances) == pytest.approx((1 - confidence) * (1 - 1 / 400), rel=1e-3)
