"""What an experiment is: a `Task` makes, from a seed, a `Trial` that any optimizer can be trained on."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import GenericAlias, ModuleType
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

    @property
    def options(self) -> dict[str, Any]:
        """The options as a dict."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_task(task: Any) -> None:
    """Raise TypeError or ValueError that says what is missing, for something that is not a usable task."""
    if not isinstance(task, Task):
        raise TypeError(f"a task must be an instance of popriskmin.compare.Task, got {task!r}")
    if not task.metrics:
        raise ValueError(f'{type(task).__name__}.metrics is empty; give for example {{"accuracy": "max"}}')
    for name, direction in task.metrics.items():
        if direction not in ("max", "min"):
            raise ValueError(
                f"{type(task).__name__}.metrics[{name!r}] must be 'max' or 'min', the direction in which it is "
                f"better, got {direction!r}"
            )


def shipped_tasks() -> list[str]:
    """Return the names of the tasks that come with the package: the modules of `popriskmin.tasks`."""
    package = importlib.import_module("popriskmin.tasks")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load_task_class(name: str) -> type[Task]:
    """Return the task of this name, or the one that a Python file defines.

    Parameters
    ----------
    name
        One of `shipped_tasks()`, or the path of a file that ends in .py.

    Raises
    ------
    ValueError
        If there is no such task or file, or the file defines no task or several.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        module = _load_file(path)
    elif name in shipped_tasks():
        module = importlib.import_module(f"popriskmin.tasks.{name}")
    else:
        raise ValueError(
            f"there is no task {name!r}; the package has {', '.join(shipped_tasks())}, and a file of your own is given "
            "by its path, ending in .py"
        )
    found = [
        value
        for value in vars(module).values()
        # Python 3.10 takes an alias such as dict[str, float] for a type.
        if isinstance(value, type)
        and not isinstance(value, GenericAlias)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(task.__name__ for task in found) or "none"
        raise ValueError(f"{name} must define one subclass of popriskmin.compare.Task, but defines {names}")
    return found[0]


def _load_file(path: Path) -> ModuleType:
    module_name = path.stem
    if module_name in sys.modules and getattr(sys.modules[module_name], "__file__", None) != str(path.resolve()):
        module_name = f"{path.stem}_task"
    # A task may import the files beside it, as it could if it were run as a script.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def source_digest(task: Task) -> str | None:
    """Return a digest of the source that defines the task; None where there is no source to read.

    It is part of what identifies a run, so that results of an older version of the task are not taken for this one's.
    """
    try:
        module = sys.modules.get(type(task).__module__)
        file = getattr(module, "__file__", None)
        source = Path(file).read_text() if file else inspect.getsource(type(task))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]
