"""The tables by which the Triton step finds its tensors, without a device."""

import struct

import pytest
import torch

from popriskmin.step.kernels import cuda_table
from popriskmin.step.kernels.cuda_table import COLUMNS, Places, built, table_of

BLOCK = 1024


def places(sizes, addresses=None, steps=None):
    """Return tensors of these sizes, all of whose addresses are the same."""
    packed = lambda numbers: struct.pack(f"{len(sizes)}q", *numbers)  # noqa: E731
    addresses = packed(addresses or [16] * len(sizes))
    return Places(packed(sizes), *[addresses] * 7, packed(steps or [8] * len(sizes)))


class Streams:
    """Stand in for what the tables ask of CUDA; the meta device for one of its devices."""

    def __init__(self, monkeypatch):
        self.capturing, self.current, self.allocated = False, 1, []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self)
        monkeypatch.setattr(cuda_table, "_pinned", self.pinned)
        for name, empty in (("_tables", {}), ("_reserve", {}), ("_read_by_graphs", [])):
            monkeypatch.setattr(cuda_table, name, empty)

    @property
    def cuda_stream(self):
        return self.current

    def pinned(self, size):
        assert not self.capturing
        self.allocated.append(torch.full((size,), -1))
        return self.allocated[-1]

    def table(self, n, keep=True):
        return table_of(places([n]), BLOCK, torch.device("meta"), keep)


def test_a_table_lists_tensors_and_blocks():
    sizes, addresses = [1, BLOCK, BLOCK + 1, 8], [16, 32, 48, 60]
    table = built(places(sizes, addresses, steps=[1, 2, 3, 4]), BLOCK)
    assert table.blocks == 5
    *rows, owners = table.numbers.split([COLUMNS] * 4 + [5])
    assert owners.tolist() == [0, 1, 2, 2, 3]
    expected = zip(sizes, [0, 1, 2, 4], [1, 1, 1, 0], *[addresses] * 7, [1, 2, 3, 4])
    assert [row.tolist() for row in rows] == [list(row) for row in expected]


@pytest.mark.parametrize("odd", range(7))
def test_one_tensor_off_its_alignment_is_enough(odd):
    held = places([5])
    off = held._replace(**{Places._fields[1 + odd]: struct.pack("q", 40)})
    assert [built(x, BLOCK).numbers[2].item() for x in (held, off)] == [1, 0]
    # A step count is read by itself.
    assert built(held._replace(steps=struct.pack("q", 4)), BLOCK).numbers[2] == 1


def test_a_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        assert built(places([3, 5]), BLOCK).numbers.device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_tables_are_kept_while_they_are_used(monkeypatch):
    monkeypatch.setattr(cuda_table, "MOST_TABLES", 2)
    streams = Streams(monkeypatch)
    one, two = streams.table(1), streams.table(2)
    assert streams.table(1) is one
    streams.table(3)
    assert streams.table(1) is one
    assert streams.table(2) is not two
    streams.current = 2
    assert streams.table(1) is not one


def test_a_graph_gets_a_table_that_nobody_else_uses(monkeypatch):
    streams = Streams(monkeypatch)
    eager = streams.table(1)
    streams.capturing = True
    captured = streams.table(1)
    assert captured is not eager
    assert captured.blocks == eager.blocks == 1
    assert len(cuda_table._tables) == 1
    # The host's memory was allocated before, and holds what the graph will read.
    (source,) = cuda_table._read_by_graphs
    assert any(source is memory for memory in streams.allocated)
    assert source[0] == 1
    streams.capturing = False
    assert streams.table(1) is eager
