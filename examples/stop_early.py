"""Stop training where it begins to overfit, with fifty held-out examples: digits with 40% wrong labels, AdamW.

    python examples/stop_early.py

Of 1,050 digits, of whose labels 40% are drawn at random, 1,000 are trained on and 50 held out, their labels as wrong as
the others. The monitor looks at their losses now and then, says when they rise, and has kept the weights of the best
look. To see what that was worth, each run is continued to the end, and 747 clean digits are counted after every epoch,
which neither training nor the monitor ever sees. About a minute.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from popriskmin import RiskMonitor

TRAINING, HELD_OUT, BATCH_SIZE, WRONG = 1000, 50, 64, 0.4


# %% The data: 1,050 digits, of which 40% get a label drawn at random, and 747 with their true labels.
def load(seed: int) -> tuple[Tensor, Tensor]:
    """Return images and labels in random order, the labels of the first 1,050 spoilt."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    y = labels[order]
    wrong = rng.random(TRAINING + HELD_OUT) < WRONG
    y[: len(wrong)][wrong] = rng.integers(10, size=wrong.sum())
    return torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(y)


# %% Training: what is new is the monitor with its function, and the question that it is asked after each epoch.
def train(seed: int, epochs: int, lr: float, held_out: int) -> tuple[int | None, float, list[float]]:
    """Return the epoch after which the monitor stops, the accuracy of the weights that it kept, and of each epoch."""
    torch.manual_seed(seed)
    x, y = load(seed)
    sliver, test = slice(TRAINING, TRAINING + held_out), slice(TRAINING + HELD_OUT, None)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def losses() -> Tensor:  # new; a model with dropout or BatchNorm would go to eval() and back to train() here
        return nn.functional.cross_entropy(model(x[sliver]), y[sliver], reduction="none")

    counts = {"n_dataset": TRAINING, "batch_size": BATCH_SIZE}  # so that it looks once a pass
    monitor = RiskMonitor(optimizer, held_out=losses, keep_best=model, **counts)  # new

    def accuracy() -> float:
        with torch.no_grad():
            return (model(x[test]).argmax(1) == y[test]).float().mean().item()

    stopped, kept, found = None, 0.0, []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(TRAINING).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        found.append(accuracy())
        if stopped is None and (
            monitor.overfitting or epoch == epochs
        ):  # new; restore and `break` in a run of one's own
            stopped = epoch
            current = {name: value.clone() for name, value in model.state_dict().items()}
            monitor.restore_best()
            kept = accuracy()
            model.load_state_dict(current)
    return stopped, kept, found


# %% What it was worth, on five seeds.
def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description="Stop with a few held-out examples.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"of {HELD_OUT} at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, AdamW, lr {args.lr}, {args.epochs} epochs, {args.held_out} held out")
    print("seed  stops after    kept weights    best   (epoch)    end")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [train(seed, args.epochs, args.lr, args.held_out) for seed in seeds]
    for seed, (stopped, kept, found) in zip(seeds, runs):
        best = max(found)
        print(f"{seed:4}  {stopped:11}    {kept:12.3f}  {best:6.3f}   ({found.index(best) + 1:2})    {found[-1]:6.3f}")
    for points in (0.01, 0.02):
        near = sum(max(found) - kept <= points for _, kept, found in runs)
        print(f"within {100 * points:.0f} points of the best epoch: {near} of {args.seeds}")


if __name__ == "__main__":
    main()
