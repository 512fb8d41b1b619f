"""A task that trains in milliseconds, for tests of the comparison; also what a user's own file looks like."""

import dataclasses
import glob
import os
import signal
import sys
import time

import torch
from torch import nn

from popriskmin.compare import Task, Trial


@dataclasses.dataclass
class Tiny(Task):
    """Fit a noisy line through nine inputs. `trouble` makes something go wrong: raise, exit, diverge, lost or die."""

    noise: float = dataclasses.field(default=0.5, metadata={"help": "standard deviation of the labels' noise"})
    steps: int = 12
    trouble: str = ""
    sleep: float = 0.0
    scratch: str = ""

    metrics = {"error": "min", "fit": "max"}
    learning_rates = (0.01, 0.1)
    weight_decays = (0.0,)

    def trial(self, seed):
        time.sleep(self.sleep)
        held = os.environ.get("TINY_HELD")  # a folder: once four runs have ended there, the others take long
        if held and len(glob.glob(os.path.join(held, "*.jsonl"))) >= 4:
            time.sleep(2)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 9, generator=generator)
        truth = torch.randn(9, 1, generator=generator)
        y = x @ truth + self.noise * torch.randn(64, 1, generator=generator)

        def measure(offset):
            def metrics(model):
                error = (model(x) - x @ truth).square().mean().item() + offset
                return {"error": error, "fit": 1 / (1 + error), "unused": 0.0}

            return metrics

        def loss(model, rows):
            value = nn.functional.mse_loss(model(x[rows]), y[rows])
            if self.trouble == "raise":
                raise ArithmeticError("the task is broken")
            if self.trouble == "exit":
                sys.exit(3)
            if self.trouble == "lost":
                return value * float("nan")
            if self.trouble == "diverge" and model.weight.abs().max() > 0.6:
                return value * float("nan")
            if self.trouble == "die" and seed == 1 and not os.path.exists(self.scratch):
                if self.scratch:
                    open(self.scratch, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return Trial(
            model=nn.Linear(9, 1),
            batches=[torch.randint(64, (8,), generator=generator) for _ in range(self.steps)],
            loss=loss,
            validation=measure(0.1),
            test=measure(0.0),
            evaluate_every=5,
            batch_size=8,
            n_dataset=64,
        )

    def joined(self, seed):
        """Twice the steps: training and validation data are the same here."""
        return dataclasses.replace(self, steps=2 * self.steps).trial(seed)
