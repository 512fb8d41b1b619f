"""`m`, `v` and `s` in 8 bits each: how a block of 128 scalars is coded, for `state_dtype="8bit"`.

A code is an 8-bit window on a float32 number: upper bits of its pattern, from which a base is
taken off. A block has its own base and as many fraction bits as its range allows, so decoding
is an addition and a shift, exact on every device.

- `v` and `s` enter as roots and span many orders of magnitude. Code 0 is zero, 1 to 253 count
  upwards from the block's smallest number, 254 is infinity, 255 NaN. A step of the code is at
  most 1/32 of the number where `v` spans 7 octaves in the block, and 1/8 where it spans 31.
  Beyond that the smallest are raised, which makes steps smaller and masks tighter, never the
  other way round.
- `m` is signed, crosses zero, and is small beside `sqrt(v)` where it is noise. So it is coded
  in units of a power of two next to its own `sqrt(v)`, as stored: a small `m` beside a large
  one in its block keeps its digits, and opens no mask. Of `|m| + lo` seven bits are kept,
  with `lo` an 8th of the block's largest, or a 128th where that is above 8: steps are even
  below `lo` and grow with `|m|` above it. The sign is two's complement's; 127 and -127 are
  infinities, -128 is NaN.

An exponential average with decay 0.999 moves by less than a step, so all three are rounded
stochastically (see `popriskmin.step.rounding`). The random bits are a hash of the element's
place and of a counter in the block itself, which goes on where a float32 step count stands
still, and is saved with it. Not at the first step: there `m**2` equals `s`, the boundary of
the masks, and what were rounded at random would open many that are shut. So `s` is rounded
up, `m` towards zero, and `v` to nearest.

A block takes 400 bytes: the codes of `m`, `v` and `s`, three headers and the counter. The
blocks of a tensor have shape (1, blocks, 400), and those of one that is sharded over ranks
(rows, blocks of a row, 400): no rank's part cuts a block.
`popriskmin/step/kernels/cpu_codes.h` does the same in C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from popriskmin.step.rounding import hash32

BLOCK = 128  # scalars that share a base and a number of fraction bits
BYTES = 3 * BLOCK + 16  # of a block

INFINITY = 0x7F800000
FRACTION = 23  # fraction bits of float32
LEAST_SHIFT, MOST_SHIFT = 7, 20  # bits that a code of `v` and `s` leaves out
LARGEST = 253  # code of a finite `v` or `s`
LARGEST_MEAN = 126  # code of a finite `|m|`
WIDE = 127 + 2  # exponent of a `|m|` from which on the block gets a wide range


FIRST = 0x8000FFFF  # the random bits of the first step: upper ones for `v`, lower for `s`, middle for `m`


class Moments(NamedTuple):
    """`m`, `v` and `s` of some blocks, float32 of shape (blocks, 128)."""

    mean: Tensor
    square: Tensor
    variance: Tensor


def are_codes(state: Tensor) -> bool:
    """Return whether a tensor that stands for `m`, `v` or `s` holds blocks of all three."""
    return state.dtype == torch.uint8


def blocks_of(scalars: int) -> int:
    """Return how many blocks so many scalars take."""
    return -(-scalars // BLOCK)


def shape_of_codes(shape: Sequence[int], in_rows: bool) -> tuple[int, int, int]:
    """Return the shape of a tensor's blocks: of the whole tensor, or of each row of its first dimension."""
    if in_rows:
        return shape[0], blocks_of(math.prod(shape[1:])), BYTES
    return 1, blocks_of(math.prod(shape)), BYTES


def are_codes_of(codes: Tensor, param: Tensor) -> bool:
    """Return whether these are blocks of a tensor of this shape."""
    return tuple(codes.shape) in [shape_of_codes(param.shape, in_rows) for in_rows in (False, param.dim() > 1)]


class Part(NamedTuple):
    """Scalars of a tensor, seen as (rows, length), that begin with a block."""

    rows: slice
    columns: slice
    place: int  # of the first scalar, in the tensor
    padded: int  # the same, with every row filled up to whole blocks

    def of(self, x: Tensor) -> Tensor:
        """Return these of a tensor of shape (rows, length)."""
        return x[self.rows, self.columns]

    def blocks(self, codes: Tensor) -> Tensor:
        """Return their blocks, of shape (blocks, 400)."""
        return codes[self.rows, self.columns.start // BLOCK : blocks_of(self.columns.stop)].view(-1, BYTES)

    def without_padding(self, x: Tensor) -> Tensor:
        """Return of decoded scalars, of shape (blocks, 128), those that exist, as `of` does."""
        return x.view(self.rows.stop - self.rows.start, -1)[:, : self.columns.stop - self.columns.start]


def parts_of(rows: int, length: int, size: int) -> Iterator[Part]:
    """Yield all scalars of a tensor, about `size` at a time, a multiple of 128: some rows, or a stretch of one."""
    padded = blocks_of(length) * BLOCK
    several = max(1, size // max(padded, 1))
    for top in range(0, rows, several):
        for left in range(0, length, size):
            some, columns = slice(top, min(top + several, rows)), slice(left, min(left + size, length))
            yield Part(some, columns, top * length + left, top * padded + left)


def decode(codes: Tensor) -> Moments:
    """Return what uint8 blocks, of shape (blocks, 400), stand for."""
    head = codes[:, 3 * BLOCK :].view(torch.int32)
    mean, square, variance = codes[:, : 3 * BLOCK].view(-1, 3, BLOCK).unbind(1)
    v = _decode_square(square, head[:, 1:2])
    return Moments(_decode_mean(mean, head[:, :1], v), v, _decode_square(variance, head[:, 2:3]))


def encode(moments: Moments, codes: Tensor, place: int, stochastic: bool = True) -> None:
    """Write moments into uint8 blocks.

    Parameters
    ----------
    moments
        In float32; padding of the last block is zero.
    codes
        Of shape (blocks, 400). With `stochastic` their counters go up by 1.
    place
        The place in the tensor of the first scalar.
    stochastic
        False rounds to nearest: for numbers that come from elsewhere.
    """
    head = codes[:, 3 * BLOCK :].view(torch.int32)
    if stochastic:
        head[:, 3] += 1
        places = torch.arange(place, place + moments.mean.numel(), device=codes.device).view(-1, BLOCK)
        drawn = hash32(places + hash32(head[:, 3:].long() & 0xFFFFFFFF)).to(torch.int64)
        bits = torch.where(head[:, 3:] == 1, FIRST, drawn)
    else:
        bits = torch.full_like(moments.mean, 0x80808080, dtype=torch.int64)
    # The bits of `m` overlap with those of both, but roundings go by the upper ones.
    for_square, for_variance, for_mean = bits, (bits << 16) & 0xFFFFFFFF, (bits << 8) & 0xFFFFFFFF
    square, header_of_square = _encode_square(moments.square, for_square)
    variance, header_of_variance = _encode_square(moments.variance, for_variance)
    mean, header_of_mean = _encode_mean(moments.mean, for_mean, _decode_square(square, header_of_square))
    codes[:, : 3 * BLOCK].view(-1, 3, BLOCK).copy_(torch.stack([mean, square, variance], 1))
    head[:, :3] = torch.cat([header_of_mean, header_of_square, header_of_variance], 1)


def _decode_square(codes: Tensor, header: Tensor) -> Tensor:
    c = codes.to(torch.int32)
    bits = ((header >> 5) - 1 + c) << (header & 31)
    bits = torch.where(c > LARGEST, INFINITY + ((c & 1) << 22), bits)
    return torch.where(c == 0, 0, bits).view(torch.float32)


def _encode_square(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, and a header for each block."""
    bits = x.view(torch.int32)
    live = (bits > 0) & (bits < INFINITY)
    most = torch.where(live, bits, 0).amax(1, keepdim=True)
    least = torch.where(live, bits, INFINITY).amin(1, keepdim=True).minimum(most)
    # The fewest bits left out with which the span, one more for rounding up, fits.
    shift = torch.full_like(most, LEAST_SHIFT)
    for k in range(LEAST_SHIFT, MOST_SHIFT):
        shift += ((most - least) >> k) > LARGEST - 3
    base = torch.maximum(least >> shift, (most >> shift) - (LARGEST - 2))
    c = ((bits + _scaled(random, shift)) >> shift) - base + 1
    c = torch.where(live, c.clamp(1, LARGEST), 0)
    c = torch.where(bits == INFINITY, 254, c)
    c = torch.where(x.isnan(), 255, c)
    return c.to(torch.uint8), base << 5 | shift


def _decode_mean(codes: Tensor, header: Tensor, square: Tensor) -> Tensor:
    c = codes.view(torch.int8).to(torch.int32)
    size, shift, lowest = c.abs(), header & 31, (header >> 5) << FRACTION
    bits = (size + (lowest >> shift)) << shift
    x = bits.view(torch.float32) - lowest.view(torch.float32)
    x = torch.where(size > LARGEST_MEAN, torch.inf, x)
    x = torch.where(c < 0, -x, x)
    return torch.where(c == -128, torch.nan, x) * _root(square, 1)


def _encode_mean(mean: Tensor, random: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, and a header for each block, of `m` beside the `v` that is stored."""
    x = mean * _root(square, -1)
    size = x.abs()
    live = size.isfinite()
    most = torch.where(live, size, 0).amax(1, keepdim=True)
    top = most.view(torch.int32) >> FRACTION
    wide = (top > WIDE).to(torch.int32)
    shift = wide + 18
    lowest = (top - 3 - 4 * wide).clamp(min=1)
    # A step is left for rounding up.
    lowest = lowest + (_steps(most, lowest, shift) > LARGEST_MEAN - 1)
    start = lowest << FRACTION
    c = (((size + start.view(torch.float32)).view(torch.int32) + _scaled(random, shift)) >> shift) - (start >> shift)
    c = torch.where(live, c.clamp(0, LARGEST_MEAN), 127)
    c = torch.where(x < 0, -c, c)
    c = torch.where(x.isnan(), -128, c)
    return c.to(torch.int8).view(torch.uint8), lowest << 5 | shift


def _root(square: Tensor, power: int) -> Tensor:
    """Return the power of two next to `sqrt(v)`, or with `power` -1 its inverse."""
    half = ((square.view(torch.int32) >> FRACTION) - 127) >> 1
    return ((127 + power * half) << FRACTION).view(torch.float32)


def _steps(size: Tensor, lowest: Tensor, shift: Tensor) -> Tensor:
    start = lowest << FRACTION
    return ((size + start.view(torch.float32)).view(torch.int32) >> shift) - (start >> shift)


def _scaled(random: Tensor, shift: Tensor) -> Tensor:
    """Return the upper ones of 32 random bits, so many as `shift` says."""
    return (random >> (32 - shift)).to(torch.int32)
