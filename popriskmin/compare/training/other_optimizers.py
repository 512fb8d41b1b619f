"""Optimizers of torch or of an installed package as arms, found by their import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable

import torch

from popriskmin.compare.task import Options, Params

# The comparison gives these itself.
OURS = ("params", "lr", "weight_decay")


def load_optimizer(path: str) -> type[torch.optim.Optimizer]:
    """Return the class at an import path.

    Parameters
    ----------
    path
        The module, a colon, and the class; the last point may stand for the colon.

    Raises
    ------
    ValueError
        If there is no such module or class, if it is not an optimizer, or if its step needs
        a closure.

    Examples
    --------
    >>> load_optimizer("torch.optim:SGD").__name__
    'SGD'
    """
    module_name, _, class_name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not class_name:
        raise ValueError(f"an optimizer is given as package.module:Class, such as torch.optim:SGD, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(f"the module {module_name} of the optimizer {path} cannot be imported: {error}") from error
    if not hasattr(module, class_name):
        names = [name for name, value in vars(module).items() if _is_optimizer(value)]
        near = difflib.get_close_matches(class_name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(names)) or 'no optimizer'}"
        raise ValueError(f"{module_name} has no {class_name}: {hint}")
    optimizer: type[torch.optim.Optimizer] = getattr(module, class_name)
    if not _is_optimizer(optimizer):
        raise ValueError(f"{path} is not a subclass of torch.optim.Optimizer, but {optimizer!r}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{path} needs a closure in each step(), which the comparison does not give")
    return optimizer


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def path_of(optimizer: str | type[torch.optim.Optimizer]) -> str:
    """Return the import path of an optimizer that is given by its path or as a class."""
    if isinstance(optimizer, str):
        return optimizer
    if not _is_optimizer(optimizer):
        raise ValueError(f"an arm's optimizer must be an import path or a class of optimizers, got {optimizer!r}")
    if "<locals>" in optimizer.__qualname__ or optimizer.__module__ == "__main__":
        raise ValueError(f"{optimizer.__qualname__} must be in a module that other processes can import")
    return f"{optimizer.__module__}:{optimizer.__qualname__}"


def has_weight_decay(path: str) -> bool:
    """Return whether the optimizer takes `weight_decay`."""
    return _takes(load_optimizer(path), "weight_decay")


def _takes(optimizer: type[torch.optim.Optimizer], name: str) -> bool:
    parameters = inspect.signature(optimizer).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def check_optimizer(path: str, options: Options) -> None:
    """Raise ValueError if there is no such optimizer or it does not accept these options."""
    optimizer = load_optimizer(path)
    known = [name for name in inspect.signature(optimizer).parameters if name not in OURS]
    for name in options:
        if name in OURS:
            raise ValueError(
                f"{name} is not an option of an arm: learning rates are given by --lr, or --arm-lr for one arm, and "
                "weight decays by --weight-decay"
            )
        if not _takes(optimizer, name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{path} has no option {name!r}: {hint}")
    try:
        # A matrix, because some optimizers take nothing else.
        build(path, [torch.zeros(2, 2, requires_grad=True)], 1e-3, 0.0, {}, options)
    except Exception as error:  # a constructor may raise anything
        raise ValueError(f"{path} does not accept these options: {error}") from error


def build(
    path: str, params: Params, lr: float, weight_decay: float, common: Options, options: Options
) -> torch.optim.Optimizer:
    """Make the optimizer.

    Parameters
    ----------
    common
        Options that all arms share. Those that this optimizer does not have are left out.
    options
        The arm's own.
    """
    optimizer = load_optimizer(path)
    named = inspect.signature(optimizer).parameters
    arguments = {name: value for name, value in common.items() if name in named} | dict(options)
    if _takes(optimizer, "weight_decay"):
        arguments["weight_decay"] = weight_decay
    make: Callable[..., torch.optim.Optimizer] = optimizer
    return make(params, lr=lr, **arguments)
