"""The length of PRM's update where `warmup_steps` ends, with and without a falling floor.

    python experiments/warmup_end.py

Prints the median length over five seeds, on the digits data with a net of one hidden
layer.
"""

from __future__ import annotations

import statistics

import torch
from sklearn.datasets import load_digits
from torch import nn

from popriskmin import PRM

WARMUP = 50
SHOWN = (49, 50, 51, 52, 60, 75, 99, 100, 101, 150)


def lengths(seed: int, warmup_steps: int, floor: bool) -> list[float]:
    """Return the Euclidean length of each of 150 updates."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = PRM(net.parameters(), lr=1e-3, weight_decay=0.0, warmup_steps=warmup_steps)
    found = []
    for t in range(1, 151):
        if floor:
            for group in optimizer.param_groups:
                group["min_q"] = min(1.0, max(0.0, 2 - t / warmup_steps))
        rows = torch.randint(0, len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        squares = [(p.detach() - b).square().sum() for p, b in zip(net.parameters(), before)]
        found.append(float(torch.stack(squares).sum().sqrt()))
    return found


def main() -> None:
    """Print a line for each way of beginning."""
    print(f"{'step':24}", *(f"{t:6}" for t in SHOWN), "  largest fall from step to step")
    for name, warmup_steps, floor in (
        ("no warmup", 0, False),
        (f"warmup_steps={WARMUP}", WARMUP, False),
        ("... and a falling floor", WARMUP, True),
    ):
        runs = [lengths(seed, warmup_steps, floor) for seed in range(5)]
        shown = (f"{statistics.median(run[t - 1] for run in runs):6.4f}" for t in SHOWN)
        fall = statistics.median(max(1 - run[t + 1] / run[t] for t in range(30, 140)) for run in runs)
        print(f"{name:24}", *shown, f"  {fall:.0%}")


if __name__ == "__main__":
    main()
