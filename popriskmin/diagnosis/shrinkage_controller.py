"""A controller that keeps `shrinkage` from closing a layer, by the layer's own largest mean gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.diagnosis.control import Controller, number_between
from popriskmin.mask import corrections
from popriskmin.optimizer import Masked
from popriskmin.optimizer.mask_state import ParamState, as_wide_reals, param_states, to_host
from popriskmin.step.lists import as_real, shrinks
from popriskmin.step.shards import local_part, over_ranks

IN_CACHE = 2**15  # scalars that are read at a time on the CPU, so that what is made of them stays in the cache
LEAST_STEPS = 2  # from the second step of a tensor on there is a variance, and a pull


class ShrinkageReading(NamedTuple):
    """The controller's measurement of one group, and its action.

    Attributes
    ----------
    group
        Its number.
    largest
        The largest mean gradient of a layer, in standard errors; of several layers the least such.
    shrinkage
        The group's shrinkage from now on.
    """

    group: int
    largest: float
    shrinkage: float


class ShrinkageController(Controller):
    """Hold the `shrinkage` of parameter groups at a share of a layer's largest mean gradient.

    A layer closes where the mean gradients of all its weights lie within `shrinkage`
    standard errors of zero: then all are pulled to zero and stay there. So after every
    `every`-th step each group gets

        z = min(z0, share * min over its layers of max |m^| / sqrt(c * s^))

    with `z0` the shrinkage that it was built with, and `c = b / (n - b)`. The strongest
    weights of each layer then always lie beyond `z`. Where little stands out of the
    noise, the pull is weak; where a few weights do, it is as strong as `z0`. So one
    setting serves layers and tables for which no single shrinkage is right.

    Nothing is added to `optimizer.step()`. Each correction reads the state of the
    controlled tensors with two dimensions or more, and waits for the device. On a CPU it
    took about as long as the fused step itself (12 million scalars, one thread).

    Parameters
    ----------
    optimizer
        A `PRM`, wrapped by a framework or not (`popriskmin.unwrap`). The controller
        attaches itself with `register_step_post_hook`, and `remove()`
        detaches it. Under `ZeroRedundancyOptimizer` every rank's controller reads that
        rank's part of the parameters, and moves that rank's shrinkage.
    share
        Of the largest mean gradient, in (0, 1).
    groups
        Numbers of the groups to control. None takes all with a shrinkage, later ones
        too. Give every layer a group of its own (`popriskmin.param_groups`): of one
        group's layers the weakest decides.
    every
        Steps between two corrections.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For arguments out of range. For a group without shrinkage, or where none has it.
        In `step()`, if a controlled group is changed to one without.

    Notes
    -----
    Set the strongest pull, `z0`, as the group's `shrinkage` before the controller is
    attached; what is set later is overwritten. The shrinkage is saved with the
    optimizer, `z0` and the count of steps with the controller's `state_dict()`. With
    both loaded, a resumed run equals the uninterrupted one bit for bit. A captured graph
    keeps the shrinkage that it was captured with, and `torch.compile` compiles anew for
    another one.

    The rule is a heuristic, measured on 24 tables ("Shrinkage" in the documentation).
    `m^` itself varies by about `s^ / 19` for `beta1 = 0.9`. Where the data are many
    batches `c * s^` is far less, so that noise alone lies beyond `z`, and the bound
    seldom binds.

    Examples
    --------
    >>> from popriskmin import PRM
    >>> strong, weak = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    >>> groups = [{"params": strong.parameters()}, {"params": weak.parameters()}]
    >>> optimizer = PRM(groups, shrinkage=3.0, batch_size=10, n_dataset=20)
    >>> controller = ShrinkageController(optimizer, share=0.5)
    >>> for _ in range(100):
    ...     strong.weight.grad = 10 + torch.randn(4, 8)
    ...     weak.weight.grad = torch.randn(4, 8)
    ...     optimizer.step()
    >>> optimizer.param_groups[0]["shrinkage"] > 2, optimizer.param_groups[1]["shrinkage"] < 1
    (True, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        share: float = 0.5,
        groups: Iterable[int] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(optimizer, groups, every)
        if isinstance(self.optimizer, Masked):
            raise TypeError("ShrinkageController needs a popriskmin.PRM, got Masked, which has no shrinkage")
        self.share = number_between("share", share, 0, 1)
        self.readings: list[ShrinkageReading] = []
        for i in self._controlled():
            self._start[i] = float(self.optimizer.param_groups[i]["shrinkage"])
        self._attach()

    def _controlled(self) -> list[int]:
        groups = self.optimizer.param_groups
        shrunk = [i for i, group in enumerate(groups) if group["shrinkage"] > 0]
        numbers = shrunk if self.groups is None else self.groups
        if not numbers:
            raise ValueError("there is no parameter group to control: all have shrinkage=0")
        for i in numbers:
            if i not in shrunk:
                raise ValueError(f"group {i} has shrinkage=0: set the strongest pull that it may have, such as 3")
        return numbers

    def _correct_all(self, numbers: list[int]) -> None:
        ready = [
            one
            for one in param_states(self.optimizer)
            if one.group in numbers and one.step >= LEAST_STEPS and shrinks(one.hyper, one.param)
        ]
        squares = over_ranks([_largest_square(one) for one in ready], [one.param for one in ready], "max")
        found: dict[int, list[float]] = {}
        for one, (square,) in zip(ready, to_host(squares)):
            found.setdefault(one.group, []).append(math.sqrt(square))
        self.readings = [self._correct(i, min(rows)) for i, rows in found.items()]

    def _correct(self, i: int, largest: float) -> ShrinkageReading:
        group = self.optimizer.param_groups[i]
        most = self._start.setdefault(i, float(group["shrinkage"]))
        # The pull of a run that has overflowed stays as it is. At 0 the group would have no shrinkage to control.
        if not math.isnan(largest):
            group["shrinkage"] = max(torch.finfo(torch.float32).tiny, min(most, self.share * largest))
        return ShrinkageReading(i, largest, group["shrinkage"])


@torch.no_grad()
def _largest_square(one: ParamState) -> Tensor:
    """Return the largest squared mean gradient of this rank's part, in squared standard errors; of shape (1,)."""
    flat = [as_real(local_part(one.state[name])).reshape(-1) for name in ("exp_avg", "exp_avg_var")]
    block = IN_CACHE if flat[0].is_cpu else max(1, flat[0].numel())
    tops = [_largest_ratio(*as_wide_reals(m, s)) for m, s in zip(*(torch.split(x, block) for x in flat)) if m.numel()]
    # This rank may have no part of the tensor.
    largest = torch.stack(tops).amax(0, keepdim=True) if tops else as_wide_reals(flat[0].new_zeros(1))[0]
    c = corrections(one.step, one.hyper)
    found: Tensor = largest * (c.bias_var / (c.bias1**2 * one.hyper.mean_coefficient))
    return found


def _largest_ratio(m: Tensor, s: Tensor) -> Tensor:
    """Return the largest `m**2 / s`; a weight without a gradient has neither, and counts as 0."""
    return m.square().div_(s.clamp(min=torch.finfo(s.dtype).tiny)).amax()
