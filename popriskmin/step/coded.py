"""The step of tensors whose state is in 8-bit blocks (`popriskmin.step.codes`), where the kernel does not take it.

A part is decoded, stepped by the loops of `popriskmin.step.foreach` and encoded.

In the lists of a step `exp_avgs`, `exp_avg_sqs` and `exp_avg_vars` all hold the blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.mask import Corrections, Hyperparameters, corrections, evaluate, finish_signal_and_noise
from popriskmin.step.codes import BLOCK, Moments, blocks_of, decode, encode
from popriskmin.step.foreach import CPU_BLOCK, Block, advance, mask_of, move
from popriskmin.step.lists import Lists, compute_dtype, count_up, is_compiling, shrinks

# Scalars that are decoded at a time on other devices; a multiple of BLOCK, as CPU_BLOCK is.
DEVICE_PART = 1 << 24


def coded_prm(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, tensor_steps: bool) -> None:
    """Step tensor by tensor, in place, a part at a time; temporaries are a few such parts."""
    if is_compiling():
        raise RuntimeError("a step with state_dtype='8bit' cannot be compiled: call it outside of torch.compile")
    for param, codes in zip(lists.params, lists.exp_avgs, strict=True):
        if len(codes) != blocks_of(param.numel()):
            raise RuntimeError(
                f"a parameter has shape {tuple(param.shape)}, and its state is of another size: take it out of "
                "optimizer.state where its data is replaced by other data of another shape"
            )
    count_up(state_steps)
    for i, param in enumerate(lists.params):
        own = hyper if shrinks(hyper, param) else hyper._replace(shrinkage=0.0)
        dtype = compute_dtype(param)
        t = state_steps[i] if tensor_steps else state_steps[i].item()
        c = corrections(t.to(dtype) if isinstance(t, Tensor) else t, own)._replace(t=t)
        _step(lists.of([i]), c, own, dtype)


class _Flat(NamedTuple):
    """One tensor's weights and what is read with them, in one dimension each, or None."""

    param: Tensor
    grad: Tensor
    maximum: Tensor | None
    grad_var: Tensor | None
    start: Tensor | None


def _step(one: Lists, c: Corrections, hyper: Hyperparameters, dtype: torch.dtype) -> None:
    [param], [codes] = one.params, one.exp_avgs
    maximum, grad_var, start = (
        tensors[0].reshape(-1) if tensors else None for tensors in (one.max_exp_avg_sqs, one.grad_vars, one.starts)
    )
    flat = _Flat(param.reshape(-1), one.grads[0].reshape(-1), maximum, grad_var, start)
    n = flat.param.numel()
    size = CPU_BLOCK if flat.param.is_cpu else DEVICE_PART
    parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    if hyper.reduction == "per_tensor" and hyper.mask != "none" and c.open is not True:
        means = torch.zeros(2, dtype=dtype, device=flat.param.device)
        for part in parts:
            moments = _advanced(flat, codes, part, c, hyper, dtype)
            # Divided first, so that the sum of a large tensor does not overflow.
            signal, noise = moments.mean.to(dtype).square(), moments.variance.to(dtype)
            means += torch.stack([x.div(param.numel()).sum() for x in (signal, noise)])
        signal, noise = finish_signal_and_noise(means[0] / c.bias1**2, means[1] / c.bias_var, c, hyper)
        q = evaluate(signal, noise, c, hyper)
        for part in parts:
            move(_block(flat, decode(_rows(codes, part)), part), [q], c, hyper, dtype, part.start)
    else:
        for part in parts:
            block = _block(flat, _advanced(flat, codes, part, c, hyper, dtype), part)
            move(block, mask_of(block, c, hyper, dtype), c, hyper, dtype, part.start)
    for held, values in ((param, flat.param), *((x, flat.maximum) for x in one.max_exp_avg_sqs)):
        if values is not None and values.data_ptr() != held.data_ptr():  # of a tensor that is not contiguous
            held.copy_(values.view(held.shape))


def _rows(codes: Tensor, part: slice) -> Tensor:
    return codes[part.start // BLOCK : blocks_of(part.stop)]


def _block(flat: _Flat, moments: Moments, part: slice) -> Block:
    n = part.stop - part.start
    m, v, s = ([x.view(-1)[:n]] for x in moments)
    maximum, grad_var, start = ([] if x is None else [x[part]] for x in (flat.maximum, flat.grad_var, flat.start))
    return Block(Lists([flat.param[part]], [flat.grad[part]], m, v, s, maximum, grad_var, start), [0])


def _advanced(
    flat: _Flat, codes: Tensor, part: slice, c: Corrections, hyper: Hyperparameters, dtype: torch.dtype
) -> Moments:
    """Bring the state of a part to this step, and return it as it is then stored."""
    rows = _rows(codes, part)
    moments = decode(rows)
    advance(_block(flat, moments, part), c, hyper._replace(amsgrad=False), dtype)
    encode(moments, rows, part.start)
    stored = decode(rows)
    if flat.maximum is not None:
        maximum = flat.maximum[part]
        torch.maximum(maximum, stored.square.view(-1)[: maximum.numel()], out=maximum)
    return stored
