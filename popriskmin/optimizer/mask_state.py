"""What a `PRM` or a `Masked` holds after its last step: the tensors that have stepped, and their mask.

The mask is recomputed from the state, which the statistics, the diagnosis and the controller
read through here. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from popriskmin.mask import Corrections, Hyperparameters, corrections, evaluate, signal_and_noise
from popriskmin.optimizer.groups import Group, parameter_names
from popriskmin.step.lists import are_plain, as_real, is_compiling

# What `Masked` calls its own state, which lies beside that of the optimizer inside.
MASKED_STATE = {"step": "mask_step", "exp_avg": "mask_exp_avg", "exp_avg_var": "mask_exp_avg_var"}

SMALL = 2**16  # scalars of a tensor whose launches take longer than its arithmetic


class HasMask(Protocol):
    """An optimizer with a mask, and what each group's last step was taken with."""

    _applied: list[Hyperparameters]
    _applied_to: list[int]  # the groups, by `id`; fewer where the steps are compiled

    @property
    def param_groups(self) -> Sequence[Group]:
        """The parameter groups."""

    def mask_state_of(self, param: Tensor) -> Mapping[str, Tensor]:
        """Return the state that a parameter's mask is made of, as PRM calls it; empty before its first step."""

    def hyperparameters_of(self, group: int) -> Hyperparameters:
        """Return the numbers of a group as it stands now."""


class ParamState(NamedTuple):
    """One parameter tensor of an optimizer, and what its last step was taken with."""

    group: int
    name: str | int
    param: Tensor
    state: Mapping[str, Tensor]  # empty where it has taken no step
    step: int  # 0 there
    hyper: Hyperparameters

    @property
    def scalars(self) -> int:
        """The number of scalars; complex ones count as two."""
        return self.param.numel() * (2 if self.param.is_complex() else 1)


class Recomputed(NamedTuple):
    """The mask of a tensor's last step and what it was made of: real tensors in float32 or wider."""

    exp_avg: Tensor
    exp_avg_var: Tensor
    c: Corrections
    signal: Tensor  # of shape () where masks are pooled, as are the next two
    noise: Tensor  # not yet times the boundary's coefficient
    q: Tensor


def param_states(optimizer: HasMask) -> Iterator[ParamState]:
    """Yield every parameter with elements, in the optimizer's order; the step counts come in one transfer.

    A lazy layer's have none before its first use, and no shape to ask for.
    """
    names, steps = parameter_names(optimizer.param_groups), steps_taken(optimizer)
    for i, group in enumerate(optimizer.param_groups):
        hyper = applied(optimizer, i)
        for param, name, t in zip(group["params"], names[i], steps[i]):
            if not is_lazy(param) and param.numel() > 0:
                yield ParamState(i, name, param, optimizer.mask_state_of(param), t, hyper)


def joined(several: Sequence[ParamState]) -> list[ParamState]:
    """Put small tensors of one group, step and type together, to be read as one.

    Each costs as many launches as a large one. Left as they are: pooled masks, which are of one tensor each, and
    tensors that are sharded over ranks.
    """
    kept: list[ParamState] = []
    alike: dict[tuple[object, ...], list[ParamState]] = {}
    for one in several:
        m, s = one.state["exp_avg"], one.state["exp_avg_var"]
        small = one.param.numel() <= SMALL and one.hyper.reduction == "per_param"
        if small and are_plain([m, s]):
            alike.setdefault((one.group, one.step, m.dtype, s.dtype, m.device), []).append(one)
        else:
            kept.append(one)
    for ones in alike.values():
        if len(ones) == 1:
            kept.append(ones[0])
            continue
        state = {
            name: torch.cat([as_real(one.state[name].detach()).reshape(-1) for one in ones])
            for name in ("exp_avg", "exp_avg_var")
        }
        kept.append(ones[0]._replace(param=state["exp_avg"], state=state))
    return kept


def applied(optimizer: HasMask, group: int) -> Hyperparameters:
    """Return what the group's last step was taken with; a schedule may have moved on since, and groups have gone."""
    kept, groups = optimizer._applied, optimizer._applied_to
    if len(groups) == len(kept):
        own = id(optimizer.param_groups[group])
        group_then = groups.index(own) if own in groups else len(groups)
    else:
        group_then = group
    return kept[group_then] if group_then < len(kept) else optimizer.hyperparameters_of(group)


def remember_applied(optimizer: HasMask, hypers: Sequence[Hyperparameters]) -> None:
    """Note what the groups' step is taken with.

    Lists are changed in place: what torch 2.11 compiles may not set attributes of an optimizer.
    """
    optimizer._applied[:] = hypers
    if not is_compiling():  # which knows no id of a dict
        optimizer._applied_to[:] = [id(group) for group in optimizer.param_groups]


def forget_applied(optimizer: HasMask, group: Group) -> None:
    """Know nothing of a new group, which may have the `id` of one that is gone."""
    optimizer._applied_to[:] = [0 if known == id(group) else known for known in optimizer._applied_to]


@torch.no_grad()
def recompute(state: Mapping[str, Tensor], step: int, hyper: Hyperparameters, stride: int = 1) -> Recomputed:
    """Recompute the mask of a tensor's last step.

    Parameters
    ----------
    state
        The tensor's, after `step` steps, the last of them taken with `hyper`.
    stride
        Above 1: of every so many scalars one stands for all. Not taken where masks are pooled, which are of the whole
        tensor, or where the tensor is sharded over ranks and cannot be counted through.
    """
    m, s = as_wide_reals(state["exp_avg"], state["exp_avg_var"])
    if stride > 1 and hyper.reduction == "per_param" and are_plain([m]):
        m, s = m.reshape(-1)[::stride], s.reshape(-1)[::stride]
    c = corrections(step, hyper)
    signal, noise = signal_and_noise(m, s, c, hyper)
    return Recomputed(m, s, c, signal, noise, evaluate(signal, noise, c, hyper))


def as_wide_reals(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return state tensors outside of autograd, as reals, in one type: that of the first, float32 at least."""
    reals = [torch.view_as_real(x.detach()) if x.is_complex() else x.detach() for x in tensors]
    dtype = torch.promote_types(reals[0].dtype, torch.float32)
    return tuple(x.to(dtype) for x in reals)


def steps_taken(optimizer: HasMask) -> list[list[int]]:
    """Return the steps that every parameter of every group has taken, in one transfer from each device."""
    states = [[optimizer.mask_state_of(param) for param in group["params"]] for group in optimizer.param_groups]
    counters = [state["step"].detach().reshape(1) for group in states for state in group if state]
    counted = iter(to_host(counters))
    return [[int(next(counted)[0]) if state else 0 for state in group] for group in states]


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
