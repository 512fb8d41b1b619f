"""Conditional flow matching from few samples, which may be memorized."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import ClassVar, Literal

import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option

SCALES = {
    "test": {"samples": 50, "width": 16, "batch_size": 16, "steps": 20},
    "default": {"samples": 200, "width": 128, "batch_size": 64, "steps": 3000},
    "paper": {"samples": 1000, "width": 512, "batch_size": 256, "steps": 30_000},
}
HELD_OUT = 300  # samples for validation, and as many for test
DRAWN = 300  # samples drawn from the model at an evaluation
FREQUENCIES = 8  # of the time's features
EULER_STEPS = 20
# A copy is nearer to a training sample than this part of the distance to the second
# nearest; Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to
# Memorize", ICML 2023 workshop.
COPY = 1 / 3


@dataclasses.dataclass
class Flow(Task):
    """Learn to draw samples like a few given ones (Lipman et al., arXiv:2210.02747).

    A network learns the velocity `x - noise` at `t * x + (1 - t) * noise` for samples
    `x`. It draws samples by integrating the velocity from noise in 20 steps of Euler.
    There are three metrics: the loss on held-out samples, with the same noise and times
    at every evaluation; the energy distance between 300 drawn samples and the held-out
    ones; and the share of drawn samples that are copies. The second nearest training
    sample is three times as far from a copy as the nearest.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    data: Literal["moons", "digits"] = option("moons", "two half circles in the plane, or images of 64 pixels")
    samples: int = option(None, "training samples")
    width: int = option(None, "units in each of the three hidden layers")
    batch_size: int = option(None, "samples in a batch")
    steps: int = option(None, "optimizer steps")

    metrics: ClassVar[dict[str, str]] = {"loss": "min", "distance": "min", "copies": "min"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    weight_decays = (0.01,)

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them."""
        complete(self, SCALES[self.scale])
        check_least(self, {"samples": 2, "width": 1, "batch_size": 1, "steps": 1})
        if self.data == "digits" and self.samples > 1797 - 2 * HELD_OUT:
            raise ValueError(f"samples must be at most {1797 - 2 * HELD_OUT} of the digits, got {self.samples}")

    def trial(self, seed: int) -> Trial:
        """Draw the samples, noise and times from the seed, and build the network."""
        generator = torch.Generator().manual_seed(seed)
        everything = self._data(seed, generator)
        training, validation, test = torch.split(everything, [self.samples, HELD_OUT, HELD_OUT])
        batches: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(batches) < self.steps:
            parts = torch.split(torch.randperm(self.samples, generator=generator), self.batch_size)
            batches += [(training[rows], *self._noise(len(rows), training, generator)) for rows in parts]
        fixed = self._noise(HELD_OUT, training, generator)
        start = torch.randn(DRAWN, training.shape[1], generator=generator)

        def measured(model: nn.Module, held_out: Tensor) -> Metrics:
            drawn = sample(model, start)
            return {
                "loss": flow_loss(model, (held_out, *fixed)).item(),
                "distance": energy_distance(drawn, held_out),
                "copies": copies(drawn, training),
            }

        return Trial(
            model=Velocity(training.shape[1], self.width),
            batches=batches[: self.steps],
            loss=flow_loss,
            validation=lambda model: measured(model, validation),
            test=lambda model: measured(model, test),
            evaluate_every=max(1, self.steps // 20),
            batch_size=min(self.batch_size, self.samples),
            n_dataset=self.samples,
        )

    def _data(self, seed: int, generator: torch.Generator) -> Tensor:
        """Return all samples, with columns of mean 0 and a total variance of 1."""
        number = self.samples + 2 * HELD_OUT
        if self.data == "moons":
            x = torch.tensor(make_moons(number, noise=0.08, random_state=seed)[0], dtype=torch.float32)
        else:
            images = torch.tensor(load_digits().data, dtype=torch.float32)
            x = images[torch.randperm(len(images), generator=generator)[:number]]
        x = x - x.mean(0)
        return x / x.square().mean().sqrt()

    @staticmethod
    def _noise(number: int, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(number, like.shape[1], generator=generator), torch.rand(number, 1, generator=generator)


class Velocity(nn.Module):
    """The velocity at a place and a time, of three hidden layers."""

    def __init__(self, dimensions: int, width: int) -> None:
        super().__init__()
        sizes = [dimensions + 2 * FREQUENCIES, width, width, width]
        hidden = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dimensions))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return velocities for `x`, (samples, dimensions), and times, (samples, 1)."""
        angles = math.pi * t * torch.arange(1, FREQUENCIES + 1)
        velocity: Tensor = self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))
        return velocity


def flow_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of the velocity, for samples, noise and times."""
    x, noise, t = batch
    loss: Tensor = (model(t * x + (1 - t) * noise, t) - (x - noise)).square().mean()
    return loss


def sample(model: nn.Module, start: Tensor) -> Tensor:
    """Draw samples, one from each row of noise."""
    x = start
    for i in range(EULER_STEPS):
        x = x + model(x, torch.full((len(x), 1), i / EULER_STEPS)) / EULER_STEPS
    return x


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance of two samples.

    It is `sqrt(2 E|a - b| - E|a - a'| - E|b - b'|)`, with distinct a' and b'.

    Examples
    --------
    >>> a = torch.tensor([[0.0], [1.0]])
    >>> round(energy_distance(a, a + 3), 3)  # sqrt(2 * 3 - 1 - 1)
    2.0
    """

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float((2 * torch.cdist(a, b).mean() - within(a) - within(b)).clamp(min=0).sqrt())


def copies(drawn: Tensor, training: Tensor) -> float:
    """Return the share of drawn samples that are copies of a training sample.

    The second nearest training sample is three times as far from a copy as the nearest.

    Examples
    --------
    >>> copies(torch.tensor([[0.1], [1.5]]), torch.tensor([[0.0], [1.0], [2.0]]))
    0.5
    """
    nearest = torch.cdist(drawn, training).topk(2, largest=False).values
    return float((nearest[:, 0] < COPY * nearest[:, 1]).float().mean())
