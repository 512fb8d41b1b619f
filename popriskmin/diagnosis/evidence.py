"""The numbers behind a diagnosis, of every tensor, in one transfer per device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.diagnosis.noise import first_step, mean_and_variance, weights
from popriskmin.mask import Hyperparameters, corrections, evaluate
from popriskmin.optimizer.groups import parameter_names
from popriskmin.optimizer.lost_steps import is_lost, rounds_to_nearest
from popriskmin.optimizer.mask_state import ParamState, as_wide_reals, param_states, recompute, to_host
from popriskmin.optimizer.masked import Masked
from popriskmin.optimizer.prm import PRM
from popriskmin.step.lists import sum_dtype
from popriskmin.step.shards import whole

# A mean gradient so much smaller than its noise (both squared) is that of one which has
# been 0 for some 100 steps.
SILENT = 1e-9
# Squared gradients that are so much smaller than the tensor's mean one are what
# rounding leaves of a gradient of 0, as that of a key's bias in attention.
ROUNDING = 1e-10
# And of a whole tensor's: beside the model's largest, and so much beside its own
# module's. The bias of a convolution before a normalization has 1e-10 of the squared
# gradient of its weights.
ROUNDING_IN_MODULE = 1e-8


class Sums(NamedTuple):
    """Sums over the scalars of one tensor; complex ones count as two."""

    q: float
    active: float  # scalars with signal > a * noise
    signal: float
    noise: float  # times the boundary's coefficient
    v: float  # v^
    weight_sq: float
    nonzero: float  # weights that are not exactly 0
    step_sq: float  # of AdamW's step, without the learning rate
    masked_step_sq: float
    # Over the scalars that have a gradient, now or in the last 100 steps or so:
    live: float
    live_q: float
    live_q_without_eps: float
    live_q_plain: float  # of the plain mask: snr, softness 1, batch boundary, no floor
    live_nonzero: float
    live_ratio: float  # m^**2 / z, each 1 at most
    live_let_move: float  # whose q is above 0
    live_lost: float  # of these, whose last step was less than half a unit in the weight's last place


class Evidence(NamedTuple):
    """One parameter tensor: what it is, and what is known of it."""

    name: str | int
    group: int
    shape: tuple[int, ...]
    scalars: int  # complex ones count as two
    step: int
    hyper: Hyperparameters  # of its last step
    sums: Sums | None  # None where it has taken no step

    @property
    def over_noise(self) -> float:
        """The mean of `m^**2 / z` over the live scalars, over that of pure noise.

        NaN if it is not known.
        """
        if self.sums is None or self.sums.live == 0 or self.step < first_step(self.hyper):
            return math.nan
        return self.sums.live_ratio / self.sums.live / weights(self.step, self.hyper).k

    @property
    def zero_fraction(self) -> float:
        """Share of the scalars without a gradient."""
        return 1.0 if self.sums is None else 1 - self.sums.live / self.scalars

    @property
    def closed(self) -> bool:
        """Whether shrinkage holds all of it at zero, or all but units that are dead."""
        n, hyper = self.sums, self.hyper
        if n is None or self.step < 2 or len(self.shape) < 2 or not hyper.shrinkage or hyper.shrink_to != "zero":
            return False
        # A unit that is never active may have weights left, which then have no gradient to be pulled by.
        return n.nonzero == 0 or (n.live > 0 and n.live_nonzero == 0)

    def decay_ratio(self, masked: bool = True) -> float:
        """Return the length of the decay's step over the gradient's, masked or not."""
        hyper, n = self.hyper, self.sums
        if n is None:
            return math.nan
        if hyper.weight_decay == 0 or not hyper.decoupled_weight_decay or (hyper.mask_decay and masked):
            return 0.0
        step = math.sqrt(n.masked_step_sq if masked else n.step_sq)
        decay = hyper.weight_decay * math.sqrt(n.weight_sq)
        return decay / step if step > 0 else (math.inf if decay > 0 else 0.0)


def read(optimizers: Sequence[PRM | Masked]) -> list[Evidence]:
    """Return the evidence on every tensor, of several optimizers, that has elements.

    Groups and unnamed parameters are counted through; names that several optimizers
    have get their group's number.
    """
    pairs = [pair for optimizer, names in zip(optimizers, _names(optimizers)) for pair in _pairs(optimizer, *names)]
    numbers = iter(to_host([sums for _, sums in pairs if sums is not None]))
    return [one if sums is None else one._replace(sums=Sums(*next(numbers))) for one, sums in pairs]


def _names(optimizers: Sequence[PRM | Masked]) -> Iterator[tuple[int, dict[Tensor, str | int]]]:
    """Yield for each optimizer the number of its first group, and parameter names."""
    names = iter(parameter_names([group for optimizer in optimizers for group in optimizer.param_groups]))
    first = 0
    for optimizer in optimizers:
        groups = optimizer.param_groups
        yield first, {p: name for group in groups for p, name in zip(group["params"], next(names))}
        first += len(groups)


def _pairs(
    optimizer: PRM | Masked, first_group: int, names: Mapping[Tensor, str | int]
) -> Iterator[tuple[Evidence, Tensor | None]]:
    for one in param_states(optimizer):
        if one.step > 0 or one.param.requires_grad:
            name, group = names[one.param], first_group + one.group
            evidence = Evidence(name, group, tuple(one.param.shape), one.scalars, one.step, one.hyper, None)
            yield evidence, _sums(one) if one.step > 0 else None


def _second_moments(one: ParamState, m: Tensor, implied: Tensor) -> tuple[Tensor, Tensor]:
    """Return `v`, and what divides the step; `implied` stands for both with Masked, which keeps none."""
    if "exp_avg_sq" not in one.state:
        return implied, implied
    v = one.state["exp_avg_sq"]
    _, v, divisor = as_wide_reals(m, v, one.state["max_exp_avg_sq"] if one.hyper.amsgrad else v)
    return v, divisor


def _lost(one: ParamState, w: Tensor, step_sq: Tensor) -> Tensor:
    """Return which scalars of a 16-bit parameter a step, squared and without the learning rate, leaves as they are."""
    if not rounds_to_nearest(one):
        return torch.zeros_like(w)
    return is_lost(w, step_sq.sqrt() * float(one.hyper.lr), one.param.dtype).to(w.dtype)


@torch.no_grad()
def _sums(one: ParamState) -> Tensor:
    t, hyper = one.step, one.hyper
    m, s, c, signal, noise, q = recompute(one.state, t, hyper)
    dtype = m.dtype
    # Corrected even where the step is not: noise is judged by corrected averages.
    full = corrections(t, hyper._replace(bias_correction=True))
    mean_sq, spread = (m / full.bias1).square(), s / full.bias_var
    w = as_wide_reals(m, one.param)[1]
    v, divisor = _second_moments(one, m, mean_sq + spread)
    # Not mean(): gloo of torch 2.7 has no average over ranks.
    mean_v = v.sum() / v.numel()
    live = ((v > ROUNDING * mean_v) & (mean_sq > SILENT * spread)).to(dtype)
    ratio = torch.zeros_like(m)
    if t >= first_step(hyper):
        variance = mean_and_variance(mean_sq, spread, weights(t, hyper))[1]
        ratio = (mean_sq / variance.clamp(min=torch.finfo(dtype).tiny)).clamp(max=1)
    plain = hyper._replace(mask="snr", softness=1.0, coefficient=1.0, mask_eps=0.0, min_q=0.0)
    without_eps, q_plain = (evaluate(signal, noise, c, h) for h in (hyper._replace(mask_eps=0.0), plain))
    noise = noise * hyper.coefficient
    step_sq = ((m / c.bias1) / ((divisor / c.bias2).sqrt() + hyper.eps)).square()
    wide = sum_dtype(m.device)

    def total(x: Tensor, among: Tensor | None = None) -> Tensor:
        """Sum over the tensor or `among`; a pooled number stands for each scalar."""
        if x.dim() == 0 and m.dim() > 0:
            return x.to(wide) * (m.numel() if among is None else among.sum(dtype=wide))
        return (x if among is None else x * among).sum(dtype=wide)

    sums = {
        "q": total(q),
        "active": total(signal > noise),
        "signal": total(signal),
        "noise": total(noise),
        "v": total(v / full.bias2),
        "weight_sq": total(w.square()),
        "nonzero": total(w != 0),
        "step_sq": total(step_sq),
        "masked_step_sq": total(q.square() * step_sq),
        "live": total(live),
        "live_q": total(q, live),
        "live_q_without_eps": total(without_eps, live),
        "live_q_plain": total(q_plain, live),
        "live_nonzero": total(w != 0, live),
        "live_ratio": total(ratio, live),
        "live_let_move": total(q > 0, live),
        "live_lost": total(_lost(one, w, q.square() * step_sq), live),
    }
    # Those of a tensor that is sharded over ranks are gathered.
    return torch.stack([whole(sums[name]) for name in Sums._fields])
