"""The foreach step: whole lists of tensors at a time, in place, with `torch._foreach_*`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from popriskmin.mask import (
    Corrections,
    Hyperparameters,
    Number,
    corrections,
    evaluate,
    evaluate_lists,
    finish_signal_and_noise,
    is_of_mean,
    largest,
    loading,
    shares_of_means,
    signal_and_noise,
)
from popriskmin.step.lists import (
    Lists,
    are_plain,
    compute_dtype,
    count_up,
    is_compiling,
    local_parts,
    sharing_memory,
    shrinks,
)
from popriskmin.step.rounding import parameter_bits, random_bits, round_stochastically, rounds_parameter
from popriskmin.step.shards import over_ranks

# On the CPU the foreach step walks its lists in blocks of this many scalars, so that a block's tensors stay in the
# cache from one operation to the next; measured in benchmarks/step_time.py.
CPU_BLOCK = 1 << 17

# So many tensors in one block are worth copying into one.
FEWEST_JOINED = 4


def multi_tensor_prm(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, tensor_steps: bool) -> None:
    """Step whole lists at a time, in place.

    Temporaries stay within two lists the size of the parameters, and five with shrinkage.
    """
    if not lists.params:
        return
    count_up(state_steps)
    for indices, t in cohorts(lists, state_steps, hyper, tensor_steps):
        whole = lists.of(indices)
        own = hyper if shrinks(hyper, whole.params[0]) else hyper._replace(shrinkage=0.0)
        # All of them lie alike over the ranks, or none is taken apart. Parts may be empty: every rank has all of them.
        cohort = local_parts(whole)
        cohort = cohort if are_plain(cohort.params) else whole
        if cohort.params[0].is_complex():
            grads, grad_vars = ([x.resolve_conj() for x in given] for given in (cohort.grads, cohort.grad_vars))
            cohort = cohort._replace(grads=grads, grad_vars=grad_vars).real()
        dtype = compute_dtype(cohort.params[0], cohort.exp_avgs[0])
        # The count itself stays as it is: what is drawn by it goes on where float32 would stand still.
        c = corrections(t.to(dtype) if isinstance(t, Tensor) else t, hyper)._replace(t=t)
        # Under a captured graph the number of kernels counts; on the host, the cache and the cost of a call.
        on_host = cohort.params[0].device.type == "cpu" and not tensor_steps and are_plain(cohort.params)
        # The random bits go by the place in the whole tensor, so tensors that need them stay whole.
        drawn = rounds_parameter(hyper.stochastic_rounding, cohort.params[0].dtype)
        on_host = on_host and not drawn and cohort.exp_avg_vars[0].dtype != torch.bfloat16
        apart = set() if is_compiling() or not are_plain(cohort.params) else sharing_memory(cohort.params)
        if own.reduction == "per_tensor" and own.mask != "none" and c.open is not True:
            blocks = list(_blocks(cohort, cut=on_host, join=False, apart=apart))
            for block in blocks:
                advance(block, c, own, dtype)
            q = pooled_mask(whole, cohort, blocks, c, own, dtype)
            for block in blocks:
                move(block, [q[i] for i in block.owners], c, own, dtype)
        else:
            for block in _blocks(cohort, cut=on_host, join=on_host, apart=apart):
                advance(block, c, own, dtype)
                move(block, mask_of(block, c, own, dtype), c, own, dtype)


class Block(NamedTuple):
    """Tensors, or flat parts of tensors, of one device, type and step; and which of the cohort each belongs to."""

    lists: Lists
    owners: list[int]


def cohorts(
    lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, tensor_steps: bool
) -> Iterator[tuple[list[int], Number]]:
    """Yield the places of tensors that agree in device, types, step count and shrinkage, and that count.

    With `tensor_steps` the count stays on the device, as one tensor with an entry for each place.
    """
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(lists.params):
        if p.numel() > 0:
            t = None if tensor_steps else state_steps[i].item()
            dtypes = [tensors[i].dtype for tensors in lists if tensors]
            alike.setdefault((type(p), p.device, shrinks(hyper, p), *dtypes, t), []).append(i)
    for key, indices in alike.items():
        yield indices, torch.stack([state_steps[i] for i in indices]) if tensor_steps else key[-1]


def _blocks(cohort: Lists, cut: bool, join: bool, apart: Collection[int] = ()) -> Iterator[Block]:
    """Yield the cohort whole, or with `cut` in blocks of about `CPU_BLOCK` scalars.

    A larger tensor is cut into flat parts if its memory, and that of its gradient and state, allows. With `join` many
    small tensors become one, which is written back to them when the next block is asked for. The places in `apart`
    are blocks by themselves, in their order.
    """
    if apart:
        for i in sorted(apart):
            yield Block(cohort.of([i]), [i])
        others = [i for i in range(len(cohort.params)) if i not in apart]
        for block in _blocks(cohort.of(others), cut, join) if others else ():
            yield block._replace(owners=[others[i] for i in block.owners])
        return
    if not cut:
        yield Block(cohort, list(range(len(cohort.params))))
        return
    gathered: list[int] = []
    size = 0
    for i, param in enumerate(cohort.params):
        n = param.numel()
        if gathered and size + n > CPU_BLOCK:
            yield from _joined(cohort, gathered, join)
            gathered, size = [], 0
        if n > CPU_BLOCK and all(tensors[i].is_contiguous() for tensors in cohort if tensors):
            whole = [tensors[i].view(-1) if tensors else None for tensors in cohort]
            for start in range(0, n, CPU_BLOCK):
                parts = [[] if x is None else [x[start : start + CPU_BLOCK]] for x in whole]
                yield Block(Lists(*parts), [i])
        else:
            gathered.append(i)
            size += n
    if gathered:
        yield from _joined(cohort, gathered, join)


def _joined(cohort: Lists, indices: list[int], join: bool) -> Iterator[Block]:
    small = cohort.of(indices)
    if not join or len(indices) < FEWEST_JOINED:
        yield Block(small, indices)
        return
    # Copied into one tensor and back, in the cache: two dozen calls for each small tensor would take longer.
    flat = Lists(*[[_flat(tensors)] if tensors else [] for tensors in small])
    yield Block(flat, indices[:1])
    for name in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_vars", "max_exp_avg_sqs"):
        tensors = getattr(small, name)
        if tensors:
            copy(tensors, _like(getattr(flat, name)[0], tensors))


def _flat(tensors: list[Tensor]) -> Tensor:
    flat: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return flat


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._C._nn.unflatten_dense_tensors(flat, tensors))


def copy(targets: list[Tensor], values: list[Tensor]) -> None:
    """Write the values into the targets."""
    if hasattr(torch, "_foreach_copy_") and are_plain(targets):  # since torch 2.1, not for sharded tensors
        torch._foreach_copy_(targets, values)
    else:
        for target, value in zip(targets, values):
            target.copy_(value)


def widen(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the list itself where it has `dtype`, else copies in it, to be handed to `write_back`."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    return [t.to(dtype) for t in tensors]


def write_back(tensors: list[Tensor], wide: list[Tensor], bits: list[Tensor] | None = None, shift: int = 0) -> None:
    """Copy widened tensors back, rounded to nearest, or with `bits`, shifted right by `shift`, stochastically."""
    if bits is not None:
        wide = [round_stochastically(x, (b >> shift) & 0xFFFF) for x, b in zip(wide, bits)]
    if wide is not tensors:
        copy(tensors, wide)


def _bits(block: Block, c: Corrections) -> list[Tensor] | None:
    """Return the random bits for `v` and `s` where these are stored in bfloat16."""
    if block.lists.exp_avg_vars[0].dtype != torch.bfloat16:
        return None
    return [random_bits(s, t) for s, t in zip(block.lists.exp_avg_vars, _steps(block, c))]


def _steps(block: Block, c: Corrections) -> Sequence[Number]:
    if not isinstance(c.t, Tensor) or c.t.dim() == 0:
        return [c.t] * len(block.owners)
    return [c.t[i] for i in block.owners]


@overload
def _each(c: Tensor, block: Block) -> list[Tensor]: ...
@overload
def _each(c: Number, block: Block) -> float | list[Tensor]: ...
def _each(c: Number, block: Block) -> float | list[Tensor]:
    """Return a number as it is; a tensor as the list of its entries for the block's tensors, for `_foreach_*`."""
    if not isinstance(c, Tensor):
        return c
    return [c] * len(block.owners) if c.dim() == 0 else [c[i] for i in block.owners]


def advance(block: Block, c: Corrections, hyper: Hyperparameters, dtype: torch.dtype) -> None:
    """Bring `m`, `v`, `s` and the maximum of `v` to this step."""
    grads = widen(block.lists.grads, dtype)
    if hyper.maximize:
        grads = list(torch._foreach_neg(grads))
    if hyper.weight_decay != 0 and not hyper.decoupled_weight_decay:
        params = widen(block.lists.params, dtype)
        if grads is block.lists.grads:
            grads = list(torch._foreach_add(grads, params, alpha=hyper.weight_decay))
        else:
            torch._foreach_add_(grads, params, alpha=hyper.weight_decay)
        del params
    exp_avgs = widen(block.lists.exp_avgs, dtype)
    bits = _bits(block, c)
    advance_variance(block, grads, exp_avgs, bits, c, hyper, dtype)
    torch._foreach_lerp_(exp_avgs, grads, 1 - hyper.beta1)
    write_back(block.lists.exp_avgs, exp_avgs)
    del exp_avgs
    exp_avg_sqs = widen(block.lists.exp_avg_sqs, dtype)
    torch._foreach_mul_(exp_avg_sqs, hyper.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - hyper.beta2)
    write_back(block.lists.exp_avg_sqs, exp_avg_sqs, bits, 16)
    if hyper.amsgrad:
        # The maximum of what is stored: rounded once, it needs no rounding of its own.
        torch._foreach_maximum_(block.lists.max_exp_avg_sqs, block.lists.exp_avg_sqs)


def advance_variance(
    block: Block,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    bits: list[Tensor] | None,
    c: Corrections,
    hyper: Hyperparameters,
    dtype: torch.dtype,
) -> None:
    """Bring `s` to this step; `exp_avgs` is the mean before this batch."""
    if hyper.given:
        exp_avg_vars = widen(block.lists.exp_avg_vars, dtype)
        torch._foreach_mul_(exp_avg_vars, hyper.rho)
        # Not by lerp: an infinite variance stays infinite here, and is not subtracted from itself.
        torch._foreach_add_(exp_avg_vars, widen(block.lists.grad_vars, dtype), alpha=1 - hyper.rho)
        write_back(block.lists.exp_avg_vars, exp_avg_vars, bits)
        return
    if not isinstance(c.blend, Tensor) and c.blend == 0:
        return
    if hyper.unbiased:
        deviations = torch._foreach_div(exp_avgs, _each(c.centre, block))
        torch._foreach_sub_(deviations, grads)
    else:
        deviations = torch._foreach_sub(grads, exp_avgs)
    exp_avg_vars = widen(block.lists.exp_avg_vars, dtype)
    torch._foreach_mul_(exp_avg_vars, hyper.rho)
    if isinstance(c.blend, Tensor):
        blends = _each(c.blend, block)
        for deviation, blend in zip(deviations, blends):
            deviation.masked_fill_(blend == 0, 0)  # not by 0 times a square that may be infinite
        # Squares are weighted first, as addcmul does: they overflow the later for it.
        torch._foreach_addcmul_(exp_avg_vars, torch._foreach_mul(deviations, blends), deviations)
    else:
        torch._foreach_addcmul_(exp_avg_vars, deviations, deviations, c.blend)
    write_back(block.lists.exp_avg_vars, exp_avg_vars, bits)


def mask_of(block: Block, c: Corrections, hyper: Hyperparameters, dtype: torch.dtype) -> list[Tensor] | None:
    """Return `q` of each tensor in the block, in its shape; None where the mask is open."""
    if hyper.mask == "none" or c.open is True:
        return None
    bound = largest(dtype)
    exp_avgs = widen(block.lists.exp_avgs, dtype)
    signals = list(torch._foreach_div(exp_avgs, _each(c.bias1, block)))
    del exp_avgs
    torch._foreach_mul_(signals, signals)
    torch._foreach_clamp_max_(signals, bound)
    noises = list(torch._foreach_div(widen(block.lists.exp_avg_vars, dtype), _each(c.bias_var, block)))
    torch._foreach_clamp_max_(noises, bound)
    return _evaluate(signals, noises, block, c, hyper)


def _evaluate(
    signals: list[Tensor], noises: list[Tensor], block: Block, c: Corrections, hyper: Hyperparameters
) -> list[Tensor]:
    """Return `q` of bounded signals and noises, and overwrite both."""
    if is_of_mean(hyper.mask):
        torch._foreach_mul_(noises, _each(c.k, block))
    elif hyper.debias:
        if isinstance(c.k, Tensor):
            for signal, noise, k in zip(signals, noises, _each(c.k, block)):
                signal.addcmul_(noise, k, value=-1)
        else:
            torch._foreach_add_(signals, noises, alpha=-c.k)
        torch._foreach_clamp_min_(signals, 0)
    q = evaluate_lists(signals, noises, hyper)
    if isinstance(c.open, Tensor):
        for value, is_open in zip(q, _each(c.open, block)):
            value.masked_fill_(is_open, 1)
    return q


def pooled_mask(
    whole: Lists,
    cohort: Lists,
    blocks: list[Block],
    c: Corrections,
    hyper: Hyperparameters,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return `q` of each tensor in the cohort, of shape `()`, from the means over whole tensors.

    `whole` are the tensors that the cohort's may be this rank's parts of: then one message takes the sums of all.
    """
    if not are_plain(cohort.params):
        # These lie differently over the ranks than their gradients or state; the tensors themselves know how.
        places = range(len(cohort.params))
        each = [Corrections._make(x[i] if isinstance(x, Tensor) else x for x in c) for i in places]
        pairs = zip(widen(cohort.exp_avgs, dtype), widen(cohort.exp_avg_vars, dtype))
        return [evaluate(*signal_and_noise(m, s, ci, hyper), ci, hyper) for (m, s), ci in zip(pairs, each)]
    shares: list[list[Tensor]] = [[] for _ in cohort.params]
    # Blocks are summed pairwise, and so are their sums; the running sum of a norm loses digits with the length.
    for block in blocks:
        for i, m, s in zip(block.owners, block.lists.exp_avgs, block.lists.exp_avg_vars):
            n = whole.params[i].numel() * (2 if whole.params[i].is_complex() else 1)
            shares[i].append(torch.stack(shares_of_means(m.to(dtype).square(), s.to(dtype), n)))
    means = [torch.stack(of_blocks, 1).sum(1) for of_blocks in shares]
    signal, noise = torch.stack(over_ranks(means, whole.params), 1)
    signal, noise = finish_signal_and_noise(signal / c.bias1**2, noise / c.bias_var, c, hyper)
    return list(evaluate(signal, noise, c, hyper).unbind())


def move(
    block: Block,
    q: list[Tensor] | None,
    c: Corrections,
    hyper: Hyperparameters,
    dtype: torch.dtype,
    place: int = 0,
) -> None:
    """Decay the parameters, take the Adam step multiplied by `q` (of the parameter's shape, or `()`), and shrink.

    `place` is that of the block's first scalar where it is a part of a tensor and its parameters may be rounded.
    """
    params = widen(block.lists.params, dtype)
    _decay(params, q if hyper.mask_decay else None, block, hyper)
    second_moments = block.lists.max_exp_avg_sqs if hyper.amsgrad else block.lists.exp_avg_sqs
    roots = list(torch._foreach_sqrt(widen(second_moments, dtype)))
    torch._foreach_div_(roots, _each(c.bias2**0.5, block))
    torch._foreach_add_(roots, hyper.eps)
    pulls = _pulls(block, q, roots, c, hyper, dtype)
    exp_avgs = widen(block.lists.exp_avgs, dtype)
    if q is None:
        steps = exp_avgs
    elif hyper.reduction == "per_tensor":
        steps = list(torch._foreach_mul(exp_avgs, q))
    else:
        torch._foreach_mul_(q, exp_avgs)
        steps = q
    del exp_avgs
    step_size = hyper.lr / c.bias1
    if isinstance(step_size, Tensor):
        # A tensor cannot be the factor of addcdiv, and must not be read back to become one.
        torch._foreach_div_(roots, _each(-step_size, block))
        torch._foreach_addcdiv_(params, steps, roots)
    else:
        torch._foreach_addcdiv_(params, steps, roots, -step_size)
    if pulls is not None:
        _shrink(params, pulls, block, dtype)
    if rounds_parameter(hyper.stochastic_rounding, block.lists.params[0].dtype):
        # One after the other: random bits are 8 bytes a scalar.
        for param, wide, t in zip(block.lists.params, params, _steps(block, c)):
            copy([param], [round_stochastically(wide, parameter_bits(param, t, place), param.dtype)])
    else:
        write_back(block.lists.params, params)


def _pulls(
    block: Block,
    q: list[Tensor] | None,
    roots: list[Tensor],
    c: Corrections,
    hyper: Hyperparameters,
    dtype: torch.dtype,
) -> list[Tensor] | None:
    """Return how far shrinkage pulls, see `popriskmin.mask.pulling_gradient`; None where it does not."""
    if not hyper.shrinkage or (not isinstance(c.t, Tensor) and c.t <= 1):
        return None
    factor = loading(hyper.shrinkage, hyper.mean_coefficient)
    noises = list(torch._foreach_div(widen(block.lists.exp_avg_vars, dtype), _each(c.bias_var, block)))
    torch._foreach_clamp_max_(noises, largest(dtype))
    pulls = list(torch._foreach_sqrt(noises))
    torch._foreach_mul_(pulls, factor)
    if q is not None:
        if hyper.reduction == "per_param":
            signals = list(torch._foreach_mul(noises, factor * factor))
            torch._foreach_clamp_max_(signals, largest(dtype))
            q = _evaluate(signals, noises, block, c, hyper)
        torch._foreach_mul_(pulls, q)
    torch._foreach_div_(pulls, roots)
    torch._foreach_mul_(pulls, _each(hyper.lr, block))
    if isinstance(c.t, Tensor):
        for pull, t in zip(pulls, _each(c.t, block)):
            pull.masked_fill_(t <= 1, 0)
    return pulls


def _shrink(params: list[Tensor], pulls: list[Tensor], block: Block, dtype: torch.dtype) -> None:
    """Move the parameters by the pulls, as `popriskmin.mask.shrunk` does."""
    starts = widen(block.lists.starts, dtype)
    distances = list(torch._foreach_sub(params, starts)) if starts else params
    moves = list(torch._foreach_maximum(distances, torch._foreach_neg(pulls)))
    torch._foreach_minimum_(moves, pulls)
    torch._foreach_sub_(params, moves)
    for param, distance, pull, start in zip(params, distances, pulls, starts):
        # The difference of two rounded numbers need not give back the second.
        param.copy_(torch.where(distance.abs() <= pull, start, param))


def _decay(params: list[Tensor], q: list[Tensor] | None, block: Block, hyper: Hyperparameters) -> None:
    if hyper.weight_decay == 0 or not hyper.decoupled_weight_decay:
        return
    decay = hyper.lr * hyper.weight_decay
    if q is None:
        torch._foreach_mul_(params, _each(1 - decay, block))
    elif isinstance(decay, Tensor):
        torch._foreach_addcmul_(params, params, torch._foreach_mul(q, _each(decay, block)), -1)
    else:
        torch._foreach_addcmul_(params, params, q, -decay)
