"""PRM with Lightning: figures in its loggers, stopping on the monitor's verdict, the monitor in its checkpoints.

    python examples/with_lightning.py --out runs/lightning
    tensorboard --logdir runs/lightning

Digits of which 40% have a wrong label, some seconds. Kill it and start it again: it goes on from the end of the last
epoch and ends with the weights of a run that was not disturbed.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations.lightning import PRMCallback


def digits(wrong: float = 0.4) -> tuple[Tensor, Tensor]:
    """Return the images and their labels in random order, the first 1,050 labels spoilt with this probability."""
    generator = torch.Generator().manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images[order].float() / 16, labels[order].long()
    spoilt = torch.rand(1050, generator=generator) < wrong
    y[:1050][spoilt] = torch.randint(10, (int(spoilt.sum()),), generator=generator)
    return x, y


class Each(torch.utils.data.Sampler[int]):
    """Every row once, in an order that the epoch alone decides, which Lightning tells through `set_epoch`."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        """Yield the rows."""
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


# %% Training
class Digits(pl.LightningModule):
    """Two layers, trained by PRM."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> PRM:
        """Return PRM."""
        return PRM(self.named_parameters(), lr=1e-2, weight_decay=0.01)


def train(folder: pathlib.Path, epochs: int) -> tuple[nn.Module, str]:
    """Train, or go on training, and return the model and how it ended."""
    pl.seed_everything(0)
    x, y = digits()
    module = Digits()

    def losses() -> Tensor:  # one for each of the 50 held-out examples
        return nn.functional.cross_entropy(module.net(x[1000:1050]), y[1000:1050], reduction="none")

    callback = PRMCallback(
        lambda optimizer: RiskMonitor(
            optimizer, every=8, n_dataset=1000, batch_size=50, held_out=losses, keep_best=module.net
        ),
        stop=True,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=20,
        logger=TensorBoardLogger(folder),
        callbacks=[callback, ModelCheckpoint(folder, save_last=True)],
        enable_progress_bar=False,
    )
    rows = TensorDataset(x[:1000], y[:1000])
    trainer.fit(module, DataLoader(rows, batch_size=50, sampler=Each(1000)), ckpt_path="last")
    best = callback.monitor.restore_best() if callback.monitor else None
    return module.net, f"stopped after step {trainer.global_step}, kept the weights after step {best}"


# %% How good it is on digits that nothing above has seen
def main() -> None:
    """Train and print two lines."""
    parser = argparse.ArgumentParser(description="PRM with Lightning.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    model, ended = train(args.out, args.epochs)
    x, y = digits()
    with torch.no_grad():
        print(f"{ended}\ntest accuracy {(model(x[1050:]).argmax(1) == y[1050:]).float().mean():.3f}")


if __name__ == "__main__":
    main()
