"""Averaged weights: the numbers, buffers, and that training does not notice."""

import pytest
import torch
from popriskmin.compare.training.averaging import Average
from tiny import Tiny
from torch import nn

from popriskmin.compare.training.arms import ADAMW, make_arms
from popriskmin.compare.training.train import Configuration, Variant, run


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
    with pytest.raises(ValueError, match="cannot be averaged, for Linear cannot be copied .* leave out --average"):
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
