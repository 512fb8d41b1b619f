"""An exponential average of the weights while a run trains, measured beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from popriskmin.compare.text import describe


class Average:
    """An exponential average of a model's weights and buffers over about `steps` steps.

    Until so many steps have been taken it is their plain mean, so that the first weights do not stay in it. Buffers
    are averaged too, but for counters, which are copied.

    Raises
    ------
    ValueError
        For a model of which there can be no copy.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> average = Average(model, steps=50)
    >>> for value in (1.0, 2.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update(model)
    >>> average.model.weight.item()
    1.5
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        try:
            self._averaged = AveragedModel(model, avg_fn=self._mean, use_buffers=True)
        except Exception as error:  # what copying a module raises, of whatever type
            raise ValueError(
                f"the weights cannot be averaged, for {type(model).__name__} cannot be copied ({describe(error)}); "
                "leave out --average, or let its trial make a model that copy.deepcopy takes"
            ) from error

    def _mean(self, averaged: Tensor, now: Tensor, number: Tensor | int) -> Tensor:
        if not (averaged.is_floating_point() or averaged.is_complex()):
            return now
        mean = averaged.lerp(now.to(averaged.dtype), max(1 / self.steps, 1 / (int(number) + 1)))
        # Infinities, as of a mask, stay what they are: their difference would be NaN.
        return torch.where(averaged == now, averaged, mean)

    def update(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        self._averaged.update_parameters(model)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights; before the first update, with those that it began with."""
        module: nn.Module = self._averaged.module
        return module
