"""The step of tensors whose state is in 8-bit blocks (`popriskmin.step.codes`), where the kernel does not take it.

A part is decoded, stepped by the loops of `popriskmin.step.foreach` and encoded.

In the lists of a step `exp_avgs`, `exp_avg_sqs` and `exp_avg_vars` all hold the blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.mask import (
    Corrections,
    Hyperparameters,
    corrections,
    evaluate,
    finish_signal_and_noise,
    shares_of_means,
)
from popriskmin.step.codes import Moments, Part, are_codes_of, decode, encode, parts_of
from popriskmin.step.foreach import CPU_BLOCK, Block, advance, mask_of, move
from popriskmin.step.lists import Lists, are_plain, compute_dtype, count_up, is_compiling, local_parts, shrinks
from popriskmin.step.shards import over_ranks

# Scalars that are decoded at a time on other devices; a multiple of BLOCK, as CPU_BLOCK is.
DEVICE_PART = 1 << 24


def coded_prm(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, tensor_steps: bool) -> None:
    """Step tensor by tensor, in place, a part at a time; temporaries are a few such parts."""
    if is_compiling():
        raise RuntimeError("a step with state_dtype='8bit' cannot be compiled: call it outside of torch.compile")
    local = local_parts(lists)
    for param, codes in zip(local.params, local.exp_avgs, strict=True):
        if not are_plain([param]):
            raise RuntimeError(
                "with state_dtype='8bit' a parameter that is sharded over ranks, its gradient and its state must lie "
                f"alike; one of shape {tuple(param.shape)} does not"
            )
        if not are_codes_of(codes, param):
            raise RuntimeError(
                f"a parameter has shape {tuple(param.shape)}, and its state is of another size: take it out of "
                "optimizer.state where its data is replaced by other data of another shape"
            )
    count_up(state_steps)
    pooled: list[tuple[int, _Tensor]] = []
    for i, param in enumerate(local.params):
        own = hyper if shrinks(hyper, param) else hyper._replace(shrinkage=0.0)
        dtype = compute_dtype(param)
        t = state_steps[i] if tensor_steps else state_steps[i].item()
        c = corrections(t.to(dtype) if isinstance(t, Tensor) else t, own)._replace(t=t)
        one = _Tensor.of(local.of([i]), c, own, dtype)
        if hyper.reduction == "per_tensor" and hyper.mask != "none" and c.open is not True:
            pooled.append((i, one))
        else:
            one.step()
    if pooled:
        wholes = [lists.params[i] for i, _ in pooled]
        shares = [one.advance_and_sum(whole.numel()) for (_, one), whole in zip(pooled, wholes)]
        for (_, one), means in zip(pooled, over_ranks(shares, wholes)):
            one.finish(means)


class _Tensor(NamedTuple):
    """One tensor, and what is read and written with it, each seen as (rows, length) or None."""

    held: Lists  # as it is
    param: Tensor
    grad: Tensor
    maximum: Tensor | None
    grad_var: Tensor | None
    start: Tensor | None
    codes: Tensor
    parts: list[Part]
    c: Corrections
    hyper: Hyperparameters
    dtype: torch.dtype

    @classmethod
    def of(cls, one: Lists, c: Corrections, hyper: Hyperparameters, dtype: torch.dtype) -> _Tensor:
        [param], [codes] = one.params, one.exp_avgs
        rows, length = len(codes), param.numel() // max(len(codes), 1)
        [grad], others = one.grads, (one.max_exp_avg_sqs, one.grad_vars, one.starts)
        maximum, grad_var, start = (x[0].reshape(rows, length) if x else None for x in others)
        parts = list(parts_of(rows, length, CPU_BLOCK if param.is_cpu else DEVICE_PART))
        w, g = param.reshape(rows, length), grad.reshape(rows, length)
        return cls(one, w, g, maximum, grad_var, start, codes, parts, c, hyper, dtype)

    def step(self) -> None:
        for part in self.parts:
            block = self._block(self._advanced(part), part)
            q = mask_of(block, self.c, self.hyper, self.dtype)
            move(block, q, self.c, self.hyper, self.dtype, part.place)
        self._write_back()

    def advance_and_sum(self, scalars: int) -> Tensor:
        """Bring the state to this step, and return what these scalars contribute to the means over so many."""
        means = torch.zeros(2, dtype=self.dtype, device=self.param.device)
        for part in self.parts:
            moments = self._advanced(part)
            signal, noise = moments.mean.to(self.dtype).square(), moments.variance.to(self.dtype)
            # Divided first, so that the sum of a large tensor does not overflow.
            means += torch.stack(shares_of_means(signal, noise, scalars))
        return means

    def finish(self, means: Tensor) -> None:
        """Move the parameters with the mask of the means of `m**2` and `s`."""
        signal, noise = means[0] / self.c.bias1**2, means[1] / self.c.bias_var
        q = evaluate(*finish_signal_and_noise(signal, noise, self.c, self.hyper), self.c, self.hyper)
        for part in self.parts:
            block = self._block(decode(part.blocks(self.codes)), part)
            move(block, [q], self.c, self.hyper, self.dtype, part.place)
        self._write_back()

    def _block(self, moments: Moments, part: Part) -> Block:
        m, v, s = ([part.without_padding(x)] for x in moments)
        maximum, grad_var, start = (
            [] if x is None else [part.of(x)] for x in (self.maximum, self.grad_var, self.start)
        )
        return Block(Lists([part.of(self.param)], [part.of(self.grad)], m, v, s, maximum, grad_var, start), [0])

    def _advanced(self, part: Part) -> Moments:
        """Bring the state of a part to this step, and return it as it is then stored."""
        blocks = part.blocks(self.codes)
        moments = decode(blocks)
        advance(self._block(moments, part), self.c, self.hyper._replace(amsgrad=False), self.dtype)
        encode(moments, blocks, part.padded)
        stored = decode(blocks)
        if self.maximum is not None:
            maximum = part.of(self.maximum)
            torch.maximum(maximum, part.without_padding(stored.square), out=maximum)
        return stored

    def _write_back(self) -> None:
        """Hand over what was stepped in a copy, as its memory has gaps."""
        for held, seen in ((self.held.params, self.param), (self.held.max_exp_avg_sqs, self.maximum)):
            if seen is not None and seen.data_ptr() != held[0].data_ptr():
                held[0].copy_(seen.view(held[0].shape))
