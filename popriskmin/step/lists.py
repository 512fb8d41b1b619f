"""The parallel lists of tensors that a step reads and writes, and what every implementation asks of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from popriskmin.mask import Hyperparameters
from popriskmin.step.shards import is_sharded

PLAIN = {Tensor, torch.nn.Parameter}


class Lists(NamedTuple):
    """Parallel lists of the tensors that a step reads and writes.

    `max_exp_avg_sqs` is empty without `amsgrad`; `grad_vars`, the variances of the
    gradients, unless they are given; `starts`, the weights that a shrinkage pulls to, where
    it pulls to zero or is off.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avg_vars: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    grad_vars: list[Tensor]
    starts: list[Tensor]

    @property
    def written(self) -> tuple[list[Tensor], ...]:
        """What a step writes to: the parameters and their state."""
        # By name: torch.compile of torch 2.7 cannot slice a named tuple.
        return self.params, self.exp_avgs, self.exp_avg_sqs, self.exp_avg_vars, self.max_exp_avg_sqs

    def of(self, indices: list[int]) -> Lists:
        """Return the lists with these places only."""
        return Lists(*[[tensors[i] for i in indices] if tensors else [] for tensors in self])

    def real(self) -> Lists:
        """Return the lists with complex tensors viewed as real."""
        return Lists(*[[as_real(tensor) for tensor in tensors] for tensors in self])


def shrinks(hyper: Hyperparameters, param: Tensor) -> bool:
    """Return whether shrinkage pulls the parameter: biases and norms, of one dimension, are left alone."""
    return hyper.shrinkage > 0 and param.dim() > 1


def is_compiling() -> bool:
    """Return whether torch.compile is tracing."""
    compiler: Any = getattr(torch, "compiler", None)
    return hasattr(compiler, "is_compiling") and bool(compiler.is_compiling())


def count_up(state_steps: list[Tensor]) -> None:
    """Add 1 to every step counter, wherever it lies."""
    on_host = [] if is_compiling() else [t for t in state_steps if t.is_cpu]
    if on_host:
        # The number is wrapped once; the slow path would wrap it for every tensor.
        torch._foreach_add_(on_host, [torch.ones((), dtype=on_host[0].dtype, device="cpu")] * len(on_host))
    if len(on_host) < len(state_steps):
        torch._foreach_add_([t for t in state_steps if not (on_host and t.is_cpu)], 1)


def are_plain(tensors: list[Tensor]) -> bool:
    """Return whether these are ordinary tensors, and not a subclass such as one sharded over ranks."""
    return set(map(type, tensors)) <= PLAIN


def local_parts(lists: Lists) -> Lists:
    """Return the lists with tensors that are sharded over ranks (DTensor) replaced by this rank's parts.

    What is done to every scalar by itself needs no other rank. A tensor whose gradient or state lies differently
    over the ranks is left as it is.
    """
    if are_plain(lists.params):
        return lists
    parts = Lists(*[list(tensors) for tensors in lists])
    for i in range(len(lists.params)):
        held: list[Any] = [tensors[i] for tensors in lists if tensors]
        if all(map(is_sharded, held)) and len({(x.device_mesh, x.placements) for x in held}) == 1:
            for tensors in parts:
                if tensors:
                    sharded: Any = tensors[i]
                    tensors[i] = sharded.to_local()
    return parts


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def sharing_memory(tensors: list[Tensor]) -> set[int]:
    """Return the places of ordinary tensors that may share elements with another.

    Each must then be stepped when the one before it has been written, or the last one written is all that remains.
    Views that lie between each other's elements count too.
    """
    extents: dict[torch.device, list[tuple[int, int, int]]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.layout == torch.strided and not tensor.is_meta:
            size = tensor.numel() * tensor.element_size()
            if size > 0 and not tensor.is_contiguous():
                last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
                size = (last + 1) * tensor.element_size()
            if size > 0:
                begin = tensor.data_ptr()
                extents.setdefault(tensor.device, []).append((begin, begin + size, i))
    sharing: set[int] = set()
    for on_device in extents.values():
        farthest, whose = 0, 0
        for begin, end, i in sorted(on_device):
            if begin < farthest:
                sharing |= {i, whose}
            if end > farthest:
                farthest, whose = end, i
    return sharing


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as real, the last dimension holding both parts."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the type to calculate in: the widest among the tensors, and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type to sum in: float64, which holds sums of many squares, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
