"""Everything that wants an NVIDIA GPU, in under 8 minutes: `make gpu`, or `python benchmarks/gpu.py --out gpu.json`.

Needs torch, triton and pytest with what the suite imports, no network, and no installation: it runs from the sources.
Each part runs in a process of its own, under its own limit of time; what one loses the others keep. The JSON holds the
parts that came to their end, and for the others why not.

    python benchmarks/gpu.py --part step     # one part alone, printed as JSON
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import gpt2_shapes, header, small_shapes, transformer_training  # noqa: E402 - the sources, whatever is installed

from popriskmin import PRM  # noqa: E402
from popriskmin.step.kernels import cuda  # noqa: E402

# Seconds that a part may take: 8 minutes together.
LIMITS = {"device": 30, "tests": 160, "step": 60, "large": 60, "graph": 30, "training": 60, "memory": 30, "blocks": 50}
CASES: dict[str, Callable[[], list[Any]]] = {"37M": gpt2_shapes, "600 small tensors": small_shapes}
# Parameters of a GPT-2 XL: 1.5 billion.
LARGE: dict[str, Callable[[], list[Any]]] = {"1.5B": lambda: gpt2_shapes(width=1600, layers=48)}
# Lines of the tests' output that are kept.
TAIL = 200
TESTS = [
    "tests/test_on_a_gpu.py",
    "tests/step/kernels/test_cuda_hardware.py",
    "tests/step/kernels/test_cuda_compiled.py",
    "tests/step/kernels/test_eligible.py",
]
# Optimizers, and the bytes that a step must move for each float32 parameter: what it reads and what it writes.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "AdamW(fused=True)": (torch.optim.AdamW, {"fused": True}, 28),
    "AdamW(foreach=True)": (torch.optim.AdamW, {"foreach": True}, 28),
    "PRM(fused=True)": (PRM, {"fused": True}, 36),
    "PRM(foreach=True)": (PRM, {"foreach": True}, 36),
    "PRM(fused=True, state_dtype=torch.bfloat16)": (PRM, {"fused": True, "state_dtype": torch.bfloat16}, 28),
    "PRM(fused=True, state_dtype='8bit')": (PRM, {"fused": True, "state_dtype": "8bit"}, 18.25),
    "PRM(fused=True, mask='soft', reduction='per_tensor')": (
        PRM,
        {"fused": True, "mask": "soft", "reduction": "per_tensor"},
        44,
    ),
}


def build(shapes: list[Any], name: str, device: str = "cuda", **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer over parameters of these shapes on the device, with gradients, one step taken."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        params.append(torch.nn.Parameter(torch.full(shape, 0.02, device=device)))
        params[-1].grad = torch.randn(shape, generator=generator, device=device)
    kind, own, _ = OPTIMIZERS[name]
    optimizer: torch.optim.Optimizer = kind(params, lr=1e-3, **own, **options)
    optimizer.step()
    return optimizer


def milliseconds(action: Callable[[], Any], repeats: int) -> float:
    """Return how long a call takes among others that nothing waits between, a median of three such rows of calls."""
    for _ in range(3):
        action()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeats)
    return statistics.median(times)


def device_milliseconds(action: Callable[[], Any], repeats: int) -> float:
    """Return how long the device works at a call, a median: the host has queued it all while the device slept."""
    # Longer than the host takes: two billion cycles are about a second.
    cycles = int(4e6 * max(host_milliseconds(action, 5), 1.0))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_milliseconds(action: Callable[[], Any], repeats: int) -> float:
    """Return how long a call keeps the host, with nothing to wait for on the device: a median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def part_device() -> dict[str, Any]:
    """Name the device and measure what a plain copy moves, reads and writes together."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), 20)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "copy_bytes_per_second": 2 * source.numel() * 4 / (copy / 1e3),
        **versions,
        "header": header(20),
    }


def _times(cases: dict[str, Callable[[], list[Any]]], repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, make in cases.items():
        shapes = make()
        count = sum(torch.Size(shape).numel() for shape in shapes)
        rows = {}
        for name, (_, _, size) in OPTIMIZERS.items():
            optimizer = build(shapes, name)
            ms = milliseconds(optimizer.step, repeats)
            host = host_milliseconds(optimizer.step, min(repeats, 20))
            device = device_milliseconds(optimizer.step, min(repeats, 20))
            rows[name] = {
                "ms": ms,
                "host_ms": host,
                "device_ms": device,
                "bytes_per_second": size * count / (device / 1e3),
            }
            del optimizer
            gc.collect()
            torch.cuda.empty_cache()
        for kind in ("ms", "host_ms", "device_ms"):
            base = rows["AdamW(fused=True)"][kind]
            for row in rows.values():
                row[f"{kind}_times_fused_adamw"] = row[kind] / base
        found[case] = {"scalars": count, "tensors": len(shapes), "optimizers": rows}
    return found


def part_step() -> dict[str, Any]:
    """Time a step on 37 million parameters and on 600 small tensors."""
    return _times(CASES, 50)


def part_large() -> dict[str, Any]:
    """Time a step on 1.5 billion parameters, which with gradients and state take 30 GB."""
    free = torch.cuda.mem_get_info()[0]
    if free < 34e9:
        raise RuntimeError(f"1.5 billion parameters need 34 GB of free memory, not {free:,} bytes")
    return _times(LARGE, 6)


def part_graph() -> dict[str, Any]:
    """Capture a step in a CUDA graph, and compare what its replays do with eager steps."""
    eager, captured = (build(small_shapes(), "PRM(fused=True)", capturable=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    eager.step()
    eager.step()  # as a capture does not run what it captures
    graph.replay()
    pairs = zip(eager.param_groups[0]["params"], captured.param_groups[0]["params"])
    far = max((a - b).abs().max().item() for a, b in pairs)
    times = {name: milliseconds(step, 50) for name, step in (("eager", eager.step), ("graph", graph.replay))}
    return {"largest_difference": far, "ms": times}


def part_memory() -> dict[str, Any]:
    """Tell the bytes of state for each parameter, and what a step allocates beyond what it holds."""
    found = {}
    for name in OPTIMIZERS:
        shapes = gpt2_shapes()
        count = sum(torch.Size(shape).numel() for shape in shapes)
        optimizer = build(shapes, name)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        state = sum(x.numel() * x.element_size() for held in optimizer.state.values() for x in held.values())
        found[name] = {
            "state_bytes_per_parameter": state / count,
            "step_allocates_bytes": torch.cuda.max_memory_allocated() - before,
        }
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()
    return found


def part_blocks() -> dict[str, Any]:
    """Time the kernel, on 0.4 billion parameters, with blocks of other sizes on other numbers of threads."""
    found: dict[str, Any] = {}
    kept = cuda.BLOCK, cuda.WARPS
    shapes = gpt2_shapes(width=1024, layers=27)
    for block, warps in [kept, (512, 4), (1024, 2), (1024, 8), (2048, 4), (2048, 8), (4096, 8), kept]:
        cuda.BLOCK, cuda.WARPS = block, warps
        row = {}
        for name in ("PRM(fused=True)", "PRM(fused=True, state_dtype='8bit')"):
            optimizer = build(shapes, name)
            row[name] = device_milliseconds(optimizer.step, 10)
            del optimizer
            gc.collect()
        found.setdefault(f"{block} elements, {warps} warps", []).append(row)
    cuda.BLOCK, cuda.WARPS = kept
    return found


def part_training() -> dict[str, Any]:
    """Time whole training steps of a GPT-2-like model of 162 million parameters, in bfloat16 by autocast."""
    names = ["AdamW(fused=True)", "AdamW(foreach=True)", "PRM(fused=True)", "PRM(fused=True, state_dtype='8bit')"]
    sizes = {"width": 768, "heads": 12, "layers": 12, "vocabulary": 50257, "sequences": 8, "length": 512}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(3):  # in turns, so that a slow moment hits all
        for name in names:
            kind, own, _ = OPTIMIZERS[name]
            make = functools.partial(kind, lr=1e-4, **own)
            step = transformer_training(make, **sizes, device="cuda", autocast=torch.bfloat16)
            times[name].append(milliseconds(step, 10))
            del step
            gc.collect()
            torch.cuda.empty_cache()
    return {name: {"ms": statistics.median(found), "turns": found} for name, found in times.items()}


def part_tests() -> dict[str, Any]:
    """Run the tests that want a device, with pytest-xdist in many processes: each compiles its own kernels."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    if find_spec("xdist"):
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    try:
        # Less than the part may take, so that what had failed by then is told.
        done = run(command, timeout=LIMITS["tests"] - 10)
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"status": "took too long", "tail": printed.splitlines()[-TAIL:]}
    lines = done.stdout.splitlines()
    told = re.findall(r"(\d+) (passed|failed|skipped|error)", "\n".join(lines[-1:]))
    counts = {word: int(number) for number, word in told}
    return {"status": done.returncode, **counts, "tail": lines[-TAIL:]}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "device": part_device,
    "tests": part_tests,
    "step": part_step,
    "large": part_large,
    "graph": part_graph,
    "training": part_training,
    "memory": part_memory,
    "blocks": part_blocks,
}


def run_part(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """Run one part in a process of its own; return what it found, or why it found nothing."""
    start = time.monotonic()
    try:
        done = subprocess.run(  # noqa: S603 - this file, by the Python that runs it
            command, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:g} s"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    try:
        return {**found, "found": json.loads(done.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        return {**found, "failed": "\n".join((done.stderr or done.stdout).splitlines()[-15:])}


def main(argv: list[str] | None = None) -> int:
    """Run every part, or one; return 0 if all came to their end and the tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        said = f"there is no CUDA device here (torch {torch.__version__}): this is for a machine with an NVIDIA GPU"
        print(said, file=sys.stderr)
        return 1
    if args.part:
        print(json.dumps(PARTS[args.part]()))
        return 0
    results: dict[str, Any] = {}
    for name in PARTS:
        command = [sys.executable, __file__, "--part", name]
        results[name] = run_part(name, command, LIMITS[name])
        print(f"{name}: {results[name].get('failed', 'done')}", flush=True)
        # Written after every part, so that nothing is lost.
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    ended = all("found" in part for part in results.values())
    return 0 if ended and results["tests"]["found"]["status"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
