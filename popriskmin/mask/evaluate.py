"""From a tensor's state to its mask: signal and noise, and `q`."""

from __future__ import annotations

import torch
from torch import Tensor

from popriskmin.mask.corrections import Corrections
from popriskmin.mask.hyperparameters import Hyperparameters
from popriskmin.mask.masks import MASKS


def largest(dtype: torch.dtype) -> float:
    """Return the bound on signal and noise that keeps their sum, and so the mask, finite in `dtype`."""
    return torch.finfo(dtype).max / 4


def floor(mask_eps: float, dtype: torch.dtype) -> float:
    """Return the mask's epsilon, never below the smallest normal number, so that no mask divides 0 by 0."""
    return max(mask_eps, torch.finfo(dtype).tiny)


def signal_and_noise(
    exp_avg: Tensor, exp_avg_var: Tensor, c: Corrections, hyper: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Return what the mask compares: the squared mean gradient and the variance of the minibatch gradient.

    Parameters
    ----------
    exp_avg, exp_avg_var
        `m` and `s` of one parameter tensor, real, of one shape.
    c
        The corrections of the step.
    hyper
        `reduction` "per_param" keeps the shape; "per_tensor" gives the means over the tensor, of shape `()`.

    Returns
    -------
    signal
        `m^**2`, with `debias` less `k * s^` and not below 0; in units of the squared gradient.
    noise
        `s^`, not yet multiplied by the boundary's coefficient; same units.
    """
    signal = (exp_avg / c.bias1).square()
    noise = exp_avg_var / c.bias_var
    if hyper.reduction == "per_tensor":
        # Divided first, so that the sum of a large tensor does not overflow.
        signal, noise = signal.div(signal.numel()).sum(), noise.div(noise.numel()).sum()
    return finish_signal_and_noise(signal, noise, c, hyper)


def finish_signal_and_noise(
    signal: Tensor, noise: Tensor, c: Corrections, hyper: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Bound both (see `largest`) and, with `debias`, take the mean's own variance out of the signal.

    A mask in units of the mean's variance allows for that itself: `debias` changes nothing about it.
    """
    bound = largest(signal.dtype)
    signal, noise = signal.clamp(max=bound), noise.clamp(max=bound)
    if hyper.debias and not MASKS[hyper.mask].of_mean:
        signal = signal - noise * c.k if isinstance(c.k, Tensor) else signal.sub(noise, alpha=c.k)
        signal = signal.clamp(min=0)
    return signal, noise


def evaluate(signal: Tensor, noise: Tensor, c: Corrections, hyper: Hyperparameters) -> Tensor:
    """Return `q` in [min_q, 1], of the shape of `signal`: the mask, or 1 where the corrections hold it open.

    NaN in the signal or the noise is NaN in `q`.
    """
    if c.open is True or hyper.mask == "none":
        return torch.ones_like(signal)
    if MASKS[hyper.mask].of_mean:
        noise = noise * c.k
    q = MASKS[hyper.mask].of_tensor(
        signal, noise, hyper.coefficient, hyper.softness, floor(hyper.mask_eps, signal.dtype)
    )
    if hyper.min_q > 0:
        q = q.clamp(min=hyper.min_q)
    if isinstance(c.open, Tensor):
        q = torch.where(c.open, torch.ones_like(q), q)
    return q


def evaluate_lists(signals: list[Tensor], noises: list[Tensor], hyper: Hyperparameters) -> list[Tensor]:
    """Return `q` for lists of tensors of one type, as if the corrections left the mask alone; overwrites both lists.

    For a mask in units of the mean's variance the noises are that: multiplied by `k` already.
    """
    of_tensor, of_lists, _ = MASKS[hyper.mask]
    numbers = (hyper.coefficient, hyper.softness, floor(hyper.mask_eps, signals[0].dtype))
    if of_lists is not None:
        of_lists(signals, noises, *numbers)
    else:
        for i, noise in enumerate(noises):
            signals[i] = of_tensor(signals[i], noise, *numbers)
    if hyper.min_q > 0:
        torch._foreach_clamp_min_(signals, hyper.min_q)
    return signals
