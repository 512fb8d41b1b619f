"""The fall of the population risk that one step is expected to bring.

It takes two gradients and the optimizer's state. docs/risk.md derives it. In short, a
step moves the weights by `-D(m)`, a function of the mean gradient `m`. To second order
the risk falls by `D(m)` times the mean of its slopes before and after the step:

- After the step the next gradient `g'` measures the slope.
- Before it the step's own gradient `g` measures the slope. But the step was made from
  `g` and depends on its noise. So `g` is multiplied by the step that `g'` would have
  made in its place, `D(m')`.

The estimate is `(g' * D(m) + g * D(m')) / 2`. No gradient is multiplied by its own
noise, whatever the mask.

A sample begins with `keep`, after a step, and ends with `compare`, when the next
gradients are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters, Options, corrections, evaluate, signal_and_noise
from popriskmin.optimizer.groups import Group
from popriskmin.optimizer.prm import PRM
from popriskmin.step.lists import PLAIN, are_plain, as_real, compute_dtype, sum_dtype
from popriskmin.step.shards import whole

# Small tensors of a group are joined up to this many scalars: on a small tensor,
# starting an operation costs more than its arithmetic.
JOINED = 1 << 16

# Larger tensors are read in blocks of at most this many scalars.
LARGEST = 1 << 21

# Adam's step is PRM's without a mask. With `rho=0` and a given variance, no bias of `s`
# is divided out.
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


class Reuse(NamedTuple):
    """The effect of using a data set again; zeros while all data is fresh."""

    a: float  # variance of the training set's own noise over that of a batch
    shuffled: float  # part of the influence that shuffled passes take off the fall


class Kept(NamedTuple):
    """The part of a sampled step that its sample needs later.

    The gradients are copies, by the `id` of their parameters, which are not held: until
    the next step a user may remove them.
    """

    step: int
    gradients: dict[int, Tensor]
    hyper: dict[int, Hyperparameters]  # by the `id` of their group, as the next
    reuse: dict[int, Reuse]


class Block(NamedTuple):
    """Scalars that are read together: a tensor, a part of one, or several small ones.

    All have taken `t` steps. The tensors are real, of one shape, in float32 or wider.
    `grad` is the gradient of the last step and `next_grad` that of the next, both of
    the loss that is minimized.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_var: Tensor | None  # Adam and AdamW have none
    grad: Tensor
    next_grad: Tensor
    t: int | Tensor  # a tensor where steps are counted on the device
    owners: tuple[tuple[int, int], ...]  # the parameters' places and their scalars


def keep(optimizer: Optimizer, step: int, reuse: list[Reuse]) -> Kept:
    """Copy the gradients of the last step, and the numbers that it was taken with.

    `reuse` has one entry for each group.
    """
    gradients = {
        id(param): param.grad.detach().clone()
        for param in _params(optimizer)
        if param.grad is not None and param.numel() > 0 and "step" in optimizer.state.get(param, {})
    }
    hyper = {id(group): hyperparameters(optimizer, group) for group in optimizer.param_groups}
    # A schedule writes to a learning rate that is a tensor.
    hyper = {i: h._replace(lr=h.lr.clone()) if isinstance(h.lr, Tensor) else h for i, h in hyper.items()}
    return Kept(step, gradients, hyper, dict(zip(hyper, reuse)))


@torch.no_grad()
def compare(kept: Kept, optimizer: Optimizer, by: str | None) -> Tensor | None:
    """Return `fresh` and `influence` of the kept step.

    Call it when the next gradients are there and before a step uses them.

    Returns
    -------
    Tensor or None
        Of shape (1, 2), (groups, 2) or (parameters, 2), on the device of the first
        gradient, without groups that came later. None if no parameter has both
        gradients.
    """
    if not kept.gradients:
        return None
    device = next(iter(kept.gradients.values())).device
    rows: list[Tensor] = []
    empty = True
    for group in optimizer.param_groups:
        if id(group) not in kept.hyper:
            continue
        hyper, reuse = kept.hyper[id(group)], kept.reuse[id(group)]
        count = len(group["params"]) if by == "parameter" else None
        total: Tensor | None = None
        for block in blocks(group["params"], optimizer, hyper, kept.gradients):
            part = sums(fall_and_influence(block, hyper), block, count)
            total = part if total is None else total + part.to(total.device)
        if total is not None:
            empty = False
        else:
            total = torch.zeros(count or 1, 2, dtype=sum_dtype(device))
        fall, influence = total.unbind(1)
        rows.append(torch.stack([fall + reuse.shuffled * influence, reuse.a * influence], 1))
    if empty:
        return None
    table = torch.cat([row.to(device) for row in rows])
    return table.sum(0, keepdim=True) if by is None else table


def hyperparameters(optimizer: Optimizer, group: Group) -> Hyperparameters:
    """Return a group's numbers; those of Adam and AdamW as of a PRM without a mask."""
    if isinstance(optimizer, PRM):
        return Hyperparameters.of_group(cast("Options", group))
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


def blocks(
    params: list[Tensor],
    optimizer: Optimizer,
    hyper: Hyperparameters,
    gradients: Mapping[int, Tensor],
) -> Iterator[Block]:
    """Yield the parameters of one group between two steps, block by block.

    Small tensors are joined, large ones split, which keeps temporaries small.
    `gradients` are those of the step before, by `id`. A parameter without one, or
    without one now, is left out.
    """
    waiting: dict[tuple[int, torch.dtype, torch.device], list[Block]] = {}
    for place, param in enumerate(params):
        block = read(param, place, optimizer, hyper, gradients.get(id(param)))
        if block is None:
            continue
        splits = hyper.reduction == "per_param" and type(param) in PLAIN
        # A counter on the device is not compared with others: that would wait for it.
        if not splits or block.param.numel() >= JOINED or isinstance(block.t, Tensor):
            yield from _split(block) if splits else [block]
            continue
        key = (block.t, block.param.dtype, block.param.device)
        waiting.setdefault(key, []).append(block)
        if sum(other.param.numel() for other in waiting[key]) >= JOINED:
            yield _join(waiting.pop(key))
    for several in waiting.values():
        yield _join(several)


def read(
    param: Tensor,
    place: int,
    optimizer: Optimizer,
    hyper: Hyperparameters,
    gradient: Tensor | None,
) -> Block | None:
    """Return one parameter as a block; None without a state or a gradient.

    A gradient of another shape is of a parameter that this one has replaced.
    """
    state = optimizer.mask_state_of(param) if isinstance(optimizer, PRM) else optimizer.state.get(param, {})
    if "step" not in state or param.numel() == 0 or param.grad is None:
        return None
    if gradient is None or gradient.shape != param.shape:
        return None
    step = state["step"]
    second = state["max_exp_avg_sq" if hyper.amsgrad else "exp_avg_sq"]
    tensors = [param, state["exp_avg"], second, gradient, param.grad]
    if isinstance(optimizer, PRM):
        tensors.append(state["exp_avg_var"])
    tensors = [as_real(tensor.detach().resolve_conj()) for tensor in tensors]
    dtype = compute_dtype(*tensors)
    w, m, v, g, following, *s = (tensor.to(dtype) for tensor in tensors)
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:  # a loss scaler leaves the division to a fused step
        following = following / scale.to(following.device)
    if hyper.maximize:
        g, following = -g, -following
    on_device = isinstance(step, Tensor) and step.device.type != "cpu"
    t = step.to(dtype) if on_device else int(step)
    return Block(w, m, v, s[0] if s else None, g, following, t, ((place, w.numel()),))


def _split(block: Block) -> Iterator[Block]:
    place = block.owners[0][0]
    for columns in zip(*[torch.split(x.flatten(), LARGEST) for x in _tensors(block)]):
        yield _with(block, columns, ((place, len(columns[0])),))


def _join(several: list[Block]) -> Block:
    if len(several) == 1:
        return several[0]
    owners = tuple(owner for block in several for owner in block.owners)
    columns = [torch.cat([x.flatten() for x in column]) for column in zip(*map(_tensors, several))]
    return _with(several[0], columns, owners)


def _tensors(block: Block) -> list[Tensor]:
    return [x for x in block[:6] if x is not None]


def _with(block: Block, tensors: Sequence[Tensor], owners: tuple[tuple[int, int], ...]) -> Block:
    """Return the block with other tensors, in the order of `_tensors`."""
    w, m, v, *s, g, following = tensors
    return Block(w, m, v, s[0] if s else None, g, following, block.t, owners)


def fall_and_influence(block: Block, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return two numbers of the last step for each scalar.

    Returns
    -------
    fall
        Of the risk: `(g' * D(m) + g * D(m')) / 2`, where `m'` is the mean with `g'` in
        the place of `g`; in units of the loss.
    influence
        Of the batch on its own examples: `g * (D(m) - D(m'))` over the weight of `g` in
        the mean. For a step `rate * m` its expectation is `rate` times the variance of
        the minibatch gradient.
    """
    bias1 = corrections(block.t, hyper).bias1
    exchanged = block.exp_avg + (1 - hyper.beta1) * (block.next_grad - block.grad)
    taken, swapped = moved(block, hyper), moved(block._replace(exp_avg=exchanged), hyper)
    fall = (block.next_grad * taken + block.grad * swapped) / 2
    return fall, block.grad * (taken - swapped) * (bias1 / (1 - hyper.beta1))


def moved(block: Block, hyper: Hyperparameters) -> Tensor:
    """Return `D(m)`: the last step, as a function of the mean gradient."""
    c = corrections(block.t, hyper)
    step: Tensor = hyper.lr / ((block.exp_avg_sq / c.bias2).sqrt() + hyper.eps)
    step = step * (block.exp_avg / c.bias1)
    decay = hyper.lr * hyper.weight_decay * block.param if hyper.decoupled_weight_decay else None
    if block.exp_avg_var is not None:
        signal, noise = signal_and_noise(block.exp_avg, block.exp_avg_var, c, hyper)
        q = evaluate(signal, noise, c, hyper)
        step = q * step
        if decay is not None and hyper.mask_decay:
            decay = q * decay
    return step if decay is None else step + decay


def sums(terms: tuple[Tensor, ...], block: Block, count: int | None) -> Tensor:
    """Return each term summed over the scalars.

    The shape is (1, terms), or (count, terms) with a row for each parameter of the
    group.
    """
    dtype = sum_dtype(terms[0].device)
    if count is None:
        return torch.stack([whole(term.sum(dtype=dtype)) for term in terms])[None]
    rows = torch.zeros(count, len(terms), dtype=dtype, device=terms[0].device)
    if len(block.owners) == 1:
        rows[block.owners[0][0]] = torch.stack([whole(term.sum(dtype=dtype)) for term in terms])
        return rows
    sizes = [size for _, size in block.owners]
    pieces = torch.split(torch.stack(terms), sizes, dim=1)
    rows[[place for place, _ in block.owners]] = torch.stack([p.sum(1, dtype=dtype) for p in pieces])
    return rows


def same_pass(beta1: float, pass_steps: float) -> float:
    """Return which share of the two products is noise of different batches of one pass.

    Batches of one shuffled pass share no example, so the products of their noise have
    the mean `-a * z` and not 0. Two batches `d` steps apart belong to one pass with
    probability `1 - d / pass_steps`. The next gradient is multiplied by all gradients
    of the mean, the step's own gradient by the next one and those before. The result is
    the mean of the two.

    Examples
    --------
    >>> round(same_pass(0.9, 1e9), 4)
    1.0
    >>> same_pass(0.9, 1)
    0.0
    """
    farthest = math.ceil(pass_steps)
    if beta1 > 0:  # beyond this distance the weights are below rounding
        farthest = min(farthest, math.ceil(40 / -math.log(beta1)) + 1)

    def share(distance: int) -> float:
        return max(0.0, 1 - distance / pass_steps)

    following = math.fsum(beta1**i * share(i + 1) for i in range(farthest))
    own = share(1) + math.fsum(beta1**i * share(i) for i in range(1, farthest))
    return (1 - beta1) * (following + own) / 2


def state_of(kept: Kept | None, optimizer: Optimizer) -> dict[str, object] | None:
    """Return what a checkpoint between the two steps of a sample needs.

    It holds tensors and plain numbers. If gradients are sharded over ranks the sample
    is left out, because the checkpoint may be loaded on another number of ranks.
    """
    if kept is None or not are_plain(list(kept.gradients.values())):
        return None
    places = enumerate(_params(optimizer))
    return {
        "step": kept.step,
        "gradients": {i: kept.gradients[id(p)] for i, p in places if id(p) in kept.gradients},
        # A group that came later has no gradient here that its numbers would matter to.
        "lr": [kept.hyper[i].lr if i in kept.hyper else 0.0 for i in map(id, optimizer.param_groups)],
        "reuse": [tuple(kept.reuse.get(i, Reuse(0.0, 0.0))) for i in map(id, optimizer.param_groups)],
    }


def restored(state: Mapping[str, Any] | None, optimizer: Optimizer) -> Kept | None:
    """Return the sample under way that `state_of` has described.

    Raises
    ------
    ValueError
        For gradients of other shapes than the parameters', or another number of groups.
    """
    if state is None:
        return None
    params, groups = _params(optimizer), optimizer.param_groups
    misfit = "the state of a RiskMonitor does not fit this optimizer"
    for i, gradient in state["gradients"].items():
        expected = tuple(params[i].shape) if i < len(params) else None
        if tuple(gradient.shape) != expected:
            raise ValueError(
                f"{misfit}: parameter {i} has a gradient of shape {tuple(gradient.shape)}, "
                f"expected {expected or f'{len(params)} parameters'}"
            )
    if len(state["lr"]) != len(groups):
        raise ValueError(f"{misfit}: it has {len(state['lr'])} groups, expected {len(groups)}")
    gradients = {id(params[i]): g.to(params[i].device, copy=True) for i, g in state["gradients"].items()}
    hyper = {id(g): hyperparameters(optimizer, g)._replace(lr=lr) for g, lr in zip(groups, state["lr"])}
    reuse = {id(g): Reuse(*numbers) for g, numbers in zip(groups, state["reuse"])}
    return Kept(int(state["step"]), gradients, hyper, reuse)


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
