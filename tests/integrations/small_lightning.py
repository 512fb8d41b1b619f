"""A small regression in Lightning, the same from the same seed; also a script that is killed in the middle.

python small_lightning.py FOLDER STEP: train into the folder until after STEP steps, and then be killed.
"""

import os
import pathlib
import signal
import sys

import lightning.pytorch as pl
import torch
from torch import nn

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations.lightning import PRMCallback


class Regression(pl.LightningModule):
    def __init__(self, build=PRM, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.build, self.options = build, options

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.build(self.named_parameters(), **{"lr": 0.01, **self.options})


def loader(rows=32, size=4):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size)


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    usual = {"max_epochs": 3, "log_every_n_steps": 3, "devices": 1}
    keep = pl.callbacks.ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{step}")
    callbacks = [*callbacks, keep]
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **usual, **options})


def every_step(optimizer):
    return RiskMonitor(optimizer, every=1)


class Killed(pl.Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(3)
    folder = pathlib.Path(sys.argv[1])
    doomed = trainer(folder, PRMCallback(every_step), Killed(int(sys.argv[2])))
    doomed.fit(Regression(), loader())
