"""Tasks: what they must give."""

import dataclasses
from typing import ClassVar

import pytest
from tiny import Tiny

from popriskmin.compare import Task
from popriskmin.compare.task import check_task


def test_name_and_options():
    @dataclasses.dataclass
    class TwoWordsDPO(Task):
        share: float = 0.5
        metrics = {"x": "max"}

        def trial(self, seed): ...

    assert TwoWordsDPO().name == "two-words-dpo"
    assert TwoWordsDPO(share=1.0).options == {"share": 1.0}


def test_a_task_needs_trial_and_metrics():
    class Without(Task):
        metrics = {"x": "max"}

    with pytest.raises(TypeError, match="trial"):
        Without()

    class Empty(Task):
        def trial(self, seed): ...

    with pytest.raises(ValueError, match=r"Empty.metrics is empty; give for example"):
        check_task(Empty())

    class Direction(Empty):
        metrics = {"loss": "lower"}

    with pytest.raises(ValueError, match=r"Direction.metrics\['loss'\] must be 'max' or 'min'.*got 'lower'"):
        check_task(Direction())
    with pytest.raises(TypeError, match="must be an instance of popriskmin.compare.Task, got 3"):
        check_task(3)


def test_metrics_that_are_no_dict():
    class Listed(Task):
        metrics = ["mse"]

        def trial(self, seed): ...

    with pytest.raises(
        ValueError, match=r"Listed.metrics must be a dict such as {\"accuracy\": \"max\"}, got \['mse'\]"
    ):
        check_task(Listed())


def test_a_forgotten_dataclass():
    class Plain(Task):
        noise: float = 0.5
        known: ClassVar[int] = 3
        metrics = {"x": "max"}

        def trial(self, seed): ...

    with pytest.raises(
        ValueError, match=r"Plain has options \(noise\), but is no dataclass: put @dataclasses.dataclass"
    ):
        check_task(Plain())
    check_task(dataclasses.dataclass(Plain)())


def test_an_option_that_would_hide_what_a_task_has():
    @dataclasses.dataclass
    class Hiding(Task):
        options: str = "x"
        metrics = {"x": "max"}

        def trial(self, seed): ...

    with pytest.raises(ValueError, match="the option options of Hiding would hide Task.options: give it another name"):
        check_task(Hiding())

    @dataclasses.dataclass
    class Rates(Task):
        learning_rates: tuple = (0.1,)
        metrics = {"x": "max"}

        def trial(self, seed): ...

    with pytest.raises(ValueError, match="would hide Task.learning_rates: write it without a type"):
        check_task(Rates())


def test_what_is_not_given_is_no_option():
    @dataclasses.dataclass
    class Derived(Task):
        width: int = 3
        area: int = dataclasses.field(default=0, init=False)
        metrics = {"x": "max"}

        def trial(self, seed): ...

    assert Derived().options == {"width": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"evaluate_every": 0}, ValueError, "Trial.evaluate_every must be a whole number >= 1, got 0"),
        ({"evaluate_every": None}, ValueError, "Trial.evaluate_every must be a whole number >= 1, got None"),
        ({"batches": 30}, TypeError, "Trial.batches must give one batch for each step, such as a list, got 30"),
        ({"test": 0.5}, TypeError, "Trial.test must be a function, got 0.5"),
        ({"model": "linear"}, TypeError, "Trial.model must be a torch.nn.Module, got 'linear'"),
    ],
)
def test_a_trial_that_cannot_work(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(Tiny().trial(0), **change)
