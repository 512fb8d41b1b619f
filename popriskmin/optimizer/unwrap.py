"""The optimizer inside the wrappers that frameworks put around it; known by their attributes, none is imported."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer

from popriskmin.optimizer.prm import PRM

# Where wrappers keep what they wrap: Accelerate, Lightning, Fabric, DeepSpeed and most others; ZeroRedundancyOptimizer.
ATTRIBUTES = ("optimizer", "_optimizer", "optim")


class Unwrapped(NamedTuple):
    """What a wrapper holds at its innermost, and the types that were passed on the way there."""

    optimizer: Any
    wrappers: list[str]  # from the outside in
    elsewhere: int  # parameter tensors that the wrappers list and this optimizer does not: other ranks hold them

    @property
    def of_rank(self) -> str:
        """Say, where other ranks hold parameters, whose figures these are; empty otherwise."""
        if not self.elsewhere:
            return ""
        here = _count(self.optimizer)
        return f"This rank's {here} of {here + self.elsewhere} tensors; the other ranks hold the others."


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer inside a framework's wrapper, or the optimizer itself where there is none.

    Accelerate (and with it transformers' `Trainer`), Lightning, Fabric, DeepSpeed and `ZeroRedundancyOptimizer` put an
    object of their own around an optimizer. Its methods that torch's optimizers do not have, as `get_mask_stats` and
    `set_variances`, are reached through this. `diagnose`, `RiskMonitor`, `SoftnessController` and the sources of
    variances take wrapped optimizers as they are.

    Parameters
    ----------
    optimizer
        A torch optimizer, or a wrapper that holds one as `optimizer`, `_optimizer` or `optim`, itself wrapped or not.

    Returns
    -------
    torch.optim.Optimizer
        A `PRM`, where that is what was wrapped.

    Raises
    ------
    TypeError
        For what is no optimizer and holds none.

    Notes
    -----
    Under `ZeroRedundancyOptimizer` each rank has a `PRM` of its own with a part of the parameters. What is read off it
    is of that part: `sum` what is a sum over scalars, as `signal_sq`, over the ranks, and weigh means by
    `parameter_count`. A `SoftnessController` there holds each rank's part at the target.

    Examples
    --------
    >>> import torch
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> adamw = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
    >>> unwrap(Wrapper(adamw)) is adamw
    True
    """
    found = unwrapped(optimizer)
    if not isinstance(found.optimizer, Optimizer):
        raise TypeError(
            f"unwrap takes a torch optimizer, or a wrapper that holds one as {', '.join(ATTRIBUTES)}, got "
            f"{described(found)}"
        )
    return found.optimizer


def unwrapped(optimizer: Any) -> Unwrapped:
    """Return what is innermost, whatever it is, and how it was reached."""
    wrappers: list[str] = []
    passed = {id(optimizer)}
    inner, most = optimizer, _count(optimizer)
    while (held := _held(inner)) is not None and id(held) not in passed:
        wrappers.append(type(inner).__name__)
        passed.add(id(held))
        inner = held
        most = max(most, _count(inner))
    return Unwrapped(inner, wrappers, most - _count(inner))


def unwrapped_prm(optimizer: Any, who: str) -> Unwrapped:
    """Return what a wrapper holds where that is a `PRM`; raise TypeError in the name of `who` needs one otherwise."""
    found = unwrapped(optimizer)
    if not isinstance(found.optimizer, PRM):
        raise TypeError(
            f"{who} needs a popriskmin.PRM, got {described(found)}: other optimizers keep no variance of the gradient. "
            "Hand the framework a PRM; the state of an AdamW goes on by load_state_dict(adamw.state_dict())"
        )
    return found


def described(found: Unwrapped) -> str:
    """Return in words what was given: `AcceleratedOptimizer around AdamW`."""
    return " around ".join([*found.wrappers, type(found.optimizer).__name__])


def _held(wrapper: Any) -> Any:
    """Return the optimizer that a wrapper holds, or None. Some wrappers are of the wrapped class as well."""
    for name in ATTRIBUTES:
        held = getattr(wrapper, name, None)
        if held is not None and hasattr(held, "param_groups") and hasattr(held, "step"):
            return held
    return None


def _count(optimizer: Any) -> int:
    return sum(len(group["params"]) for group in getattr(optimizer, "param_groups", ()))
