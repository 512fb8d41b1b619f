"""The two pictures of docs/shrinkage.md: what mask and pull do together, and a table's columns over a training.

python experiments/shrinkage_pictures.py     # half a minute; writes docs/shrinkage.svg
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from popriskmin import PRM
from popriskmin.compare.training.train import seed_everything
from popriskmin.mask import variance_of_mean
from popriskmin.tasks.table import Table

TASK = Table(data="wine", probes=500, rows=1000, steps=500)
BATCH, ROWS = 32, 500  # of the left picture
SHRINKAGE = 2.0
COLORS = {"none": "0.35", "snr": "#1f5fa8", "threshold": "#c2571a"}
SHADES = {1.0: "#9cc3e8", 2.0: "#1f5fa8", 3.0: "#0b2545"}


def mean_step(mask: str, mean: torch.Tensor, deviation: float, noise: float) -> torch.Tensor:
    """Return the mean of q*m over the noise of m, for mean gradients in units of the minibatch gradient's deviation."""
    draws = torch.linspace(-4, 4, 801)
    weights = torch.exp(-draws.square() / 2)
    m = mean[:, None] + deviation * draws
    return (masked(mask, m, noise) * weights).sum(1) / weights.sum()


def masked(mask: str, m: torch.Tensor, noise: float) -> torch.Tensor:
    """Return q*m; the threshold lies at two of the running mean's own standard errors."""
    if mask == "none":
        return m
    if mask == "snr":
        return m**3 / (m.square() + 1)
    return m.sign() * (m.abs() - 2 * math.sqrt(noise)).clamp(min=0)


def draw_balance(ax: Any) -> None:
    """Draw the mean step and the pull of each mask against the mean gradient over the data set."""
    of_data = math.sqrt(BATCH / (ROWS - BATCH))  # a standard error of the data set's mean, beside the minibatch's noise
    of_mean = variance_of_mean(0.9, 1000)
    x = torch.linspace(0, 6, 121)
    for mask, color in COLORS.items():
        step = mean_step(mask, x * of_data, math.sqrt(of_mean), of_mean) / of_data
        pull = masked(mask, torch.tensor([SHRINKAGE * of_data]), of_mean)[0] / of_data
        ax.plot(x, step, color=color, lw=1.6, label=f"mask {mask}: mean step")
        ax.axhline(float(pull), color=color, lw=1.2, ls="--", label="its pull")
    ax.set(xlim=(0, 5), ylim=(0, 5), ylabel="step, in the same unit")
    ax.set_xlabel("mean gradient over the data, in its standard errors")
    ax.set_title("A weight rests where its step meets its pull", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def columns_in_use(shrinkage: float) -> tuple[list[float], list[float]]:
    """Return after each step which share of the real columns, and of the others, has a weight off zero."""
    seed_everything(0)
    trial = TASK.trial(0)
    first, *others = trial.model.parameters()
    groups = [{"params": [first], "shrinkage": shrinkage}, {"params": others}]
    optimizer = PRM(groups, lr=1e-2, batch_size=trial.batch_size, n_dataset=trial.n_dataset)
    counts: tuple[list[float], list[float]] = ([], [])
    for batch in trial.batches:
        optimizer.zero_grad()
        trial.loss(trial.model, batch).backward()
        optimizer.step()
        used = (first != 0).any(0)
        counts[0].append(float(used[: -TASK.probes].float().mean()))
        counts[1].append(float(used[-TASK.probes :].float().mean()))
    return counts


def draw_columns(ax: Any) -> None:
    """Draw the shares of columns in use over a training, for several numbers of standard errors."""
    for z, color in SHADES.items():
        real, nothing = columns_in_use(z)
        ax.plot(real, color=color, lw=1.6, label=f"z = {z:g}: real columns")
        ax.plot(nothing, color=color, lw=1.2, ls="--", label=f"z = {z:g}: columns that say nothing")
    ax.set(xlabel="step", ylabel="share with a weight off zero", ylim=(0, 1.02), xlim=(0, TASK.steps))
    ax.set_title("Columns in use: wine and 500 columns that say nothing", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description="The pictures of docs/shrinkage.md.")
    parser.add_argument("--out", type=Path, default=Path("docs/shrinkage.svg"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained")
    draw_balance(left)
    draw_columns(right)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
