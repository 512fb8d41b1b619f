"""Trainer and Accelerate on the ranks that torchrun starts; each rank writes down what it ended with.

small_ranks.py FOLDER [STEP]: without a step both, with and without accumulation. With one the Trainer alone, of which
rank 1 is killed after so many steps; torchrun starts all ranks again, and they go on from the last checkpoint.
"""

import os
import pathlib
import sys

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


def main():
    torch.set_num_threads(1)
    join()
    folder, rank = pathlib.Path(sys.argv[1]), dist.get_rank()
    if len(sys.argv) > 2:
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        doomed = [] if again or rank != 1 else [Killed(int(sys.argv[2]))]
        ended = {"trainer 1": train(folder / "trainer 1", 1, callbacks=doomed, resume=again or None)}
        ended["attempt"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    else:
        ended = all_there_is(folder)
    torch.save(ended, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort while the interpreter shuts down, a matter of torch's


if __name__ == "__main__":
    main()
