"""Real processes that talk over gloo, for tests of what happens on several ranks."""

import os
import traceback

import pytest
import torch


def _one(rank, world_size, rendezvous, failures, function, arguments):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    code = 0
    try:
        function(rank, *arguments)
        dist.barrier()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    os._exit(code)  # gloo's threads can abort while the interpreter shuts down, a matter of torch's


def run_ranks(folder, world_size, function, *arguments, timeout=240):
    """Call `function(rank, *arguments)` in so many processes of one group; fail with the first rank's traceback.

    `folder` is a fresh one, where the processes find each other. The function must be importable.
    """
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    ranks = [
        context.Process(target=_one, args=(rank, world_size, folder / "rendezvous", failures, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=timeout)
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, 9)
    said = "" if failures.empty() else failures.get()
    if said or any(process.exitcode != 0 for process in ranks):
        pytest.fail(f"{said or 'no rank said why'}\nexit codes: {[process.exitcode for process in ranks]}")
