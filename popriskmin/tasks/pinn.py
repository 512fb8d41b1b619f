"""A physics-informed network: convection from a noisy initial condition."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option

SCALES = {
    "test": {"points": 20, "collocation": 16, "width": 8, "depth": 2, "steps": 20},
    "default": {"points": 100, "collocation": 128, "width": 50, "depth": 3, "steps": 3000},
    "paper": {"points": 100, "collocation": 1000, "width": 50, "depth": 4, "steps": 20_000},
}
GRID = 64  # places and times at which the solution is compared, in each direction
INITIAL = 32  # noisy points of the initial condition in a batch


class Batch(NamedTuple):
    """Noisy initial values, and places and times at which the equation is required."""

    x: Tensor
    u: Tensor
    inside: Tensor  # (points, 2): place and time
    edge: Tensor  # times at which both ends must agree


@dataclasses.dataclass
class Pinn(Task):
    """Solve `u_t + speed * u_x = 0` on a ring, from noisy values of `u(x, 0) = sin x`.

    A network of tanh units takes place and time. It is trained on the sum of three
    squared errors: from noisy initial values, which are drawn once from the seed and
    used in batches of 32; of the equation, at fresh places and times; and between the
    two ends of the ring. The metric is the relative l2 error `|u - truth| / |truth|`.
    The test takes a grid of places and times and the exact `sin(x - speed * t)`, the
    validation further noisy initial values.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    speed: float = option(5.0, "speed of the convection")
    noise: float = option(0.5, "standard deviation of the noise in the initial values, whose amplitude is 1")
    points: int = option(None, "noisy initial values")
    collocation: int = option(None, "fresh places and times in a batch")
    width: int = option(None, "units in each hidden layer")
    depth: int = option(None, "hidden layers")
    steps: int = option(None, "optimizer steps")

    metrics: ClassVar[dict[str, str]] = {"error": "min"}
    goals: ClassVar[dict[str, float]] = {"error": 0.4}
    learning_rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decays = (0.01,)

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them."""
        complete(self, SCALES[self.scale])
        check_least(self, {"noise": 0, "points": 1, "collocation": 1, "width": 1, "depth": 1, "steps": 1})

    def trial(self, seed: int) -> Trial:
        """Draw the noisy values, places and times from the seed; build the network."""
        generator = torch.Generator().manual_seed(seed)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            x = 2 * math.pi * torch.rand(number, generator=generator)
            return x, x.sin() + self.noise * torch.randn(number, generator=generator)

        x, u = draw(self.points)
        held_x, held_u = draw(self.points)
        span = torch.tensor([2 * math.pi, 1.0])
        rows: list[Tensor] = []
        while len(rows) < self.steps:
            rows += torch.split(torch.randperm(self.points, generator=generator), INITIAL)
        batches = [
            Batch(
                x[chosen],
                u[chosen],
                torch.rand(self.collocation, 2, generator=generator) * span,
                torch.rand(INITIAL, generator=generator),
            )
            for chosen in rows[: self.steps]
        ]
        place, time = torch.meshgrid(torch.linspace(0, 2 * math.pi, GRID), torch.linspace(0, 1, GRID), indexing="ij")
        everywhere, truth = torch.stack([place, time], -1).flatten(0, 1), torch.sin(place - self.speed * time).flatten()
        return Trial(
            model=network(self.width, self.depth),
            batches=batches,
            loss=self._loss,
            validation=lambda model: relative_error(model, at_start(held_x), held_u),
            test=lambda model: relative_error(model, everywhere, truth),
            evaluate_every=max(1, self.steps // 100),
            batch_size=min(INITIAL, self.points),
            n_dataset=self.points,
        )

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        initial = (model(at_start(batch.x))[:, 0] - batch.u).square().mean()
        inside = batch.inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
        equation = (slope[:, 1] + self.speed * slope[:, 0]).square().mean()
        ends = [model(torch.stack([torch.full_like(batch.edge, x), batch.edge], 1)) for x in (0.0, 2 * math.pi)]
        loss: Tensor = initial + equation + (ends[0] - ends[1]).square().mean()
        return loss


def network(width: int, depth: int) -> nn.Sequential:
    """Return a network from place and time to the solution, of tanh units."""
    layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def at_start(x: Tensor) -> Tensor:
    """Return these places at time 0."""
    return torch.stack([x, torch.zeros_like(x)], 1)


def relative_error(model: nn.Module, where: Tensor, truth: Tensor) -> Metrics:
    """Return `|u - truth| / |truth|`."""
    return {"error": ((model(where)[:, 0] - truth).norm() / truth.norm()).item()}
