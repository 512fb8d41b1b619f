"""Time one optimizer step: PRM beside torch's AdamW, in turns within one run, on the shapes of real models.

    python benchmarks/step_time.py                      # both shapes, on 1 and 2 threads
    python benchmarks/step_time.py --threads 2 --repeats 21

Every figure is a median; the ratio is the median of the ratios of neighbouring runs, which a machine's slow
moments hit on both sides.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from popriskmin import PRM, __version__

BASELINE = "AdamW(foreach=True)"


def gpt2_shapes(width: int = 384, layers: int = 10, vocabulary: int = 50257, context: int = 1024) -> list[Any]:
    """Return the shapes of a GPT-2-like model's parameters; 37 million scalars with the default sizes."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *(layer * layers), (width,), (width,)]


def small_shapes() -> list[Any]:
    """Return 600 small shapes, as of a network of many thin layers; 317 thousand scalars."""
    return [(32, 32), (32,)] * 300


CASES: dict[str, Callable[[], list[Any]]] = {"GPT-2-like": gpt2_shapes, "600 small tensors": small_shapes}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    BASELINE: lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW(foreach=False)": lambda params: torch.optim.AdamW(params, foreach=False),
    "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    "PRM()": lambda params: PRM(params),
    "PRM(mask='soft')": lambda params: PRM(params, mask="soft"),
    "PRM(reduction='per_tensor')": lambda params: PRM(params, reduction="per_tensor"),
    "PRM(debias=True)": lambda params: PRM(params, debias=True),
    "PRM(amsgrad=True)": lambda params: PRM(params, amsgrad=True),
    "PRM(foreach=False)": lambda params: PRM(params, foreach=False),
}


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def measure(shapes: list[Any], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of `repeats` steps of every optimizer, taken in turns; one step each goes unmeasured."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    optimizers = {}
    for name, build in OPTIMIZERS.items():
        params = [torch.nn.Parameter(torch.full_like(g, 0.02)) for g in grads]
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizers[name] = build(params)
        optimizers[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print a table for every case and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(
        f"{datetime.date.today()}, {processor()}, {platform.python_implementation()} {platform.python_version()}, "
        f"torch {torch.__version__}, popriskmin {__version__}, median of {args.repeats}"
    )
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case, shapes in CASES.items():
            seconds = measure(shapes(), args.repeats)
            count = sum(torch.Size(shape).numel() for shape in shapes())
            print(f"\n{case}: {count:,} scalars, {len(shapes())} tensors, threads: {threads}\n")
            print(f"| optimizer | ms per step | times {BASELINE} |\n| --- | ---: | ---: |")
            for name, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(taken, seconds[BASELINE]))
                print(f"| `{name}` | {1e3 * statistics.median(taken):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
