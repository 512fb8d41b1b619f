"""Real processes, some of which talk over gloo, for tests of what happens on several ranks or after a kill.

They are forked from one process that has imported torch and trained nothing, so that only the first of them waits for
the imports.
"""

import gc
import multiprocessing
import os
import signal
import traceback
import uuid

import pytest
import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = torch.multiprocessing.get_context(METHOD)
_first = ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
_first += ["torch.distributed.optim", "torch.distributed.tensor.parallel", "fsspec"]
_first += ["popriskmin", "hypothesis", "pytest"]


def import_first(*modules):
    """Let the process that others are forked from import these too, where they are installed."""
    _first.extend(modules)
    if METHOD == "forkserver":
        CONTEXT.set_forkserver_preload(_first)


if __name__ == "ranks":  # and not once more, as where pytest looks for doctests, after the files that import more
    import_first()


def _settle(environment):
    gc.freeze()  # trainers collect garbage, and would go through all that was imported
    os.environ.update(environment)
    torch.set_num_threads(1)


def _as_a_user(environment, function, arguments):
    """Go on as a new process of the user's would: with one thread and the environment of now."""
    _settle(environment)
    function(*arguments)


def exit_code(function, *arguments, timeout=240):
    """Call a function in a process of its own and return how that ended: 0, or -9 where it was killed."""
    process = CONTEXT.Process(target=_as_a_user, args=(dict(os.environ), function, arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.kill(process.pid, 9)
        pytest.fail(f"{function.__name__}{arguments} is not done after {timeout} s")
    return process.exitcode


def torchrun(function, *arguments, ranks=2, restarts=0):
    """Call a function on ranks as `torchrun --standalone` starts a script; a ChildFailedError says which rank failed.

    It must come back rather than exit.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, ranks, run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=restarts, monitor_interval=0.1, start_method=METHOD,
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    try:
        elastic_launch(config, _as_a_user)(environment, function, arguments)
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _one(rank, world_size, rendezvous, environment, failures, function, arguments):
    import torch.distributed as dist

    _settle(environment)
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
    failures = CONTEXT.SimpleQueue()
    shared = (world_size, folder / "rendezvous", dict(os.environ), failures, function, arguments)
    ranks = [CONTEXT.Process(target=_one, args=(rank, *shared)) for rank in range(world_size)]
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
