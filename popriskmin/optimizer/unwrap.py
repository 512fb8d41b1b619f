"""The optimizer inside a framework's wrappers, which are known by their attributes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer

from popriskmin.optimizer.masked import Masked
from popriskmin.optimizer.prm import PRM

# Where wrappers keep their optimizer: Accelerate, Lightning, Fabric, DeepSpeed and most
# others; ZeroRedundancyOptimizer.
ATTRIBUTES = ("optimizer", "_optimizer", "optim")


class Unwrapped(NamedTuple):
    """The innermost object of a wrapper, and the types of the wrappers around it."""

    optimizer: Any
    wrappers: list[str]  # from the outside in
    elsewhere: int  # parameter tensors of the wrappers that other ranks hold

    @property
    def of_rank(self) -> str:
        """A sentence on this rank's part if other ranks hold parameters; else empty."""
        if not self.elsewhere:
            return ""
        here = _count(self.optimizer)
        return f"This rank's {here} of {here + self.elsewhere} tensors; the other ranks hold the others."


def unwrap(optimizer: object) -> Optimizer:
    """Return the optimizer inside a framework's wrapper, or an unwrapped one itself.

    Accelerate (and with it transformers' `Trainer`), Lightning, Fabric, DeepSpeed and
    `ZeroRedundancyOptimizer` put an object of their own around an optimizer. Methods
    that torch's optimizers do not have, such as `get_mask_stats` and `set_variances`,
    are reached through this function. `diagnose`, `RiskMonitor`, `SoftnessController`
    and the sources of variances take wrapped optimizers as they are.

    Parameters
    ----------
    optimizer
        A torch optimizer, or a wrapper that holds one as `optimizer`, `_optimizer` or
        `optim`. The inner one may be wrapped too.

    Returns
    -------
    torch.optim.Optimizer
        The innermost optimizer, such as a `PRM`. A `Masked` is no framework's wrapper,
        and stays on.

    Raises
    ------
    TypeError
        For an object that is no optimizer and holds none.

    Notes
    -----
    Under `ZeroRedundancyOptimizer` each rank has a `PRM` of its own with a part of the
    parameters, and its statistics cover that part. Over the ranks, add up what is a sum
    over scalars, such as `signal_sq`, and weigh means by `parameter_count`. A
    `SoftnessController` there holds each rank's part at the target.

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
    inside = unwrapped(optimizer)
    if not isinstance(inside.optimizer, Optimizer):
        raise TypeError(
            f"unwrap takes a torch optimizer, or a wrapper that holds one as {', '.join(ATTRIBUTES)}, got "
            f"{described(inside)}"
        )
    return inside.optimizer


def unwrapped(optimizer: object) -> Unwrapped:
    """Return the innermost object, of any type, and the wrappers around it."""
    wrappers: list[str] = []
    passed = {id(optimizer)}
    inner, most = optimizer, _count(optimizer)
    while (wrapped := _wrapped_by(inner)) is not None and id(wrapped) not in passed:
        wrappers.append(type(inner).__name__)
        passed.add(id(wrapped))
        inner = wrapped
        most = max(most, _count(inner))
    return Unwrapped(inner, wrappers, most - _count(inner))


def unwrapped_prm(optimizer: object, who: str) -> Unwrapped:
    """Return the `PRM` or `Masked` inside; raise TypeError, naming `who`, for others."""
    inside = unwrapped(optimizer)
    if not isinstance(inside.optimizer, (PRM, Masked)):
        raise TypeError(
            f"{who} needs a popriskmin.PRM, got {described(inside)}: other optimizers keep no variance of the "
            "gradient. Hand the framework a PRM, to which an AdamW's state goes on by "
            "load_state_dict(adamw.state_dict()), or popriskmin.Masked around the optimizer"
        )
    return inside


def described(inside: Unwrapped) -> str:
    """Return wrappers and optimizer in words: `AcceleratedOptimizer around AdamW`."""
    return " around ".join([*inside.wrappers, type(inside.optimizer).__name__])


def _wrapped_by(wrapper: object) -> object:
    """Return the optimizer that a wrapper holds, or None.

    The type does not tell, as some wrappers are also of the wrapped class.
    """
    for name in ATTRIBUTES:
        inner = getattr(wrapper, name, None)
        if inner is not None and hasattr(inner, "param_groups") and hasattr(inner, "step"):
            return inner
    return None


def _count(optimizer: object) -> int:
    return sum(len(group["params"]) for group in getattr(optimizer, "param_groups", ()))
