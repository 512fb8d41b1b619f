"""What controllers share: they act after a step on an option of parameter groups, and resume with it."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch.optim import Optimizer

from popriskmin.optimizer.checkpoint_probe import made_state_alone
from popriskmin.optimizer.unwrap import unwrapped_prm


class Controller(abc.ABC):
    """Moves one option of parameter groups after every `every`-th step.

    Parameters
    ----------
    optimizer
        A `PRM` or `Masked`, wrapped by a framework or not.
    groups
        Numbers of the groups to control; None takes those that `_controlled` finds.
    every
        Steps between two corrections.
    """

    def __init__(self, optimizer: Optimizer, groups: Iterable[int] | None, every: int) -> None:
        self.optimizer = unwrapped_prm(optimizer, type(self).__name__).optimizer
        self.groups = None if groups is None else _numbers(groups, len(self.optimizer.param_groups) - 1)
        self.every = whole_number("every", every)
        self._steps = 0

    def _attach(self) -> None:
        self._handle = self.optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Detach from the optimizer; what was moved stays as it is."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the optimizer's state.

        `torch.load(..., weights_only=True)` reads it.
        """
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the target and the other settings stay as built.

        Raises
        ------
        ValueError
            For what is not from a controller's `state_dict()`.
        """
        if set(state_dict) != {"steps"}:
            raise ValueError(f"a {type(self).__name__}'s state holds steps alone, got {', '.join(state_dict)}")
        steps = state_dict["steps"]
        if not isinstance(steps, Integral) or int(steps) < 0:
            raise ValueError(f"steps must be a whole number >= 0, got {steps!r}")
        self._steps = int(steps)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if made_state_alone(self.optimizer, counted=0):
            return  # a distributed checkpoint has begun to load
        self._steps += 1
        if self._steps % self.every == 0:
            self._correct_all(self._controlled())

    @abc.abstractmethod
    def _controlled(self) -> list[int]:
        """Return the numbers of the groups to control; raise if one cannot be."""

    @abc.abstractmethod
    def _correct_all(self, numbers: list[int]) -> None:
        """Read these groups and move their option."""


def _numbers(groups: Iterable[int], last: int) -> list[int]:
    expected = f"groups must be numbers of parameter groups, from 0 to {last}"
    if not isinstance(groups, Iterable):
        raise ValueError(f"{expected}, got {groups!r}")
    numbers = list(groups)
    for number in numbers:
        if not (isinstance(number, Integral) and 0 <= number <= last):
            raise ValueError(f"{expected}, got {number!r}")
    return numbers


def number_between(name: str, value: object, least: float, largest: float) -> float:
    """Return an argument as a float, or raise unless it is a number between the two."""
    if not (isinstance(value, Real) and least < float(value) < largest):
        limits = f"between {least} and {largest}" if largest < math.inf else f"above {least}, and finite"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    return float(value)


def whole_number(name: str, value: object) -> int:
    """Return an argument as an int, or raise unless it is 1 or more."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)
