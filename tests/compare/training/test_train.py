"""One run: its records, its random numbers, and what it makes of trouble."""

import json
import random
import re

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch import nn

from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.runner import factors
from popriskmin.compare.training.store import plain
from popriskmin.compare.training.train import Average, Configuration, Variant, evaluate, run

ADAMW, PRM_ARM, MATCHED = make_arms()
SETTING = Configuration(lr=0.1, weight_decay=0.0, seed=3)


def kinds(records):
    return [record["kind"] for record in records]


def test_records_of_a_run():
    records = run(Tiny(), PRM_ARM, SETTING)
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert all(record["loss"] > 0 and 0 < record["factor"] < 1 for record in steps)
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [0, 5, 10, 12]
    masks = [record for record in records if record["kind"] == "mask"]
    assert [record["step"] for record in masks] == [5, 10, 12]
    assert list(masks[0]["layers"]) == ["weight", "bias"]
    end = records[-1]
    assert (end["kind"], end["status"], end["steps"]) == ("end", "finished", 12)
    assert end["parameters"] == 10
    assert end["state_bytes"] == 3 * 10 * 4 + 2 * 4
    assert 0 < end["optimizer_seconds_per_step"] < end["seconds_per_step"] < end["seconds"]
    json.dumps(plain(records), allow_nan=False)


def test_the_last_step_is_evaluated_once():
    records = run(Tiny(steps=10), ADAMW, SETTING)
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [0, 5, 10]
    assert "mask" not in kinds(records)


def without_times(records):
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in records]


def test_a_run_is_repeatable_and_leaves_no_trace():
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    threads = torch.get_num_threads()
    expected = (torch.rand(1), np.random.rand(), random.random())
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    one = run(Tiny(), PRM_ARM, SETTING)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert torch.get_num_threads() == threads
    other = run(Tiny(), PRM_ARM, SETTING)
    assert without_times(one) == without_times(other)


def test_all_arms_start_alike():
    prm = run(Tiny(), PRM_ARM, SETTING)
    ends = [run(Tiny(), ADAMW, SETTING)[-1], prm[-1], run(Tiny(), MATCHED, SETTING, factors(prm))[-1]]
    for key in ("initial_weights", "first_batches"):
        assert ends[0][key] == ends[1][key] == ends[2][key]
    other = run(Tiny(), ADAMW, Configuration(0.1, 0.0, seed=4))[-1]
    assert other["initial_weights"] != ends[0]["initial_weights"]
    assert other["first_batches"] != ends[0]["first_batches"]


def test_a_diverging_run_is_recorded_as_such():
    records = run(Tiny(trouble="diverge"), PRM_ARM, Configuration(0.5, 0.0, 0))
    end = records[-1]
    assert end["status"] == "diverged"
    assert end["steps"] < 12
    last = records[-2]
    assert last["kind"] == "step"
    assert np.isnan(last["loss"])
    assert "factor" not in last
    # The arm that follows it has no factor beyond that step, and diverges there at the latest.
    followed = run(Tiny(), MATCHED, Configuration(0.5, 0.0, 0), factors(records))
    assert followed[-1]["status"] == "diverged"


def test_a_run_that_diverges_before_its_first_step():
    records = run(Tiny(trouble="lost"), PRM_ARM, SETTING)
    assert (records[-1]["status"], records[-1]["steps"]) == ("diverged", 1)
    followed = run(Tiny(trouble="lost"), MATCHED, SETTING, factors(records))
    assert followed[-1]["status"] == "diverged"
    assert "seconds_per_step" not in followed[-1]


def test_an_error_becomes_a_record():
    end = run(Tiny(trouble="raise"), ADAMW, SETTING)[-1]
    assert end["status"] == "failed"
    assert "ArithmeticError: the task is broken" in end["error"]
    end = run(Tiny(trouble="exit"), ADAMW, SETTING)[-1]
    assert end["status"] == "failed"
    assert "SystemExit: 3" in end["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trial: setattr(trial, "batches", []), "gave no batches"),
        (lambda trial: setattr(trial, "validation", lambda model: {"fit": 1.0}), "validation.* must return error, fit"),
        (lambda trial: setattr(trial, "test", lambda model: {}), "but returned nothing"),
        (lambda trial: setattr(trial, "test", lambda model: 0.5), r"test\(model\) must return a dict .*, got 0.5"),
        (
            lambda trial: setattr(trial, "test", lambda model: {"error": "low", "fit": 1}),
            r"test\(model\)\['error'\] must be a number, got 'low'",
        ),
        (lambda trial: setattr(trial, "loss", lambda model, rows: 0.5), "a tensor with one element, got 0.5"),
        (
            lambda trial: setattr(trial, "loss", lambda model, rows: model.weight),
            r"a tensor with one element, got a tensor of shape \(1, 9\)",
        ),
    ],
)
def test_a_trial_that_does_not_fit_says_why(monkeypatch, change, message):
    original = Tiny.trial

    def changed(self, seed):
        trial = original(self, seed)
        change(trial)
        return trial

    monkeypatch.setattr(Tiny, "trial", changed)
    end = run(Tiny(), ADAMW, SETTING)[-1]
    assert end["status"] == "failed"
    assert re.search(message, end["error"])


def test_a_trial_of_the_wrong_type(monkeypatch):
    monkeypatch.setattr(Tiny, "trial", lambda self, seed: None)
    assert "must return a popriskmin.compare.Trial, got None" in run(Tiny(), ADAMW, SETTING)[-1]["error"]


def test_evaluation_leaves_mode_and_random_numbers_alone():
    trial = Tiny().trial(0)
    seen = []

    def noisy(model):
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"error": 0.0, "fit": 1.0}

    trial.validation = noisy
    trial.model.train()
    before = torch.get_rng_state()
    evaluate(Tiny(), trial, 0)
    assert seen == [(False, False)]
    assert trial.model.training
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_against_the_recursion(steps):
    model = nn.Linear(2, 1).double()
    average = Average(model, steps)
    expected = None
    torch.manual_seed(0)
    for number in range(1, 12):
        with torch.no_grad():
            model.weight.normal_()
        average.update(model)
        now = model.weight.detach().clone()
        weight = max(1 / steps, 1 / number)
        expected = now if expected is None else expected + weight * (now - expected)
        torch.testing.assert_close(average.model.weight.detach(), expected)


def test_until_then_it_is_the_plain_mean():
    model = nn.Linear(1, 1)
    average = Average(model, 50)
    for value in range(1, 11):
        nn.init.constant_(model.weight, value)
        average.update(model)
    assert average.model.weight.item() == pytest.approx(5.5)


def test_buffers_are_averaged_and_counters_copied():
    model = nn.BatchNorm1d(2)
    average = Average(model, 50)
    for value in (1.0, 3.0):
        model.running_mean.fill_(value)
        model.num_batches_tracked += 1
        average.update(model)
    assert average.model.running_mean.tolist() == [2.0, 2.0]
    assert average.model.num_batches_tracked.item() == 2


def test_infinities_of_a_mask_stay():
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = Average(model, 50)
    for _ in range(3):
        average.update(model)
    assert average.model.mask.tolist() == [0.0, -torch.inf]


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(1, 1)
    model.generator = (x for x in range(3))
    with pytest.raises(ValueError, match="cannot be averaged, because Linear cannot be copied .* leave out --average"):
        Average(model, 50)


@pytest.mark.parametrize("arm", make_arms()[:2], ids=["adamw", "prm"])
def test_the_run_itself_is_the_same_to_the_last_bit(arm):
    plain, averaged = (run(Tiny(), arm, Configuration(0.1, 0.0, 0), None, Variant(average=n)) for n in (0, 5))
    kept = ("loss", "factor", "validation", "test", "layers")
    for one, other in zip(plain[:-1], averaged[:-1], strict=True):
        assert {name: one.get(name) for name in kept} == {name: other.get(name) for name in kept}
    evaluations = [record for record in averaged if record["kind"] == "evaluation"]
    assert evaluations[0]["averaged"]["test"] == evaluations[0]["test"]
    assert evaluations[-1]["averaged"]["test"] != evaluations[-1]["test"]
    assert not any("averaged" in record for record in plain)


def test_averaged_over_one_step_is_not_averaged():
    records = run(Tiny(), ADAMW, Configuration(0.1, 0.0, 0), None, Variant(average=1))
    for record in records:
        if record["kind"] == "evaluation":
            assert record["averaged"] == {"validation": record["validation"], "test": record["test"]}
