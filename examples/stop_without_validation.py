"""Stop training where it begins to overfit, without validation data: digits with 40% wrong labels, AdamW.

    python examples/stop_without_validation.py

Every one of scikit-learn's digits that is not held out for the final count is trained on. The monitor reads AdamW's
state and says when the next step is expected to do harm; there the run stops. To see what that was worth, each run is
then continued to the end, and the clean held-out digits are counted after every epoch, which the monitor never sees.
Weights are averaged over the last steps, as one does before using them. About a minute.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from popriskmin import RiskMonitor

TRAINING, BATCH_SIZE, WRONG = 1000, 64, 0.4


# %% The data: 1,000 digits, of which 40% get a label drawn at random, and 797 with their true labels.
def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, and held-out images and labels."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    wrong = torch.tensor(rng.random(TRAINING) < WRONG)
    spoilt = torch.where(wrong, torch.tensor(rng.integers(10, size=TRAINING)), y[:TRAINING])
    return x[:TRAINING], spoilt, x[TRAINING:], y[TRAINING:]


# %% Training: two lines are new, the monitor and the question that it is asked after each epoch.
def train(seed: int, epochs: int, lr: float, unfitted: float) -> tuple[int | None, list[float], list[float]]:
    """Return the epoch after which the monitor stops, and the held-out accuracy of averaged and plain weights."""
    torch.manual_seed(seed)
    x, y, held_out_x, held_out_y = load(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    monitor = RiskMonitor(optimizer, every=2, n_dataset=TRAINING, batch_size=BATCH_SIZE, unfitted=unfitted)  # new

    stopped, accuracy, plain = None, [], []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(TRAINING).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            averaged.update_parameters(model)
        if stopped is None and monitor.overfitting:  # new; `break` in a run that is not being examined
            stopped = epoch
        with torch.no_grad():
            for network, found in ((averaged, accuracy), (model, plain)):
                found.append((network(held_out_x).argmax(1) == held_out_y).float().mean().item())
    return stopped, accuracy, plain


# %% What it was worth, on five seeds.
def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description="Stop without validation data.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--unfitted", type=float, default=0.25, help="the monitor's own argument")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, AdamW, lr {args.lr}, {args.epochs} epochs, {TRAINING} digits, 40% wrong labels")
    print("                 averaged weights                      plain weights")
    print("seed  stop at    there    best   (epoch)    end    there    best   (epoch)    end")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [train(seed, args.epochs, args.lr, args.unfitted) for seed in seeds]
    for seed, (stopped, *curves) in zip(seeds, runs):
        cells = []
        for accuracy in curves:
            there, best = accuracy[(stopped or args.epochs) - 1], max(accuracy)
            cells.append(f"{there:7.3f}  {best:6.3f}   ({accuracy.index(best) + 1:2})    {accuracy[-1]:6.3f}")
        print(f"{seed:4}  {stopped or 'never':>7}  {'  '.join(cells)}")
    for i, name in enumerate(("averaged", "plain"), 1):
        near = sum(max(run[i]) - run[i][(run[0] or args.epochs) - 1] <= 0.01 for run in runs)
        print(f"{name} weights within 1 point of their best epoch: {near} of {args.seeds}")
    # The same epoch for all, which takes the held-out data to know.
    near, epoch = max(
        (sum(max(run[1]) - run[1][epoch] <= 0.01 for run in runs), epoch + 1) for epoch in range(args.epochs)
    )
    print(f"averaged weights, had all stopped after epoch {epoch}: {near} of {args.seeds}")


if __name__ == "__main__":
    main()
