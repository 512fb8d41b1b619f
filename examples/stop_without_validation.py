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
def train(seed: int, epochs: int, lr: float) -> tuple[int | None, list[float]]:
    """Return the epoch after which the monitor would stop, and the held-out accuracy after each epoch."""
    torch.manual_seed(seed)
    x, y, held_out_x, held_out_y = load(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    monitor = RiskMonitor(optimizer, every=2, n_dataset=TRAINING, batch_size=BATCH_SIZE)  # new

    stopped, accuracy = None, []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(TRAINING).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            averaged.update_parameters(model)
        if stopped is None and monitor.overfitting:  # new; `break` in a run that is not being examined
            stopped = epoch
        with torch.no_grad():
            accuracy.append((averaged(held_out_x).argmax(1) == held_out_y).float().mean().item())
    return stopped, accuracy


# %% What it was worth, on five seeds.
def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description="Stop without validation data.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, AdamW, lr {args.lr}, {args.epochs} epochs, {TRAINING} digits, 40% wrong labels")
    print("seed  stopped after epoch  accuracy there  best epoch  accuracy there  after the last epoch")
    near = 0
    for seed in range(args.seeds):
        stopped, accuracy = train(seed, args.epochs, args.lr)
        at_stop = accuracy[(stopped or args.epochs) - 1]
        best = max(accuracy)
        near += best - at_stop <= 0.01
        print(
            f"{seed:4}  {stopped or 'never':>19}  {at_stop:14.3f}  {accuracy.index(best) + 1:10}  {best:14.3f}"
            f"  {accuracy[-1]:20.3f}"
        )
    print(f"within 1 point of the best epoch: {near} of {args.seeds}")


if __name__ == "__main__":
    main()
