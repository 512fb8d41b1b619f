"""Time one optimizer step: PRM beside torch's AdamW, in turns within one run, on the shapes of real models.

    python benchmarks/step_time.py                      # both shapes, a transformer, on 1 and 2 threads
    python benchmarks/step_time.py --threads 2 --repeats 21

Every figure is a median; a ratio is the median of the ratios of neighbouring calls, which a machine's slow moments hit
on both sides. It ends with the bars that the fused step is held to, and whether they were reached here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    ADAMW,
    ADAMW_FUSED,
    OPTIMIZERS,
    build,
    gpt2_shapes,
    header,
    in_turns,
    small_shapes,
    smollm2_shapes,
    state_bytes,
    transformer_training,
)

from popriskmin import PRM

CASES: dict[str, Callable[[], list[Any]]] = {"GPT-2-like": gpt2_shapes, "600 small tensors": small_shapes}

# Numerator, denominator, the most that their ratio may be; for each case and number of threads.
BARS = {
    "GPT-2-like": [
        ("PRM()", ADAMW_FUSED, 1.35),
        ("PRM(state_dtype=torch.bfloat16)", ADAMW_FUSED, 1.05),
        ("PRM(state_dtype='8bit')", ADAMW_FUSED, 1.0),
    ],
    "600 small tensors": [("PRM()", ADAMW_FUSED, 1.0), ("PRM(state_dtype='8bit')", ADAMW_FUSED, 1.0)],
}
EVERYWHERE = [
    ("PRM(mask='soft', reduction='per_tensor')", "PRM()", 1.35),
    ("PRM(debias=True)", "PRM()", 1.35),
    ("PRM(amsgrad=True)", "PRM()", 1.35),
    ("PRM()", ADAMW, 0.40),
]
TRAINING = ("training with PRM()", f"training with {ADAMW_FUSED}", 1.03)
SLOW = "PRM(foreach=False)"


def ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Return the median ratio of neighbouring calls."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator]))


def table(seconds: dict[str, list[float]], baseline: str) -> None:
    """Print milliseconds and the ratio to the baseline."""
    print(f"| | ms | times {baseline} |\n| --- | ---: | ---: |")
    for name, taken in seconds.items():
        print(f"| `{name}` | {1e3 * statistics.median(taken):.2f} | {ratio(seconds, name, baseline):.2f} |")


def memory_of_a_step(shapes: list[Any]) -> float | None:
    """Return by how many MiB the process grows during a step of PRM at most; None where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    optimizer = build(shapes, PRM)

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    growth = []
    for _ in range(5):
        reset.write_text("5")  # sets the high-water mark to what is in use now
        before = kilobytes("VmRSS")
        optimizer.step()
        growth.append(max(kilobytes("VmHWM") - before, 0))
    return statistics.median(growth) / 1024


def main() -> None:
    """Print a table for every case and number of threads, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), help="optimizers; bars of others are left out")
    args = parser.parse_args()
    print(header(args.repeats))
    bars: list[tuple[str, float, float]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case, shapes in CASES.items():
            names = args.only or [name for name in OPTIMIZERS if name != SLOW]
            optimizers = {name: build(shapes(), OPTIMIZERS[name]) for name in names}
            seconds = in_turns({name: optimizer.step for name, optimizer in optimizers.items()}, args.repeats)
            count = sum(torch.Size(shape).numel() for shape in shapes())
            print(f"\n{case}: {count:,} scalars, {len(shapes())} tensors, threads: {threads}\n")
            table(seconds, ADAMW_FUSED)
            for over, under, bar in BARS.get(case, []) + EVERYWHERE:
                if over not in seconds or under not in seconds:
                    continue
                bars.append((f"{over} / {under}, {case}, threads: {threads}", ratio(seconds, over, under), bar))
        if args.only:
            continue
        training = {f"training with {name}": transformer_training(OPTIMIZERS[name]) for name in (ADAMW_FUSED, "PRM()")}
        seconds = in_turns(training, 3 * args.repeats)
        print(f"\nA training step of a small transformer, threads: {threads}\n")
        table(seconds, TRAINING[1])
        bars.append(
            (f"a training step, PRM() / {ADAMW_FUSED}, threads: {threads}", ratio(seconds, *TRAINING[:2]), 1.03)
        )
    memory = memory_of_a_step(CASES[next(iter(CASES))]())
    for name, shapes in (("GPT-2-like", gpt2_shapes()), ("SmolLM2-135M", smollm2_shapes())):
        reached = state_bytes(build(shapes, OPTIMIZERS["PRM(state_dtype='8bit')"]))
        bars.append((f"8-bit state, bytes a parameter, {name}", reached, 3.3))
    print("\n| bar | reached | at most | |\n| --- | ---: | ---: | --- |")
    for name, reached, bar in bars:
        print(f"| {name} | {reached:.2f} | {bar:.2f} | {'yes' if reached <= bar else 'NO'} |")
    if memory is not None:
        reached = "yes" if memory < 1 else "NO"
        print(f"| memory allocated by a step, {next(iter(CASES))} | {memory:.2f} MiB | 1 MiB | {reached} |")


if __name__ == "__main__":
    main()
