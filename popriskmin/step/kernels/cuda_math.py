# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM300
"""The parts of the step in Triton's language: reading and writing, rounding, corrections and masks.

Triton's language has the looks of Python and not its types, hence the lines above this docstring: uppercase arguments
are known at compile time, `T` is the type of a tensor in memory and `C` the type to calculate in.

- The numbers of the update come as bit patterns in integers, since Triton passes every float as float32. See `number`.
- Bfloat16 is read and written as 16-bit integers and rounded by hand, by the rules of torch: so it works alike on
  devices without bfloat16 and in Triton's interpreter, whose own conversion rounds otherwise.
- Divisions and roots are rounded correctly (Triton's `/` and `sqrt` on float32 are not), except that numbers which are
  the same for the whole tensor come as their reciprocals, which is what torch's own kernels do on a GPU.
- Clamps and maxima are comparisons in the direction that lets NaN pass.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # `cuda.unusable` says so; the module itself stays importable for tools that import all modules
    triton = tl = None


def jit(**options: Any) -> Any:
    """Return `triton.jit` with these options, or what does nothing where there is no Triton."""
    return triton.jit(**options) if triton else lambda function: function


@jit()
def number(bits, C: tl.constexpr):
    """Return the number of type `C` whose bit pattern an integer argument holds."""
    if C == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@jit()
def divide(a, b, C: tl.constexpr):
    """Return the quotient, rounded correctly."""
    if C == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@jit()
def root(x, C: tl.constexpr):
    """Return the square root, rounded correctly."""
    if C == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@jit()
def _places(address, start, lanes, T: tl.constexpr, FULL: tl.constexpr):
    """Return pointers to the block's elements of the tensor at an address, 16-bit integers for bfloat16."""
    if T == tl.bfloat16:
        at = address.to(tl.pointer_type(tl.uint16))
    else:
        at = address.to(tl.pointer_type(T))
    if FULL:
        at = tl.multiple_of(at, 16)
    return at + start + lanes


@jit()
def load(address, start, lanes, left, T: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Return a block of the tensor at an address; 0 in the place of elements that do not exist."""
    places = _places(address, start, lanes, T, FULL)
    if FULL:
        x = tl.load(places)
    else:
        x = tl.load(places, mask=lanes < left, other=0)
    if T == tl.bfloat16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(C)


@jit()
def store(address, start, lanes, left, x, T: tl.constexpr, FULL: tl.constexpr):
    """Write a block of the tensor at an address, rounded to nearest."""
    places = _places(address, start, lanes, T, FULL)
    if T == tl.bfloat16:
        x = (_nearest_bfloat16(x.to(tl.float32)).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    elif T == tl.float16:
        x = x.to(tl.float32).to(tl.float16)  # by way of float32, as torch does
    else:
        x = x.to(T)
    if FULL:
        tl.store(places, x)
    else:
        tl.store(places, x, mask=lanes < left)


@jit()
def _nearest_bfloat16(x):
    """Round float32 to a bfloat16 number, to nearest, ties to even; still of type float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + (((bits >> 16) & 1) + 0x7FFF)
    # One certain NaN: another may have its bits in the lower half only, and become infinity.
    return tl.where(x == x, ((bits >> 16) << 16).to(tl.float32, bitcast=True), float("nan"))


@jit()
def stochastic_bfloat16(x, random):
    """Round float32 to one of the bfloat16 numbers around it, see `popriskmin.step.rounding`; still of type float32."""
    raised = ((x.to(tl.uint32, bitcast=True) + random) >> 16) << 16
    # From the largest finite number on, to nearest.
    is_between = tl.abs(x) < 3.3895313892515355e38
    return tl.where(is_between, raised.to(tl.float32, bitcast=True), _nearest_bfloat16(x))


@jit()
def stochastic_float16(x, random):
    """Round float32 to one of the float16 numbers around it, as `stochastic_bfloat16`; still of type float32."""
    size = tl.abs(x)
    raised = (((size.to(tl.uint32, bitcast=True) + (random >> 3)) >> 13) << 13).to(tl.float32, bitcast=True)
    # Below the smallest normal number there are multiples of 2**-24.
    units = tl.where(size < 0.00006103515625, size, 0.0) * 16777216.0
    whole = units.to(tl.int32).to(tl.float32)
    above = (units - whole) * 65536.0 > random.to(tl.float32)
    tiny = (whole + above.to(tl.float32)) * 0.000000059604644775390625
    rounded = tl.where(size < 0.00006103515625, tiny, raised).to(tl.uint32, bitcast=True)
    rounded = rounded | ((x.to(tl.uint32, bitcast=True) >> 31) << 31)  # of -0, too
    return tl.where(size < 65504.0, rounded.to(tl.float32, bitcast=True), x)


@jit()
def store_rounded(address, start, lanes, left, x, key, T: tl.constexpr, FULL: tl.constexpr):
    """Write a block of a parameter of 16 bits, rounded up or down at random; its old values go into the bits."""
    places = address.to(tl.pointer_type(tl.uint16)) + start + lanes
    old = tl.load(places, mask=lanes < left, other=0).to(tl.uint32) * 0x85EBCA77
    random = hash32(start.to(tl.uint32) + lanes.to(tl.uint32) + hash32(key) + old) >> 16
    if T == tl.bfloat16:
        x = stochastic_bfloat16(x.to(tl.float32), random)
    else:
        x = stochastic_float16(x.to(tl.float32), random)
    store(address, start, lanes, left, x, T, FULL)


@jit()
def hash32(x):
    """Return what `popriskmin.step.rounding.hash32` does, of a uint32."""
    x = x * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit()
def as_stored(x, T: tl.constexpr, C: tl.constexpr):
    """Return `x` as it will be read back from a tensor of type `T`: the mask and the step use the stored moments."""
    if T == tl.bfloat16:
        return _nearest_bfloat16(x.to(tl.float32)).to(C)
    else:
        return x.to(T).to(C)


@jit()
def one_minus_power(log_beta, t, C: tl.constexpr):
    """Return `1 - beta**t`; plain powers lose digits where it is small, and Triton has no expm1."""
    x = t * log_beta
    TERMS: tl.constexpr = 20 if C == tl.float64 else 12
    series = 1.0
    for i in tl.static_range(0, TERMS):
        series = series * x * (1.0 / (TERMS + 1 - i)) + 1
    return tl.where(x > -1, -x * series, 1 - tl.exp(x))


@jit()
def corrections(
    t,
    log1,
    log2,
    log_rho,
    ratio,
    weight_rho,
    BIAS: tl.constexpr,
    DEBIAS: tl.constexpr,
    GIVEN: tl.constexpr,
    C: tl.constexpr,
):
    """Return what `popriskmin.mask.corrections` does, reciprocals of the divisors, for a step count on the device."""
    one = t * 0 + 1
    over_bias1, over_root2, over_bias_var, over_centre, blend, k = one, one, one, one, weight_rho, one
    if BIAS:
        bias1 = one_minus_power(log1, t, C)
        over_bias1 = divide(one, bias1, C)
        over_root2 = divide(one, root(one_minus_power(log2, t, C), C), C)
        if DEBIAS:
            k = ratio * divide(2 - bias1, bias1, C)
        if DEBIAS and not GIVEN:
            before = tl.where(t > 1, t - 1, one)
            centre = one_minus_power(log1, before, C)
            over_centre = divide(one, centre, C)
            over_bias_var = divide(one, one_minus_power(log_rho, before, C), C)
            blend = divide(weight_rho, 1 + ratio * divide(2 - centre, centre, C), C)
            blend = tl.where(t > 1, blend, one * 0)
        else:
            over_bias_var = divide(one, one_minus_power(log_rho, t, C), C)
    return over_bias1, over_root2, over_bias_var, over_centre, blend, k


@jit()
def mask(
    signal,
    noise,
    k,
    bound,
    coefficient,
    softness,
    mask_eps,
    min_q,
    MASK: tl.constexpr,
    DEBIAS: tl.constexpr,
    C: tl.constexpr,
):
    """Return `q`, see `popriskmin.mask`; for "snr" and "threshold" the softness holds the coefficient already."""
    signal = tl.where(signal > bound, bound, signal)
    noise = tl.where(noise > bound, bound, noise)
    if DEBIAS and MASK != "threshold":
        signal = signal - noise * k
        signal = tl.where(signal < 0, 0.0, signal)
    if MASK == "snr":
        q = divide(signal, noise * softness + mask_eps + signal, C)
    elif MASK == "soft":
        excess = signal - noise * coefficient
        excess = tl.where(excess < 0, 0.0, excess)
        q = divide(excess, noise * softness + mask_eps + excess, C)
    elif MASK == "threshold":
        q = 1 - root(divide(noise * k * softness + mask_eps, signal + mask_eps, C), C)
        q = tl.where(q < 0, 0.0, q)
    else:
        q = (signal > noise * coefficient).to(C)
    return tl.where(q < min_q, min_q, q)
