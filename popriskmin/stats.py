"""How open the mask is, read off an optimizer's state. Nothing is computed, and nothing stored, while training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from popriskmin.lists import sum_dtype, whole
from popriskmin.mask import Hyperparameters, corrections, evaluate, signal_and_noise

if TYPE_CHECKING:
    from torch.optim import Optimizer

Row = dict[str, float]

BY = (None, "group", "parameter")


@overload
def mask_stats(optimizer: Optimizer, by: None = None, applied: Sequence[Hyperparameters] = ()) -> Row: ...
@overload
def mask_stats(
    optimizer: Optimizer, by: Literal["group"], applied: Sequence[Hyperparameters] = ()
) -> dict[int, Row]: ...
@overload
def mask_stats(
    optimizer: Optimizer, by: Literal["parameter"], applied: Sequence[Hyperparameters] = ()
) -> dict[str | int, Row]: ...
def mask_stats(optimizer: Optimizer, by: str | None = None, applied: Sequence[Hyperparameters] = ()) -> Any:
    """Recompute the mask of the last step from the state of a `PRM` optimizer; see `PRM.get_mask_stats`.

    `applied` is what each group's last step was taken with; groups beyond it are read as they stand.
    """
    if by not in BY:
        raise ValueError(f"by must be None, 'group' or 'parameter', got {by!r}")
    measured = list(_measure(optimizer, applied))
    if not measured:
        raise RuntimeError(
            "get_mask_stats() before the first step: no parameter (with any elements) has taken a step yet; "
            "call it after optimizer.step()"
        )
    # One transfer to the host for each device, not one for each number.
    sums = to_host([values for *_, values in measured])
    gathered: dict[Any, list[tuple[int, list[float]]]] = {}
    for (group, name, count, weight, _), values in zip(measured, sums):
        key = {None: None, "group": group, "parameter": name}[by]
        gathered.setdefault(key, []).append((count, [*(weight * value for value in values[:4]), *values[4:]]))
    rows = {key: _row(parts) for key, parts in gathered.items()}
    return rows[None] if by is None else rows


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[list[str | int]]:
    """Return a key for every parameter of each group: its name, or where it has none its place in the whole list.

    A name that several groups share, as when two models are trained together, gets its group's number.
    """
    names: list[list[str | int]] = []
    start = 0
    for group in groups:
        count = len(group["params"])
        names.append(list(group.get("param_names") or range(start, start + count)))
        start += count
    uses = Counter(name for group_names in names for name in group_names)
    return [
        [f"group {i}: {name}" if uses[name] > 1 else name for name in group_names]
        for i, group_names in enumerate(names)
    ]


def _measure(
    optimizer: Optimizer, applied: Sequence[Hyperparameters]
) -> Iterator[tuple[int, str | int, int, int, Tensor]]:
    """Yield group, name, number of scalars, weight of its sums and six numbers on the device, for what has moved."""
    names = parameter_names(optimizer.param_groups)
    for i, group in enumerate(optimizer.param_groups):
        hyper = applied[i] if i < len(applied) else Hyperparameters.of_group(group)
        for param, name in zip(group["params"], names[i]):
            state = optimizer.state.get(param)
            if state and param.numel() > 0 and float(state["step"]) > 0:
                m, s = state["exp_avg"].detach(), state["exp_avg_var"].detach()
                if m.is_complex():
                    m, s = torch.view_as_real(m), torch.view_as_real(s)
                # A pooled mask is one number that stands for every scalar of its tensor.
                weight = m.numel() if hyper.reduction == "per_tensor" else 1
                yield i, name, m.numel(), weight, _sums(m, s, float(state["step"]), hyper)


@torch.no_grad()
def _sums(m: Tensor, s: Tensor, t: float, hyper: Hyperparameters) -> Tensor:
    dtype = torch.promote_types(m.dtype, torch.float32)
    c = corrections(t, hyper)
    signal, noise = signal_and_noise(m.to(dtype), s.to(dtype), c, hyper)
    q = evaluate(signal, noise, c, hyper)
    noise = noise * hyper.coefficient
    # A squared gradient that float32 still holds need not leave room for the sum of many.
    wide = sum_dtype(m.device)
    active = (signal > noise).sum().to(wide)
    sums = [q.sum(dtype=wide), active, signal.sum(dtype=wide), noise.sum(dtype=wide)]
    numbers = [*sums, q.min().to(wide), q.max().to(wide)]
    # Those of a tensor that is sharded over ranks are gathered.
    return torch.stack([whole(number) for number in numbers])


def to_host(values: list[Tensor]) -> list[list[float]]:
    """Return small tensors of one shape as lists of numbers, with one transfer for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, []).append(i)
    result: list[list[float]] = [[]] * len(values)
    for indices in by_device.values():
        for i, row in zip(indices, torch.stack([values[i] for i in indices]).tolist()):
            result[i] = row
    return result


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
