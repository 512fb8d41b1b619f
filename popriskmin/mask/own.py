"""A mask of one's own: a function of signal and noise, kept in checkpoints by its import path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import overload

from torch import Tensor

# Of the signal, the noise and the group's `Hyperparameters`, or in JAX `MaskNumbers`; returns `q`.
MaskFunction = Callable[..., Tensor]


def mask_name(mask: str | MaskFunction) -> str:
    """Return what a mask is called: its name, or for a function its import path.

    Examples
    --------
    >>> mask_name("snr"), mask_name(mask_name)
    ('snr', 'popriskmin.mask.own:mask_name')
    """
    if isinstance(mask, str):
        return mask
    return f"{getattr(mask, '__module__', '?')}:{getattr(mask, '__qualname__', type(mask).__qualname__)}"


@overload
def found_mask(mask: str | MaskFunction) -> str | MaskFunction: ...
@overload
def found_mask(mask: object) -> object: ...
def found_mask(mask: object) -> object:
    """Return the function at an import path such as "my_module:my_mask"; anything else as it is.

    Raises
    ------
    ValueError
        For a path without such a module or function.

    Examples
    --------
    >>> found_mask("popriskmin.mask.own:mask_name") is mask_name, found_mask("snr")
    (True, 'snr')
    """
    if not isinstance(mask, str) or ":" not in mask:
        return mask
    module_name, _, name = mask.partition(":")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # what a module raises when it is imported, of whatever type
        raise ValueError(f"the module {module_name!r} of the mask {mask!r} cannot be imported: {error}") from error
    names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"the mask {mask!r} cannot be found: {module_name} has no {name}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"the mask {mask!r} is no function, but {found!r}")
    return found


def checked_shape(mask: MaskFunction, q: object, signal: Tensor) -> Tensor:
    """Return `q` if it is a tensor of the signal's shape; raise ValueError otherwise."""
    if not isinstance(q, Tensor) or q.shape != signal.shape:
        given = f"shape {tuple(q.shape)}" if isinstance(q, Tensor) else repr(q)
        raise ValueError(
            f"the mask {mask_name(mask)} must return q as a tensor of the signal's shape {tuple(signal.shape)}, "
            f"got {given}"
        )
    return q
