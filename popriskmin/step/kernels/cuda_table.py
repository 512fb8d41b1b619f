"""Where the kernel for CUDA finds its tensors: a table of sizes and addresses, made on the host, kept on the device.

The table is one tensor of int64: a row of `COLUMNS` numbers for each tensor, and then for each block of elements the
number of its tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A tensor's row: its number of elements, its first block, whether its memory allows wide loads, the addresses of p, g,
# m, v, s, of the maximum of v (or of v) and of the gradient's variance (or of g), and that of its step count (or 0).
COLUMNS = 11

# Tables in use: a few for each parameter group; more only where gradients change their addresses at every step.
MOST_TABLES = 256


class Places(NamedTuple):
    """Sizes and addresses of the tensors of a launch: for each a string of 64-bit integers, one for each tensor."""

    sizes: bytes
    params: bytes
    grads: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    exp_avg_vars: bytes
    max_exp_avg_sqs: bytes
    grad_vars: bytes
    steps: bytes

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self.sizes) // 8


class Table(NamedTuple):
    """A table on the device, and the number of blocks that its tensors have."""

    numbers: Tensor
    blocks: int


def built(places: Places, block: int) -> Table:
    """Return the table on the host, for blocks of so many elements."""
    n, *addresses, steps = torch.frombuffer(bytearray(b"".join(places)), dtype=torch.int64).view(len(places), -1)
    blocks = (n + (block - 1)).div(block, rounding_mode="floor")
    joined = addresses[0]
    for column in addresses[1:]:
        joined = joined | column
    rows = torch.stack([n, blocks.cumsum(0) - blocks, (joined % 16 == 0).long(), *addresses, steps], 1)
    owners = torch.repeat_interleave(torch.arange(len(n), device="cpu"), blocks)
    return Table(torch.cat([rows.flatten(), owners]), len(owners))


# By what they hold, so that none goes stale; and by stream, so that the memory of one that is dropped is used again
# only after the kernels that read it: both are work of the same stream.
_tables: dict[tuple[torch.device, int, int, Places], Table] = {}
# Host memory that captured graphs read at every replay. How long a graph lives cannot be known, so it is kept.
_read_by_graphs: list[Tensor] = []
# Pinned host memory for tables of captured graphs, by size: allocating it during a capture fails in older torch.
_reserve: dict[int, list[Tensor]] = {}
_MOST_RESERVED = 8


def table_of(places: Places, block: int, device: torch.device, keep: bool) -> Table:
    """Return the table on the device, from the cache where it is there already.

    With `keep`, memory is put aside for a later capture of the same step into a graph.
    """
    if device.type == "cpu":
        return built(places, block)
    if torch.cuda.is_current_stream_capturing():
        # Never from the cache, which may drop what the graph goes on reading. The copy becomes a node of the graph:
        # it reads the host's memory, which is kept, at every replay, and writes to memory of the graph's own pool,
        # which lives as long as the graph. Nor into the cache: before the first replay nothing has been copied.
        table = built(places, block)
        reserved = _reserve.get(len(table.numbers))
        source = (reserved.pop() if reserved else _pinned(len(table.numbers))).copy_(table.numbers)
        _read_by_graphs.append(source)
        return Table(source.to(device, non_blocking=True), table.blocks)
    key = (device, torch.cuda.current_stream(device).cuda_stream, block, places)
    cached = _tables.pop(key, None)
    if cached is None:
        table = built(places, block)
        size = len(table.numbers)
        if keep and len(_reserve.setdefault(size, [])) < _MOST_RESERVED:
            _reserve[size].append(_pinned(size))
        # The pinned memory may go at once: torch lends it to nobody else before the copy is done.
        numbers = _pinned(size).copy_(table.numbers).to(device, non_blocking=True)
        cached = Table(numbers, table.blocks)
        if len(_tables) >= MOST_TABLES:
            _tables.pop(next(iter(_tables)))
    _tables[key] = cached  # last, as the most recently used
    return cached


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
