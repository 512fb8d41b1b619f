"""The mask of PRM: how far a parameter may move, given its gradient's signal and noise.

Pure functions of tensors and numbers. Every implementation of the step (for-loop, foreach, fused) and the
statistics compute the mask from here, so that all of them decide alike.

A new mask is one function of a tensor, one of lists where speed matters, and its line in `MASKS`.

References
----------
Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172 (the masks and boundaries).
Balles and Hennig, "Dissecting Adam", ICML 2018, arXiv:1705.07774 (`variance_of_mean`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOUNDARIES = ("batch", "empirical")
REDUCTIONS = ("per_param", "per_tensor")
VARIANCES = ("streaming", "given")


class Hyperparameters(NamedTuple):
    """The numbers of one parameter group that enter the update, resolved for one step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    rho: float
    eps: float
    mask_eps: float
    weight_decay: float
    softness: float
    coefficient: float
    mask: str
    reduction: str
    warmup_steps: int
    amsgrad: bool
    bias_correction: bool
    decoupled_weight_decay: bool
    maximize: bool
    debias: bool
    mask_decay: bool
    min_q: float
    variance: str

    @classmethod
    def of(
        cls, *, lr: float | Tensor, eps: float, mask_eps: float | None, warmup_steps: int, **others: Any
    ) -> Hyperparameters:
        """Return the numbers, with what users may leave out or write in several ways brought to one."""
        return cls(
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            eps=eps,
            mask_eps=eps * eps if mask_eps is None else mask_eps,
            warmup_steps=int(warmup_steps),
            **others,
        )

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Read a parameter group as it stands now, so that a schedule that writes to it takes effect.

        Raises
        ------
        ValueError
            For a mask, reduction, boundary or source of the variance that is none, or an empirical boundary without
            fitting counts.
        """
        for name, known in (("mask", MASKS), ("reduction", REDUCTIONS), ("variance", VARIANCES)):
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")
        beta1, beta2 = group["betas"]
        coefficient = boundary_coefficient(group["boundary"], group["batch_size"], group["n_dataset"])
        same = {name: group[name] for name in cls._fields if name not in ("beta1", "beta2", "coefficient")}
        return cls.of(**same, beta1=beta1, beta2=beta2, coefficient=coefficient)

    @property
    def given(self) -> bool:
        """Whether the variance of each gradient comes from outside."""
        return self.variance == "given"


def boundary_coefficient(boundary: str, batch_size: int | None, n_dataset: int | None) -> float:
    """Return `a`, the factor of the noise that the signal must exceed.

    Parameters
    ----------
    boundary
        "batch": every batch is fresh, `a = 1`. "empirical": batches of `batch_size` examples are drawn again
        and again from `n_dataset` examples, `a = b / (n - b)`.
    batch_size, n_dataset
        Counts of examples; both required for "empirical", with `n_dataset > batch_size`.

    Raises
    ------
    ValueError
        For an unknown boundary, or "empirical" without both counts or with `n_dataset <= batch_size`.

    Examples
    --------
    >>> boundary_coefficient("batch", None, None)
    1.0
    >>> boundary_coefficient("empirical", 100, 1100)
    0.1
    """
    if boundary == "batch":
        return 1.0
    if boundary != "empirical":
        raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")
    if batch_size is None or n_dataset is None:
        raise ValueError(
            "boundary='empirical' needs batch_size and n_dataset, "
            f"got batch_size={batch_size} and n_dataset={n_dataset}"
        )
    if n_dataset <= batch_size:
        raise ValueError(
            f"n_dataset must be larger than batch_size, got n_dataset={n_dataset} and batch_size={batch_size}"
        )
    return batch_size / (n_dataset - batch_size)


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


def _one_minus_power(beta: float, t: Any) -> Any:
    """Return `1 - beta**t`, exact to rounding for a float32 tensor `t` too, where plain powers lose digits."""
    if not isinstance(t, Tensor):
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
    k: Any  # variance of m^, subtracted from the signal; 0 without debias
    open: Any  # true where the mask is held at 1: during warmup, and where debias has no estimate yet


def corrections(t: Any, hyper: Hyperparameters) -> Corrections:
    """Return the bias corrections and weights of step `t` (1 for the first one)."""
    warmup = t <= hyper.warmup_steps if hyper.warmup_steps > 0 else False
    if not hyper.bias_correction:
        return Corrections(t, 1.0, 1.0, 1.0, 1.0, 1 - hyper.rho, 0.0, warmup)
    bias1 = _one_minus_power(hyper.beta1, t)
    bias2 = _one_minus_power(hyper.beta2, t)
    k = variance_of_mean(hyper.beta1, t) if hyper.debias else 0.0
    if hyper.given or not hyper.debias:
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
    """Bound both (see `largest`) and, with `debias`, take the mean's own variance out of the signal."""
    bound = largest(signal.dtype)
    signal, noise = signal.clamp(max=bound), noise.clamp(max=bound)
    if hyper.debias:
        signal = signal - noise * c.k if isinstance(c.k, Tensor) else signal.sub(noise, alpha=c.k)
        signal = signal.clamp(min=0)
    return signal, noise


def evaluate(signal: Tensor, noise: Tensor, c: Corrections, hyper: Hyperparameters) -> Tensor:
    """Return `q` in [min_q, 1], of the shape of `signal`: the mask, or 1 where the corrections hold it open.

    NaN in the signal or the noise is NaN in `q`.
    """
    if c.open is True or hyper.mask == "none":
        return torch.ones_like(signal)
    q = MASKS[hyper.mask].of_tensor(
        signal, noise, hyper.coefficient, hyper.softness, floor(hyper.mask_eps, signal.dtype)
    )
    if hyper.min_q > 0:
        q = q.clamp(min=hyper.min_q)
    if isinstance(c.open, Tensor):
        q = torch.where(c.open, torch.ones_like(q), q)
    return q


def evaluate_lists(signals: list[Tensor], noises: list[Tensor], hyper: Hyperparameters) -> list[Tensor]:
    """Return `q` for lists of tensors of one type, as if the corrections left the mask alone; overwrites both lists."""
    of_tensor, of_lists = MASKS[hyper.mask]
    numbers = (hyper.coefficient, hyper.softness, floor(hyper.mask_eps, signals[0].dtype))
    if of_lists is not None:
        of_lists(signals, noises, *numbers)
    else:
        for i, noise in enumerate(noises):
            signals[i] = of_tensor(signals[i], noise, *numbers)
    if hyper.min_q > 0:
        torch._foreach_clamp_min_(signals, hyper.min_q)
    return signals


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


class Mask(NamedTuple):
    """One mask, in its two forms.

    `of_tensor(signal, noise, coefficient, softness, eps)` returns `q` as a new tensor. `of_lists` takes lists of
    tensors, works with `torch._foreach_*` and leaves `q` in place of the signals; it may overwrite the noises.
    Without it, the foreach step calls `of_tensor` tensor by tensor.
    """

    of_tensor: Callable[[Tensor, Tensor, float, float, float], Tensor]
    of_lists: Callable[[list[Tensor], list[Tensor], float, float, float], None] | None = None


MASKS: dict[str, Mask] = {
    "snr": Mask(snr, _snr_lists),
    "soft": Mask(soft, _soft_lists),
    "hard": Mask(hard),
    "none": Mask(none),
}
