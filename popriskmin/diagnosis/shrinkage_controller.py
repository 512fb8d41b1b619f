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
from popriskmin.step.foreach import CPU_BLOCK
from popriskmin.step.lists import as_real, shrinks
from popriskmin.step.shards import local_part, over_ranks

MOST = "max_shrinkage"  # the key of a group
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
    `every`-th step each group gets::

        z = min(z0, share * min over its layers of max |m^| / sqrt(c * s^))

    with `z0` the group's first shrinkage, and `c = b / (n - b)`. So the strongest weights
    of each layer lie beyond `z` when it is set, and a small layer, whose largest mean
    gradient is less, gets a smaller `z` than a wide one. One setting then serves layers
    and tables for which no single shrinkage is right.

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
        too. Give every layer a group of its own, by a pattern for each in
        `popriskmin.param_groups`: of one group's layers the weakest decides.
    every
        Steps between two corrections. The tables were measured with 1.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For arguments out of range. For a group of `groups` without shrinkage, or where none
        has it; in `step()`, after the update, if that is changed later.

    Notes
    -----
    `z0` stands in the group as `max_shrinkage`, which may be changed; the shrinkage itself is
    overwritten. Both are saved with the optimizer, the count of steps with the
    controller's `state_dict()`. With both loaded, a resumed run equals the uninterrupted one
    bit for bit. A captured graph keeps the shrinkage that it was captured with, and
    `torch.compile` compiles anew for another one.

    The rule is a heuristic, measured on 24 tables ("Shrinkage" in the documentation).
    `m^` itself varies by about `s^ / 19` for `beta1 = 0.9`, so noise alone bounds `z` from
    below. A layer of 500 by 64 keeps about 2.6 of 3 with 30 batches of data, and all of it
    with hundreds: there the bound seldom binds.

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
            self._most(i)
        self._attach()

    def _most(self, i: int) -> float:
        """Return the strongest pull of a group, which is kept in it: it is saved, moved and removed with the group."""
        group = self.optimizer.param_groups[i]
        return float(group.setdefault(MOST, group["shrinkage"]))

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
        squares = over_ranks([largest_square(one) for one in ready], [one.param for one in ready], "max")
        found: dict[int, list[float]] = {}
        for one, (square, overflowed) in zip(ready, to_host(squares)):
            found.setdefault(one.group, []).append(math.nan if overflowed else math.sqrt(square))
        self.readings = [
            self._correct(i, math.nan if any(map(math.isnan, rows)) else min(rows)) for i, rows in found.items()
        ]

    def _correct(self, i: int, largest: float) -> ShrinkageReading:
        group, most = self.optimizer.param_groups[i], self._most(i)
        # The pull of a run that has overflowed stays as it is. At 0 the group would have no shrinkage to control.
        if not math.isnan(largest):
            group["shrinkage"] = max(torch.finfo(torch.float32).tiny, min(most, self.share * largest))
        return ShrinkageReading(i, largest, group["shrinkage"])


@torch.no_grad()
def largest_square(one: ParamState) -> Tensor:
    """Return the largest squared mean gradient of this rank's part, in squared standard errors, and if one is NaN.

    They are of shape (2,), the second 0 or 1, because a maximum over ranks need not keep NaN.
    """
    flat = [as_real(local_part(one.state[name])).reshape(-1) for name in ("exp_avg", "exp_avg_var")]
    block = CPU_BLOCK if flat[0].is_cpu else max(1, flat[0].numel())
    tops = [_largest_ratio(*as_wide_reals(m, s)) for m, s in zip(*(torch.split(x, block) for x in flat)) if m.numel()]
    # This rank may have no part of the tensor.
    largest = torch.stack(tops).amax() if tops else as_wide_reals(flat[0].new_zeros(()))[0]
    c = corrections(one.step, one.hyper)
    largest = largest * (c.bias_var / (c.bias1**2 * one.hyper.mean_coefficient))
    return torch.stack([largest.nan_to_num(nan=0.0, posinf=math.inf), largest.isnan().to(largest.dtype)])


def _largest_ratio(m: Tensor, s: Tensor) -> Tensor:
    """Return the largest `m**2 / s`; a weight without a gradient has neither, and counts as 0."""
    return m.square().div_(s.clamp(min=torch.finfo(s.dtype).tiny)).amax()
