"""The moment in a step when its gradients are there, with a closure and without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def with_gradients(args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]) -> Arguments | None:
    """Call `act` as soon as the gradients of a step are there.

    Without a closure they are there before the step, and `act` is called at once. With
    one it is called when the closure has returned.

    Parameters
    ----------
    args, kwargs
        The arguments of a step pre-hook, of which the first is the optimizer.
    act
        Called once, without arguments. An error that it raises ends the step.

    Returns
    -------
    tuple or None
        The return value of the pre-hook: the arguments with the closure wrapped, or
        None if they stay as they are.

    Examples
    --------
    >>> import torch
    >>> def hook(optimizer, args, kwargs):
    ...     return with_gradients(args, kwargs, lambda: print(parameter.grad))
    >>> parameter = torch.nn.Parameter(torch.zeros(1))
    >>> parameter.grad = torch.ones(1)
    >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
    >>> handle = optimizer.register_step_pre_hook(hook)
    >>> optimizer.step()
    tensor([1.])
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        act()
        return None

    def observed() -> object:
        loss = closure()
        act()
        return loss

    if len(args) > 1:
        return (args[0], observed, *args[2:]), kwargs
    return args, {**kwargs, "closure": observed}
