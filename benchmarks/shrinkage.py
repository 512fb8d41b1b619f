"""Time the fused step with shrinkage beside the plain one, in turns within one run.

    python benchmarks/shrinkage.py

A ratio is the median over steps of three optimizers taken one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import header

from popriskmin import PRM

CASES = {
    "37.7M scalars in 3 tensors": [(4096, 4096), (4096, 4096), (4096, 1024)],
    "600 small tensors": [(64, 64), (64,)] * 300,
}


def build(shapes: list[tuple[int, ...]], mask: str, shrinkage: float, shrink_to: str) -> PRM:
    """Return an optimizer that has taken three steps, the second of which is the first that shrinks."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = PRM(params, lr=1e-5, mask=mask, shrinkage=shrinkage, shrink_to=shrink_to, batch_size=32,
                    n_dataset=1000, fused=True)  # fmt: skip
    for _ in range(3):
        for param in params:
            param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


def ratios(shapes: list[tuple[int, ...]], mask: str, repeats: int) -> list[float]:
    """Return the times of shrinking to zero and to the start over that of the plain step."""
    optimizers = [build(shapes, mask, z, to) for z, to in ((0.0, "zero"), (2.0, "zero"), (2.0, "start"))]
    rows = []
    for _ in range(repeats):
        times = []
        for optimizer in optimizers:
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        rows.append([t / times[0] for t in times[1:]])
    return [statistics.median(column) for column in zip(*rows)]


def main() -> None:
    """Print a line for each case, mask and number of threads."""
    parser = argparse.ArgumentParser(description="What shrinkage adds to a fused step.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=41)
    args = parser.parse_args()
    print(header(args.repeats))
    print("\n| case | mask | threads | to zero | to the start |\n| --- | --- | ---: | ---: | ---: |")
    for name, shapes in CASES.items():
        for mask in ("snr", "none"):
            for threads in args.threads:
                torch.set_num_threads(threads)
                zero, start = ratios(shapes, mask, args.repeats)
                print(f"| {name} | {mask} | {threads} | {zero:.2f} | {start:.2f} |", flush=True)


if __name__ == "__main__":
    main()
