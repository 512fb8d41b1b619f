"""Time training with a RiskMonitor at its own pace and without one, in turns.

    python experiments/risk_cost.py

A ratio is the median over neighbouring blocks of 256 steps, one with the monitor and
one without. Times are the processor's, on one thread, so that what else the machine
does is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from risk_runs import RUNS
from studies import header

from popriskmin import PRM, RiskMonitor

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "PRM": PRM}
BLOCK = 256


def measure(name: str, optimizer_name: str, repeats: int) -> tuple[float, int, float]:
    """Return milliseconds per step, the steps between samples, and the ratio with monitor to without."""
    torch.manual_seed(0)
    run = RUNS[name](0)
    optimizer = OPTIMIZERS[optimizer_name](run.model.parameters(), lr=1e-4)

    def seconds(steps: int) -> float:
        start = time.process_time()
        for i in range(steps):
            optimizer.zero_grad()
            run.loss(run.model, run.batches[i]).backward()
            optimizer.step()
        return time.process_time() - start

    seconds(8)
    with_monitor, without = [], []
    for _ in range(repeats):
        without.append(seconds(BLOCK))
        monitor = RiskMonitor(optimizer)
        seconds(56)  # it finds its pace
        with_monitor.append(seconds(BLOCK))
        monitor.detach()
    ratio = statistics.median(a / b for a, b in zip(with_monitor, without))
    return 1e3 * statistics.median(without) / BLOCK, monitor.every, ratio


def main() -> None:
    """Print a row for each run and optimizer."""
    parser = argparse.ArgumentParser(description="Time a RiskMonitor.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--runs", nargs="+", default=["digits", "grokking", "text, 600 windows"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{header(args.repeats)}, 1 thread\n")
    print("| run | | ms per step | a sample every | with the monitor / without |\n| --- | --- | ---: | ---: | ---: |")
    for name in args.runs:
        for optimizer in OPTIMIZERS:
            step, every, ratio = measure(name, optimizer, args.repeats)
            print(f"| {name} | {optimizer} | {step:.2f} | {every} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
