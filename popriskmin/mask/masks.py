"""The masks: how far a parameter may move, given its gradient's signal and noise.

A new mask is one function of a tensor, one of lists where speed matters, and its line in `MASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def snr(signal: Tensor, noise: Tensor, coefficient: float, softness: float, eps: float) -> Tensor:
    """Return `signal / (signal + softness * coefficient * noise + eps)`: smooth, never quite shut.

    All masks take the signal and the noise (same shape, units of the squared gradient), the boundary's
    coefficient, the softness and an epsilon in the same units.

    Examples
    --------
    >>> snr(torch.tensor([3.0, 1.0, 0.0]), torch.ones(3), 1.0, 1.0, 1e-16)
    tensor([0.7500, 0.5000, 0.0000])
    """
    return signal / (noise * (softness * coefficient) + eps + signal)


def soft(signal: Tensor, noise: Tensor, coefficient: float, softness: float, eps: float) -> Tensor:
    """Return `x / (x + softness * noise + eps)`, `x = max(signal - coefficient * noise, 0)`: 0 below the boundary.

    Examples
    --------
    >>> soft(torch.tensor([3.0, 1.0, 0.0]), torch.ones(3), 1.0, 1.0, 1e-16)
    tensor([0.6667, 0.0000, 0.0000])
    """
    excess = (signal - noise * coefficient).clamp(min=0)
    return excess / (noise * softness + eps + excess)


def hard(signal: Tensor, noise: Tensor, coefficient: float, softness: float, eps: float) -> Tensor:
    """Return 1 where `signal > coefficient * noise`, else 0; softness and eps have no effect.

    Examples
    --------
    >>> hard(torch.tensor([3.0, 1.0, 0.0]), torch.ones(3), 1.0, 1.0, 1e-16)
    tensor([1., 0., 0.])
    """
    return (signal > noise * coefficient).to(signal.dtype)


def threshold(signal: Tensor, noise: Tensor, coefficient: float, softness: float, eps: float) -> Tensor:
    """Return `max(1 - sqrt((softness * coefficient * noise + eps) / (signal + eps)), 0)`.

    `q * m^` is then `m^` less `z = sqrt(softness)` of its standard errors, or 0: the soft threshold of Donoho and
    Johnstone ("Ideal spatial adaptation by wavelet shrinkage", Biometrika, 1994). Of pure noise a share of 0.32, 0.05
    and 0.003 passes at softness 1, 4 and 9; a strong signal passes but for `z` standard errors. Unlike that of the
    other masks, the noise here is the variance of the mean, `k` times that of the gradient (see `Mask`).

    Examples
    --------
    >>> threshold(torch.tensor([16.0, 4.0, 1.0]), torch.ones(3), 1.0, 4.0, 1e-16)
    tensor([0.5000, 0.0000, 0.0000])
    """
    return (1 - ((noise * (softness * coefficient) + eps) / (signal + eps)).sqrt()).clamp(min=0)


def none(signal: Tensor, noise: Tensor, coefficient: float, softness: float, eps: float) -> Tensor:
    """Return 1: plain AdamW.

    Examples
    --------
    >>> none(torch.tensor([3.0, 1.0, 0.0]), torch.ones(3), 1.0, 1.0, 1e-16)
    tensor([1., 1., 1.])
    """
    return torch.ones_like(signal)


def _snr_lists(signals: list[Tensor], noises: list[Tensor], coefficient: float, softness: float, eps: float) -> None:
    if softness * coefficient != 1:
        torch._foreach_mul_(noises, softness * coefficient)
    torch._foreach_add_(noises, eps)
    torch._foreach_add_(noises, signals)
    torch._foreach_div_(signals, noises)


def _soft_lists(signals: list[Tensor], noises: list[Tensor], coefficient: float, softness: float, eps: float) -> None:
    # Multiplied before it is subtracted, in two roundings: a fused multiply-add would leave a remainder at the
    # boundary, where the mask must be exactly 0.
    if coefficient != 1:
        torch._foreach_mul_(noises, coefficient)
        # Bounded again, see `largest`: infinity times a softness that rounds to 0 would be NaN.
        torch._foreach_clamp_max_(noises, torch.finfo(noises[0].dtype).max)
    torch._foreach_sub_(signals, noises)
    torch._foreach_clamp_min_(signals, 0)
    if softness == 0:
        torch._foreach_zero_(noises)
    elif softness != coefficient:
        torch._foreach_mul_(noises, softness / coefficient)
    torch._foreach_add_(noises, eps)
    torch._foreach_add_(noises, signals)
    torch._foreach_div_(signals, noises)


def _threshold_lists(
    signals: list[Tensor], noises: list[Tensor], coefficient: float, softness: float, eps: float
) -> None:
    if softness * coefficient != 1:
        torch._foreach_mul_(noises, softness * coefficient)
    torch._foreach_add_(noises, eps)
    torch._foreach_add_(signals, eps)
    torch._foreach_div_(noises, signals)
    torch._foreach_sqrt_(noises)
    torch._foreach_neg_(noises)
    torch._foreach_add_(noises, 1)
    torch._foreach_clamp_min_(noises, 0)
    signals[:] = noises


class Mask(NamedTuple):
    """One mask, in its two forms.

    `of_tensor(signal, noise, coefficient, softness, eps)` returns `q` as a new tensor. `of_lists` takes lists of
    tensors, works with `torch._foreach_*` and leaves `q` in place of the signals; it may overwrite the noises.
    Without it, the foreach step calls `of_tensor` tensor by tensor. A mask `of_mean` gets as its noise the variance of
    the mean, `k` times that of the gradient, for which `s` is estimated without bias.
    """

    of_tensor: Callable[[Tensor, Tensor, float, float, float], Tensor]
    of_lists: Callable[[list[Tensor], list[Tensor], float, float, float], None] | None = None
    of_mean: bool = False


def is_of_mean(mask: object) -> bool:
    """Return whether a mask's noise is the variance of the mean; that of a mask of one's own is the gradient's."""
    return isinstance(mask, str) and MASKS[mask].of_mean


MASKS: dict[str, Mask] = {
    "snr": Mask(snr, _snr_lists),
    "soft": Mask(soft, _soft_lists),
    "hard": Mask(hard),
    "threshold": Mask(threshold, _threshold_lists, of_mean=True),
    "none": Mask(none),
}
