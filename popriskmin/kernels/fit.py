"""Whether the tensors of a step are such that their addresses may be handed to a kernel."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from popriskmin.lists import Lists, are_plain, is_dense

GRADIENT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MEAN_TYPES = (torch.float32, torch.float64)
STATE_TYPES = (torch.float32, torch.float64, torch.bfloat16)

_dtype, _is_cpu, _shape = attrgetter("dtype"), attrgetter("is_cpu"), attrgetter("shape")


def all_fit_on_the_cpu(lists: Lists, state_steps: list[Tensor]) -> bool:
    """Return whether all tensors are contiguous, on the CPU, and list by list of one type: the usual, soon seen."""
    shapes = list(map(_shape, lists.params))
    try:
        for tensors in lists:
            if tensors and not (
                are_plain(tensors)
                and all(map(_is_cpu, tensors))
                and all(map(Tensor.is_contiguous, tensors))
                and list(map(_shape, tensors)) == shapes
                and len(set(map(_dtype, tensors))) == 1
            ):
                return False
    except RuntimeError:  # sparse and other tensors without strides
        return False
    return (
        not lists.params[0].is_complex()
        and not lists.grads[0].is_complex()
        and not any(map(Tensor.is_neg, lists.params))
        and not any(map(Tensor.is_neg, lists.grads))
        and not any(_misfit_of_types(lists, 0))
        and all(map(_is_counter, state_steps))
    )


def _is_counter(step: Tensor) -> bool:
    return step.is_cpu and step.dtype == torch.float32 and step.numel() == 1


def misfit(lists: Lists, state_steps: list[Tensor], i: int) -> str | None:
    """Return why the tensors at place `i` cannot be handed to a kernel, or None if they can.

    All must be ordinary dense tensors on one device, of one shape and the same strides, of types that the kernels
    know. A gradient that alone lies otherwise does not count: `matched` copies it.
    """
    held = {
        name: tensors[i]
        for name, tensors in zip(("the parameter", "its gradient", "exp_avg", "exp_avg_sq", "exp_avg_var",
                                  "max_exp_avg_sq"), lists)
        if tensors
    }  # fmt: skip
    param = lists.params[i]
    for name, tensor in held.items():
        if not are_plain([tensor]):
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor"
        if tensor.layout != torch.strided:
            return f"{name} has layout {tensor.layout}"
        if tensor.device != param.device:
            return f"{name} is on {tensor.device}, the parameter on {param.device}"
        if tensor.shape != param.shape:
            return f"{name} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
        if name != "its gradient":
            if tensor.is_conj() or tensor.is_neg():
                return f"{name} is a lazily conjugated or negated view"
            if param.numel() > 0 and tensor.stride() != param.stride():
                return f"{name} has strides {tensor.stride()}, the parameter {param.stride()}"
    if not is_dense(param):
        return f"the parameter's memory has gaps or overlaps: shape {tuple(param.shape)}, strides {param.stride()}"
    if state_steps[i].device.type != "cpu" and state_steps[i].device != param.device:
        return f"its step counter is on {state_steps[i].device}, the parameter on {param.device}"
    if state_steps[i].dtype != torch.float32:
        return f"its step counter has type {state_steps[i].dtype}, not torch.float32"
    return next(_misfit_of_types(lists, i), None)


def _misfit_of_types(lists: Lists, i: int) -> Any:
    """Yield what is wrong with the types at place `i`."""
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    param, grad, exp_avg, exp_avg_sq, exp_avg_var = (
        real.get(tensors[i].dtype, tensors[i].dtype) for tensors in lists[:5]
    )
    for name, dtype, known in (
        ("the parameter", param, GRADIENT_TYPES),
        ("its gradient", grad, GRADIENT_TYPES),
        ("exp_avg", exp_avg, MEAN_TYPES),
        ("exp_avg_var", exp_avg_var, STATE_TYPES),
    ):
        if dtype not in known:
            yield f"{name} has type {dtype}, not one of {', '.join(map(str, known))}"
    others = [exp_avg_sq] + [tensors[i].dtype for tensors in lists[5:] if tensors]
    if any(real.get(dtype, dtype) != exp_avg_var for dtype in others):
        yield "exp_avg_sq, exp_avg_var and max_exp_avg_sq differ in type"


def matched(grad: Tensor, param: Tensor) -> Tensor:
    """Return the gradient as it is where it lies like its parameter, else a copy that does."""
    if grad.is_conj() or grad.is_neg() or grad.stride() != param.stride():
        return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad
