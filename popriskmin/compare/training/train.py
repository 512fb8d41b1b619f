"""One run: train a trial with one arm, one configuration and one seed.

The run returns records, which the store keeps line by line.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from popriskmin.compare.task import Batch, Task, Trial
from popriskmin.compare.text import describe
from popriskmin.compare.training.arms import REFERENCES, Arm
from popriskmin.compare.training.drivers import Driver, PRMDriver, make_driver
from popriskmin.compare.training.fingerprint import content_digest

# A line of a run's file, of plain values.
Record = dict[str, Any]

# The first batches enter the check that all arms see the same.
BATCHES_CHECKED = 3


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The settings in which the runs of one arm differ."""

    lr: float
    weight_decay: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a run does beyond an ordinary one.

    Attributes
    ----------
    average
        The number of steps over which the weights are averaged, to be measured beside the
        plain ones; 0 for no average.
    joined
        Whether to train on `Task.joined`, training and validation data together.
    """

    average: int = 0
    joined: bool = False


PLAIN = Variant()


def run(
    task: Task,
    arm: Arm,
    configuration: Configuration,
    trace: Sequence[float] | None = None,
    variant: Variant = PLAIN,
) -> list[Record]:
    """Train once and return the records of the run, an error among them.

    Every record has a `kind`. "step" has the loss of a step and, where the arm has one, its
    factor. "evaluation" has the metrics on validation and test data, and under "averaged"
    those of averaged weights. "mask" has PRM's mask in each layer. The last is "end", with
    the status "finished", "diverged" (a loss that is not finite) or "failed" (with the
    error). A task that calls `sys.exit` has failed too.
    """
    records: list[Record] = []
    end: Record = {"kind": "end"}
    start = time.perf_counter()
    with _isolated():
        try:
            if arm == REFERENCES:
                end |= _refer(task, configuration.seed, records)
            else:
                end |= _Training(task, arm, configuration, trace, variant, records).run()
        except (Exception, SystemExit):  # one bad run must not stop the others
            end |= {"status": "failed", "error": traceback.format_exc()}
    end["seconds"] = time.perf_counter() - start
    return [*records, end]


def _refer(task: Task, seed: int, records: list[Record]) -> Record:
    """Record the task's references for a seed, each with its name and its test metrics."""
    seed_everything(seed)
    references = task.references(seed)
    if not isinstance(references, Mapping):
        raise TypeError(f"references(seed) must return a dict of metrics by name, got {references!r}")
    for name, values in references.items():
        metrics = _metrics(task, f"references(seed)[{name!r}]", values)
        records.append({"kind": "reference", "name": str(name), "test": metrics})
    return {"status": "finished"}


class _Training:
    """A trial with its optimizer, on the way through its batches."""

    def __init__(
        self,
        task: Task,
        arm: Arm,
        configuration: Configuration,
        trace: Sequence[float] | None,
        variant: Variant,
        records: list[Record],
    ) -> None:
        self.task, self.trace, self.records = task, trace, records
        self.trial = trial = _make_trial(task, configuration.seed, variant.joined)
        lr, decay = configuration.lr, configuration.weight_decay
        self.driver = make_driver(arm, trial, lr, decay, task.optimizer_options, trace)
        self.weights_digest = content_digest(list(trial.model.parameters()))
        self.batch_digests: list[str] = []
        self.timer = _Timer()
        self.average = Average(trial.model, variant.average) if variant.average else None

    def run(self) -> Record:
        """Take all steps and return the content of the last record."""
        self.records.append(evaluate(self.task, self.trial, 0, self.average))
        self.driver.train()
        status, number = "finished", 0
        for number, batch in enumerate(self.trial.batches, 1):
            if number <= BATCHES_CHECKED:
                self.batch_digests.append(content_digest(batch))
            if not self._step(batch, number):
                status = "diverged"
                break
            if number % self.trial.evaluate_every == 0:
                self._observe(number)
        if number == 0:
            raise ValueError(f"{type(self.task).__name__}.trial gave no batches")
        if status == "finished" and number % self.trial.evaluate_every:
            self._observe(number)
        return {
            "status": status,
            "steps": number,
            "initial_weights": self.weights_digest,
            "first_batches": self.batch_digests,
            "parameters": sum(p.numel() for p in self.trial.model.parameters()),
            "state_bytes": state_bytes(self.driver.optimizer),
            **self.timer.medians(),
        }

    def _step(self, batch: Batch, number: int) -> bool:
        """Take a step and record it; return whether the training may go on."""
        if self.trace is not None and number > len(self.trace):
            return False  # the run that it follows has diverged here and has no further factor
        loss = self.timer.step(self.trial, self.driver, batch, number)
        self.records.append({"kind": "step", "step": number, "loss": loss})
        if not math.isfinite(loss):
            return False
        if self.average is not None:
            self.average.update(self.trial.model)
        factor = self.driver.factor(number)
        if factor is not None:
            self.records[-1]["factor"] = factor
        return True

    def _observe(self, number: int) -> None:
        """Record the metrics after a step, and the mask of PRM."""
        self.driver.train(False)
        self.records.append(evaluate(self.task, self.trial, number, self.average))
        self.driver.train()
        if isinstance(self.driver, PRMDriver):
            layers = self.driver.optimizer.get_mask_stats(by="parameter")
            kept = {str(name): {key: row[key] for key in ("mean_q", "active_fraction")} for name, row in layers.items()}
            self.records.append({"kind": "mask", "step": number, "layers": kept})


def _make_trial(task: Task, seed: int, joined: bool) -> Trial:
    seed_everything(seed)
    trial = task.joined(seed) if joined else task.trial(seed)
    if not isinstance(trial, Trial):
        method = f"{type(task).__name__}.{'joined' if joined else 'trial'}"
        raise TypeError(f"{method} must return a popriskmin.compare.Trial, got {trial!r}")
    seed_everything(seed)
    return trial


class Average:
    """An exponential average of a model's weights and buffers over about `steps` steps.

    It is the plain mean of the first `steps` steps, so that the first weights do not stay
    in it. Buffers are averaged too, except for counters, which are copied.

    Raises
    ------
    ValueError
        For a model that cannot be copied.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> average = Average(model, steps=50)
    >>> for value in (1.0, 2.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update(model)
    >>> average.model.weight.item()
    1.5
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        try:
            self._averaged = AveragedModel(model, avg_fn=self._mean, use_buffers=True)
        except Exception as error:  # copying a module may raise anything
            raise ValueError(
                f"the weights cannot be averaged, because {type(model).__name__} cannot be copied ({describe(error)}); "
                "leave out --average, or let its trial make a model that copy.deepcopy takes"
            ) from error

    def _mean(self, averaged: Tensor, now: Tensor, number: Tensor | int) -> Tensor:
        if not (averaged.is_floating_point() or averaged.is_complex()):
            return now
        mean = averaged.lerp(now.to(averaged.dtype), max(1 / self.steps, 1 / (int(number) + 1)))
        # Infinities, as of a mask, stay: their difference would be NaN.
        return torch.where(averaged == now, averaged, mean)

    def update(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        self._averaged.update_parameters(model)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights; before an update, with the initial ones."""
        module: nn.Module = self._averaged.module
        return module


def evaluate(task: Task, trial: Trial, step: int, average: Average | None = None) -> Record:
    """Return the metrics on validation and test data, without a trace in the random numbers."""
    record: Record = {"kind": "evaluation", "step": step, **_measure(task, trial, trial.model)}
    if average is not None:
        with _restored():  # a task may draw from other random numbers than torch's
            record["averaged"] = _measure(task, trial, average.model)
    return record


def _measure(task: Task, trial: Trial, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            measured = {"validation": trial.validation(model), "test": trial.test(model)}
    finally:
        model.train(training)
    return {part: _metrics(task, f"{part}(model)", values) for part, values in measured.items()}


def _metrics(task: Task, source: str, values: object) -> dict[str, float]:
    """Return the task's metrics out of a value that its code has returned."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{source} must return a dict of {', '.join(task.metrics)}, got {values!r}")
    missing = [metric for metric in task.metrics if metric not in values]
    if missing:
        raise ValueError(
            f"{source} must return {', '.join(task.metrics)}, as {type(task).__name__}.metrics says, "
            f"but returned {', '.join(values) or 'nothing'}"
        )
    return {metric: _as_number(values[metric], f"{source}[{metric!r}]") for metric in task.metrics}


def _as_number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error


class _Timer:
    """Takes steps and notes their times: of the whole step, and of the optimizer's part."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.optimizer: list[float] = []

    def step(self, trial: Trial, driver: Driver, batch: Batch, number: int) -> float:
        start = time.perf_counter()
        driver.optimizer.zero_grad()
        loss = trial.loss(trial.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise TypeError(f"loss(model, batch) must return a tensor with one element, got {shown}")
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        before = time.perf_counter()
        if math.isfinite(value):
            driver.step(number)
        end = time.perf_counter()
        self.whole.append(end - start)
        self.optimizer.append(end - before)
        return value

    def medians(self) -> dict[str, float]:
        """Return the medians; nothing for a run that took no step."""
        if not self.whole:
            return {}
        # The first steps allocate state and warm caches.
        whole, optimizer = self.whole[3:] or self.whole, self.optimizer[3:] or self.optimizer
        return {
            "seconds_per_step": statistics.median(whole),
            "optimizer_seconds_per_step": statistics.median(optimizer),
        }


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for tasks that draw from numpy's global generator
    torch.manual_seed(seed)


# Runs draw from the process's random numbers: where a backend has several threads they take turns.
_LOCK = threading.Lock()


@contextmanager
def _isolated() -> Iterator[None]:
    """Run on one thread, whatever the number of jobs, and restore all random state."""
    with _LOCK, _restored():
        yield


@contextmanager
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
