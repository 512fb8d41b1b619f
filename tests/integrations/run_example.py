"""Run an example as a user would, and keep the weights it ends with.

python run_example.py WEIGHTS STEP EXAMPLE [ARGUMENT ...]: killed after so many steps of its optimizer, 0 for never.
"""

import os
import runpy
import signal
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from popriskmin import PRM


def run(weights, after, path, *arguments):
    """Run it and save what its PRM trained; under torchrun each rank saves its part, in a file with its number."""
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(0)  # gloo's threads can abort while the interpreter shuts down, a matter of torch's
