"""Draw the time of a step against the number of parameters and against the number of tensors.

    python benchmarks/scaling.py --out docs/results/speed      # some ten minutes; needs the extra `compare`
    python benchmarks/scaling.py --most 1e6                    # smaller and quicker

Lines: PRM's implementations, AdamW's, and those of other optimizer libraries, if they are installed (heavyball,
pytorch-optimizer). The dashed lines are the roofline: the bytes that PRM (36 a parameter) and AdamW (28) must move,
over the bandwidth of scaling a tensor in place, measured in the same run. Writes step-time.png and step-time.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from common import ADAMW, ADAMW_FUSED, OPTIMIZERS, Build, build, header

mpl.use("agg")
from matplotlib import pyplot as plt

NAMES = ["PRM()", "PRM(state_dtype=torch.bfloat16)", "PRM(foreach=True)", ADAMW_FUSED, "AdamW(foreach=True)", ADAMW]
OTHERS = [("heavyball", "AdamW"), ("pytorch_optimizer", "AdaBelief"), ("pytorch_optimizer", "StableAdamW")]
COLORS = ["#c1272d", "#e88c30", "#8b5a2b", "#1f4e9c", "#5b9bd5", "#8fb8de", "#2a7f3f", "#6b6b6b", "#a0a0a0"]


def others() -> dict[str, Build]:
    """Return the optimizers of other libraries that are installed and work here."""
    found: dict[str, Build] = {}
    for module, name in OTHERS:
        try:
            make = getattr(importlib.import_module(module), name)
            build([(4, 4)], make)
        except Exception as error:  # whatever keeps another library from working here
            print(f"without {module}.{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        else:
            found[f"{module}.{name}()"] = make
    return found


def bandwidth(mebibytes: int = 256) -> float:
    """Return the bytes a second that scaling a large tensor in place moves, reads and writes together.

    In place, as an optimizer works: where the target is other memory, it is read too before it is written.
    """
    tensor = torch.ones(mebibytes << 18)
    taken = []
    for _ in range(15):
        start = time.perf_counter()
        tensor.mul_(0.999)
        taken.append(time.perf_counter() - start)
    return 2 * tensor.numel() * tensor.element_size() / statistics.median(taken[3:])


def seconds_of_a_step(shapes: list[Any], make: Build, budget: float) -> float:
    """Return the median of as many steps as the budget of seconds holds, from 3 to 50."""
    optimizer = build(shapes, make)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [torch.full_like(p, 0.01) for p in params]
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 50 and sum(taken) < budget):
        for param, grad in zip(params, grads):
            param.grad = grad  # heavyball takes the gradients away
        start = time.perf_counter()
        optimizer.step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(cases: dict[int, list[Any]], optimizers: dict[str, Build], budget: float) -> dict[str, dict[int, float]]:
    """Return the seconds of a step of every optimizer, by the key of the case.

    An optimizer that takes long to build and compile for one case is not asked for the next, ten times as large.
    """
    results: dict[str, dict[int, float]] = {}
    for name, make in optimizers.items():
        results[name] = {}
        for key, shapes in cases.items():
            start = time.perf_counter()
            results[name][key] = seconds_of_a_step(shapes, make, budget)
            if time.perf_counter() - start > 20 * budget:
                print(f"{name}: {key:,} took {time.perf_counter() - start:.0f} s in all; no larger ones")
                break
    return results


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw both curves, side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for axis, kind, label in (
        (axes[0], "parameters", "parameters, in one tensor"),
        (axes[1], "tensors", "tensors of 1,000 parameters"),
    ):
        for (name, points), color in zip(results[kind].items(), COLORS):
            x = [int(key) for key in points]
            axis.plot(
                x, [1e3 * y for y in points.values()], "o-", color=color, label=name, markersize=3.5, linewidth=1.6
            )
        per_tensor = 1 if kind == "parameters" else 1000
        for size, style, who in ((36, "--", "PRM"), (28, ":", "AdamW")):
            floor = [1e3 * n * per_tensor * size / results["bytes_per_second"] for n in x]
            axis.plot(x, floor, style, color="black", linewidth=1, label=f"roofline of {who}: {size} bytes a parameter")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds a step")
        axis.set_ylim(bottom=5e-3)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(f"Time of an optimizer step, {results['threads']} threads", fontsize=12)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, draw, and write both down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=1e8, help="the most parameters (default: 1e8, some 3 GB)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each point (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    optimizers = {name: OPTIMIZERS[name] for name in NAMES} | others()
    sizes = [10**k for k in range(3, 9) if 10**k <= args.most]
    counts = [n for n in (1, 10, 100, 1000, 10_000) if n * 1000 <= args.most]
    results = {
        "measured": header(3),
        "threads": args.threads,
        "bytes_per_second": bandwidth(),
        "parameters": measure({n: [(n,)] for n in sizes}, optimizers, args.budget),
        "tensors": measure({n: [(1000,)] * n for n in counts}, optimizers, args.budget),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step-time.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.out / "step-time.png")
    print(results["measured"])
    print(f"memory moves {results['bytes_per_second'] / 1e9:.1f} GB/s; written: {args.out / 'step-time.png'}")


if __name__ == "__main__":
    main()
