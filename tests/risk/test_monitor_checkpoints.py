"""The risk monitor goes on from a checkpoint as if nothing had been."""

import pytest
import torch
from monitored import BUILDS, Line, Memorizer
from steps import through_a_file

from popriskmin import PRM
from popriskmin.risk.monitor import FIELDS, check_state


def saved_and_loaded(parts):
    return through_a_file([part.state_dict() for part in parts])


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


def test_the_pace_goes_on_from_a_checkpoint():
    line = Line(every=None).train(10)
    resumed = Line(every=None)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._sampler._pace is not None
    line.train(60)
    resumed.monitor.load_state_dict(line.monitor.state_dict())
    assert resumed.monitor._sampler._pace is None
    assert resumed.monitor.every == line.monitor.every


GOOD = {
    "format": 1,
    "steps": 4,
    "every": 2,
    "pace": False,
    "samples": torch.ones(2, 3),
    "rows": [],
    "kept": None,
    "held_out": None,
}


def test_a_good_one():
    assert set(GOOD) == set(FIELDS)
    check_state(GOOD, None, held_out=False)
    check_state({**GOOD, "rows": [torch.ones(4, 2)] * 2}, "parameter", held_out=False)
    check_state({**GOOD, "held_out": {}}, None, held_out=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"steps": "4"}, "steps is '4'"),
        ({"samples": torch.ones(3)}, "samples is no table of three columns"),
        ({"format": None}, "format None"),
        ({"format": 99}, r"format 99.*formats up to 1"),
        ({"rows": [torch.ones(4, 2)] * 2}, "other parts than this one, which has by=None"),
        ({"held_out": {}}, "has held-out losses, and this one no held_out"),
    ],
)
def test_bad_ones_are_named(part, message):
    with pytest.raises(ValueError, match=message):
        check_state({**GOOD, **part}, None, held_out=False)


def test_what_this_monitor_needs_has_to_be_there():
    with pytest.raises(ValueError, match="has by='group'"):
        check_state(GOOD, "group", held_out=False)
    with pytest.raises(ValueError, match="has no held-out losses, and this one held_out"):
        check_state(GOOD, None, held_out=True)
    with pytest.raises(ValueError, match="it lacks every, format, held_out, kept, pace, rows, samples, steps"):
        check_state({}, None, held_out=False)
