"""Whether the tensors of a step are such that their addresses may be handed to a kernel."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from operator import attrgetter
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from popriskmin.step.codes import BLOCK, are_codes, are_codes_of
from popriskmin.step.lists import PLAIN, Lists, are_plain, compute_dtype, is_dense, sharing_memory

GRADIENT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MEAN_TYPES = (torch.float32, torch.float64)
STATE_TYPES = (torch.float32, torch.float64, torch.bfloat16)
COUNTER_TYPES = (torch.float32, torch.float64)

_dtype, _shape = attrgetter("dtype"), attrgetter("shape")
_is_cpu, _is_cuda = attrgetter("is_cpu"), attrgetter("is_cuda")


Layout = list[tuple[int, ...] | None] | None
# Tables on the device, by their kind, and by what they were made of.
KernelMemory = dict[str, dict[tuple[Hashable, ...], Tensor]]


class State(NamedTuple):
    """Parameters and state of a group that were found to fit, with what the kernel is told of them.

    Looking at every property of every tensor takes longer than a step of small ones. While the tensors are the same
    objects at the same addresses most of what they were found to be holds; the types, shapes and strides of the
    parameters, which users may change in place, are looked at in every step, and so are gradients, which come anew
    with it.

    No tensor is held: users remove and replace them, and their memory is to be free then. The identity of an object
    that may be gone says nothing, so the state's are watched. Parameters are not: `torch.utils.swap_tensors`, by which
    a module moves sharded ones to another device, refuses a tensor with weak references.
    """

    ids: int  # the sum over the state's tensors
    watched: list[ref[Tensor]]
    gone: list[ref[Tensor]]  # of those watched, the ones that no longer exist
    addresses: list[bytes]
    shapes: list[torch.Size]
    layout: Layout
    sizes: bytes
    origins: bytes  # see `origins`
    memory: KernelMemory  # what the kernel itself keeps of them


def packed(numbers: Iterable[int], count: int) -> bytes:
    """Return integers as the kernel reads them: 64 bits each, in this machine's order."""
    return struct.pack(f"{count}q", *numbers)


def origins(lists: Lists) -> bytes:
    """Return what the kernels know of each tensor's shrinkage.

    0 leaves it alone, as biases and norms are, 1 pulls it to zero, and any other number is
    the address of what it is pulled to.
    """
    starts = map(Tensor.data_ptr, lists.starts) if lists.starts else [1] * len(lists.params)
    return packed((start if param.dim() > 1 else 0 for param, start in zip(lists.params, starts)), len(lists.params))


def fits_as_usual(lists: Lists, state_steps: list[Tensor], known: State | None) -> State | None:
    """Return what the kernel is told if all is dense, on one device, list by list of one type, and lies alike.

    That is the usual case, and soon seen. None says only that it is not the usual case. `known` is what this returned
    for the step before. The device is the CPU or one for CUDA, where the steps may be counted on either.
    """
    params, grads = lists.params, lists.grads
    kept = (*lists.written, lists.starts)
    held = [*kept, state_steps]
    shapes = list(map(_shape, params))
    device = Tensor.get_device(params[0])  # -1 for the CPU
    if not (params[0].is_cpu or params[0].is_cuda):
        return None
    try:
        addresses = [packed(map(Tensor.data_ptr, tensors), len(tensors)) for tensors in held]
        if known is not None and shapes == known.shapes and _are_same(held, addresses, known):
            found = known
            good = (
                _layout(params) == known.layout
                and len(set(map(_dtype, params))) == 1
                and set(map(type, params)) <= PLAIN
            )
        else:
            layout = _layout(params)
            sizes = packed(map(Tensor.numel, params), len(params))
            # What a kernel keeps it finds by addresses, whatever objects stand for them.
            memory = {} if known is None else known.memory
            gone: list[ref[Tensor]] = []
            watched = [ref(tensor, gone.append) for tensor in chain.from_iterable(held[1:])]
            ids = sum(map(id, chain.from_iterable(held[1:])))
            found = State(ids, watched, gone, addresses, shapes, layout, sizes, origins(lists), memory)
            good = (
                (layout is None or all(map(is_dense, params)))
                and all(_are_usual(tensors, found, device) for tensors in _of_its_shape(lists) if tensors)
                and _are_usual_blocks(lists, device)
                and not any(map(Tensor.is_neg, params))
                and not sharing_memory(params)
                and all(map(_is_counter, state_steps))
                and len(set(map(_dtype, state_steps))) == 1
                and (_are_on(state_steps, -1) or _are_on(state_steps, device))
            )
        for given in (grads, lists.grad_vars) if lists.grad_vars else (grads,):
            good = good and _are_usual(given, found, device) and not any(map(Tensor.is_neg, given))
    except RuntimeError:  # sparse and other tensors without strides or addresses
        return None
    if not good or params[0].is_complex() or grads[0].is_complex() or any(_misfit_of_types(lists, 0)):
        return None
    return found


def _of_its_shape(lists: Lists) -> Iterator[list[Tensor]]:
    """Yield what is kept from step to step and has the shape of its parameter."""
    coded = are_codes(lists.exp_avgs[0])
    yield from (lists.params, lists.max_exp_avg_sqs, lists.starts)
    yield from () if coded else (lists.exp_avgs, lists.exp_avg_sqs, lists.exp_avg_vars)


def _are_usual_blocks(lists: Lists, device: int) -> bool:
    """Return whether the state is in blocks that a kernel takes, or in none at all."""
    coded = list(map(are_codes, lists.exp_avgs))
    if not any(coded):
        return True
    return (
        all(coded)
        and _are_on(lists.exp_avgs, device)
        and all(_misfit_of_blocks(lists, i) is None for i in range(len(coded)))
    )


def _misfit_of_blocks(lists: Lists, i: int) -> str | None:
    """Return why a kernel does not take the 8-bit blocks at place `i`, or None if it does."""
    param, codes = lists.params[i], lists.exp_avgs[i]
    if not (are_plain([codes]) and codes.is_contiguous() and are_codes_of(codes, param)):
        return f"its codes, of shape {tuple(codes.shape)}, are no contiguous blocks of its own"
    if len(codes) > 1 and param.numel() % (len(codes) * BLOCK):
        return f"it is sharded, and its rows of {param.numel() // len(codes)} scalars are no whole blocks of {BLOCK}"
    if codes.device != param.device:
        return f"its codes are on {codes.device}, the parameter on {param.device}"
    if not param.is_contiguous():
        return f"state_dtype='8bit' needs it contiguous, and it has strides {param.stride()}"
    maxima = {tensors[i].dtype for tensors in (lists.max_exp_avg_sqs,) if tensors}
    if maxima - {compute_dtype(param)}:
        return f"max_exp_avg_sq has type {maxima.pop()}, not {compute_dtype(param)}"
    return None


def _are_same(held: list[list[Tensor]], addresses: list[bytes], known: State) -> bool:
    if known.gone or addresses != known.addresses:
        return False
    # A sum is made sooner than a list of numbers. What another parameter at the same address could have different is
    # looked at anyway.
    return sum(map(id, chain.from_iterable(held[1:]))) == known.ids


def _are_usual(tensors: list[Tensor], state: State, device: int) -> bool:
    return (
        set(map(type, tensors)) <= PLAIN
        and _are_on(tensors, device)
        and list(map(_shape, tensors)) == state.shapes
        and _layout(tensors) == state.layout
        and len(set(map(_dtype, tensors))) == 1
    )


def _layout(tensors: list[Tensor]) -> Layout:
    """Return how the elements lie: None where all tensors are contiguous, as they mostly are, and that is soon seen."""
    if all(map(Tensor.is_contiguous, tensors)):
        return None
    return [None if tensor.is_contiguous() else _strides(tensor) for tensor in tensors]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that count: those of dimensions with one element say nothing."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)


def _are_on(tensors: list[Tensor], device: int) -> bool:
    """Return whether all lie on the CPU, or on the CUDA device of this number."""
    if device < 0:
        return all(map(_is_cpu, tensors))
    return all(map(_is_cuda, tensors)) and set(map(Tensor.get_device, tensors)) == {device}


def _is_counter(step: Tensor) -> bool:
    return type(step) is Tensor and step.dtype in COUNTER_TYPES and step.numel() == 1


def misfit(lists: Lists, state_steps: list[Tensor], i: int) -> str | None:
    """Return why the tensors at place `i` cannot be handed to a kernel, or None if they can.

    All must be ordinary dense tensors on one device, of one shape and the same strides, of types that the kernels
    know. A gradient or a given variance that alone lies otherwise does not count: `matched` copies it.
    """
    held = {
        name: tensors[i]
        for name, tensors in zip(("the parameter", "its gradient", "exp_avg", "exp_avg_sq", "exp_avg_var",
                                  "max_exp_avg_sq", "its variance", "its start"), lists)
        if tensors
    }  # fmt: skip
    param = lists.params[i]
    if are_codes(lists.exp_avgs[i]):
        held = {name: tensor for name, tensor in held.items() if not name.startswith("exp_avg")}
    for name, tensor in held.items():
        if not are_plain([tensor]):
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor"
        if tensor.layout != torch.strided:
            return f"{name} has layout {tensor.layout}"
        if tensor.device != param.device:
            return f"{name} is on {tensor.device}, the parameter on {param.device}"
        if tensor.shape != param.shape:
            return f"{name} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
        if name not in ("its gradient", "its variance"):
            if tensor.is_conj() or tensor.is_neg():
                return f"{name} is a lazily conjugated or negated view"
            if param.numel() > 0 and not _lie_alike(tensor, param):
                return f"{name} has strides {tensor.stride()}, the parameter {param.stride()}"
    if not is_dense(param):
        return f"the parameter's memory has gaps or overlaps: shape {tuple(param.shape)}, strides {param.stride()}"
    if state_steps[i].device.type != "cpu" and state_steps[i].device != param.device:
        return f"its step counter is on {state_steps[i].device}, the parameter on {param.device}"
    if state_steps[i].dtype not in COUNTER_TYPES:
        return f"its step counter has type {state_steps[i].dtype}, not one of {', '.join(map(str, COUNTER_TYPES))}"
    if are_codes(lists.exp_avgs[i]):
        reason = _misfit_of_blocks(lists, i)
        if reason is not None:
            return reason
    return next(_misfit_of_types(lists, i), None)


def _misfit_of_types(lists: Lists, i: int) -> Iterator[str]:
    """Yield what is wrong with the types at place `i`."""
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    param, grad, exp_avg, exp_avg_sq, exp_avg_var = (
        real.get(tensors[i].dtype, tensors[i].dtype) for tensors in lists[:5]
    )
    coded = exp_avg == torch.uint8
    for name, dtype, known in (
        ("the parameter", param, GRADIENT_TYPES),
        ("its gradient", grad, GRADIENT_TYPES),
        *(() if coded else (("exp_avg", exp_avg, MEAN_TYPES), ("exp_avg_var", exp_avg_var, STATE_TYPES))),
    ):
        if dtype not in known:
            yield f"{name} has type {dtype}, not one of {', '.join(map(str, known))}"
    if lists.grad_vars:
        dtype = lists.grad_vars[i].dtype
        if real.get(dtype, dtype) not in GRADIENT_TYPES:
            yield f"its variance has type {dtype}, not one of {', '.join(map(str, GRADIENT_TYPES))}"
    if lists.starts and lists.starts[i].dtype != lists.params[i].dtype:
        yield f"its start has type {lists.starts[i].dtype}, the parameter {lists.params[i].dtype}"
    others = [exp_avg_sq] + [tensors[i].dtype for tensors in lists[5:6] if tensors]
    if not coded and any(real.get(dtype, dtype) != exp_avg_var for dtype in others):
        yield "exp_avg_sq, exp_avg_var and max_exp_avg_sq differ in type"


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() or _strides(one) == _strides(other)


def matched(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient or a variance as it is where it lies like its parameter, else a copy that does."""
    if grad.is_conj() or grad.is_neg() or not _lie_alike(grad, param):
        return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad
