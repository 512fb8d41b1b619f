"""The tables by which the Triton step finds its tensors, without a device."""

import struct

import pytest
import torch

from popriskmin.step.kernels import cuda_table
from popriskmin.step.kernels.cuda_table import COLUMNS, MOST_TABLES, Places, built, tables_of

BLOCK = 1024


def places(sizes, addresses=None, steps=None, origins=None):
    """Return tensors of these sizes, all of whose addresses are the same."""
    packed = lambda numbers: struct.pack(f"{len(sizes)}q", *numbers)  # noqa: E731
    addresses = packed(addresses or [16] * len(sizes))
    return Places(
        packed(sizes), *[addresses] * 5, *map(packed, (steps or [8] * len(sizes), origins or [0] * len(sizes)))
    )


class Streams:
    """Stand in for what the tables ask of CUDA; the meta device for one of its devices."""

    def __init__(self, monkeypatch):
        self.capturing, self.current, self.allocated, self.memory = False, 1, [], {}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self)
        monkeypatch.setattr(cuda_table, "_pinned", self.pinned)
        monkeypatch.setattr(cuda_table, "_reserve", {})
        monkeypatch.setattr(cuda_table, "_read_by_graphs", [])

    @property
    def cuda_stream(self):
        return self.current

    def pinned(self, size):
        assert not self.capturing
        self.allocated.append(torch.full((size,), -1))
        return self.allocated[-1]

    def tables(self, n, gradient=16, reserve=True):
        packed = struct.pack("q", gradient)
        return tables_of(places([n]), packed, BLOCK, torch.device("meta"), reserve, self.memory)


def test_a_table_lists_tensors_and_blocks():
    sizes, addresses = [1, BLOCK, 0, BLOCK + 1, 8], [16, 32, 0, 48, 60]
    held = places(sizes, addresses, steps=[1, 2, 3, 4, 5], origins=[0, 1, 0, 1, 32])
    assert tables_of(held, struct.pack("5q", *addresses), BLOCK, torch.device("cpu"), False, {}).blocks == 5
    *rows, owners = built(held, BLOCK).split([COLUMNS] * 5 + [5])
    assert owners.tolist() == [0, 1, 3, 3, 4]
    expected = zip(sizes, [0, 1, 2, 2, 4], [1, 1, 1, 1, 0], *[addresses] * 5, [1, 2, 3, 4, 5], [0, 1, 0, 1, 32])
    assert [row.tolist() for row in rows] == [list(row) for row in expected]


@pytest.mark.parametrize("odd", range(5))
def test_one_tensor_off_its_alignment_is_enough(odd):
    held = places([5])
    off = held._replace(**{Places._fields[1 + odd]: struct.pack("q", 40)})
    assert [built(x, BLOCK)[2].item() for x in (held, off)] == [1, 0]
    # The first weights count too, and what says that there are none does not.
    assert [built(places([5], origins=[origin]), BLOCK)[2].item() for origin in (0, 1, 32, 40)] == [1, 1, 1, 0]
    # A step count is read by itself.
    assert built(held._replace(steps=struct.pack("q", 4)), BLOCK)[2] == 1


def test_on_the_host_the_tables_are_made_anew():
    tables = tables_of(places([5]), struct.pack("2q", 16, 24), BLOCK, torch.device("cpu"), False, {})
    assert (tables.rows[0], tables.gradients.tolist(), tables.blocks) == (5, [16, 24], 1)


def test_a_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        assert built(places([3, 5]), BLOCK).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_tables_are_kept_while_they_are_used(monkeypatch):
    monkeypatch.setitem(MOST_TABLES, "rows", 2)
    streams = Streams(monkeypatch)
    one, two = streams.tables(1).rows, streams.tables(2).rows
    assert streams.tables(1).rows is one
    streams.tables(3)
    assert streams.tables(1).rows is one
    assert streams.tables(2).rows is not two
    streams.current = 2
    assert streams.tables(1).rows is not one


def test_gradients_at_other_addresses_want_a_small_table_only(monkeypatch):
    streams = Streams(monkeypatch)
    one, other = streams.tables(1, gradient=16), streams.tables(1, gradient=32)
    assert other.rows is one.rows
    assert other.gradients is not one.gradients
    assert streams.tables(1, gradient=16).gradients is one.gradients
    for gradient in range(48, 48 + 16 * MOST_TABLES["gradients"], 16):
        streams.tables(1, gradient=gradient)
    assert len(streams.memory["gradients"]) == MOST_TABLES["gradients"]
    assert streams.tables(1, gradient=16).gradients is not one.gradients


def test_a_graph_gets_tables_that_nobody_else_uses(monkeypatch):
    streams = Streams(monkeypatch)
    eager = streams.tables(1)
    streams.capturing = True
    captured = streams.tables(1)
    assert captured.rows is not eager.rows
    assert captured.gradients is not eager.gradients
    assert captured.blocks == eager.blocks == 1
    assert [len(kept) for kept in streams.memory.values()] == [1, 1]
    # The host's memory was allocated before, and holds what the graph will read.
    rows, gradients = cuda_table._read_by_graphs
    assert all(any(source is memory for memory in streams.allocated) for source in (rows, gradients))
    assert (rows[0], gradients.tolist()) == (1, [16])
    streams.capturing = False
    assert streams.tables(1).rows is eager.rows
