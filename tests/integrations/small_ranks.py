"""Trainer and Accelerate on the ranks that torchrun starts; each rank writes down what it ended with."""

import os

import torch
import torch.distributed as dist
from integrations.small_trainer import Killed, every_step, trainer

from popriskmin.integrations.transformers import PRMCallback


def join():
    """Form the group by a name of this attempt: gloo would find the addresses of dead processes in torchrun's store."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore("attempt " + os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))


def train(folder, accumulate, size=4, callbacks=(), resume=None):
    """Return the weights and the training's part of the log; the size is that of the batches on each rank."""
    one = trainer(folder, callbacks, gradient_accumulation_steps=accumulate, per_device_train_batch_size=size)
    one.add_callback(PRMCallback(one, monitor=every_step))
    one.train(resume_from_checkpoint=resume)
    weights = [p.detach().clone() for p in one.model.parameters()]
    return weights, [row for row in one.state.log_history if "loss" in row]


def all_there_is(folder):
    from integrations import small_accelerate

    return {
        **{f"trainer {n}": train(folder / f"trainer {n}", n) for n in (1, 2)},
        **{f"accelerate {n}": small_accelerate.train(4, n) for n in (1, 2)},
    }


def run(folder, fatal_step=None):
    """Write down what this rank ends with.

    Without a step that is both, with and without accumulation. With one it is the Trainer alone, of which rank 1 is
    killed after so many steps; torchrun starts all ranks again, and they go on from the last checkpoint.
    """
    join()
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if fatal_step is None:
        ended = all_there_is(folder)
    else:
        doomed = [Killed(fatal_step)] if rank == 1 and attempt == 0 else []
        ended = {"trainer 1": train(folder / "trainer 1", 1, callbacks=doomed, resume=attempt > 0 or None)}
        ended["attempt"] = attempt
    torch.save(ended, folder / f"{rank}.pt")
    dist.barrier()
