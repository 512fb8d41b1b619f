"""Stochastic rounding to 16 bits: of `v` and `s` where they are stored in bfloat16, and of parameters on request.

An exponential average with decay 0.999 changes by a thousandth of the difference a step, bfloat16 has steps of 1/256:
rounded to nearest, such an average stands still. Rounded up with the probability that makes the mean exact, it moves.
So does a weight whose steps are below half a unit in its last place. A number of the narrow type is never moved.

The random bits are a hash of the step count and the element's place in memory, so that all implementations round
alike, a resumed run goes on bit for bit, replicas stay equal, and torch's generators are left alone. `v` takes the
upper 16 bits, `s` the lower ones; the parameter has bits of its own. A step count that stood still, as one in float32
does at 2**24, would draw the same bits for ever: `PRM` counts in float64 wherever it rounds so.

Into a parameter's bits goes its old value, too. Without it two layers of one shape would round the same way at every
place, and what they do together would err more than by chance. `v` and `s` of two tensors do share their bits where the
places and the steps agree: nothing adds them up.

The hash is Knuth's multiplication by the golden ratio, which over neighbouring places is an addition, and the second
half of Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).

The kernels in `popriskmin/step/kernels` do the same in their languages.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from popriskmin.step.lists import is_dense
from popriskmin.step.shards import is_sharded, local_part, spread_as

Integers = TypeVar("Integers", int, Tensor)

NARROW = (torch.bfloat16, torch.float16)

_WORD = 0xFFFFFFFF
_OLD = 0x85EBCA77  # spreads the old values of a parameter over all numbers of 32 bits


def hash32(x: Integers) -> Integers:
    """Return a well mixed 32-bit hash of a number, or of an int64 tensor, in [0, 2**32).

    Examples
    --------
    >>> hash32(1), hash32(torch.tensor([1, 2])).tolist()
    (2396652751, [2396652751, 4013380994])
    """
    x = (x * 0x9E3779B1) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def random_bits(like: Tensor, t: float | Tensor) -> Tensor:
    """Return 32 random bits for each element of the state, as int64 of the shape of `like`.

    Parameters
    ----------
    like
        A tensor; its strides tell each element's place in memory, so that a transposed tensor rounds as its base does.
    t
        The step count, a number or a tensor of shape `()`.
    """
    like = local_part(like)
    return torch.as_tensor(hash32(_places(like) + _key(t)))


def parameter_bits(param: Tensor, t: float | Tensor, place: int = 0) -> Tensor:
    """Return 16 random bits for each element of a parameter of 16 bits, as int64 of its shape.

    Parameters
    ----------
    param
        As it was before the step.
    t
        The step count, a number or a tensor of shape `()`.
    place
        That of the first element, where `param` is a part of a tensor.
    """
    param = local_part(param).detach()
    old = param.view(torch.int16).long() & 0xFFFF
    return torch.as_tensor(hash32(_places(param, place) + hash32(_key(t)) + old * _OLD) >> 16)


def _key(t: float | Tensor) -> Any:
    return hash32(t.long()) if isinstance(t, Tensor) else hash32(int(t))


def _places(like: Tensor, first: int = 0) -> Tensor:
    """Return the place in memory of each element, counted from that of the first."""
    places = torch.arange(first, first + like.numel(), device=like.device)
    return places.as_strided(like.shape, like.stride()) if is_dense(like) else places.view(like.shape)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return `x` in `dtype`, one of the two numbers around it, such that the mean over `bits` is `x`.

    Beyond the largest finite number of `dtype` there is no mean to keep: `x` goes to the nearest number.

    Parameters
    ----------
    x
        Float32 or float64; infinities and NaN stay what they are.
    bits
        Integers of the shape of `x`, or of this rank's part of it, uniform in [0, 2**16).
    dtype
        `torch.bfloat16` or `torch.float16`.

    Examples
    --------
    >>> x = torch.full((4,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> round_stochastically(x, torch.tensor([0, 16384, 32768, 49152])).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    if is_sharded(x):
        return spread_as(round_stochastically(local_part(x), bits, dtype), x)
    x = x.float()
    if dtype == torch.float16:
        return torch.where(_is_between(x, dtype), _raised_to_float16(x.abs(), bits).copysign(x), x).to(dtype)
    raised = (x.view(torch.int32) + bits.to(torch.int32)) & ~0xFFFF
    return torch.where(_is_between(x, dtype), raised.view(torch.float32), x).to(dtype)


def rounds_parameter(stochastic: bool, dtype: torch.dtype) -> bool:
    """Return whether parameters of this type are written rounded at random, by the option `stochastic_rounding`."""
    return stochastic and dtype in NARROW


def _is_between(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether there is a finite number of `dtype` to either side; not so of NaN."""
    return x.abs() < torch.finfo(dtype).max


def _raised_to_float16(size: Tensor, bits: Tensor) -> Tensor:
    """Return absolute values rounded up or down to numbers of float16, as float32."""
    raised = (size.view(torch.int32) + (bits >> 3).to(torch.int32)) & ~0x1FFF
    # Below the smallest normal number there are multiples of 2**-24.
    units = size * 2**24
    whole = units.floor()
    tiny = (whole + ((units - whole) * 2**16 > bits)) * 2**-24
    return torch.where(size < 2**-14, tiny, raised.view(torch.float32))
