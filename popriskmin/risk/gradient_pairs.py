"""A sample of the risk estimate: a step's gradients, kept until the next step brings those to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters
from popriskmin.risk.expected_fall import fall_and_influence, hyperparameters, moments, sums
from popriskmin.step.lists import are_plain, sum_dtype


class Reuse(NamedTuple):
    """What a data set that is used again and again does to the terms of one group, zeros while everything is fresh."""

    a: float  # variance of the training set's own noise, over that of a batch
    shuffled: float  # what shuffled passes take from the fall, in units of the influence


class Kept(NamedTuple):
    """What a sample needs of the step that it is of."""

    step: int
    gradients: dict[Tensor, Tensor]
    hyper: list[Hyperparameters]
    reuse: list[Reuse]


def keep(optimizer: Optimizer, step: int, reuse: list[Reuse]) -> Kept:
    """Copy the gradients of the step just taken, and the numbers that it was taken with."""
    gradients = {
        param: param.grad.detach().clone()
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None and param.numel() > 0 and optimizer.state.get(param)
    }
    hyper = [hyperparameters(optimizer, group) for group in optimizer.param_groups]
    # A learning rate that is a tensor is written to by a schedule.
    hyper = [h._replace(lr=h.lr.clone()) if isinstance(h.lr, Tensor) else h for h in hyper]
    return Kept(step, gradients, hyper, reuse)


@torch.no_grad()
def compare(kept: Kept, optimizer: Optimizer, by: str | None) -> Tensor | None:
    """Return `fresh` and `influence` of the kept step, now that the next gradients are there and before they are used.

    Returns
    -------
    Tensor or None
        Of shape (1, 2), (groups, 2) or (parameters, 2), on the device of the first parameters; None where no
        parameter has both gradients.
    """
    if not kept.gradients:
        return None
    device = next(iter(kept.gradients)).device
    rows: list[Tensor] = []
    empty = True
    for group, hyper, reuse in zip(optimizer.param_groups, kept.hyper, kept.reuse):
        count = len(group["params"]) if by == "parameter" else None
        gathered: Tensor | None = None
        for entry in moments(group["params"], optimizer, hyper, kept.gradients):
            found = sums(fall_and_influence(entry, hyper), entry, count)
            gathered = found if gathered is None else gathered + found.to(gathered.device)
        if gathered is not None:
            empty = False
        else:
            gathered = torch.zeros(count or 1, 2, dtype=sum_dtype(device))
        rows.append(torch.stack([gathered[:, 0] + reuse.shuffled * gathered[:, 1], reuse.a * gathered[:, 1]], 1))
    if empty:
        return None
    table = torch.cat([row.to(device) for row in rows])
    return table.sum(0, keepdim=True) if by is None else table


def state_of(kept: Kept | None, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what a checkpoint between the two steps of a sample needs; tensors and plain numbers.

    Gradients that are sharded over ranks are left out, and with them the sample: what is loaded need not be on as many.
    """
    if kept is None or not are_plain(list(kept.gradients.values())):
        return None
    return {
        "step": kept.step,
        "gradients": {i: kept.gradients[p] for i, p in enumerate(_params(optimizer)) if p in kept.gradients},
        "lr": [h.lr for h in kept.hyper],
        "reuse": [tuple(reuse) for reuse in kept.reuse],
    }


def restored(state: Mapping[str, Any] | None, optimizer: Optimizer) -> Kept | None:
    """Take over what `state_of` returned.

    Raises
    ------
    ValueError
        For gradients of other shapes than the parameters', or another number of groups.
    """
    if state is None:
        return None
    params = _params(optimizer)
    for i, gradient in state["gradients"].items():
        expected = tuple(params[i].shape) if i < len(params) else None
        if tuple(gradient.shape) != expected:
            raise ValueError(
                f"the state of a RiskMonitor does not fit this optimizer: parameter {i} has a gradient of shape "
                f"{tuple(gradient.shape)}, expected {expected or f'{len(params)} parameters'}"
            )
    if len(state["lr"]) != len(optimizer.param_groups):
        raise ValueError(
            f"the state of a RiskMonitor does not fit this optimizer: it has {len(state['lr'])} groups, expected "
            f"{len(optimizer.param_groups)}"
        )
    gradients = {params[i]: g.to(params[i].device, copy=True) for i, g in state["gradients"].items()}
    hyper = [hyperparameters(optimizer, g)._replace(lr=lr) for g, lr in zip(optimizer.param_groups, state["lr"])]
    return Kept(int(state["step"]), gradients, hyper, [Reuse(*reuse) for reuse in state["reuse"]])


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
