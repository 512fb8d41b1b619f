"""What depends on the step count alone: bias corrections, and the variance of the mean."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor

from popriskmin.mask.hyperparameters import Hyperparameters

# A number, or a tensor of shape () or with an entry for each of several tensors.
Number = float | Tensor


@overload
def variance_of_mean(beta1: float, t: float) -> float: ...
@overload
def variance_of_mean(beta1: Number, t: Tensor) -> Tensor: ...
@overload
def variance_of_mean(beta1: Number, t: Number) -> Number: ...
def variance_of_mean(beta1: Number, t: Number) -> Number:
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


def _one_minus_power(beta: Number, t: Number) -> Number:
    """Return `1 - beta**t`, exact to rounding for a float32 tensor `t` too, where plain powers lose digits."""
    if not isinstance(t, Tensor) or isinstance(beta, Tensor):
        return 1 - beta**t
    return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)


class Corrections(NamedTuple):
    """What depends on the step count `t` alone: numbers, or tensors of the shape of `t`."""

    t: Number
    bias1: Number  # divisor of m
    bias2: Number  # divisor of v
    bias_var: Number  # divisor of s
    centre: Number  # divisor of the mean before this batch, on which the new gradient is centred
    blend: Number  # weight of the new squared deviation, or of the given variance, in s
    k: Number  # variance of m^ in units of the gradient's; 0 where nothing asks for it
    # True where the mask is held at 1: in the warmup, and while an unbiased variance has no estimate.
    open: bool | Tensor


def corrections(t: Number, hyper: Hyperparameters) -> Corrections:
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
    before: Number
    blend: Number
    if isinstance(t, Tensor):
        before = t.sub(1).clamp(min=1)
        later = (1 - hyper.rho) / (1 + variance_of_mean(hyper.beta1, before))
        blend = torch.where(t <= 1, torch.zeros_like(later), later)
    else:
        before = max(t - 1, 1)
        blend = 0.0 if t <= 1 else (1 - hyper.rho) / (1 + variance_of_mean(hyper.beta1, before))
    return Corrections(
        t=t,
        bias1=bias1,
        bias2=bias2,
        bias_var=_one_minus_power(hyper.rho, before),
        centre=_one_minus_power(hyper.beta1, before),
        blend=blend,
        k=k,
        open=warmup | (t <= 1),
    )
