"""The fused step, one pass over memory: `cpu` in C, `cuda` in Triton; and what of it is usable here.

A kernel takes addresses, so every tensor is looked at first; what does not fit is left to the foreach step.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.mask import Hyperparameters, mask_name
from popriskmin.step.kernels import cpu, cuda
from popriskmin.step.kernels.eligible import State, fits_as_usual, matched, misfit
from popriskmin.step.lists import Lists, are_plain, sharing_memory, shrinks

# What is known of the tensors of a group, from its step before: of all, or by device and types.
Memory = dict[object, State]


class Kernel(NamedTuple):
    """One kernel: `unusable()` says why it cannot run here, or None; `step` runs it."""

    unusable: Callable[[], str | None]
    step: Callable[[Lists, list[Tensor], Hyperparameters, State | None], None]


# By the type of the device.
KERNELS = {"cpu": Kernel(cpu.unusable, cpu.step), "cuda": Kernel(cuda.unusable, cuda.step)}


def unusable() -> str | None:
    """Return why no kernel can be used here, or None if one can."""
    reasons = []
    for device, kernel in KERNELS.items():
        reason = kernel.unusable()
        if reason is None:
            return None  # without asking on, which would wake up a device
        reasons.append(f"{device}: {reason}")
    return "; ".join(reasons)


def fused_prm(
    lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, insist: bool, memory: Memory
) -> list[int]:
    """Take one step of the tensors that fit a kernel, in place, and return the places of the others.

    Parameters
    ----------
    lists, state_steps, hyper
        As for every implementation, not empty; see `popriskmin.step.functional.prm`.
    insist
        Raise where a tensor does not fit, before any has moved.
    memory
        Kept by the caller from step to step of a group, to save time; empty at first.

    Raises
    ------
    RuntimeError
        With `insist`, saying which tensor does not fit and why.
    """
    parts = _usual_parts(lists, state_steps, hyper, memory)
    if parts is not None:
        for part in parts:
            KERNELS[part.lists.params[0].device.type].step(part.lists, part.state_steps, hyper, part.state)
        return []
    if not insist and not _any_usable(lists.params):
        return list(range(len(lists.params)))
    cohorts: dict[tuple[object, ...], list[int]] = {}
    left, empty = [], []
    apart = sharing_memory(lists.params) if are_plain(lists.params) else set()
    for i, param in enumerate(lists.params):
        if param.numel() == 0:
            empty.append(i)
            continue
        reason = _refusal(hyper, param) or misfit(lists, state_steps, i)
        if reason is None:
            kind = (shrinks(hyper, param), i if i in apart else None, *_kind(lists, state_steps, i))
            cohorts.setdefault(kind, []).append(i)
        elif insist:
            raise RuntimeError(f"fused=True, but tensor {i} of a parameter group cannot take it: {reason}")
        else:
            left.append(i)
    for i in empty:
        state_steps[i] += 1
    for (shrinking, *_), indices in cohorts.items():
        cohort = lists.of(indices)
        # Seen as real, a complex tensor of one dimension has two.
        own = hyper if shrinking else hyper._replace(shrinkage=0.0)
        grads = [matched(grad, param) for grad, param in zip(cohort.grads, cohort.params)]
        grad_vars = [matched(z, param) for z, param in zip(cohort.grad_vars, cohort.params)]
        kernel = KERNELS[cohort.params[0].device.type]
        kernel.step(
            cohort._replace(grads=grads, grad_vars=grad_vars).real(), [state_steps[i] for i in indices], own, None
        )
    return left


def _any_usable(params: list[Tensor]) -> bool:
    """Return whether there is a kernel for one of the parameters; warn, once, of one that should be here and is not."""
    reasons = {type: KERNELS[type].unusable() for type in {param.device.type for param in params} if type in KERNELS}
    for device, reason in reasons.items():
        _warn_without_kernel(device, reason)
    return None in reasons.values()


@functools.cache
def _warn_without_kernel(device: str, reason: str | None) -> None:
    if reason is not None:
        name = "" if device == "cpu" else f" for {device}"
        warnings.warn(f"PRM works without its fused step{name}, several times slower: {reason}", stacklevel=8)


class _Part(NamedTuple):
    """Tensors that lie as usual, and what is known of them."""

    lists: Lists
    state_steps: list[Tensor]
    state: State


def _usual_parts(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, memory: Memory) -> list[_Part] | None:
    """Return the tensors, by device and types, in parts that lie as usual; None if some do not, which takes longer."""
    whole = _usual(lists, state_steps, hyper, memory, None)
    if whole is not None:
        return [whole]
    places: dict[object, list[int]] = {}
    for i in range(len(lists.params)):
        places.setdefault(_kind(lists, state_steps, i), []).append(i)
    if len(places) == 1:
        return None
    parts = []
    for key, indices in places.items():
        part = _usual(lists.of(indices), [state_steps[i] for i in indices], hyper, memory, key)
        if part is None:
            return None
        parts.append(part)
    return parts


def _kind(lists: Lists, state_steps: list[Tensor], i: int) -> tuple[object, ...]:
    """Return devices and types at a place: what agrees in them can go into one call of a kernel."""
    step = state_steps[i]
    return (lists.params[i].device, step.device, step.dtype, *(tensors[i].dtype for tensors in lists if tensors))


def _usual(
    lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, memory: Memory, key: object
) -> _Part | None:
    if _refusal(hyper, lists.params[0]) is not None:
        return None
    state = fits_as_usual(lists, state_steps, memory.get(key))
    if state is None:
        return None
    memory[key] = state
    return _Part(lists, state_steps, state)


def _refusal(hyper: Hyperparameters, param: Tensor) -> str | None:
    """Return why no kernel steps a parameter on its device, whatever its other tensors are."""
    device = param.device.type
    if device not in KERNELS:
        return f"there is no kernel for {device}"
    if isinstance(hyper.lr, Tensor) and hyper.lr.device.type not in ("cpu", device):
        return f"lr is on {hyper.lr.device}, the parameter on {param.device}"
    if hyper.mask not in cpu.MASK_CODES:
        known = ", ".join(cpu.MASK_CODES)
        return f"the kernels know the masks {known}, and not {mask_name(hyper.mask)}"
    return KERNELS[device].unusable()


def describe() -> dict[str, str]:
    """Return what is usable here, in words: a line for each device, and one on masks."""
    lines = {}
    for device, kernel in KERNELS.items():
        reason = kernel.unusable()
        if reason is not None:
            lines[device] = f"foreach; no fused step: {reason}"
        elif device == "cpu":
            lines[device] = (
                f"fused, {cpu.LEVELS[cpu.level()]}, {torch.get_num_threads()} threads (torch.get_num_threads())"
            )
        else:
            lines[device] = "fused, by Triton"
    if any(line.startswith("fused") for line in lines.values()):
        lines["masks"] = f"fused: {', '.join(cpu.MASK_CODES)}; a mask of one's own steps by foreach"
    return lines
