"""How open the mask is, read off an optimizer's state. Nothing is computed, and nothing stored, while training."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal, overload

import torch
from torch import Tensor

from popriskmin.mask import corrections, evaluate, finish_signal_and_noise, shares_of_means
from popriskmin.optimizer.mask_state import HasMask, ParamState, as_wide_reals, joined, param_states, recompute, to_host
from popriskmin.step.lists import sum_dtype
from popriskmin.step.shards import local_part, of_one_rank, over_ranks

MaskStats = dict[str, float]

BY = (None, "group", "parameter")

PART_OF_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) has flattened the parameters, and the figures are of this rank's part alone; "
    "fully_shard (FSDP2) gives those of all ranks"
)


@overload
def mask_stats(optimizer: HasMask, by: None = None, local: bool = False) -> MaskStats | None: ...
@overload
def mask_stats(optimizer: HasMask, by: Literal["group"], local: bool = False) -> dict[int, MaskStats]: ...
@overload
def mask_stats(optimizer: HasMask, by: Literal["parameter"], local: bool = False) -> dict[str | int, MaskStats]: ...
def mask_stats(optimizer: HasMask, by: str | None = None, local: bool = False) -> object:
    """Recompute the mask of the last step from the state of a `PRM` or a `Masked`; see `PRM.get_mask_stats`."""
    if by not in BY:
        raise ValueError(f"by must be None, 'group' or 'parameter', got {by!r}")
    if not local and of_one_rank(p for group in optimizer.param_groups for p in group["params"]):
        _warn_of_part()
    gathered: dict[object, list[tuple[int, list[float]]]] = {}
    for one, count, weight, values in _measured(optimizer, local, apart=by == "parameter"):
        key = {None: None, "group": one.group, "parameter": one.name}[by]
        gathered.setdefault(key, []).append((count, [*(weight * value for value in values[:4]), *values[4:]]))
    rows = {key: _row(parts) for key, parts in gathered.items()}
    return rows.get(None) if by is None else rows


@functools.cache
def _warn_of_part() -> None:
    warnings.warn(f"get_mask_stats: {PART_OF_FSDP1}", UserWarning, stacklevel=4)


@torch.no_grad()
def _measured(optimizer: HasMask, local: bool, apart: bool) -> Iterator[tuple[ParamState, int, int, list[float]]]:
    """Yield each tensor that has moved, its scalars, the weight of its sums, and six numbers; one transfer a device.

    Those are the sums of `q`, of active scalars, signal and noise, and the least and the largest `q`. Unless they are
    to be kept apart, small tensors of a group come together as one.
    """
    stepped = [one for one in param_states(optimizer) if one.step > 0]
    if not apart:
        stepped = joined(stepped)
    if local:
        stepped = [one for one in stepped if local_part(one.param).numel() > 0]
    pooled = [one.hyper.reduction == "per_tensor" for one in stepped]
    means = _pooled_means([one for one, is_pooled in zip(stepped, pooled) if is_pooled], local)
    numbers = [_sums(one, next(means) if is_pooled else None) for one, is_pooled in zip(stepped, pooled)]
    if not local:
        # A pooled mask is the same number on every rank; of the others each rank has summed its part.
        alone = [i for i, is_pooled in enumerate(pooled) if not is_pooled]
        params = [stepped[i].param for i in alone]
        sums = over_ranks([numbers[i][:4] for i in alone], params)
        extremes = over_ranks([numbers[i][4:] for i in alone], params, "max")
        for i, *of_all in zip(alone, sums, extremes):
            numbers[i] = torch.cat(of_all)
    for one, is_pooled, values in zip(stepped, pooled, to_host(numbers)):
        q, active, signal, noise, negated_least, largest = values
        if math.isnan(q):  # which maxima over ranks may have lost
            negated_least = largest = math.nan
        count = local_part(one.param).numel() * one.scalars // one.param.numel() if local else one.scalars
        # A pooled mask is one number that stands for every scalar of its tensor.
        yield one, count, count if is_pooled else 1, [q, active, signal, noise, -negated_least, largest]


def _pooled_means(pooled: list[ParamState], local: bool) -> Iterator[Tensor]:
    """Yield for each tensor the means of the squared `m^` and of `s^`, over all ranks unless `local`."""
    means = []
    for one in pooled:
        m, s = _parts(one)
        c = corrections(one.step, one.hyper)
        n = m.numel() if local else one.scalars
        means.append(torch.stack(shares_of_means((m / c.bias1).square(), s / c.bias_var, n)))
    return iter(means if local else over_ranks(means, [one.param for one in pooled]))


def _sums(one: ParamState, means: Tensor | None) -> Tensor:
    """Return four sums over this rank's part, less the least `q`, and the largest; for a pooled mask its numbers."""
    if means is None:
        m, s = _parts(one)
        mask = recompute({"exp_avg": m, "exp_avg_var": s}, one.step, one.hyper)
        signal, noise, q = mask.signal, mask.noise * one.hyper.coefficient, mask.q
    else:
        c = corrections(one.step, one.hyper)
        signal, noise = finish_signal_and_noise(means[0], means[1], c, one.hyper)
        q = evaluate(signal, noise, c, one.hyper)
        noise = noise * one.hyper.coefficient
    # A squared gradient that float32 still holds need not leave room for the sum of many.
    wide = sum_dtype(signal.device)
    active = (signal > noise).sum().to(wide)
    sums = [q.sum(dtype=wide), active, signal.sum(dtype=wide), noise.sum(dtype=wide)]
    nothing = torch.full((), -math.inf, dtype=wide, device=q.device)  # of a tensor of which this rank has no part
    extremes = [q.min().neg().to(wide), q.max().to(wide)] if q.numel() > 0 else [nothing, nothing]
    return torch.stack([*sums, *extremes])


def _parts(one: ParamState) -> tuple[Tensor, Tensor]:
    m, s = as_wide_reals(*(local_part(one.state[name]) for name in ("exp_avg", "exp_avg_var")))
    return m, s


def _row(parts: list[tuple[int, list[float]]]) -> MaskStats:
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


def combined(rows: Iterable[MaskStats]) -> MaskStats:
    """Return the row of all the scalars that several rows, one at least and of different scalars, are of."""
    parts = []
    for row in rows:
        n = int(row["parameter_count"])
        sums = [n * row["mean_q"], n * row["active_fraction"], row["signal_sq"], row["noise_scale"]]
        parts.append((n, [*sums, row["min_q"], row["max_q"]]))
    return _row(parts)


def _nan_min(values: Iterator[float]) -> float:
    """Return the smallest, or NaN if one is NaN, which Python's min would hide or not by its place."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else min(listed)
