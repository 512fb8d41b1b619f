"""PRM with parameters sharded by FSDP2: figures of all ranks, and a run that goes on where it was killed.

    torchrun --standalone --nproc-per-node 2 examples/with_fsdp2.py --out runs/fsdp2
    tensorboard --logdir runs/fsdp2

Digits of which 40% have a wrong label, on the CPU over gloo, half a minute. Kill it and start it again: it goes on from
the last checkpoint, on another number of ranks too.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.tensorboard import SummaryWriter

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations import log

BATCH_SIZE = 48  # of all ranks together


def digits(wrong: float = 0.4) -> tuple[Tensor, Tensor]:
    """Return the images and their labels in random order, the first 1,000 labels spoilt with this probability."""
    generator = torch.Generator().manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images[order].float() / 16, labels[order].long()
    spoilt = torch.rand(1000, generator=generator) < wrong
    y[:1000][spoilt] = torch.randint(10, (int(spoilt.sum()),), generator=generator)
    return x, y


# %% Training
def train(folder: pathlib.Path, epochs: int) -> nn.Module:
    """Train, or go on training, and return the model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    mesh = init_device_mesh("cpu", (ranks,))  # "cuda" on GPUs
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = PRM(model.named_parameters(), lr=1e-2, weight_decay=0.01)
    monitor = RiskMonitor(optimizer, every=4, n_dataset=1000, batch_size=BATCH_SIZE)
    done = sorted(int(path.parent.name) for path in folder.glob("*/complete"))
    first = done[-1] if done else 0
    if done:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(state, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        monitor.load_state_dict(torch.load(folder / str(first) / "monitor.pt", weights_only=True))

    writer = SummaryWriter(str(folder)) if rank == 0 else None
    for epoch in range(first, epochs):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(epoch))
        for rows in order[: 1000 // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            mine = rows.chunk(ranks)[rank]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
            loss.backward()
            optimizer.step()
        figures = {"loss": loss.item(), **log(optimizer, monitor)}  # every rank asks; one alone: log(..., local=True)
        checkpoint = folder / str(epoch + 1)
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=checkpoint)
        if writer is not None:
            torch.save(monitor.state_dict(), checkpoint / "monitor.pt")
            (checkpoint / "complete").touch()
            for name, value in figures.items():
                writer.add_scalar(name, value, epoch + 1)
    if writer is not None:
        writer.close()
    return model


# %% How good it is on digits that nothing above has seen
def main() -> None:
    """Train and print a line."""
    parser = argparse.ArgumentParser(description="PRM with FSDP2.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fsdp2"))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    dist.init_process_group("gloo")  # "nccl" on GPUs
    model = train(args.out, args.epochs)
    x, y = digits()
    with torch.no_grad():
        accuracy = (model(x[1000:]).argmax(1) == y[1000:]).float().mean()
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
