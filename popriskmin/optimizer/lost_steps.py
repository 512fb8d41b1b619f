"""Steps that parameters of 16 bits lose to rounding: which these are, and one warning where most are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from popriskmin.optimizer.mask_state import HasMask, ParamState, as_wide_reals, param_states, recompute
from popriskmin.step.codes import BLOCK, decode
from popriskmin.step.rounding import NARROW
from popriskmin.step.shards import local_part

# After so many steps it is looked: the averages have settled; and a warmup of the learning rate may be over.
LOOKS = (30, 300)

# What is looked at: so many of the largest tensors, and of each so many scalars.
TENSORS, SCALARS = 16, 4096


def is_lost(w: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which scalars stay where they are although the mask lets them move.

    Parameters
    ----------
    w
        The weights, widened.
    step
        The length of each scalar's step, 0 or more.
    dtype
        The type that the weights are stored in. Below half a unit in the last place a step is rounded away.
    """
    precision = torch.finfo(dtype)
    half_a_unit = w.abs().clamp(min=precision.tiny).log2().floor().exp2() * (precision.eps / 2)
    return (step > 0) & (step < half_a_unit)


def rounds_to_nearest(one: ParamState) -> bool:
    """Return whether a parameter of 16 bits is written rounded to nearest."""
    return one.param.dtype in NARROW and not one.hyper.stochastic_rounding


class LostSteps:
    """Looks at an optimizer after some of its steps, and warns once.

    Nobody waits for a device: what is counted on one is read in a later step, when it is there. Groups that are
    captured in a graph, and other devices than the CPU and CUDA's, are not looked at.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._counted: Tensor | None = None
        self._arrived: Any = None  # an event of CUDA, whose class has no types

    def look(self, optimizer: HasMask) -> None:
        """Call this after each step."""
        self._steps += 1
        if self._steps in LOOKS and not any(group["capturable"] for group in optimizer.param_groups):
            self._count(optimizer)
        if self._counted is not None and (self._arrived is None or self._arrived.query()):
            lost, moving = self._counted.tolist()
            self._counted = self._arrived = None
            if lost > moving / 2:
                self._steps = LOOKS[-1]
                _warn(lost / moving)

    @torch.no_grad()
    def _count(self, optimizer: HasMask) -> None:
        stepped = [one for one in param_states(optimizer) if one.step > 0 and local_part(one.param).numel() > 0]
        narrow = [one for one in stepped if rounds_to_nearest(one)]
        devices = {one.param.device for one in narrow}
        if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            return
        largest = sorted(narrow, key=lambda one: one.param.numel(), reverse=True)[:TENSORS]
        total = torch.stack(list(_counts(largest))).sum(0)
        self._counted = total.to("cpu", non_blocking=True)
        if total.is_cuda:
            cuda: Any = torch.cuda
            self._arrived = cuda.Event()
            self._arrived.record()


def _counts(several: list[ParamState]) -> Iterator[Tensor]:
    """Yield for each tensor how many scalars lost their last step, and how many had one.

    A pooled mask is taken from the means over what is looked at.
    """
    for one in several:
        w, m, v, s = as_wide_reals(*_sample(one))
        m, _, c, _, _, q = recompute({"exp_avg": m, "exp_avg_var": s}, one.step, one.hyper)
        step = (q * (m / c.bias1) / ((v / c.bias2).sqrt() + one.hyper.eps)).abs() * one.hyper.lr
        lost = is_lost(w, step, one.param.dtype)
        yield torch.stack([lost.sum(), (step > 0).sum()]).double() * (local_part(one.param).numel() / w.numel())


def _sample(one: ParamState) -> list[Tensor]:
    """Return some scalars of the parameter, and their `m`, `v` and `s`."""
    param = local_part(one.param).reshape(-1)
    if "codes" in one.state:
        # Of the first row: each begins with a block of its own.
        codes = local_part(one.state["codes"])
        mean, square, variance = decode(codes[0, : SCALARS // BLOCK])
        first = param.reshape(len(codes), -1)[0, :SCALARS]
        return [first, *(x.reshape(-1)[: first.numel()] for x in (mean, square, variance))]
    stride = max(1, param.numel() // SCALARS)
    state = [local_part(one.state[name]).reshape(-1) for name in ("exp_avg", "exp_avg_sq", "exp_avg_var")]
    return [x[::stride] for x in (param, *state)]


def _warn(share: float) -> None:
    warnings.warn(
        f"PRM: rounding takes away the steps of {share:.0%} of the 16-bit weights that the mask lets move. Pass "
        "stochastic_rounding=True, or keep the weights in float32 and compute in 16 bits under autocast",
        UserWarning,
        stacklevel=6,
    )
