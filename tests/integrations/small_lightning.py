"""A small regression in Lightning, the same from the same seed; also on two ranks, and one that is killed."""

import os
import signal

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


def loader(size=4, rank=0, ranks=1):
    """Return the 32 rows in their order; Lightning's own sampler for several ranks would shuffle them."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    sampler = torch.utils.data.DistributedSampler(data, ranks, rank, shuffle=False) if ranks > 1 else None
    return torch.utils.data.DataLoader(data, batch_size=size, sampler=sampler)


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


class WithRows(Regression):
    """The model with its data, of which each rank takes its part."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        return loader(self.size, self.trainer.global_rank, self.trainer.world_size)


class Written(pl.Callback):
    """Write down the weights and what was logged, on every rank."""

    def __init__(self, folder):
        self.folder, self.rows = folder, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if "prm/mean_q" in trainer.callback_metrics:
            row = {name: value.item() for name, value in trainer.callback_metrics.items()}
            if [row] != self.rows[-1:]:
                self.rows.append(row)

    def on_train_end(self, trainer, module):
        weights = [p.detach().clone() for p in module.parameters()]
        torch.save((weights, self.rows), self.folder / f"{trainer.global_rank}.pt")


def write(folder, accumulate, size, **options):
    """Train, and write down what each rank ends with; the size is that of the batches on each rank."""
    pl.seed_everything(3)
    folder.mkdir()
    callbacks = (PRMCallback(every_step), Written(folder))
    trainer(folder, *callbacks, accumulate_grad_batches=accumulate, **options).fit(WithRows(size))


def write_of_two_ranks(folders):
    """Train with each accumulation on two ranks, which Lightning forks."""
    for accumulate, folder in folders.items():
        gloo = pl.strategies.DDPStrategy(process_group_backend="gloo", start_method="fork")
        write(folder, accumulate, 4, devices=2, strategy=gloo)


def train_until_killed(folder, after):
    """Train into the folder until after so many steps, and then be killed."""
    pl.seed_everything(3)
    doomed = trainer(folder, PRMCallback(every_step), Killed(after))
    doomed.fit(Regression(), loader())
