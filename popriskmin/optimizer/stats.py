"""How open the mask is, read off an optimizer's state. Nothing is computed, and nothing stored, while training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from popriskmin.optimizer.reading import Held, held, recompute, to_host
from popriskmin.step.lists import sum_dtype, whole

if TYPE_CHECKING:
    from popriskmin.optimizer.prm import PRM

Row = dict[str, float]

BY = (None, "group", "parameter")


@overload
def mask_stats(optimizer: PRM, by: None = None) -> Row: ...
@overload
def mask_stats(optimizer: PRM, by: Literal["group"]) -> dict[int, Row]: ...
@overload
def mask_stats(optimizer: PRM, by: Literal["parameter"]) -> dict[str | int, Row]: ...
def mask_stats(optimizer: PRM, by: str | None = None) -> Any:
    """Recompute the mask of the last step from the state of a `PRM` optimizer; see `PRM.get_mask_stats`."""
    if by not in BY:
        raise ValueError(f"by must be None, 'group' or 'parameter', got {by!r}")
    measured = list(_measure(optimizer))
    if not measured:
        raise RuntimeError(
            "get_mask_stats() before the first step: no parameter (with any elements) has taken a step yet; "
            "call it after optimizer.step()"
        )
    # One transfer to the host for each device, not one for each number.
    sums = to_host([values for *_, values in measured])
    gathered: dict[Any, list[tuple[int, list[float]]]] = {}
    for (one, count, weight, _), values in zip(measured, sums):
        key = {None: None, "group": one.group, "parameter": one.name}[by]
        gathered.setdefault(key, []).append((count, [*(weight * value for value in values[:4]), *values[4:]]))
    rows = {key: _row(parts) for key, parts in gathered.items()}
    return rows[None] if by is None else rows


def _measure(optimizer: PRM) -> Iterator[tuple[Held, int, int, Tensor]]:
    """Yield each tensor that has moved, its scalars, the weight of its sums, and six numbers on the device."""
    for one in held(optimizer):
        if one.step > 0:
            # A pooled mask is one number that stands for every scalar of its tensor.
            weight = one.scalars if one.hyper.reduction == "per_tensor" else 1
            yield one, one.scalars, weight, _sums(one)


@torch.no_grad()
def _sums(one: Held) -> Tensor:
    found = recompute(one.state, one.step, one.hyper)
    signal, noise, q = found.signal, found.noise * one.hyper.coefficient, found.q
    # A squared gradient that float32 still holds need not leave room for the sum of many.
    wide = sum_dtype(signal.device)
    active = (signal > noise).sum().to(wide)
    sums = [q.sum(dtype=wide), active, signal.sum(dtype=wide), noise.sum(dtype=wide)]
    numbers = [*sums, q.min().to(wide), q.max().to(wide)]
    # Those of a tensor that is sharded over ranks are gathered.
    return torch.stack([whole(number) for number in numbers])


def _row(parts: list[tuple[int, list[float]]]) -> Row:
    count = sum(n for n, _ in parts)
    q, active, signal, noise = (math.fsum(values[k] for _, values in parts) for k in range(4))
    without_noise = math.inf if signal > 0 else math.nan
    return {
        "mean_q": q / count,
        "active_fraction": active / count,
        "min_q": _nan_min(values[4] for _, values in parts),
        "max_q": -_nan_min(-values[5] for _, values in parts),
        "parameter_count": count,
        "noise_scale": noise,
        "signal_sq": signal,
        "snr": signal / noise if noise > 0 else without_noise,
    }


def _nan_min(values: Iterator[float]) -> float:
    """Return the smallest, or NaN if one is NaN, which Python's min would hide or not by its place."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else min(listed)
