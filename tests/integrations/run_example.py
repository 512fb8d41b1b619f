"""Run an example as a user would, and keep the weights it ends with."""

import contextlib
import os
import runpy
import signal
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from popriskmin import PRM


def run(weights, after, path, *arguments):
    """Run it and save what its PRM trained; under torchrun each rank saves its part, in a file with its number.

    It is killed after so many steps of its optimizer, 0 for never.
    """
    seen = []

    def watch(optimizer, args, kwargs):
        if isinstance(optimizer, PRM):
            seen.append(optimizer)
            if len(seen) == after:
                os.kill(os.getpid(), signal.SIGKILL)

    hook = register_optimizer_step_post_hook(watch)
    argv, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        hook.remove()
        sys.argv = argv
    trained = [p for group in seen[-1].param_groups for p in group["params"]]
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    torch.save([part.detach().clone() for part in parts], f"{weights}.{os.environ.get('RANK', 0)}")
    return len(seen)


def run_rank(weights, after, path, *arguments):
    """Run it on a rank of torchrun's, and keep what it says."""
    with open(f"{weights}.{os.environ['RANK']}.txt", "w") as file, contextlib.redirect_stdout(file):
        run(weights, after, path, *arguments)
