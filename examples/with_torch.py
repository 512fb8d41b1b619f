"""PRM in a loop of one's own: figures in TensorBoard, and a run that goes on where it was killed.

    python examples/with_torch.py --out runs/torch
    tensorboard --logdir runs/torch

Digits of which 40% have a wrong label, ten seconds. Kill it and start it again: it goes on from the last checkpoint and
ends with the weights of a run that was not disturbed.
"""

from __future__ import annotations

import argparse
import os
import pathlib

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations import log


def digits(wrong: float = 0.4) -> tuple[Tensor, Tensor]:
    """Return the images and their labels in random order, the first 1,050 labels spoilt with this probability."""
    generator = torch.Generator().manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images[order].float() / 16, labels[order].long()
    spoilt = torch.rand(1050, generator=generator) < wrong
    y[:1050][spoilt] = torch.randint(10, (int(spoilt.sum()),), generator=generator)
    return x, y


# %% Training
def train(folder: pathlib.Path, epochs: int) -> nn.Module:
    """Train, or go on training, and return the model."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = PRM(model.named_parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def losses() -> Tensor:  # one for each of the 50 held-out examples
        return nn.functional.cross_entropy(model(x[1000:1050]), y[1000:1050], reduction="none")

    monitor = RiskMonitor(optimizer, every=8, n_dataset=1000, batch_size=50, held_out=losses, keep_best=model)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "monitor": monitor}
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first = saved["epoch"]
        torch.set_rng_state(saved["random"])

    with SummaryWriter(str(folder)) as writer:
        for epoch in range(first, epochs):
            if monitor.overfitting:
                print(f"overfitting at epoch {epoch}; the weights after step {monitor.restore_best()} are back")
                break
            for rows in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
            schedule.step()
            for name, value in {"loss": loss.item(), **log(optimizer, monitor)}.items():
                writer.add_scalar(name, value, epoch + 1)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"epoch": epoch + 1, "random": torch.get_rng_state()}
            torch.save(state, checkpoint.with_suffix(".part"))  # so that a kill while it is written loses nothing
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return model


# %% How good it is on digits that nothing above has seen
def main() -> None:
    """Train and print a line."""
    parser = argparse.ArgumentParser(description="PRM in a loop of one's own.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/torch"))
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.out, args.epochs)
    x, y = digits()
    with torch.no_grad():
        print(f"test accuracy {(model(x[1050:]).argmax(1) == y[1050:]).float().mean():.3f}")


if __name__ == "__main__":
    main()
