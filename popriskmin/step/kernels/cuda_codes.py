# mypy: ignore-errors
# ruff: noqa: N803
"""State in 8-bit blocks in Triton's language: `popriskmin.step.codes` says what the codes mean.

Scalars are of shape (blocks, 128), numbers of a block of shape (blocks, 1). See `popriskmin.step.kernels.cuda_math` for
the conventions.
"""

from __future__ import annotations

from popriskmin.step.kernels.cuda_math import hash32, jit, tl


@jit()
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@jit()
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@jit()
def _root(square, POWER: tl.constexpr):
    """Return the power of two next to `sqrt(v)`, or with -1 its inverse."""
    half = ((_bits(square) >> 23) - 127) >> 1
    return _float((127 + POWER * half) << 23)


@jit()
def _square(c, header):
    """Return `v` or `s` of a code."""
    bits = ((header >> 5) - 1 + c) << (header & 31)
    bits = tl.where(c > 253, 0x7F800000 + ((c & 1) << 22), bits)
    return _float(tl.where(c == 0, 0, bits))


@jit()
def _mean(c, header, square):
    """Return `m` of a code, from -128 to 127."""
    size = tl.abs(c)
    shift = header & 31
    lowest = (header >> 5) << 23
    x = _float((size + (lowest >> shift)) << shift) - _float(lowest)
    x = tl.where(size > 126, float("inf"), x)
    x = tl.where(c < 0, -x, x)
    return tl.where(c == -128, float("nan"), x) * _root(square, 1)


@jit()
def _code_of_square(x, random):
    """Return the code of `v` or `s`, and the block's header."""
    bits = _bits(x)
    live = (bits > 0) & (bits < 0x7F800000)
    most = tl.max(tl.where(live, bits, 0), axis=1)[:, None]
    least = tl.min(tl.where(live, bits, 0x7F800000), axis=1)[:, None]
    least = tl.where(least > most, most, least)
    shift = tl.zeros_like(most) + 7
    for k in tl.static_range(7, 20):
        shift += (((most - least) >> k) > 250).to(tl.int32)
    lowest, highest = least >> shift, (most >> shift) - 251
    base = tl.where(highest > lowest, highest, lowest)
    c = ((bits + _scaled(random, shift)) >> shift) - base + 1
    c = tl.where(c < 1, 1, tl.where(c > 253, 253, c))
    c = tl.where(live, c, 0)
    c = tl.where(bits == 0x7F800000, 254, c)
    return tl.where(x != x, 255, c), (base << 5) | shift


@jit()
def _code_of_mean(mean, random, square):
    """Return the code of `m` beside the `v` that is stored, and the block's header."""
    x = mean * _root(square, -1)
    size = tl.abs(x)
    live = size < float("inf")
    # Of the bits, which are in order: a maximum of floats would lose NaN on its way.
    most = _float(tl.max(tl.where(live, _bits(size), 0), axis=1)[:, None])
    top = _bits(most) >> 23
    wide = (top > 129).to(tl.int32)
    shift = wide + 18
    lowest = top - 3 - 4 * wide
    lowest = tl.where(lowest < 1, 1, lowest)
    lowest += (_steps(most, lowest, shift, 0) > 125).to(tl.int32)
    c = _steps(size, lowest, shift, _scaled(random, shift))
    c = tl.where(c < 0, 0, tl.where(c > 126, 126, c))
    c = tl.where(live, c, 127)
    c = tl.where(x < 0, -c, c)
    return tl.where(x != x, -128, c), (lowest << 5) | shift


@jit()
def _steps(size, lowest, shift, random):
    start = lowest << 23
    return ((_bits(size + _float(start)) + random) >> shift) - (start >> shift)


@jit()
def _scaled(random, shift):
    """Return the upper ones of 32 random bits, so many as `shift` says."""
    return (random >> (32 - shift).to(tl.uint32)).to(tl.int32)


@jit()
def _places(address, start, lanes, FULL: tl.constexpr):
    """Return pointers to the codes of `m` and to the blocks' headers, and the first lane of each block."""
    at = address.to(tl.pointer_type(tl.uint8))
    if FULL:
        at = tl.multiple_of(at, 16)
    rows = tl.arange(0, lanes.shape[0])[:, None]
    blocks = at + (start // 128 + rows) * 400
    return blocks + tl.arange(0, 128)[None, :], (blocks + 384).to(tl.pointer_type(tl.int32)), rows * 128


@jit()
def _load(places, there, FULL: tl.constexpr):
    if FULL:
        return tl.load(places)
    else:
        return tl.load(places, mask=there, other=0)


@jit()
def _store(places, x, there, FULL: tl.constexpr):
    if FULL:
        tl.store(places, x)
    else:
        tl.store(places, x, mask=there)


@jit()
def load_codes(address, start, lanes, left, C: tl.constexpr, FULL: tl.constexpr):
    """Return `m`, `v` and `s`; 0 in the place of scalars that do not exist."""
    codes, heads, firsts = _places(address, start, lanes, FULL)
    row = firsts < left
    there = row & (lanes >= 0)
    c = _load(codes, there, FULL).to(tl.int8, bitcast=True).to(tl.int32)
    v = _square(_load(codes + 128, there, FULL).to(tl.int32), _load(heads + 1, row, FULL))
    s = _square(_load(codes + 256, there, FULL).to(tl.int32), _load(heads + 2, row, FULL))
    return _mean(c, _load(heads, row, FULL), v).to(C), v.to(C), s.to(C)


@jit()
def store_codes(address, start, lanes, left, m, v, s, C: tl.constexpr, FULL: tl.constexpr):
    """Write `m`, `v` and `s`, rounded stochastically, and return what is then stored."""
    codes, heads, firsts = _places(address, start, lanes, FULL)
    row = firsts < left
    there = row & (lanes >= 0)
    counter = _load(heads + 3, row, FULL) + 1
    random = hash32((start + lanes).to(tl.uint32) + hash32(counter.to(tl.uint32, bitcast=True)))
    first = (counter == 1).to(tl.uint32)
    random = random * (1 - first) + first * 0x8000FFFF
    cv, of_v = _code_of_square(v.to(tl.float32), random)
    cs, of_s = _code_of_square(s.to(tl.float32), random << 16)
    v, s = _square(cv, of_v), _square(cs, of_s)
    cm, of_m = _code_of_mean(m.to(tl.float32), random << 8, v)
    m = _mean(cm, of_m, v)
    _store(codes, (cm & 255).to(tl.uint8), there, FULL)
    _store(codes + 128, cv.to(tl.uint8), there, FULL)
    _store(codes + 256, cs.to(tl.uint8), there, FULL)
    _store(heads, of_m, row, FULL)
    _store(heads + 1, of_v, row, FULL)
    _store(heads + 2, of_s, row, FULL)
    _store(heads + 3, counter, row, FULL)
    return m.to(C), v.to(C), s.to(C)
