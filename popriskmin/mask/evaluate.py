"""From a tensor's state to its mask: signal and noise, and `q`."""

from __future__ import annotations

import torch
from torch import Tensor

from popriskmin.mask.corrections import Corrections
from popriskmin.mask.hyperparameters import Hyperparameters
from popriskmin.mask.masks import MASKS, is_of_mean
from popriskmin.mask.own import MaskFunction, checked_shape, mask_name


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
        signal, noise = shares_of_means(signal, noise, signal.numel())
    return finish_signal_and_noise(signal, noise, c, hyper)


def shares_of_means(signal: Tensor, noise: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return what these scalars add to the means of both over a tensor of `n`, of which they may be a part."""
    # Divided first, so that the sum of a large tensor does not overflow.
    return signal.div(n).sum(), noise.div(n).sum()


def finish_signal_and_noise(
    signal: Tensor, noise: Tensor, c: Corrections, hyper: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Bound both (see `largest`) and, with `debias`, take the mean's own variance out of the signal.

    A mask in units of the mean's variance allows for that itself: `debias` changes nothing about it.
    """
    bound = largest(signal.dtype)
    signal, noise = signal.clamp(max=bound), noise.clamp(max=bound)
    if hyper.debias and not is_of_mean(hyper.mask):
        signal = signal - noise * c.k if isinstance(c.k, Tensor) else signal.sub(noise, alpha=c.k)
        signal = signal.clamp(min=0)
    return signal, noise


def evaluate(signal: Tensor, noise: Tensor, c: Corrections, hyper: Hyperparameters) -> Tensor:
    """Return `q` in [min_q, 1], of the shape of `signal`: the mask, or 1 where the corrections hold it open.

    NaN in the signal or the noise is NaN in `q`.
    """
    if c.open is True or hyper.mask == "none":
        return torch.ones_like(signal)
    if is_of_mean(hyper.mask):
        noise = noise * c.k
    q = _of_tensor(signal, noise, hyper)
    if hyper.min_q > 0:
        q = q.clamp(min=hyper.min_q)
    if isinstance(c.open, Tensor):
        q = torch.where(c.open, torch.ones_like(q), q)
    return q


def _of_tensor(signal: Tensor, noise: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return `q` of a known mask, or of one's own."""
    eps = floor(hyper.mask_eps, signal.dtype)
    if isinstance(hyper.mask, str):
        return MASKS[hyper.mask].of_tensor(signal, noise, hyper.coefficient, hyper.softness, eps)
    return checked_shape(hyper.mask, hyper.mask(signal, noise, hyper._replace(mask_eps=eps)), signal)


def check_function(mask: MaskFunction, hyper: Hyperparameters) -> None:
    """Raise ValueError where a function is no mask, as a few numbers show.

    It must return `q` in [0, 1] of each scalar by itself, for tensors come in parts, and leave what it is given alone.
    """
    signal, noise = torch.tensor([0.0, 1.0, 4.0, 9.0, 1e-20]), torch.tensor([1.0, 1.0, 0.25, 0.0, 1e-20])
    given = signal.clone(), noise.clone()
    halves = [(x.clone(), y.clone()) for x, y in zip(torch.split(signal, 2), torch.split(noise, 2))]
    hyper, name = hyper._replace(mask=mask), mask_name(mask)
    try:
        q = _of_tensor(signal, noise, hyper)
        parts = torch.cat([_of_tensor(*part, hyper) for part in halves])
    except Exception as error:  # what a function raises, of whatever type
        raise ValueError(f"the mask {name} fails on signal={signal} and noise={noise}: {error}") from error
    if not (torch.equal(signal, given[0]) and torch.equal(noise, given[1])):
        raise ValueError(f"the mask {name} changes the signal or the noise that it is given: return a new tensor")
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"the mask {name} must return q in [0, 1], got {q} of signal={signal} and noise={noise}")
    if not torch.allclose(q.to(torch.float32), parts.to(torch.float32)):
        raise ValueError(
            f"the mask {name} must return q of each scalar by itself, for tensors come to it in parts: "
            "reduction='per_tensor' makes one signal and one noise of a whole tensor"
        )


def evaluate_lists(signals: list[Tensor], noises: list[Tensor], hyper: Hyperparameters) -> list[Tensor]:
    """Return `q` for lists of tensors of one type, as if the corrections left the mask alone; overwrites both lists.

    For a mask in units of the mean's variance the noises are that: multiplied by `k` already.
    """
    of_lists = MASKS[hyper.mask].of_lists if isinstance(hyper.mask, str) else None
    if of_lists is not None:
        of_lists(signals, noises, hyper.coefficient, hyper.softness, floor(hyper.mask_eps, signals[0].dtype))
    else:
        for i, noise in enumerate(noises):
            signals[i] = _of_tensor(signals[i], noise, hyper)
    if hyper.min_q > 0:
        torch._foreach_clamp_min_(signals, hyper.min_q)
    return signals
