"""Forms of shrinkage that are tried beside PRM's own: optimizers that arms of a comparison name by their path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from popriskmin import PRM, ShrinkageController
from popriskmin.mask import Hyperparameters, corrections, variance_of_mean
from popriskmin.optimizer.mask_state import param_states
from popriskmin.step.lists import shrinks

FIRST = 2  # tensors: a network's first layer, or the embeddings of its tokens and of their places


class BoundedPRM(PRM):
    """PRM with a group for each tensor and a `ShrinkageController` at its defaults."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__([{"params": [param]} for param in params], **options)
        self.controller = ShrinkageController(self)


class HoldingPRM(PRM):
    """PRM whose weights leave their origin only on more than the noise of the running mean; see `within_noise`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and put back what has left its origin on noise."""
        before = [(one, one.param.clone()) for one in param_states(self)]
        loss = super().step(closure)
        for one, was in before:
            if one.step and shrinks(one.hyper, one.param):  # from the second step on there is a pull
                origin = one.state.get("start", torch.zeros(()))
                held = (was == origin) & within_noise(one.state, one.step + 1, one.hyper)
                one.param.copy_(torch.where(held, origin, one.param))
        return loss


class FirstLayerPRM(PRM):
    """PRM that shrinks a network's first layer, or its embeddings, alone."""

    def __init__(self, params: Iterable[Tensor], *, shrinkage: float, **options: Any) -> None:
        given = list(params)
        groups = [{"params": given[:FIRST], "shrinkage": shrinkage}, {"params": given[FIRST:]}]
        super().__init__(groups, **options)


def by_fan_in(share: float, weight: Tensor) -> float:
    """Return `share * sqrt(2 * log(inputs))`; 0 for what is no matrix, or has one input."""
    return share * math.sqrt(2 * math.log(weight.shape[1])) if weight.dim() > 1 else 0.0


def within_noise(state: Mapping[str, Tensor], step: int, hyper: Hyperparameters) -> Tensor:
    """Return where the running mean lies within `z * sqrt((c + k) * s^)`, the error of what one step sees of it.

    `c` makes of `s^` the variance of the mean gradient over the data, and `k` that of the running mean over the steps.
    """
    corrected = corrections(step, hyper)
    seen = hyper.mean_coefficient + variance_of_mean(hyper.beta1, step)
    mean, noise = state["exp_avg"] / corrected.bias1, state["exp_avg_var"] / corrected.bias_var
    return mean.square() <= hyper.shrinkage**2 * seen * noise
