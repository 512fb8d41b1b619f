"""What PRM adds on several ranks: messages, bytes and time of a training step beside AdamW's, under each wrapper.

    python benchmarks/over_ranks.py [--ranks 4] [--repeat 5] [--json FILE]

Processes talk over gloo on this machine's CPU, so the times say little about a cluster; messages and bytes are those of
any backend. A message is one collective of torch.distributed, its bytes those of the tensors that this rank hands in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import header
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from popriskmin import PRM

WIDTH, LAYERS, BATCH = 512, 8, 64
WRAPPERS = ("DDP", "FSDP2", "ZeRO")
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "PRM": (PRM, {}),
    "PRM per_tensor": (PRM, {"reduction": "per_tensor"}),
}


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes of the tensors that go in."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what belongs to torch.distributed, and do it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first what a sharded tensor makes of it
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func) and "barrier" not in str(func):
            self.messages += 1
            self.bytes += sum(x.numel() * x.element_size() for x in _tensors(args))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(itertools.chain.from_iterable(map(_tensors, value))) if isinstance(value, (list, tuple)) else []


def build(wrapper: str, optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a wrapped model and its optimizer."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    kind, options = OPTIMIZERS[optimizer]
    if wrapper == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, kind(model.parameters(), lr=1e-3, **(options if kind is PRM else {}))
    if wrapper == "ZeRO":
        return DistributedDataParallel(model), ZeroRedundancyOptimizer(model.parameters(), kind, lr=1e-3, **options)
    return DistributedDataParallel(model), kind(model.parameters(), lr=1e-3, **options)


def measure(wrapper: str, repeat: int) -> dict[str, dict[str, float]]:
    """Return messages, bytes and seconds of a step for each optimizer; times are medians of interleaved repeats."""
    made = {name: build(wrapper, name) for name in OPTIMIZERS}
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    times: dict[str, list[float]] = {name: [] for name in made}
    found: dict[str, dict[str, float]] = {}

    def step(name: str) -> None:
        model, optimizer = made[name]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for name in made:
        for _ in range(3):
            step(name)
        with Traffic() as whole:
            step(name)
        found[name] = {"messages": whole.messages, "bytes": whole.bytes}
    for _ in range(repeat):
        for name in made:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(5):
                step(name)
            times[name].append((time.perf_counter() - start) / 5)
    for name, seconds in times.items():
        found[name]["seconds"] = statistics.median(seconds)
    if wrapper != "ZeRO":
        optimizer = made["PRM"][1]
        with Traffic() as reading:
            optimizer.get_mask_stats()
        found["PRM get_mask_stats()"] = {"messages": reading.messages, "bytes": reading.bytes}
    return found


def rank(number: int, size: int, rendezvous: str, repeat: int, out: str) -> None:
    """Measure every wrapper; the first rank writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=size)
    found = {wrapper: measure(wrapper, repeat) for wrapper in WRAPPERS}
    if number == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Start the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    print(header(args.repeat))
    scalars = LAYERS * WIDTH * (WIDTH + 1)
    print(f"{args.ranks} ranks over gloo, {2 * LAYERS} tensors, {scalars:,} scalars\n")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        context = torch.multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=rank, args=(i, args.ranks, f"{folder}/rendezvous", args.repeat, out))
            for i in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found = json.loads(Path(out).read_text())
    print(f"{'':8}{'':22}{'messages':>10}{'bytes':>14}{'ms':>9}{'over AdamW':>12}")
    for wrapper, rows in found.items():
        for name, row in rows.items():
            line = f"{wrapper:8}{name:22}{row['messages']:10}{row['bytes']:14,}"
            if "seconds" in row:
                line += f"{1e3 * row['seconds']:9.1f}{row['seconds'] / rows['AdamW']['seconds']:12.2f}"
            print(line)
    if args.json:
        about = {"machine": header(args.repeat), "ranks": args.ranks, "scalars": scalars, "tensors": 2 * LAYERS}
        Path(args.json).write_text(json.dumps({**about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
