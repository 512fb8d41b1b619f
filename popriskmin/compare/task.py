"""What an experiment is: a `Task` makes, from a seed, a `Trial` that any optimizer can be trained on."""

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


@dataclasses.dataclass
class Trial:
    """One thing to train, made from a seed.

    Attributes
    ----------
    model
        A fresh model with its initial weights.
    batches
        One batch for every optimizer step, of any type; where they end the training ends.
    loss
        `loss(model, batch)` returns a scalar tensor to minimize.
    validation, test
        `validation(model)` returns the held-out metrics on validation data, whose labels are as bad as those of the
        training data; `test(model)` the same metrics on test data. Configurations are chosen on the first, all
        figures come from the second. The model is in evaluation mode and no gradient is recorded.
    evaluate_every
        Steps between two evaluations; there is one before the first step and one after the last in any case.
    batch_size, n_dataset
        Numbers of examples in a batch and in the training data; what `boundary="empirical"` needs.
    parameters
        Parameters or parameter groups for the optimizer, where all of `model.named_parameters()` will not do.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    validation: Callable[[nn.Module], Metrics]
    test: Callable[[nn.Module], Metrics]
    evaluate_every: int
    batch_size: int | None = None
    n_dataset: int | None = None
    parameters: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        """Check what was given, so that a mistake is named before it shows somewhere else."""
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

    The fields of a subclass (a dataclass too) are its options, which `popriskmin compare` offers as flags: a field
    `noise: float = 0.4` becomes `--noise`; a text for it goes into `metadata={"help": ...}`.

    Attributes
    ----------
    metrics
        The metrics that `validation` and `test` return, each with "max" or "min", the direction in which it is
        better. The first is the one on which configurations are chosen. Override it as a property where it depends
        on the options.
    learning_rates, weight_decays
        The grid that is searched unless another is asked for.
    optimizer_options
        Options that all optimizers get alike, such as `{"betas": (0.9, 0.98)}`.
    default_prm, default_arms
        Arms beside AdamW, PRM and the AdamW of equal steps where none are asked for, as `compare` takes them.
    goals
        For metrics where the first step counts at which a test value is reached, such as `{"accuracy": 0.95}`.

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
    optimizer_options: ClassVar[Mapping[str, Any]] = {}
    default_prm: ClassVar[Sequence[Mapping[str, Any]]] = ()
    default_arms: ClassVar[Mapping[str, Any]] = {}
    goals: ClassVar[Mapping[str, float]] = {}

    @property
    def name(self) -> str:
        """The class's name in lower case with hyphens."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    @abc.abstractmethod
    def trial(self, seed: int) -> Trial:
        """Make a trial. Torch's, numpy's and Python's random numbers are seeded with `seed` before the call.

        Calling it twice with one seed must give the same weights and batches: all arms of the comparison start from
        them, which is checked.
        """

    def references(self, seed: int) -> Mapping[str, Metrics]:
        """Return the test metrics of what is no optimizer, by name: a forest, the ceiling with clean labels.

        For a task to override. Each must have the metrics of the task. It is called once for each seed, with random
        numbers seeded as for `trial`, and shown beside the arms.
        """
        return {}

    def joined(self, seed: int) -> Trial:
        """Make the trial of a seed with training and validation data joined, for `--spend-validation`.

        For a task to override: with the initial weights and the test data of `trial(seed)`, and as many passes over
        the data that is now for training. Nothing is chosen by its `validation`, which may measure what it likes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method joined(self, seed)")

    @property
    def about(self) -> Sequence[str]:
        """Lines on the data that the answer begins with: how much of it there is, what was left out and why."""
        return ()

    @property
    def files(self) -> Sequence[str]:
        """The data files that `trial` reads: a run belongs to their content, and a changed one makes new runs."""
        return ()

    @property
    def options(self) -> dict[str, Any]:
        """The options as a dict."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}


def option(default: Any, text: str) -> Any:
    """Return a field that is an option of a task, with the text that --help shows.

    Examples
    --------
    >>> @dataclasses.dataclass
    ... class Options:
    ...     noise: float = option(0.4, "share of wrong labels")
    >>> Options().noise
    0.4
    """
    return dataclasses.field(default=default, metadata={"help": text})


def complete(task: Task, scale: Mapping[str, Any]) -> None:
    """Give the options of a task that were left out (None) the values of the scale that it runs at."""
    for name, value in scale.items():
        if getattr(task, name) is None:
            setattr(task, name, value)


def check_least(task: Task, least: Mapping[str, float]) -> None:
    """Raise ValueError for the first option of a task that is below its least value."""
    for name, bound in least.items():
        if not getattr(task, name) >= bound:
            raise ValueError(f"{name} must be at least {bound:g}, got {getattr(task, name)}")


def check_task(task: Any) -> None:
    """Raise TypeError or ValueError that says what is missing, for something that is not a usable task."""
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
    """Raise ValueError for a class of which no usable task can be made: without `trial`, or whose options are none."""
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
