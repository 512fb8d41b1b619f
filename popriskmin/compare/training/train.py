"""One run: train a trial with one arm, one configuration and one seed, and return what happened, line by line."""

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

from popriskmin.compare.task import Task, Trial
from popriskmin.compare.training.arms import REFERENCES, Arm, Driver, PRMDriver, make_driver
from popriskmin.compare.training.averaging import Average
from popriskmin.compare.training.fingerprint import content_digest

Record = dict[str, Any]

# Batches whose content enters the check that all arms see the same.
BATCHES_CHECKED = 3


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What distinguishes the runs of one arm."""

    lr: float
    weight_decay: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a run does beside what all do.

    Attributes
    ----------
    average
        Over about how many steps the weights are averaged, to be measured beside the plain ones; 0 for not at all.
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
    """Train once and return the records of the run; an error becomes a record too.

    Every record has a `kind`: "step" for each step (its loss and, where the arm has one, the factor of the step);
    "evaluation" (the metrics on validation and test data, and under "averaged" those of averaged weights); "mask" (per
    layer, for PRM); and a last "end" with the status: "finished", "diverged" (a loss that is not finite), or "failed"
    with the error. A task that calls `sys.exit` has failed too.
    """
    records: list[Record] = []
    end: Record = {"kind": "end"}
    start = time.perf_counter()
    with _isolated():
        try:
            if arm == REFERENCES:
                end |= _refer(task, configuration.seed, records)
            else:
                end |= _train(task, arm, configuration, trace, variant, records)
        except (Exception, SystemExit):  # one bad run must not stop the others
            end |= {"status": "failed", "error": traceback.format_exc()}
    end["seconds"] = time.perf_counter() - start
    return [*records, end]


def _refer(task: Task, seed: int, records: list[Record]) -> Record:
    """Record the task's references for a seed, each with kind "reference", its name and its test metrics."""
    seed_everything(seed)
    found = task.references(seed)
    if not isinstance(found, Mapping):
        raise TypeError(f"references(seed) must return a dict of metrics by name, got {found!r}")
    for name, values in found.items():
        metrics = _metrics(task, f"references(seed)[{name!r}]", values)
        records.append({"kind": "reference", "name": str(name), "test": metrics})
    return {"status": "finished"}


def _train(
    task: Task,
    arm: Arm,
    configuration: Configuration,
    trace: Sequence[float] | None,
    variant: Variant,
    records: list[Record],
) -> Record:
    trial = _make_trial(task, configuration.seed, variant.joined)
    driver = make_driver(arm, trial, configuration.lr, configuration.weight_decay, task.optimizer_options, trace)
    weights_digest = content_digest(list(trial.model.parameters()))
    batch_digests: list[str] = []
    timer = _Timer()
    average = Average(trial.model, variant.average) if variant.average else None
    records.append(evaluate(task, trial, 0, average))
    driver.train()
    status, number = "finished", 0
    for number, batch in enumerate(trial.batches, 1):
        if number <= BATCHES_CHECKED:
            batch_digests.append(content_digest(batch))
        if trace is not None and number > len(trace):
            status = "diverged"  # as did the run that it follows, which has no further factor
            break
        loss = timer.step(trial, driver, batch, number)
        records.append({"kind": "step", "step": number, "loss": loss})
        if not math.isfinite(loss):
            status = "diverged"
            break
        if average is not None:
            average.update(trial.model)
        factor = driver.factor(number)
        if factor is not None:
            records[-1]["factor"] = factor
        if number % trial.evaluate_every == 0:
            _observe(task, trial, driver, average, number, records)
    if number == 0:
        raise ValueError(f"{type(task).__name__}.trial gave no batches")
    if status == "finished" and number % trial.evaluate_every:
        _observe(task, trial, driver, average, number, records)
    return {
        "status": status,
        "steps": number,
        "initial_weights": weights_digest,
        "first_batches": batch_digests,
        "parameters": sum(p.numel() for p in trial.model.parameters()),
        "state_bytes": state_bytes(driver.optimizer),
        **timer.medians(),
    }


def _make_trial(task: Task, seed: int, joined: bool) -> Trial:
    seed_everything(seed)
    trial = task.joined(seed) if joined else task.trial(seed)
    if not isinstance(trial, Trial):
        method = f"{type(task).__name__}.{'joined' if joined else 'trial'}"
        raise TypeError(f"{method} must return a popriskmin.compare.Trial, got {trial!r}")
    seed_everything(seed)
    return trial


def _observe(
    task: Task, trial: Trial, driver: Driver, average: Average | None, number: int, records: list[Record]
) -> None:
    driver.train(False)
    records.append(evaluate(task, trial, number, average))
    driver.train()
    if isinstance(driver, PRMDriver):
        layers = driver.optimizer.get_mask_stats(by="parameter")
        kept = {str(name): {key: row[key] for key in ("mean_q", "active_fraction")} for name, row in layers.items()}
        records.append({"kind": "mask", "step": number, "layers": kept})


def evaluate(task: Task, trial: Trial, step: int, average: Average | None = None) -> Record:
    """Return the metrics on validation and test data, without touching the model or the random numbers."""
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
            found = {"validation": trial.validation(model), "test": trial.test(model)}
    finally:
        model.train(training)
    return {name: _metrics(task, f"{name}(model)", values) for name, values in found.items()}


def _metrics(task: Task, source: str, values: Any) -> dict[str, float]:
    """Return the task's metrics of what its code has returned."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{source} must return a dict of {', '.join(task.metrics)}, got {values!r}")
    missing = [metric for metric in task.metrics if metric not in values]
    if missing:
        raise ValueError(
            f"{source} must return {', '.join(task.metrics)}, as {type(task).__name__}.metrics says, "
            f"but returned {', '.join(values) or 'nothing'}"
        )
    return {metric: _number(values[metric], f"{source}[{metric!r}]") for metric in task.metrics}


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error


class _Timer:
    """Takes the steps and their times: the whole step with both passes, and the optimizer's part of it."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.optimizer: list[float] = []

    def step(self, trial: Trial, driver: Driver, batch: Any, number: int) -> float:
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
    """Run on one thread, so that results do not depend on the number of jobs, and give back all random state."""
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
