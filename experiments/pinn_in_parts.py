"""Shrinkage for a loss of two parts: the physics-informed network, and a PRM that keeps the noise of each part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from popriskmin import PRM
from popriskmin.mask import Hyperparameters
from popriskmin.tasks.pinn import Batch, Pinn, at_start

REUSED = "reused"  # the attribute of a parameter with the gradient of the part that uses its data again


class PartsPRM(PRM):
    """PRM for a loss of two parts, one of data that are used again and again, one of points that are always new.

    The parts' noises add up in `s`, but averages of them over the data do not shrink alike. So each tensor is pulled by
    z errors of `c * s_reused + s_fresh / t`, taken as one share of its `c * s`: the mean gradient of the fresh points
    is one over as many batches as there were steps.
    """

    def __init__(self, params: Iterable[Tensor], *, shrinkage: float, **options: Any) -> None:
        super().__init__([{"params": [param]} for param in params], shrinkage=shrinkage, **options)
        self.z = shrinkage
        self.taken = 0
        self.parts: dict[Tensor, tuple[RunningVariance, RunningVariance]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with each tensor's shrinkage set anew."""
        self.taken += 1
        for group, hyper in zip(self.param_groups, map(self.hyperparameters_of, range(len(self.param_groups)))):
            (param,) = group["params"]
            reused, fresh = self.parts.setdefault(param, (RunningVariance(hyper), RunningVariance(hyper)))
            own = getattr(param, REUSED)
            a, b = reused.add(own), fresh.add(param.grad - own)
            if a + b > 0:
                group["shrinkage"] = self.z * math.sqrt((a + b / (self.taken * hyper.mean_coefficient)) / (a + b))
        return super().step(closure)


class RunningVariance:
    """The sum over a tensor of the running variances of its gradient, as PRM has them."""

    def __init__(self, hyper: Hyperparameters) -> None:
        self.hyper = hyper
        self.mean: Tensor | None = None
        self.sum = 0.0

    def add(self, gradient: Tensor) -> float:
        """Return the sum with one more gradient."""
        if self.mean is None:
            self.mean = torch.zeros_like(gradient)
        deviation = (gradient - self.mean).square().sum().item()
        self.sum = self.hyper.rho * self.sum + (1 - self.hyper.rho) * deviation
        self.mean.lerp_(gradient, 1 - self.hyper.beta1)
        return self.sum


@dataclasses.dataclass
class PinnInParts(Pinn):
    """The physics-informed network, whose loss leaves the gradient of its reused part for `PartsPRM`."""

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        initial = (model(at_start(batch.x))[:, 0] - batch.u).square().mean()
        params = [param for param in model.parameters() if param.requires_grad]
        gradients = torch.autograd.grad(initial, params, allow_unused=True)
        for param, gradient in zip(params, gradients):
            setattr(param, REUSED, torch.zeros_like(param) if gradient is None else gradient)
        return super()._loss(model, batch)
