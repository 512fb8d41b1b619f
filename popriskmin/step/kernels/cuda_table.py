"""Where the kernel for CUDA finds its tensors: tables of sizes and addresses, made on the host, kept on the device.

Two tables of int64. One is of what seldom changes: a row of `COLUMNS` numbers for each tensor, and then for each block
of elements the number of its tensor. The other, small, holds the addresses of the gradients, which may come at others
in every step, and then those of their variances where they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.step.kernels.eligible import KernelMemory

# A tensor's row: its number of elements, its first block, whether its memory allows wide loads, the addresses of p, m,
# v, s and of the maximum of v (or of v), that of its step count, and what shrinkage pulls it to, see
# `popriskmin.step.kernels.eligible.origins`.
COLUMNS = 10

# Tables kept for a parameter group: of each kind one is in use, more where steps differ, or where gradients change
# their addresses at every step.
MOST_TABLES = {"rows": 8, "gradients": 256}


class Places(NamedTuple):
    """Sizes and addresses of the tensors of a launch: for each a string of 64-bit integers, one for each tensor."""

    sizes: bytes
    params: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    exp_avg_vars: bytes
    max_exp_avg_sqs: bytes
    steps: bytes
    origins: bytes

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self.sizes) // 8


class Tables(NamedTuple):
    """Both tables on the device, and the number of blocks that the tensors have."""

    rows: Tensor
    gradients: Tensor
    blocks: int


def built(places: Places, block: int) -> Tensor:
    """Return the table of rows on the host, for blocks of so many elements."""
    n, *addresses, steps, origins = _integers(b"".join(places)).view(len(places), -1)
    blocks = (n + (block - 1)).div(block, rounding_mode="floor")
    joined = origins * (origins > 1)  # others are no addresses
    for column in addresses:
        joined = joined | column
    rows = torch.stack([n, blocks.cumsum(0) - blocks, (joined % 16 == 0).long(), *addresses, steps, origins], 1)
    owners = torch.repeat_interleave(torch.arange(len(n), device="cpu"), blocks)
    return torch.cat([rows.flatten(), owners])


def _integers(packed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


# Host memory that captured graphs read at every replay. How long a graph lives cannot be known, so it is kept.
_read_by_graphs: list[Tensor] = []
# Pinned host memory for tables of captured graphs, by size: allocating it during a capture fails in older torch.
_reserve: dict[int, list[Tensor]] = {}
_MOST_RESERVED = 8


def tables_of(
    places: Places, gradients: bytes, block: int, device: torch.device, reserve: bool, memory: KernelMemory
) -> Tables:
    """Return the tables on the device, from the memory of the parameter group where they are there already.

    With `reserve`, memory is put aside for a later capture of the same step into a graph.
    """

    def bring(kind: str, key: tuple[Hashable, ...], build: Callable[[], Tensor]) -> Tensor:
        if device.type == "cpu":
            return build()
        if torch.cuda.is_current_stream_capturing():
            return _for_a_graph(build(), device)
        # By what a table holds, so that none goes stale; and by stream, so that the memory of one that is dropped is
        # used again only after the kernels that read it: both are work of the same stream.
        kept = memory.setdefault(kind, {})
        key = (device, torch.cuda.current_stream(device).cuda_stream, *key)
        found = kept.pop(key, None)
        if found is None:
            found = _brought(build(), device, reserve)
            if len(kept) >= MOST_TABLES[kind]:
                kept.pop(next(iter(kept)))
        kept[key] = found  # last, as the most recently used
        return found

    rows = bring("rows", (block, places), lambda: built(places, block))
    grads = bring("gradients", (gradients,), lambda: _integers(gradients))
    return Tables(rows, grads, len(rows) - COLUMNS * places.tensors)


def _brought(table: Tensor, device: torch.device, reserve: bool) -> Tensor:
    size = len(table)
    if reserve and len(_reserve.setdefault(size, [])) < _MOST_RESERVED:
        _reserve[size].append(_pinned(size))
    # The pinned memory may go at once: torch lends it to nobody else before the copy is done.
    return _pinned(size).copy_(table).to(device, non_blocking=True)


def _for_a_graph(table: Tensor, device: torch.device) -> Tensor:
    # Never one that is kept, which may be dropped while the graph goes on reading it. The copy becomes a node of the
    # graph: it reads the host's memory, which is kept, at every replay, and writes to memory of the graph's own pool,
    # which lives as long as the graph. Nor is it kept: before the first replay nothing has been copied.
    reserved = _reserve.get(len(table))
    source = (reserved.pop() if reserved else _pinned(len(table))).copy_(table)
    _read_by_graphs.append(source)
    return source.to(device, non_blocking=True)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
