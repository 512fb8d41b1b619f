"""An experiment is a `Task`: from a seed it makes a `Trial`, for any optimizer to train."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

Metrics = Mapping[str, float]

# Values of a user's choice, by name: options of a task or of an optimizer.
Options = Mapping[str, Any]

# One batch, of the type that the task's own loss takes.
Batch = Any

# What torch.optim takes: parameters, pairs of a name and a parameter, or dicts of groups.
Params = Sequence[Any]


@dataclasses.dataclass
class Trial:
    """One training, made from a seed.

    Attributes
    ----------
    model
        A fresh model with its initial weights.
    batches
        One batch for every optimizer step, of any type. The training ends with them.
    loss
        `loss(model, batch)` returns a scalar tensor to minimize.
    validation, test
        `validation(model)` returns the metrics on validation data, whose labels are as bad
        as those of the training data, and `test(model)` the same metrics on test data. The
        first choose configurations, the second are reported. The model is in evaluation
        mode, and no gradient is recorded.
    evaluate_every
        Steps between two evaluations. There is also one before the first step and one after
        the last.
    batch_size, n_dataset
        Numbers of examples in a batch and in the training data, which
        `boundary="empirical"` needs.
    parameters
        Parameters or parameter groups for the optimizer; None takes all of
        `model.named_parameters()`.
    """

    model: nn.Module
    batches: Iterable[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    validation: Callable[[nn.Module], Metrics]
    test: Callable[[nn.Module], Metrics]
    evaluate_every: int
    batch_size: int | None = None
    n_dataset: int | None = None
    parameters: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        """Check the fields, so that a mistake is named before it shows somewhere else."""
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"Trial.model must be a torch.nn.Module, got {self.model!r}")
        if not isinstance(self.batches, Iterable):
            raise TypeError(f"Trial.batches must give one batch for each step, such as a list, got {self.batches!r}")
        for name in ("loss", "validation", "test"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Trial.{name} must be a function, got {getattr(self, name)!r}")
        if not isinstance(self.evaluate_every, Integral) or self.evaluate_every < 1:
            raise ValueError(f"Trial.evaluate_every must be a whole number >= 1, got {self.evaluate_every!r}")


@dataclasses.dataclass
class Task(abc.ABC):
    """An experiment: derive from it, give `metrics`, and write `trial`.

    The fields of a subclass, which is a dataclass too, are its options. `popriskmin compare`
    offers them as flags: a field `noise: float = 0.4` becomes `--noise`. A text for --help
    goes into `metadata={"help": ...}`.

    Attributes
    ----------
    metrics
        The metrics that `validation` and `test` return, each with the direction in which it
        is better, "max" or "min". The first one chooses configurations. Where they depend on
        the options, override it as a property.
    learning_rates, weight_decays
        The grid that is searched unless another is asked for.
    optimizer_options
        Options that all optimizers share, such as `{"betas": (0.9, 0.98)}`.
    default_prm, default_arms
        Further arms where `compare` is asked for none, in the form in which it takes them.
    goals
        By metric, a value to reach, such as `{"accuracy": 0.95}`. The answer then tells the
        first step at which the test metric is there.

    Examples
    --------
    >>> import torch
    >>> @dataclasses.dataclass
    ... class Line(Task):
    ...     noise: float = 0.5
    ...     metrics = {"error": "min"}
    ...
    ...     def trial(self, seed):
    ...         generator = torch.Generator().manual_seed(seed)
    ...         x = torch.rand(200, 1, generator=generator)
    ...         y = 2 * x + self.noise * torch.randn(200, 1, generator=generator)
    ...         error = lambda model: {"error": (model(x) - 2 * x).abs().mean().item()}
    ...         return Trial(
    ...             model=nn.Linear(1, 1),
    ...             batches=torch.randperm(200, generator=generator).split(10),
    ...             loss=lambda model, rows: nn.functional.mse_loss(model(x[rows]), y[rows]),
    ...             validation=error,
    ...             test=error,
    ...             evaluate_every=10,
    ...         )
    >>> len(Line(noise=1.0).trial(seed=0).batches)
    20
    """

    metrics: ClassVar[Mapping[str, str]] = {}
    learning_rates: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays: ClassVar[tuple[float, ...]] = (0.01, 0.1)
    optimizer_options: ClassVar[Options] = {}
    default_prm: ClassVar[Sequence[Options]] = ()
    default_arms: ClassVar[Options] = {}
    goals: ClassVar[Mapping[str, float]] = {}

    @property
    def name(self) -> str:
        """The class's name in lower case with hyphens."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    @abc.abstractmethod
    def trial(self, seed: int) -> Trial:
        """Make a trial.

        The random numbers of torch, numpy and Python are seeded with `seed` before the call.
        Two calls with one seed must give the same weights and batches, because all arms of
        the comparison start from them. This is checked.
        """

    def references(self, seed: int) -> Mapping[str, Metrics]:
        """Return test metrics to stand beside the arms, by name, such as those of a forest.

        For a task to override. Each must have all metrics of the task. It is called once
        for each seed, with random numbers seeded as for `trial`.
        """
        return {}

    def joined(self, seed: int) -> Trial:
        """Make the trial of a seed with training and validation data joined.

        For a task to override, so that `--spend-validation` works. It has the initial
        weights and the test data of `trial(seed)`, and makes as many passes over the data.
        Its `validation` chooses nothing and may measure anything.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method joined(self, seed)")

    @property
    def about(self) -> Sequence[str]:
        """Lines on the data before the answer: how much there is, and what was left out."""
        return ()

    @property
    def files(self) -> Sequence[str]:
        """The data files that `trial` reads. New runs are made where their content changes."""
        return ()

    @property
    def options(self) -> dict[str, Any]:
        """The options as a dict."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}


def option(default: Any, text: str) -> Any:
    """Return a field that is an option of a task, with its text for --help.

    Examples
    --------
    >>> @dataclasses.dataclass
    ... class Settings:
    ...     noise: float = option(0.4, "share of wrong labels")
    >>> Settings().noise
    0.4
    """
    return dataclasses.field(default=default, metadata={"help": text})


def complete(task: Task, scale: Options) -> None:
    """Give the options of a task that are None the values of the scale that it runs at."""
    for name, value in scale.items():
        if getattr(task, name) is None:
            setattr(task, name, value)


def check_least(task: Task, least: Mapping[str, float]) -> None:
    """Raise ValueError for the first option of a task that is below its least value."""
    for name, bound in least.items():
        if not getattr(task, name) >= bound:
            raise ValueError(f"{name} must be at least {bound:g}, got {getattr(task, name)}")


def check_task(task: object) -> None:
    """Raise TypeError or ValueError for a task that cannot be used, and say why."""
    if not isinstance(task, Task):
        raise TypeError(f"a task must be an instance of popriskmin.compare.Task, got {task!r}")
    check_task_class(type(task))
    name = type(task).__name__
    if not isinstance(task.metrics, Mapping):
        raise ValueError(f'{name}.metrics must be a dict such as {{"accuracy": "max"}}, got {task.metrics!r}')
    if not task.metrics:
        raise ValueError(f'{name}.metrics is empty; give for example {{"accuracy": "max"}}')
    for metric, direction in task.metrics.items():
        if direction not in ("max", "min"):
            raise ValueError(
                f"{name}.metrics[{metric!r}] must be 'max' or 'min', the direction in which it is better, "
                f"got {direction!r}"
            )


def check_task_class(kind: type[Task]) -> None:
    """Raise ValueError for a class without `trial`, or with fields that cannot be options."""
    if inspect.isabstract(kind):
        similar = difflib.get_close_matches("trial", [name for name in vars(kind) if name[0] != "_"], n=1)
        hint = f": did you mean it by {similar[0]}?" if similar else ""
        raise ValueError(f"{kind.__name__} has no method trial(self, seed){hint}")
    for base in kind.__mro__[: kind.__mro__.index(Task)]:
        options = [name for name, hint in inspect.get_annotations(base).items() if "ClassVar" not in str(hint)]
        if options and "__dataclass_fields__" not in vars(base):
            raise ValueError(
                f"{base.__name__} has options ({', '.join(options)}), but is no dataclass: put "
                f"@dataclasses.dataclass above class {base.__name__}"
            )
    for field in dataclasses.fields(kind):
        if field.name in vars(Task):
            own = field.name in ("name", "options", "trial", "references", "joined")
            cure = "give it another name" if own else "write it without a type, so that it is no option"
            raise ValueError(f"the option {field.name} of {kind.__name__} would hide Task.{field.name}: {cure}")
