"""What depends on the step count alone: bias corrections, and the variance of the mean."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popriskmin.mask.hyperparameters import Hyperparameters


def variance_of_mean(beta1: float, t: Any) -> Any:
    """Return `k(t)`, the variance of the bias-corrected mean `m^` after `t` steps, in units of the gradient's.

    For independent gradients of variance `z`, `Var[m^(t)] = k(t) * z` with
    `k(t) = (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)`, from 1 at the first step down to
    `(1 - beta1) / (1 + beta1)` (Balles and Hennig, arXiv:1705.07774, with uncentred weights).

    Parameters
    ----------
    beta1
        Decay of the mean, in [0, 1).
    t
        Step count, at least 1: a number, or a tensor of any shape, whose shape the result has.

    Examples
    --------
    >>> variance_of_mean(0.9, 1)
    1.0
    >>> round(variance_of_mean(0.9, 1000), 4)
    0.0526
    """
    one_minus_power = _one_minus_power(beta1, t)
    return (1 - beta1) / (1 + beta1) * (2 - one_minus_power) / one_minus_power


def _one_minus_power(beta: Any, t: Any) -> Any:
    """Return `1 - beta**t`, exact to rounding for a float32 tensor `t` too, where plain powers lose digits."""
    if not isinstance(t, Tensor) or isinstance(beta, Tensor):
        return 1 - beta**t
    return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)


class Corrections(NamedTuple):
    """What depends on the step count `t` alone: numbers, or tensors of the shape of `t`."""

    t: Any
    bias1: Any  # divisor of m
    bias2: Any  # divisor of v
    bias_var: Any  # divisor of s
    centre: Any  # divisor of the mean before this batch, on which the new gradient is centred
    blend: Any  # weight of the new squared deviation, or of the given variance, in s
    k: Any  # variance of m^ in units of the gradient's; 0 where nothing asks for it
    open: Any  # true where the mask is held at 1: during warmup, and where an unbiased variance has no estimate yet


def corrections(t: Any, hyper: Hyperparameters) -> Corrections:
    """Return the bias corrections and weights of step `t` (1 for the first one)."""
    warmup = t <= hyper.warmup_steps if hyper.warmup_steps > 0 else False
    if not hyper.bias_correction:
        return Corrections(t, 1.0, 1.0, 1.0, 1.0, 1 - hyper.rho, 0.0, warmup)
    bias1 = _one_minus_power(hyper.beta1, t)
    bias2 = _one_minus_power(hyper.beta2, t)
    k = variance_of_mean(hyper.beta1, t) if hyper.unbiased else 0.0
    if hyper.given or not hyper.unbiased:
        # A variance that is given is one from the first step on, and holds nothing of the mean's.
        return Corrections(t, bias1, bias2, _one_minus_power(hyper.rho, t), 1.0, 1 - hyper.rho, k, warmup)
    # The first step has a mean to start from but no deviation from one: s begins at the second. There, numbers
    # for t = 1 stand in for t = 0, whose divisors vanish; blend = 0 keeps s at 0 and open leaves the mask alone.
    first = t <= 1
    before = t.sub(1).clamp(min=1) if isinstance(t, Tensor) else max(t - 1, 1)
    blend = (1 - hyper.rho) / (1 + variance_of_mean(hyper.beta1, before))
    return Corrections(
        t=t,
        bias1=bias1,
        bias2=bias2,
        bias_var=_one_minus_power(hyper.rho, before),
        centre=_one_minus_power(hyper.beta1, before),
        blend=torch.where(first, torch.zeros_like(blend), blend)
        if isinstance(t, Tensor)
        else (0.0 if first else blend),
        k=k,
        open=warmup | first,
    )
