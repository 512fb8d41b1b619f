"""A small regression in Lightning, the same from the same seed; also one that is killed in the middle.

python small_lightning.py FOLDER: train on two ranks, with and without accumulation, and write down the ends.
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


def loader(size=4, ranks=1):
    """Return the 32 rows in their order; Lightning's own sampler for several ranks would shuffle them."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    rank = int(os.environ.get("LOCAL_RANK", 0))
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


class Rows(pl.Callback):
    """Keep what is logged, on every rank."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if "prm/mean_q" in trainer.callback_metrics:
            row = {name: value.item() for name, value in trainer.callback_metrics.items()}
            if [row] != self.rows[-1:]:
                self.rows.append(row)


def logged_training(folder, accumulate, size, **options):
    """Return the weights and what was logged; the size is that of the batches on each rank."""
    rows, module = Rows(), Regression()
    one = trainer(folder, PRMCallback(every_step), rows, accumulate_grad_batches=accumulate, **options)
    one.fit(module, loader(size, one.world_size))
    return [p.detach().clone() for p in module.parameters()], rows.rows


def on_two_ranks(folder):
    def end(accumulate):
        gloo = pl.strategies.DDPStrategy(process_group_backend="gloo")
        return logged_training(folder / str(accumulate), accumulate, 4, devices=2, strategy=gloo)

    ends = {accumulate: end(accumulate) for accumulate in (1, 2)}
    torch.save(ends, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort while the interpreter shuts down, a matter of torch's


def train_until_killed(folder, after):
    """Train into the folder until after so many steps, and then be killed."""
    pl.seed_everything(3)
    doomed = trainer(folder, PRMCallback(every_step), Killed(after))
    doomed.fit(Regression(), loader())


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(3)
    on_two_ranks(pathlib.Path(sys.argv[1]))
