"""The plan of a comparison: task, arms, grid and seeds, checked before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

from popriskmin.compare.loading import load_task_class, make_task
from popriskmin.compare.task import Options, Task, check_task
from popriskmin.compare.training.arms import Arm, check_common_options, make_arms, make_rivals
from popriskmin.compare.training.fingerprint import source_digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes
    ----------
    task
        The experiment.
    arms
        All ways to train, with averages after the arms that they average.
    learning_rates, weight_decays
        The grid, in ascending order.
    seeds
        The seeds, in ascending order.
    average
        The number of steps over which weights are averaged; 0 for no averages.
    spend_validation
        Whether each arm is also trained on training and validation data together.
    folder
        The folder of `results.json`, `report.html` and the runs.
    source
        The digest of the task's source.
    """

    task: Task
    arms: Sequence[Arm]
    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    seeds: Sequence[int]
    average: int = 0
    spend_validation: bool = False
    folder: Path = Path("runs")
    source: str = ""

    @property
    def metric(self) -> str:
        """The metric that chooses configurations."""
        return next(iter(self.task.metrics))

    @property
    def direction(self) -> str:
        """The direction in which that metric is better, "max" or "min"."""
        return self.task.metrics[self.metric]

    @property
    def sign(self) -> int:
        """1 or -1, by which that metric is multiplied so that larger is better."""
        return 1 if self.direction == "max" else -1

    @property
    def trained(self) -> list[Arm]:
        """The arms with runs of their own, without averages."""
        return [arm for arm in self.arms if not arm.averaged]

    @property
    def further(self) -> list[Arm]:
        """The trained arms beyond the three that are always there."""
        return self.trained[3:]


def plan(
    task: Task | str,
    *,
    lr: Sequence[float] | None,
    weight_decay: Sequence[float] | None,
    seeds: int | Sequence[int],
    prm: Sequence[Options] | None,
    match_all: bool,
    average: int,
    spend_validation: bool,
    arms: Options | None,
    arm_lr: Mapping[str, Sequence[float]] | None,
    out: str | Path | None,
) -> Comparison:
    """Return the comparison that these arguments of `compare` describe.

    Raises
    ------
    ValueError
        For arguments that cannot work.
    """
    if isinstance(task, str):
        task = make_task(load_task_class(task), {})
    check_task(task)
    learning_rates = _numbers("lr", task.learning_rates if lr is None else lr)
    weight_decays = _numbers("weight_decay", task.weight_decays if weight_decay is None else weight_decay)
    seed_list = _seeds(seeds)
    average = whole_number("average", average, least=0)
    if spend_validation and type(task).joined is Task.joined:
        raise ValueError(
            f"{type(task).__name__} does not say how its training and validation data are joined: spend_validation "
            "needs a method joined(self, seed) that returns a Trial"
        )
    every_arm = _arms(task, prm, arms, arm_lr or {}, match_all)
    if average:
        every_arm += [arm.of_averages for arm in every_arm]
    if out is not None and not str(out).strip():
        raise ValueError(f"out must name a folder, got {out!r}")
    return Comparison(
        task=task,
        arms=every_arm,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
        seeds=seed_list,
        average=average,
        spend_validation=bool(spend_validation),
        folder=Path("runs") / task.name if out is None else Path(out),
        # Before the task's code runs, which may change data that the source holds.
        source=source_digest(task),
    )


def _arms(
    task: Task,
    prm: Sequence[Options] | None,
    arms: Options | None,
    arm_lr: Mapping[str, Sequence[float]],
    match_all: bool,
) -> list[Arm]:
    if prm is None and arms is None:
        prm, arms = task.default_prm, task.default_arms
    every_arm = make_arms(_options_of_arms(() if prm is None else prm), match_all)
    rates = {name: _numbers(f"the learning rates of {name}", values) for name, values in arm_lr.items()}
    every_arm += make_rivals(_rivals(arms or {}), rates, every_arm)
    check_common_options(task.optimizer_options, every_arm)
    return every_arm


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return an argument that must be a whole number of at least `least`."""
    if not (isinstance(value, Integral) and int(value) >= least):
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    """Return the distinct values of a grid in ascending order."""
    try:
        listed = [values] if isinstance(values, Real) else list(values)
        numbers = [] if any(isinstance(value, str) for value in listed) else sorted({float(value) for value in listed})
    except (TypeError, ValueError):
        numbers = []
    if not numbers or numbers[0] < 0 or not all(value < float("inf") for value in numbers):
        raise ValueError(f"{name} must be one or more finite numbers >= 0, got {values!r}")
    return numbers


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    message = f"seeds must be a number of seeds >= 1, or a list of whole numbers >= 0, got {seeds!r}"
    if isinstance(seeds, Integral):
        listed: list[object] = list(range(int(seeds)))
    elif isinstance(seeds, Iterable):
        listed = list(seeds)
    else:
        raise ValueError(message)
    numbers = [int(seed) for seed in listed if isinstance(seed, Integral) and 0 <= int(seed) < 2**32]
    if not listed or len(numbers) < len(listed):
        raise ValueError(message)
    return sorted(set(numbers))


def _options_of_arms(prm: Sequence[Options]) -> list[Options]:
    if isinstance(prm, (str, Mapping)) or not all(isinstance(options, Mapping) for options in prm):
        raise ValueError(f'prm must be a list with a dict for each arm, such as [{{"mask": "soft"}}], got {prm!r}')
    return list(prm)


def _rivals(arms: Options) -> dict[str, tuple[str | type, Options]]:
    """Return every arm as a pair; one without options may be given by its optimizer alone."""
    pairs = {name: (value, {}) if isinstance(value, (str, type)) else value for name, value in arms.items()}
    for name, pair in pairs.items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise ValueError(f'arms[{name!r}] must be such as ("torch.optim:SGD", {{"momentum": 0.9}}), got {pair!r}')
    return pairs
