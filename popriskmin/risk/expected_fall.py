"""What an optimizer step is expected to take off the population risk, from two gradients and the optimizer's state.

The derivation stands in docs/risk.md. In short: a step moves the weights by `-D(m)`, a function of the mean gradient
`m`. To second order the risk falls by `D(m)` times the mean of its slopes before and after the step. The slope after it
is what the next gradient `g'` measures. The slope before it is what the step's own gradient `g` measures, but the step
was made from `g` and depends on its noise. So that one is multiplied by the step that would have been taken with `g'`
in the place of `g`: `(g' * D(m) + g * D(m')) / 2`. No gradient meets its own noise there, whatever the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters, corrections, evaluate, signal_and_noise
from popriskmin.optimizer.prm import PRM
from popriskmin.step.lists import PLAIN, as_real, compute_dtype, sum_dtype
from popriskmin.step.shards import whole

# Tensors of one group are joined up to so many scalars: on small ones an operation's start costs more than its work.
JOINED = 1 << 16

# Larger ones are read in blocks of so many scalars.
BLOCK = 1 << 21

# Adam's step is PRM's without a mask; with `rho` 0 and a variance that is given, nothing is divided out of it.
_ADAM: dict[str, Any] = {
    "rho": 0.0,
    "mask_eps": 0.0,
    "softness": 1.0,
    "coefficient": 1.0,
    "mask": "none",
    "reduction": "per_param",
    "warmup_steps": 0,
    "bias_correction": True,
    "debias": False,
    "mask_decay": False,
    "min_q": 0.0,
    "variance": "given",
}


def hyperparameters(optimizer: Optimizer, group: Mapping[str, Any]) -> Hyperparameters:
    """Return the numbers of a group of PRM, or of Adam or AdamW as those of a PRM without mask."""
    if isinstance(optimizer, PRM):
        return Hyperparameters.of_group(group)
    beta1, beta2 = group["betas"]
    return Hyperparameters.of(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        # Adam and AdamW say it in the group since torch 2.7.
        decoupled_weight_decay=group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)),
        **_ADAM,
    )


class Moments(NamedTuple):
    """What is read of parameters that have taken `t` steps: real tensors of one shape, in float32 or wider.

    `grad` is the gradient of the last step and `next_grad` that of the next, both of the loss to be minimized.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_var: Tensor | None  # Adam and AdamW have none
    grad: Tensor
    next_grad: Tensor
    t: Any
    owners: tuple[tuple[int, int], ...]  # each parameter's place in its group, and its number of scalars


def moments(
    params: list[Tensor], optimizer: Optimizer, hyper: Hyperparameters, gradients: Mapping[Tensor, Tensor]
) -> Iterator[Moments]:
    """Yield what is to be read of these parameters of one group between two steps, small ones joined.

    Large tensors come in blocks, so that temporaries stay small. `gradients` holds those of the step before; a
    parameter that has none there, or now, is left out.
    """
    waiting: dict[Any, list[Moments]] = {}
    for place, param in enumerate(params):
        entry = read(param, place, optimizer, hyper, gradients.get(param))
        if entry is None:
            continue
        # Where steps are counted on the device they are not compared, which would need them on the host.
        alone = hyper.reduction == "per_tensor" or entry.param.numel() >= JOINED or isinstance(entry.t, Tensor)
        if alone or type(param) not in PLAIN:
            yield from _blocks(entry) if hyper.reduction == "per_param" and type(param) in PLAIN else [entry]
            continue
        key = (entry.t, entry.param.dtype, entry.param.device)
        waiting.setdefault(key, []).append(entry)
        if sum(other.param.numel() for other in waiting[key]) >= JOINED:
            yield _join(waiting.pop(key))
    for entries in waiting.values():
        yield _join(entries)


def read(
    param: Tensor, place: int, optimizer: Optimizer, hyper: Hyperparameters, gradient: Tensor | None
) -> Moments | None:
    """Return what is to be read of one parameter, or None where it has no state or not both gradients."""
    state = optimizer.state.get(param)
    if not state or param.numel() == 0 or param.grad is None or gradient is None:
        return None
    step = state["step"]
    t = step if isinstance(step, Tensor) and step.device.type != "cpu" else int(step)
    second = state["max_exp_avg_sq" if hyper.amsgrad else "exp_avg_sq"]
    held = [param, state["exp_avg"], second, gradient, param.grad]
    if isinstance(optimizer, PRM):
        held.append(state["exp_avg_var"])
    held = [as_real(tensor.detach().resolve_conj()) for tensor in held]
    dtype = compute_dtype(*held)
    w, m, v, g, following, *s = (tensor.to(dtype) for tensor in held)
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:  # a fused step that a loss scaler is about to call divides by it itself
        following = following / scale.to(following.device)
    if hyper.maximize:
        g, following = -g, -following
    owners = ((place, w.numel()),)
    return Moments(w, m, v, s[0] if s else None, g, following, t.to(dtype) if isinstance(t, Tensor) else t, owners)


def _blocks(entry: Moments) -> Iterator[Moments]:
    place = entry.owners[0][0]
    for columns in zip(*[torch.split(x.flatten(), BLOCK) for x in _tensors(entry)]):
        yield _with(entry, columns, ((place, len(columns[0])),))


def _join(entries: list[Moments]) -> Moments:
    if len(entries) == 1:
        return entries[0]
    owners = tuple(owner for entry in entries for owner in entry.owners)
    columns = [torch.cat([x.flatten() for x in column]) for column in zip(*map(_tensors, entries))]
    return _with(entries[0], columns, owners)


def _tensors(entry: Moments) -> list[Tensor]:
    return [x for x in entry[:6] if x is not None]


def _with(entry: Moments, tensors: Sequence[Tensor], owners: tuple[tuple[int, int], ...]) -> Moments:
    """Return the entry with other tensors, in the order of `_tensors`."""
    w, m, v, *s, g, following = tensors
    return Moments(w, m, v, s[0] if s else None, g, following, entry.t, owners)


def fall_and_influence(entry: Moments, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return the fall of the risk in the last step, and the batch's influence on its own examples, of each scalar.

    Returns
    -------
    fall
        `(g' * D(m) + g * D(m')) / 2`, where `m'` is the mean with `g'` in the place of `g`; in units of the loss.
    influence
        `g * (D(m) - D(m'))` over `g`'s weight in the mean; for a step `rate * m` it is `rate` times the variance of the
        minibatch gradient, expected over batches.
    """
    bias1 = corrections(entry.t, hyper).bias1
    exchanged = entry.exp_avg + (1 - hyper.beta1) * (entry.next_grad - entry.grad)
    there, swapped = moved(entry, hyper), moved(entry._replace(exp_avg=exchanged), hyper)
    fall = (entry.next_grad * there + entry.grad * swapped) / 2
    return fall, entry.grad * (there - swapped) * (bias1 / (1 - hyper.beta1))


def moved(entry: Moments, hyper: Hyperparameters) -> Tensor:
    """Return `D(m)`, what the last step took off the weights, as a function of the mean alone."""
    c = corrections(entry.t, hyper)
    step: Tensor = hyper.lr / ((entry.exp_avg_sq / c.bias2).sqrt() + hyper.eps) * (entry.exp_avg / c.bias1)
    decay = hyper.lr * hyper.weight_decay * entry.param if hyper.decoupled_weight_decay else None
    if entry.exp_avg_var is not None:
        q = evaluate(*signal_and_noise(entry.exp_avg, entry.exp_avg_var, c, hyper), c, hyper)
        step = q * step
        if decay is not None and hyper.mask_decay:
            decay = q * decay
    return step if decay is None else step + decay


def sums(terms: tuple[Tensor, ...], entry: Moments, count: int | None) -> Tensor:
    """Return the sums over the scalars of each term: of shape (1, terms), or with `count` a row for each parameter."""
    dtype = sum_dtype(terms[0].device)
    if count is None:
        return torch.stack([whole(term.sum(dtype=dtype)) for term in terms])[None]
    rows = torch.zeros(count, len(terms), dtype=dtype, device=terms[0].device)
    if len(entry.owners) == 1:
        rows[entry.owners[0][0]] = torch.stack([whole(term.sum(dtype=dtype)) for term in terms])
        return rows
    sizes = [size for _, size in entry.owners]
    pieces = [piece.sum(1, dtype=dtype) for piece in torch.split(torch.stack(terms), sizes, dim=1)]
    rows[[place for place, _ in entry.owners]] = torch.stack(pieces)
    return rows


def same_pass(beta1: float, pass_steps: float) -> float:
    """Return how much of the two products consists of noise of different batches of one pass over the data.

    Batches of one shuffled pass have no example in common, so the products of their noise have the mean `-a * z` and
    not 0. Two batches `d` steps apart belong to one pass with probability `1 - d / pass_steps`. The next gradient meets
    all gradients of the mean, the step's own the next and those before; the two halves are averaged.

    Examples
    --------
    >>> round(same_pass(0.9, 1e9), 4)
    1.0
    >>> same_pass(0.9, 1)
    0.0
    """
    # Beyond that distance weights are below rounding.
    farthest = math.ceil(pass_steps) if beta1 == 0 else min(math.ceil(pass_steps), math.ceil(40 / -math.log(beta1)) + 1)

    def share(distance: int) -> float:
        return max(0.0, 1 - distance / pass_steps)

    following = math.fsum(beta1**i * share(i + 1) for i in range(farthest))
    own = share(1) + math.fsum(beta1**i * share(i) for i in range(1, farthest))
    return (1 - beta1) * (following + own) / 2
