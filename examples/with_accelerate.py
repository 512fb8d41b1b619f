"""PRM with Accelerate: figures in its trackers, the monitor in its checkpoints.

    python examples/with_accelerate.py --out runs/accelerate           (or: accelerate launch ...)
    tensorboard --logdir runs/accelerate

Digits of which 40% have a wrong label, ten seconds. Kill it and start it again: it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations import log


def digits(wrong: float = 0.4) -> tuple[TensorDataset, TensorDataset]:
    """Return 1,000 images with labels of which this share is wrong, and 797 with true ones."""
    generator = torch.Generator().manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images[order].float() / 16, labels[order].long()
    spoilt = torch.rand(1000, generator=generator) < wrong
    y[:1000][spoilt] = torch.randint(10, (int(spoilt.sum()),), generator=generator)
    return TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:])


# %% Training
def train(folder: pathlib.Path, epochs: int) -> nn.Module:
    """Train, or go on training, and return the model."""
    saving = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(log_with="tensorboard", project_config=saving, gradient_accumulation_steps=2)
    accelerator.init_trackers("training")
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = PRM(model.named_parameters(), lr=1e-2, weight_decay=0.01)
    loader = DataLoader(digits()[0], batch_size=25, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor = RiskMonitor(optimizer, every=4, n_dataset=1000, batch_size=50)  # the wrapped optimizer, as it is
    accelerator.register_for_checkpointing(monitor)
    first = 0
    if (folder / "checkpoints").exists() and any((folder / "checkpoints").iterdir()):
        accelerator.load_state()  # the last one; the monitor's state comes with it
        first = saving.iteration = 1 + max(int(p.name.split("_")[1]) for p in (folder / "checkpoints").iterdir())

    for epoch in range(first, epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.log({"loss": loss.item(), **log(optimizer, monitor)}, step=epoch + 1)
        accelerator.save_state()
    accelerator.end_training()
    return accelerator.unwrap_model(model).cpu()


# %% How good it is on digits that nothing above has seen
def main() -> None:
    """Train and print a line."""
    parser = argparse.ArgumentParser(description="PRM with Accelerate.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    model = train(args.out, args.epochs)
    x, y = digits()[1].tensors
    with torch.no_grad():
        print(f"test accuracy {(model(x).argmax(1) == y).float().mean():.3f}")


if __name__ == "__main__":
    main()
