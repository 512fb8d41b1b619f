# mypy: ignore-errors
# ruff: noqa: N803, SIM300
"""The step in Triton's language: what `popriskmin.step.kernels.cuda` launches. Nothing else should import this.

`update` is launched with one program for each block of `BLOCK` elements of some tensor. The program finds its tensor
in the table of `popriskmin.step.kernels.cuda_table`.

The launch must be made with `enable_fp_fusion=False`. A fused multiply-add would leave a remainder in
`signal - a * noise` where both are the same number, and the masks would not be shut at the boundary.

See `popriskmin.step.kernels.cuda_math` for the conventions.
"""

from __future__ import annotations

import torch

from popriskmin.step.kernels.cuda_codes import load_codes, store_codes
from popriskmin.step.kernels.cuda_math import (
    as_stored,
    corrections,
    divide,
    hash32,
    jit,
    load,
    mask,
    number,
    one_minus_power,
    root,
    stochastic_bfloat16,
    store,
    store_rounded,
    tl,
    triton,
)

if triton:
    TYPES = {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float64: tl.float64,
    }

# Every number of `update`; integers that Triton is not to compile anew for when they are 1 or divisible by 16. Those of
# the third line are functions of the step count, where it is known on the host; those of the fourth are what to
# calculate them from, where it lies on the device.
NUMBERS = [
    *["t", "lr", "weight_decay", "weight1", "beta2", "weight2", "rho", "eps", "mask_eps", "min_q", "bound", "softness"],
    *["coefficient", "loading", "loading_sq"],
    *["over_bias1", "over_root2", "over_bias_var", "over_centre", "blend", "k"],
    *["log1", "log2", "log_rho", "ratio", "weight_rho", "open_until"],
    "count",  # the lower 32 bits of the step count itself, which seeds what is rounded at random
]


@jit()
def _advance(
    w,
    g,
    m,
    v,
    s,
    z,
    weight_decay,
    weight1,
    beta2,
    weight2,
    rho,
    over_centre,
    blend,
    COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DEBIAS: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_END: tl.constexpr,
):
    """Return `m`, `v` and `s` of this step, not yet rounded to what stores them; `z` is the variance if it is given."""
    if MAXIMIZE:
        g = -g
    if COUPLED:
        g = g + w * weight_decay
    if GIVEN:
        s = s * rho + z * blend
    else:
        if DEBIAS:
            deviation = g - m * over_centre
        else:
            deviation = g - m
        # Not a product with 0: at the first step of `debias` a square that overflows would make it NaN.
        s = tl.where(blend > 0, s * rho + deviation * blend * deviation, s)
    # The two forms of torch's lerp, which differ in where infinities become NaN.
    if FROM_END:
        m = g - (g - m) * (1 - weight1)
    else:
        m = m + (g - m) * weight1
    v = v * beta2 + g * weight2 * g
    return m, v, s


@jit()
def _moved(
    row,
    w,
    m,
    v,
    noise,
    q,
    start,
    lanes,
    left,
    t,
    lr,
    weight_decay,
    eps,
    mask_eps,
    min_q,
    bound,
    softness,
    coefficient,
    loading,
    loading_sq,
    over_bias1,
    over_root2,
    k,
    open_until,
    W: tl.constexpr,
    C: tl.constexpr,
    PHASE: tl.constexpr,
    MASK: tl.constexpr,
    DECOUPLED: tl.constexpr,
    DEBIAS: tl.constexpr,
    MASK_DECAY: tl.constexpr,
    SHRINK: tl.constexpr,
    TENSOR_STEPS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return the weights after decay, step and pull."""
    if DECOUPLED:
        decay = lr * weight_decay
        if MASK_DECAY:
            w = w - w * (decay * q)
        else:
            w = w * (1 - decay)
    denominator = root(v, C) * over_root2 + eps
    w = w - divide((q * m) * (lr * over_bias1), denominator, C)
    if SHRINK != "none":
        at_o = tl.load(row + 9)
        if at_o != 0:
            noise = tl.where(noise > bound, bound, noise)
            if PHASE == "all" and MASK != "none":
                q = mask(noise * loading_sq, noise, k, bound, coefficient, softness, mask_eps, min_q, MASK, DEBIAS, C)
                if TENSOR_STEPS:
                    q = tl.where(t <= open_until, 1.0, q)
            pull = divide(q * (root(noise, C) * loading), denominator, C) * lr
            if TENSOR_STEPS:
                pull = tl.where(t > 1, pull, 0.0)
            origin = tl.zeros_like(w)
            if SHRINK == "start":
                origin = load(at_o, start, lanes, left, W, C, FULL)
            distance = w - origin
            w = tl.where(tl.abs(distance) <= pull, origin, w - tl.where(distance < 0, -pull, pull))
    return w


@jit()
def _store_moments(
    at_m,
    at_v,
    at_s,
    start,
    lanes,
    left,
    m,
    v,
    s,
    key,
    M: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write the moments, and return them as they are stored."""
    if S == tl.bfloat16:
        random = hash32(start.to(tl.uint32) + lanes.to(tl.uint32) + key)
        v = stochastic_bfloat16(v.to(tl.float32), random >> 16).to(C)
        s = stochastic_bfloat16(s.to(tl.float32), random & 0xFFFF).to(C)
    m, v, s = as_stored(m, M, C), as_stored(v, V, C), as_stored(s, S, C)
    store(at_m, start, lanes, left, m, M, FULL)
    store(at_v, start, lanes, left, v, V, FULL)
    store(at_s, start, lanes, left, s, S, FULL)
    return m, v, s


@jit()
def _block(
    row,
    at_g,
    at_z,
    start,
    lanes,
    left,
    partials,
    first,
    block,
    t,
    key,
    lr,
    weight_decay,
    weight1,
    beta2,
    weight2,
    rho,
    eps,
    mask_eps,
    min_q,
    bound,
    softness,
    coefficient,
    loading,
    loading_sq,
    over_bias1,
    over_root2,
    over_bias_var,
    over_centre,
    blend,
    k,
    open_until,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PHASE: tl.constexpr,
    MASK: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DEBIAS: tl.constexpr,
    GIVEN: tl.constexpr,
    MASK_DECAY: tl.constexpr,
    SHRINK: tl.constexpr,
    FROM_END: tl.constexpr,
    ROUND: tl.constexpr,
    TENSOR_STEPS: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Step one block. With `FULL` all its elements exist and each tensor begins at a multiple of 16 bytes."""
    at_w, at_m, at_v = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    at_s, at_x = tl.load(row + 6), tl.load(row + 7)
    if CODED:
        m, v, s = load_codes(at_m, start, lanes, left, C, FULL)
    else:
        m = load(at_m, start, lanes, left, M, C, FULL)
    w = m
    if PHASE != "advance" or COUPLED:
        w = load(at_w, start, lanes, left, P, C, FULL)

    if PHASE == "move":
        if AMSGRAD:
            v = as_stored(load(at_x, start, lanes, left, X, C, FULL), V, C)
        elif not CODED:
            v = load(at_v, start, lanes, left, V, C, FULL)
        q = tl.load(partials + first)
        if not CODED:
            s = v
            if SHRINK != "none":
                s = load(at_s, start, lanes, left, S, C, FULL)
    else:
        g = load(at_g, start, lanes, left, G, C, FULL)
        if not CODED:
            v = load(at_v, start, lanes, left, V, C, FULL)
            s = load(at_s, start, lanes, left, S, C, FULL)
        z = s
        if GIVEN:
            z = load(at_z, start, lanes, left, Z, C, FULL)
        m, v, s = _advance(
            w, g, m, v, s, z, weight_decay, weight1, beta2, weight2, rho, over_centre, blend,
            COUPLED, MAXIMIZE, DEBIAS, GIVEN, FROM_END,
        )  # fmt: skip
        if CODED:
            m, v, s = store_codes(at_m, start, lanes, left, m, v, s, C, FULL)
        else:
            m, v, s = _store_moments(at_m, at_v, at_s, start, lanes, left, m, v, s, key, M, V, S, C, FULL)
        if AMSGRAD:
            old = as_stored(load(at_x, start, lanes, left, X, C, FULL), V, C)
            v = tl.where((old > v) | (old != old), old, v)
            store(at_x, start, lanes, left, v, X, FULL)
        signal = m * over_bias1
        signal = signal * signal
        noise = s * over_bias_var
        if PHASE == "advance":
            # Multiplied first, by a power of two, so that the sum of squares that are still finite is.
            share = tl.where(lanes < left, 1.0 / BLOCK, 0.0).to(C)
            tl.store(partials + block, tl.sum(signal * share))
            tl.store(partials + tl.num_programs(0) + block, tl.sum(noise * share))
        q = 1.0
        if PHASE == "all" and MASK != "none":
            q = mask(signal, noise, k, bound, coefficient, softness, mask_eps, min_q, MASK, DEBIAS, C)
            if TENSOR_STEPS:
                q = tl.where(t <= open_until, 1.0, q)

    if PHASE != "advance":
        w = _moved(
            row, w, m, v, s * over_bias_var, q, start, lanes, left, t, lr, weight_decay, eps, mask_eps, min_q, bound,
            softness, coefficient, loading, loading_sq, over_bias1, over_root2, k, open_until, W, C, PHASE, MASK,
            DECOUPLED, DEBIAS, MASK_DECAY, SHRINK, TENSOR_STEPS, FULL,
        )  # fmt: skip
        if ROUND:
            store_rounded(at_w, start, lanes, left, w, key, P, FULL)
        else:
            store(at_w, start, lanes, left, w, P, FULL)


@jit(do_not_specialize=[*NUMBERS, "tensors"])
def update(
    table,
    gradients,
    partials,
    lr_at,
    tensors,
    t,
    lr,
    weight_decay,
    weight1,
    beta2,
    weight2,
    rho,
    eps,
    mask_eps,
    min_q,
    bound,
    softness,
    coefficient,
    loading,
    loading_sq,
    over_bias1,
    over_root2,
    over_bias_var,
    over_centre,
    blend,
    k,
    log1,
    log2,
    log_rho,
    ratio,
    weight_rho,
    open_until,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    PHASE: tl.constexpr,
    MASK: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BIAS: tl.constexpr,
    DEBIAS: tl.constexpr,
    GIVEN: tl.constexpr,
    MASK_DECAY: tl.constexpr,
    SHRINK: tl.constexpr,
    FROM_END: tl.constexpr,
    ROUND: tl.constexpr,
    TENSOR_STEPS: tl.constexpr,
    TENSOR_LR: tl.constexpr,
    CODED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one block of one tensor: wholly, or the moments only ("advance"), or the parameter only ("move")."""
    block = tl.program_id(0).to(tl.int64)
    owner = tl.load(table + tensors.to(tl.int64) * COLUMNS + block)
    row = table + owner * COLUMNS
    n, first = tl.load(row), tl.load(row + 1)
    at_g = tl.load(gradients + owner)
    at_z = at_g
    if GIVEN:
        at_z = tl.load(gradients + tensors + owner)
    aligned = (tl.load(row + 2) != 0) & (((at_g | at_z) & 15) == 0)
    start = (block - first) * BLOCK
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    if CODED:
        lanes = tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]

    over_bias1, over_root2 = number(over_bias1, C), number(over_root2, C)
    over_bias_var, over_centre = number(over_bias_var, C), number(over_centre, C)
    t, blend, k = number(t, C), number(blend, C), number(k, C)
    count = count.to(tl.uint32)
    if TENSOR_STEPS:
        taken = tl.load(tl.load(row + 8).to(tl.pointer_type(T)))
        t, count = taken.to(C), taken.to(tl.int64).to(tl.uint32)
        over_bias1, over_root2, over_bias_var, over_centre, blend, k = corrections(
            t, number(log1, C), number(log2, C), number(log_rho, C), number(ratio, C), number(weight_rho, C),
            BIAS, DEBIAS, GIVEN, C,
        )  # fmt: skip
    if TENSOR_LR:
        lr = tl.load(lr_at).to(C)
    else:
        lr = number(lr, C)
    weight_decay, weight1, beta2 = number(weight_decay, C), number(weight1, C), number(beta2, C)
    weight2, rho, eps = number(weight2, C), number(rho, C), number(eps, C)
    mask_eps, min_q, bound = number(mask_eps, C), number(min_q, C), number(bound, C)
    open_until = number(open_until, C)
    softness, coefficient = number(softness, C), number(coefficient, C)
    loading, loading_sq = number(loading, C), number(loading_sq, C)
    key = hash32(count)
    # Compiled twice: only where no element is left out are wide loads and stores possible.
    if aligned & (left == BLOCK):
        _block(
            row, at_g, at_z, start, lanes, left, partials, first, block, t, key, lr, weight_decay, weight1, beta2,
            weight2, rho, eps, mask_eps, min_q, bound, softness, coefficient, loading, loading_sq, over_bias1,
            over_root2, over_bias_var, over_centre, blend, k, open_until, P, G, M, V, S, X, Z, W, C, PHASE, MASK,
            AMSGRAD, COUPLED, DECOUPLED, MAXIMIZE, DEBIAS, GIVEN, MASK_DECAY, SHRINK, FROM_END, ROUND, TENSOR_STEPS,
            CODED, BLOCK, True,
        )  # fmt: skip
    else:
        _block(
            row, at_g, at_z, start, lanes, left, partials, first, block, t, key, lr, weight_decay, weight1, beta2,
            weight2, rho, eps, mask_eps, min_q, bound, softness, coefficient, loading, loading_sq, over_bias1,
            over_root2, over_bias_var, over_centre, blend, k, open_until, P, G, M, V, S, X, Z, W, C, PHASE, MASK,
            AMSGRAD, COUPLED, DECOUPLED, MAXIMIZE, DEBIAS, GIVEN, MASK_DECAY, SHRINK, FROM_END, ROUND, TENSOR_STEPS,
            CODED, BLOCK, False,
        )  # fmt: skip


@jit(
    do_not_specialize=[
        *["blocks", "mask_eps", "min_q", "bound", "softness", "coefficient", "k", "log1", "ratio", "open_until"]
    ]
)
def pool(
    table,
    partials,
    blocks,
    mask_eps,
    min_q,
    bound,
    softness,
    coefficient,
    k,
    log1,
    ratio,
    open_until,
    MASK: tl.constexpr,
    DEBIAS: tl.constexpr,
    T: tl.constexpr,
    TENSOR_STEPS: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Turn the sums over the blocks of one tensor, each over `BLOCK`, into its `q`, left in place of the first sum."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    n, first = tl.load(row), tl.load(row + 1)
    count = (n + BLOCK - 1) // BLOCK
    lanes = tl.arange(0, CHUNK)
    signals, noises = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.float64)
    for start in range(0, count, CHUNK):
        places = partials + first + start + lanes
        signals += tl.load(places, mask=start + lanes < count, other=0).to(tl.float64)
        noises += tl.load(places + blocks, mask=start + lanes < count, other=0).to(tl.float64)
    signal = (tl.sum(signals, axis=0) * BLOCK / n.to(tl.float64)).to(C)
    noise = (tl.sum(noises, axis=0) * BLOCK / n.to(tl.float64)).to(C)
    k = number(k, C)
    if TENSOR_STEPS:
        t = tl.load(tl.load(row + 8).to(tl.pointer_type(T))).to(C)
        if DEBIAS:
            bias1 = one_minus_power(number(log1, C), t, C)
            k = number(ratio, C) * divide(2 - bias1, bias1, C)
    q = mask(signal, noise, k, number(bound, C), number(coefficient, C), number(softness, C),
              number(mask_eps, C), number(min_q, C), MASK, DEBIAS, C)  # fmt: skip
    if TENSOR_STEPS:
        q = tl.where(t <= number(open_until, C), 1.0, q)
    tl.store(partials + first, q, mask=n > 0)  # a tensor without elements has no blocks


@jit()
def trial(place):
    """Write a number, to see whether kernels can be compiled and launched."""
    tl.store(place, 1.0)
