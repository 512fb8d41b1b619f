"""PRM on one screen, in plain torch: what every implementation of the step is tested against.

Nothing imports this module. `popriskmin.PRM` is for training; this is for reading, and for
a port to another library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MaskFormula = Callable[[Tensor, Tensor, float, float, float], Tensor]


def snr(signal: Tensor, noise: Tensor, a: float, softness: float, eps: float) -> Tensor:
    """Return the share of the signal in signal and noise."""
    return signal / (signal + softness * a * noise + eps)


def soft(signal: Tensor, noise: Tensor, a: float, softness: float, eps: float) -> Tensor:
    """Return the share of what lies above the boundary `a * noise`, 0 below it."""
    excess = (signal - a * noise).clamp(min=0)
    return excess / (excess + softness * noise + eps)


def hard(signal: Tensor, noise: Tensor, a: float, softness: float, eps: float) -> Tensor:
    """Return 1 above the boundary, 0 below it."""
    return (signal > a * noise).to(signal.dtype)


class State(NamedTuple):
    """What one parameter tensor carries from step to step."""

    t: int  # the steps taken
    m: Tensor  # running mean of the gradient
    v: Tensor  # running mean of its square
    s: Tensor  # running variance


def begin(w: Tensor) -> State:
    """Return the state before the first step."""
    return State(0, torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w))


def step(
    w: Tensor,
    g: Tensor,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    rho: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: MaskFormula = snr,
    softness: float = 1.0,
    a: float = 1.0,
    shrinkage: float = 0.0,
    c: float = 0.0,
) -> tuple[Tensor, State]:
    """Return one parameter tensor and its state after a step with the gradient `g`.

    Parameters
    ----------
    w, g
        The weights and the minibatch's gradient, real tensors of one shape.
    a
        The boundary's coefficient: 1 for fresh batches, and
        `batch_size / (n_dataset - batch_size)` for `boundary="empirical"`.
    c
        `batch_size / (n_dataset - batch_size)`, which `shrinkage` needs.

    Examples
    --------
    >>> w, g = torch.ones(2), torch.tensor([1.0, -1.0])
    >>> w, state = step(w, g, begin(w), lr=0.5, weight_decay=0.0)
    >>> w  # the first step's signal equals its noise: q = 1/2
    tensor([0.7500, 1.2500])
    """
    t, m, v, s = state
    t, (beta1, beta2) = t + 1, betas

    s = rho * s + (1 - rho) * (g - m) ** 2  # m is the mean before this batch
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2

    mean = m / (1 - beta1**t)
    noise = s / (1 - rho**t)
    scale = (v / (1 - beta2**t)).sqrt() + eps

    q = mask(mean**2, noise, a, softness, eps**2)
    w = w - lr * weight_decay * w  # the mask does not touch the decay
    w = w - lr * q * mean / scale

    if shrinkage > 0 and t > 1 and w.dim() > 1:
        # A mean gradient of `shrinkage` standard errors over the data set, and the step
        # that PRM would take at it: so far is each weight pulled to zero.
        x = shrinkage * (c * noise).sqrt()
        pull = lr * mask(x**2, noise, a, softness, eps**2) * x / scale
        w = w.sign() * (w.abs() - pull).clamp(min=0)

    return w, State(t, m, v, s)
