/* The arithmetic of PRM's step on the CPU, over stretches of memory that lie in the first cache.
 *
 * A template: cpu.c includes this file once for every pair of an arithmetic type REAL and an instruction set TARGET, and
 * NAME(x) gives x a name of its own. Every function does one pass, in loops that compilers turn into vector code.
 * Nothing may contract a multiplication and an addition into one rounding (-ffp-contract=off): at the boundary the soft
 * mask must be exactly 0, and every instruction set must give the same bits.
 */

/* The constants of `numbers` in the arithmetic type. */
typedef struct {
    REAL sign, coupled_decay, pull, beta2, one_minus_beta2, rho, blend, inv_centre, given_rho, given_blend;
    REAL inv_bias1, inv_bias_var, k, coefficient, softness, mask_eps, min_q, bound;
    REAL keep, masked_decay, step_size, inv_root_bias2, eps, lr, loading, loading_squared;
    int debias, has_blend, from_grad;
} NAME(constants);

static NAME(constants) NAME(convert)(const numbers *x) {
    NAME(constants) c;
    c.sign = (REAL)x->sign;
    c.coupled_decay = (REAL)x->coupled_decay;
    /* As torch's lerp: from the nearer end, which keeps the digits of a small gradient after a large mean. */
    c.from_grad = x->beta1 <= 0.5;
    c.pull = (REAL)(c.from_grad ? -x->beta1 : 1 - x->beta1);
    c.beta2 = (REAL)x->beta2;
    c.one_minus_beta2 = (REAL)x->one_minus_beta2;
    c.rho = (REAL)x->rho;
    c.blend = (REAL)x->blend;
    c.given_rho = (REAL)x->given_rho;
    c.given_blend = (REAL)x->given_blend;
    /* Whether the loops must look at k, or at whether there is anything to blend in. */
    c.debias = x->k > 0 || x->blend == 0;
    c.has_blend = x->blend != 0;
    c.inv_centre = (REAL)x->inv_centre;
    c.inv_bias1 = (REAL)x->inv_bias1;
    c.inv_bias_var = (REAL)x->inv_bias_var;
    c.k = (REAL)x->k;
    c.coefficient = (REAL)x->coefficient;
    /* The snr mask multiplies the noise by both, the threshold by the variance of the mean too. */
    double factor = x->mask == MASK_SNR ? x->coefficient : x->mask == MASK_THRESHOLD ? x->coefficient * x->k : 1;
    c.softness = (REAL)(x->softness * factor);
    /* As popriskmin.mask.floor and popriskmin.mask.largest. */
    c.mask_eps = (REAL)(x->mask_eps > (double)REAL_TINY ? x->mask_eps : (double)REAL_TINY);
    c.bound = (REAL)(REAL_MAX / 4);
    c.min_q = (REAL)x->min_q;
    c.keep = (REAL)x->keep;
    c.masked_decay = (REAL)x->masked_decay;
    c.step_size = (REAL)x->step_size;
    c.inv_root_bias2 = (REAL)x->inv_root_bias2;
    c.eps = (REAL)x->eps;
    c.lr = (REAL)x->lr;
    c.loading = (REAL)x->loading;
    c.loading_squared = (REAL)(x->loading * x->loading);
    return c;
}

/* Comparisons are written so that NaN passes through, as it does in torch's clamp and maximum. */
TARGET INLINE REAL NAME(at_most)(REAL x, REAL bound) { return x > bound ? bound : x; }
TARGET INLINE REAL NAME(not_negative)(REAL x) { return x < 0 ? 0 : x; }

/* q from signal and noise; `mask` and `debias` are constants wherever speed counts, so only one branch is left. */
TARGET INLINE REAL NAME(mask)(int mask, int debias, REAL signal, REAL noise, const NAME(constants) *c) {
    signal = NAME(at_most)(signal, c->bound);
    noise = NAME(at_most)(noise, c->bound);
    if (debias && mask != MASK_THRESHOLD)
        signal = NAME(not_negative)(signal - noise * c->k);
    REAL q = 1;
    if (mask == MASK_SNR)
        q = signal / (noise * c->softness + c->mask_eps + signal);
    if (mask == MASK_SOFT) {
        REAL excess = NAME(not_negative)(signal - noise * c->coefficient);
        q = excess / (noise * c->softness + c->mask_eps + excess);
    }
    if (mask == MASK_HARD)
        q = signal > noise * c->coefficient ? 1 : 0;
    if (mask == MASK_THRESHOLD)
        q = NAME(not_negative)(1 - SQRT((noise * c->softness + c->mask_eps) / (signal + c->mask_eps)));
    return q < c->min_q ? c->min_q : q;
}

TARGET static REAL NAME(mask_of_means)(int mask, double signal, double noise, const NAME(constants) *c) {
    return NAME(mask)(mask, c->debias, (REAL)signal, (REAL)noise, c);
}

/* s to this step where the variances of the gradients are given; it is in the first cache when the loops read it. */
TARGET static void NAME(blend_in)(int64_t n, REAL *restrict s, const REAL *restrict z, const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++)
        s[i] = s[i] * c.given_rho + z[i] * c.given_blend;
}

/* The same where s is stored in bfloat16. The loops round it once more, which does nothing to it. */
TARGET static void NAME(blend_in_narrow)(int64_t n, uint32_t place, uint16_t *restrict s, const REAL *restrict z,
                                         const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++) {
        REAL variance = (REAL)from_bfloat16(s[i]) * c.given_rho + z[i] * c.given_blend;
        s[i] = (uint16_t)(bits_of(round_stochastically((float)variance, hash32(place + (uint32_t)i) & 0xFFFF)) >> 16);
    }
}

/* m, v, s to this step. Squares are multiplied by their weight first, as torch does: they overflow the later for it. */
TARGET INLINE void NAME(advance_loop)(int coupled, int64_t n, const REAL *restrict p, const REAL *restrict g,
                                             REAL *restrict m, REAL *restrict v, REAL *restrict s,
                                             const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++) {
        REAL grad = g[i] * c.sign;
        if (coupled)
            grad = grad + p[i] * c.coupled_decay;
        REAL mean = m[i];
        REAL deviation = grad - mean * c.inv_centre;
        /* Where blend is 0 the square may be infinite, and 0 times infinity is not 0. */
        deviation = c.has_blend ? deviation : 0;
        s[i] = s[i] * c.rho + c.blend * deviation * deviation;
        m[i] = (c.from_grad ? grad : mean) + (grad - mean) * c.pull;
        v[i] = v[i] * c.beta2 + c.one_minus_beta2 * grad * grad;
    }
}

TARGET static void NAME(advance)(int coupled, int64_t n, const REAL *p, const REAL *g, REAL *m, REAL *v, REAL *s,
                                 const NAME(constants) *c) {
    if (coupled)
        NAME(advance_loop)(1, n, p, g, m, v, s, c);
    else
        NAME(advance_loop)(0, n, p, g, m, v, s, c);
}

TARGET static void NAME(raise_maximum)(int64_t n, REAL *restrict maximum, const REAL *restrict v) {
    for (int64_t i = 0; i < n; i++)
        maximum[i] = (v[i] > maximum[i]) | (v[i] != v[i]) ? v[i] : maximum[i];
}

/* p moves; `given` multiplies the step where the mask is MASK_NONE. */
TARGET INLINE void NAME(move_loop)(int mask, int debias, int64_t n, REAL *restrict p, const REAL *restrict m,
                                          const REAL *restrict v, const REAL *restrict s, REAL given,
                                          const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++) {
        REAL mean = m[i], q = given;
        if (mask != MASK_NONE) {
            REAL root = mean * c.inv_bias1;
            q = NAME(mask)(mask, debias, root * root, s[i] * c.inv_bias_var, &c);
        }
        REAL divisor = SQRT(v[i]) * c.inv_root_bias2 + c.eps;
        REAL kept = p[i] * (c.keep - c.masked_decay * q);
        p[i] = kept - c.step_size * ((q * mean) / divisor);
    }
}

TARGET static void NAME(move)(int mask, int64_t n, REAL *p, const REAL *m, const REAL *v, const REAL *s, REAL given,
                              const NAME(constants) *c) {
    switch (mask) {
    case MASK_SNR: NAME(move_loop)(MASK_SNR, c->debias, n, p, m, v, s, given, c); break;
    case MASK_SOFT: NAME(move_loop)(MASK_SOFT, c->debias, n, p, m, v, s, given, c); break;
    case MASK_HARD: NAME(move_loop)(MASK_HARD, c->debias, n, p, m, v, s, given, c); break;
    case MASK_THRESHOLD: NAME(move_loop)(MASK_THRESHOLD, c->debias, n, p, m, v, s, given, c); break;
    default: NAME(move_loop)(MASK_NONE, 0, n, p, m, v, s, given, c);
    }
}

/* Shrinkage, after the step: where a parameter ends that is pulled to its origin; see popriskmin.mask.shrink. */
TARGET INLINE REAL NAME(pulled_to)(int mask, int debias, REAL p, REAL origin, REAL noise, REAL divisor, REAL given,
                                   const NAME(constants) *c) {
    noise = NAME(at_most)(noise, c->bound);
    REAL q = given;
    if (mask != MASK_NONE)
        q = NAME(mask)(mask, debias, noise * c->loading_squared, noise, c);
    REAL pull = c->lr * ((q * (SQRT(noise) * c->loading)) / divisor);
    REAL distance = p - origin;
    REAL moved = p + (distance > 0 ? -pull : pull);
    return (distance < 0 ? -distance : distance) <= pull ? origin : moved;
}

TARGET INLINE void NAME(pull_loop)(int mask, int debias, int to_start, int64_t n, REAL *restrict p,
                                   const REAL *restrict v, const REAL *restrict s, const REAL *restrict start, REAL given,
                                   const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++) {
        REAL divisor = SQRT(v[i]) * c.inv_root_bias2 + c.eps;
        p[i] = NAME(pulled_to)(mask, debias, p[i], to_start ? start[i] : 0, s[i] * c.inv_bias_var, divisor, given, &c);
    }
}

#define PULL(mask, debias)                                                                                             \
    (start ? NAME(pull_loop)(mask, debias, 1, n, p, v, s, start, given, c)                                             \
           : NAME(pull_loop)(mask, debias, 0, n, p, v, s, NULL, given, c))
TARGET static void NAME(pull)(int mask, int64_t n, REAL *p, const REAL *v, const REAL *s, const REAL *start, REAL given,
                              const NAME(constants) *c) {
    switch (2 * mask + c->debias) {
    case 2 * MASK_SNR: PULL(MASK_SNR, 0); break;
    case 2 * MASK_SNR + 1: PULL(MASK_SNR, 1); break;
    case 2 * MASK_SOFT: PULL(MASK_SOFT, 0); break;
    case 2 * MASK_SOFT + 1: PULL(MASK_SOFT, 1); break;
    case 2 * MASK_HARD: PULL(MASK_HARD, 0); break;
    case 2 * MASK_HARD + 1: PULL(MASK_HARD, 1); break;
    case 2 * MASK_THRESHOLD: PULL(MASK_THRESHOLD, 0); break;
    case 2 * MASK_THRESHOLD + 1: PULL(MASK_THRESHOLD, 1); break;
    default: PULL(MASK_NONE, 0);
    }
}
#undef PULL

/* The same where v and s are stored in bfloat16; n is at most AHEAD. */
TARGET static void NAME(pull_narrow)(int mask, int64_t n, REAL *p, const uint16_t *v, const uint16_t *s,
                                     const REAL *start, REAL given, const NAME(constants) *c) {
    REAL wide_v[AHEAD], wide_s[AHEAD];
    for (int64_t i = 0; i < n; i++) {
        wide_v[i] = (REAL)from_bfloat16(v[i]);
        wide_s[i] = (REAL)from_bfloat16(s[i]);
    }
    NAME(pull)(mask, n, p, wide_v, wide_s, start, given, c);
}

/* Both at once, for tensors in the arithmetic type, with v and s there too or with `narrow` in bfloat16, and for the
 * usual options (numbers.usual). The processor divides and takes roots while it waits for memory, which passes over a
 * buffer in the cache would keep apart. */
TARGET INLINE void NAME(whole_loop)(int mask, int debias, int narrow, int pulls, int64_t n, uint32_t place,
                                    REAL *restrict p, const REAL *restrict start, const REAL *restrict g, REAL *restrict m, REAL *restrict v, REAL *restrict s,
                                    REAL *restrict maximum, uint16_t *restrict v16, uint16_t *restrict s16,
                                    const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    for (int64_t i = 0; i < n; i++, place++) {
        REAL grad = g[i], mean = m[i];
        REAL square = narrow ? (REAL)from_bfloat16(v16[i]) : v[i];
        REAL variance = narrow ? (REAL)from_bfloat16(s16[i]) : s[i];
        REAL deviation = grad - (debias ? mean * c.inv_centre : mean);
        if (debias)
            deviation = c.has_blend ? deviation : 0;
        variance = variance * c.rho + c.blend * deviation * deviation;
        mean = (c.from_grad ? grad : mean) + (grad - mean) * c.pull;
        square = square * c.beta2 + c.one_minus_beta2 * grad * grad;
        if (narrow) {
            /* NaN in one will be NaN in the parameter; without random bits it stays NaN. Beside infinity nothing is
             * told apart, which round_stochastically does: a step divided by either is 0. */
            uint32_t bits = __builtin_isunordered(square, variance) ? 0 : hash32(place);
            square = (REAL)float_of((bits_of((float)square) + (bits >> 16)) & 0xFFFF0000);
            variance = (REAL)float_of((bits_of((float)variance) + (bits & 0xFFFF)) & 0xFFFF0000);
            v16[i] = (uint16_t)(bits_of((float)square) >> 16);
            s16[i] = (uint16_t)(bits_of((float)variance) >> 16);
        } else {
            v[i] = square;
            s[i] = variance;
        }
        m[i] = mean;
        if (maximum) {
            square = (square > maximum[i]) | (square != square) ? square : maximum[i];
            maximum[i] = square;
        }
        REAL root = mean * c.inv_bias1, q = 1;
        if (mask != MASK_NONE)
            q = NAME(mask)(mask, debias, root * root, variance * c.inv_bias_var, &c);
        REAL divisor = SQRT(square) * c.inv_root_bias2 + c.eps;
        REAL moved = p[i] * c.keep - c.step_size * ((q * mean) / divisor);
        if (pulls) {
            REAL origin = pulls == PULLS_TO_START ? start[i] : 0;
            moved = NAME(pulled_to)(mask, debias, moved, origin, variance * c.inv_bias_var, divisor, 1, &c);
        }
        p[i] = moved;
    }
}

#define WHOLE(mask, debias)                                                                                            \
    (narrow    ? NAME(whole_loop)(mask, debias, 1, 0, n, place, p, NULL, g, m, NULL, NULL, NULL, v, s, c)              \
     : maximum ? NAME(whole_loop)(mask, debias, 0, 0, n, place, p, NULL, g, m, v, s, maximum, NULL, NULL, c)           \
     : !pulls  ? NAME(whole_loop)(mask, debias, 0, 0, n, place, p, NULL, g, m, v, s, NULL, NULL, NULL, c)              \
     : start   ? NAME(whole_loop)(mask, debias, 0, PULLS_TO_START, n, place, p, start, g, m, v, s, NULL, NULL, NULL, c) \
               : NAME(whole_loop)(mask, debias, 0, PULLS_TO_ZERO, n, place, p, NULL, g, m, v, s, NULL, NULL, NULL, c))
TARGET static void NAME(whole)(int mask, int narrow, int pulls, int64_t n, uint32_t place, REAL *p, const REAL *start,
                               const REAL *g, REAL *m, void *v, void *s, REAL *maximum, const NAME(constants) *c) {
    switch (2 * mask + c->debias) {
    case 2 * MASK_SNR: WHOLE(MASK_SNR, 0); break;
    case 2 * MASK_SNR + 1: WHOLE(MASK_SNR, 1); break;
    case 2 * MASK_SOFT: WHOLE(MASK_SOFT, 0); break;
    case 2 * MASK_SOFT + 1: WHOLE(MASK_SOFT, 1); break;
    case 2 * MASK_HARD: WHOLE(MASK_HARD, 0); break;
    case 2 * MASK_HARD + 1: WHOLE(MASK_HARD, 1); break;
    case 2 * MASK_THRESHOLD + 1: WHOLE(MASK_THRESHOLD, 1); break;
    case 2 * MASK_NONE: WHOLE(MASK_NONE, 0); break;
    default: WHOLE(MASK_NONE, 1);
    }
}
#undef WHOLE

/* The sums of m^2 and s are taken in double and in a fixed order, so that the result is always the same: LANES strands
 * side by side, then one after the other. Compilers leave sums in their order; so these are vectors by hand. */
#define LANES 8
#define PART (DOUBLES < LANES ? DOUBLES : LANES) /* what a vector of doubles holds */
#define PARTS (LANES / PART)
typedef REAL NAME(reals) __attribute__((vector_size(LANES * sizeof(REAL))));
typedef REAL NAME(part_of_reals) __attribute__((vector_size(PART * sizeof(REAL))));
typedef double NAME(part_of_doubles) __attribute__((vector_size(PART * sizeof(double))));
typedef struct {
    NAME(part_of_doubles) signal[PARTS], noise[PARTS];
} NAME(strands);

TARGET INLINE void NAME(add)(NAME(strands) *strands, const NAME(reals) *m, const NAME(reals) *s) {
    for (int part = 0; part < PARTS; part++) {
        NAME(part_of_reals) mean, variance;
        memcpy(&mean, (const char *)m + part * sizeof mean, sizeof mean);
        memcpy(&variance, (const char *)s + part * sizeof variance, sizeof variance);
        NAME(part_of_doubles) wide = __builtin_convertvector(mean, NAME(part_of_doubles));
        strands->signal[part] += wide * wide;
        strands->noise[part] += __builtin_convertvector(variance, NAME(part_of_doubles));
    }
}

TARGET static void NAME(gather)(const NAME(strands) *strands, double *sums) {
    for (int part = 0; part < PARTS; part++)
        for (int j = 0; j < PART; j++) {
            sums[0] += strands->signal[part][j];
            sums[1] += strands->noise[part][j];
        }
}

TARGET static void NAME(add_up)(int64_t n, const REAL *m, const REAL *s, double *sums) {
    NAME(strands) strands = {{{0}}, {{0}}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        NAME(reals) mean, variance;
        memcpy(&mean, m + i, sizeof mean);
        memcpy(&variance, s + i, sizeof variance);
        NAME(add)(&strands, &mean, &variance);
    }
    NAME(gather)(&strands, sums);
    for (; i < n; i++) {
        sums[0] += (double)m[i] * (double)m[i];
        sums[1] += (double)s[i];
    }
}

/* m, v, s to this step and their sums at once; n is a multiple of LANES, the options are the usual ones. */
TARGET static void NAME(advance_and_add_up)(int64_t n, const REAL *g, REAL *m, REAL *v, REAL *s, double *sums,
                                            const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    NAME(strands) strands = {{{0}}, {{0}}};
    for (int64_t i = 0; i < n; i += LANES) {
        NAME(reals) grad, mean, square, variance;
        memcpy(&grad, g + i, sizeof grad);
        memcpy(&mean, m + i, sizeof mean);
        memcpy(&square, v + i, sizeof square);
        memcpy(&variance, s + i, sizeof variance);
        NAME(reals) deviation = grad - mean * c.inv_centre;
        if (c.has_blend)
            variance = variance * c.rho + c.blend * deviation * deviation;
        mean = (c.from_grad ? grad : mean) + (grad - mean) * c.pull;
        square = square * c.beta2 + c.one_minus_beta2 * grad * grad;
        memcpy(m + i, &mean, sizeof mean);
        memcpy(v + i, &square, sizeof square);
        memcpy(s + i, &variance, sizeof variance);
        NAME(add)(&strands, &mean, &variance);
    }
    NAME(gather)(&strands, sums);
}

TARGET static REAL *NAME(load)(const void *base, int type, int64_t start, int64_t n, REAL *restrict buffer) {
    if (type == REAL_TYPE)
        return (REAL *)base + start;
    switch (type) {
    case TYPE_FLOAT32: {
        const float *x = (const float *)base + start;
        for (int64_t i = 0; i < n; i++) buffer[i] = (REAL)x[i];
        break;
    }
    case TYPE_FLOAT64: {
        const double *x = (const double *)base + start;
        for (int64_t i = 0; i < n; i++) buffer[i] = (REAL)x[i];
        break;
    }
    case TYPE_BFLOAT16: {
        const uint16_t *x = (const uint16_t *)base + start;
        for (int64_t i = 0; i < n; i++) buffer[i] = (REAL)from_bfloat16(x[i]);
        break;
    }
    default: {
        const uint16_t *x = (const uint16_t *)base + start;
        for (int64_t i = 0; i < n; i++) buffer[i] = (REAL)from_float16(x[i]);
    }
    }
    return buffer;
}

/* Write a buffer back; where `load` gave the memory itself there is nothing to do. */
TARGET static void NAME(store)(void *base, int type, int64_t start, int64_t n, const REAL *restrict buffer) {
    switch (type) {
    case REAL_TYPE: break;
#if REAL_TYPE == TYPE_FLOAT64
    case TYPE_FLOAT32: {
        float *x = (float *)base + start;
        for (int64_t i = 0; i < n; i++) x[i] = (float)buffer[i];
        break;
    }
#endif
    case TYPE_BFLOAT16: {
        uint16_t *x = (uint16_t *)base + start;
        for (int64_t i = 0; i < n; i++) x[i] = to_bfloat16((float)buffer[i]);
        break;
    }
    default: {
        uint16_t *x = (uint16_t *)base + start;
        for (int64_t i = 0; i < n; i++) x[i] = to_float16((float)buffer[i]);
    }
    }
}

/* Write parameters of 16 bits back, rounded up or down at random. */
TARGET static void NAME(store_rounded)(void *base, int type, int64_t start, int64_t n, uint32_t key,
                                       const REAL *restrict buffer) {
    uint16_t *x = (uint16_t *)base + start; /* still the old values, which go into the bits */
    if (type == TYPE_BFLOAT16) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = hash32((uint32_t)(start + i) + key + x[i] * SPREAD_OLD) >> 16;
            x[i] = (uint16_t)(bits_of(round_stochastically((float)buffer[i], bits)) >> 16);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = hash32((uint32_t)(start + i) + key + x[i] * SPREAD_OLD) >> 16;
            x[i] = to_float16(round_stochastically_to_float16((float)buffer[i], bits));
        }
    }
}

/* Write parameters back; of 16 bits they are rounded at random where that is asked for. */
TARGET static void NAME(store_parameters)(const job *job, const tensor *t, const numbers *x, int64_t start, int64_t n,
                                          const REAL *p) {
    if (job->rounds_p)
        NAME(store_rounded)(t->p, job->p_type, start, n, x->param_key, p);
    else
        NAME(store)(t->p, job->p_type, start, n, p);
}

/* Round v and s to numbers of their bfloat16 storage; what is stored is what the mask and the step see. */
TARGET static void NAME(round_state)(int64_t n, int64_t start, uint32_t key, REAL *restrict v, REAL *restrict s) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = hash32((uint32_t)(start + i) + key);
        v[i] = (REAL)round_stochastically((float)v[i], bits >> 16);
        s[i] = (REAL)round_stochastically((float)s[i], bits & 0xFFFF);
    }
}

/* Move the parameters from `start` on, and bring them back to their memory; v is what the step divides by. */
TARGET static void NAME(move_and_pull)(const job *job, const tensor *t, const numbers *x, const NAME(constants) *c,
                                       int64_t start, int64_t n, REAL *p, const REAL *m, const REAL *v, const REAL *s,
                                       REAL given, REAL *buffer) {
    int mask = t->pooled ? MASK_NONE : x->mask;
    NAME(move)(mask, n, p, m, v, s, given, c);
    if (t->pulled) {
        const REAL *to = t->start ? NAME(load)(t->start, job->p_type, start, n, buffer) : NULL;
        NAME(pull)(mask, n, p, v, s, to, given, c);
    }
    NAME(store_parameters)(job, t, x, start, n, p);
}

/* The same three, a chunk at a time, for tensors of any types and for any options. */
TARGET static void NAME(work_in_chunks)(const job *job, const tensor *t, const numbers *x, const NAME(constants) *c,
                                        int64_t begin, int64_t end, int what, REAL given, double *sums) {
    int narrow = job->s_type == TYPE_BFLOAT16, reads_p = (what & MOVE) || x->coupled;
    REAL buffers[8][CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t n = end - start < CHUNK ? end - start : CHUNK;
        REAL *p = reads_p ? NAME(load)(t->p, job->p_type, start, n, buffers[0]) : NULL;
        REAL *m = NAME(load)(t->m, job->m_type, start, n, buffers[1]);
        REAL *v = NAME(load)(t->v, job->s_type, start, n, buffers[2]);
        REAL *s = NAME(load)(t->s, job->s_type, start, n, buffers[3]);
        REAL *maximum = t->maximum ? NAME(load)(t->maximum, job->s_type, start, n, buffers[4]) : NULL;
        if (what & ADVANCE) {
            const REAL *g = NAME(load)(t->g, job->g_type, start, n, buffers[5]);
            if (t->z)
                NAME(blend_in)(n, s, NAME(load)(t->z, job->z_type, start, n, buffers[6]), c);
            NAME(advance)(x->coupled, n, p, g, m, v, s, c);
            if (narrow)
                NAME(round_state)(n, start, x->key, v, s);
            if (maximum)
                NAME(raise_maximum)(n, maximum, v);
            NAME(store)(t->m, job->m_type, start, n, m);
            NAME(store)(t->v, job->s_type, start, n, v);
            NAME(store)(t->s, job->s_type, start, n, s);
            if (maximum)
                NAME(store)(t->maximum, job->s_type, start, n, maximum);
        }
        if (sums)
            NAME(add_up)(n, m, s, sums);
        if (what & MOVE)
            NAME(move_and_pull)(job, t, x, c, start, n, p, m, maximum ? maximum : v, s, given, buffers[7]);
    }
}

/* The same for tensors in the arithmetic type and the usual options, or v and s in bfloat16, straight in their memory. */
TARGET static void NAME(work_in_place)(const job *job, const tensor *t, const numbers *x, const NAME(constants) *c,
                                       int64_t begin, int64_t end, int what, REAL given, double *sums) {
    int narrow = job->s_type == TYPE_BFLOAT16;
    REAL *p = t->p, *m = t->m, *maximum = t->maximum;
    const REAL *g = t->g;
    char *v = t->v, *s = t->s;
    int64_t size = narrow ? 2 : (int64_t)sizeof(REAL);
    /* Whether the pull is taken in the loop of the step, not in a pass after it. */
    int pulls_at_once = t->pulled && what == (ADVANCE | MOVE) && !narrow && !maximum;
    for (int64_t i = begin; i < end; i += AHEAD) {
        int64_t n = smaller(end - i, AHEAD);
        if (i + 2 * AHEAD <= end) {
            if (asks_ahead)
                fetch_ahead(t, i + AHEAD, sizeof(REAL), size, what);
            if ((what & MOVE) && t->pulled && t->start) /* a sixth array, for which AMD's processors too fall behind */
                fetch_array(t->start, i + AHEAD, sizeof(REAL));
        }
        const REAL *start = t->start ? (const REAL *)t->start + i : NULL;
        if (t->z && (what & ADVANCE)) {
            const REAL *z = (const REAL *)t->z + i;
            if (narrow)
                NAME(blend_in_narrow)(n, (uint32_t)i + x->key, (uint16_t *)s + i, z, c);
            else
                NAME(blend_in)(n, (REAL *)s + i, z, c);
        }
        if (what == (ADVANCE | MOVE)) {
            NAME(whole)(x->mask, narrow, pulls_at_once, n, (uint32_t)i + x->key, p + i, start, g + i, m + i,
                        v + size * i, s + size * i, maximum ? maximum + i : NULL, c);
        } else if (what == ADVANCE) {
            int64_t lanes = n / LANES * LANES;
            REAL *v_i = (REAL *)v + i, *s_i = (REAL *)s + i;
            NAME(advance_and_add_up)(lanes, g + i, m + i, v_i, s_i, sums, c);
            NAME(advance)(0, n - lanes, NULL, g + i + lanes, m + i + lanes, v_i + lanes, s_i + lanes, c);
            NAME(add_up)(n - lanes, m + i + lanes, s_i + lanes, sums);
            if (maximum)
                NAME(raise_maximum)(n, maximum + i, v_i);
        } else {
            NAME(move)(MASK_NONE, n, p + i, m + i, maximum ? maximum + i : (REAL *)v + i, NULL, given, c);
        }
        if (t->pulled && (what & MOVE) && !pulls_at_once) {
            int mask = t->pooled ? MASK_NONE : x->mask;
            if (narrow)
                NAME(pull_narrow)(mask, n, p + i, (uint16_t *)v + i, (uint16_t *)s + i, start, given, c);
            else
                NAME(pull)(mask, n, p + i, maximum ? maximum + i : (REAL *)v + i, (REAL *)s + i, start, given, c);
        }
    }
}

#include "cpu_codes.h"

/* What is to be done to a stretch: bring the state on, add up its sums, move the parameters. */
TARGET static void NAME(work)(const job *job, int64_t index, int64_t begin, int64_t end, int what, double given,
                              double *sums) {
    const tensor t = tensor_of(job, index);
    const numbers *x = &job->numbers[t.numbers];
    const NAME(constants) c = NAME(convert)(x);
    int narrow = job->s_type == TYPE_BFLOAT16;
    int in_place = x->usual && job->p_type == REAL_TYPE && job->g_type == REAL_TYPE && job->m_type == REAL_TYPE &&
                   (!t.z || job->z_type == REAL_TYPE) && (narrow ? !t.pooled && !t.maximum : job->s_type == REAL_TYPE);
    if (job->m_type == TYPE_CODES)
        NAME(work_in_codes)(job, &t, x, &c, begin, end, what, (REAL)given, sums);
    else if (in_place)
        NAME(work_in_place)(job, &t, x, &c, begin, end, what, (REAL)given, sums);
    else
        NAME(work_in_chunks)(job, &t, x, &c, begin, end, what, (REAL)given, sums);
}

TARGET static double NAME(pooled_mask)(const job *job, int64_t index, const double *sums) {
    const tensor t = tensor_of(job, index);
    const numbers *x = &job->numbers[t.numbers];
    const NAME(constants) c = NAME(convert)(x);
    double n = (double)t.n;
    return NAME(mask_of_means)(x->mask, sums[0] / n * x->inv_bias1 * x->inv_bias1, sums[1] / n * x->inv_bias_var, &c);
}

static const operations NAME(operations) = {NAME(work), NAME(pooled_mask)};
#undef LANES
#undef PART
#undef PARTS
