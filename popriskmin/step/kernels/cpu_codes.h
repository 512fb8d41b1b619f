/* The state in 8-bit blocks: what popriskmin/step/codes.py does, which says how the code works and why, on one block.
 *
 * A template as cpu_step.h, which includes it. A block is decoded into buffers of float32, stepped there by the loops of
 * cpu_step.h, and encoded, all in the first cache. The loops are over whole blocks, padding included, and on integers of
 * one width, which compilers turn into vector code; what is no finite number takes loops of its own (`special`).
 */
#ifndef PRM_CODES
#define PRM_CODES

#define CODES 128                   /* scalars of a block */
#define CODE_BYTES (3 * CODES + 16) /* of a block: codes of m, v and s, three headers and the counter */
#define CODE_INFINITY 0x7F800000
#define CODE_FIRST 0x8000FFFFu /* the random bits of the first step */
#define CODE_LARGEST 253 /* of a finite v or s */
#define CODE_LARGEST_MEAN 126
#define CODE_LEAST_SHIFT 7
#define CODE_MOST_SHIFT 20
#define CODE_WIDE 129

typedef struct {
    float m[CODES], v[CODES], s[CODES];
} moments;

typedef struct {
    int32_t mean, square, variance, counter;
} code_headers;

typedef struct {
    uint32_t most_v, least_v, most_s, least_s;
} code_extents;

/* A block on its way to its codes: those of m, v and s, m in units of sqrt(v), and random bits. */
typedef struct {
    uint32_t m[CODES], v[CODES], s[CODES], random[CODES];
    float x[CODES];
} coded_block;

/* The header of v or of s from the bits of the block's largest and smallest number. */
static int32_t header_of_squares(int32_t most, int32_t least) {
    uint32_t span = (uint32_t)(most - least);
    /* The fewest bits left out with which the span, one more for rounding up, fits: its upper eight bits, or seven. */
    int shift = 24 - __builtin_clz(span | 1);
    shift = shift < CODE_LEAST_SHIFT ? CODE_LEAST_SHIFT : shift;
    shift += (span >> shift) > CODE_LARGEST - 3;
    shift = shift > CODE_MOST_SHIFT ? CODE_MOST_SHIFT : shift;
    int32_t base = least >> shift, lowest = (most >> shift) - (CODE_LARGEST - 2);
    return (base > lowest ? base : lowest) << 5 | shift;
}

/* The header of m from the bits of the block's largest |m|. */
static int32_t header_of_means(int32_t most) {
    int32_t top = most >> 23, wide = top > CODE_WIDE, shift = 18 + wide, lowest = top - 3 - 4 * wide;
    lowest = lowest < 1 ? 1 : lowest;
    uint32_t start = (uint32_t)lowest << 23, end = bits_of(float_of((uint32_t)most) + float_of(start));
    lowest += (end >> shift) - (start >> shift) > CODE_LARGEST_MEAN - 1;
    return lowest << 5 | shift;
}

/* The power of two next to sqrt(v), and its inverse, of the bits of v. */
INLINE float code_root(uint32_t v) { return float_of(((v + (127u << 23)) >> 1) & CODE_INFINITY); }
INLINE float code_inverse_root(uint32_t v) { return float_of((((383u << 23) - 1 - v) >> 1) & CODE_INFINITY); }
#endif

TARGET INLINE void NAME(decode_squares)(int special, const uint8_t *restrict codes, int32_t header, float *restrict x) {
    const uint32_t offset = (uint32_t)((header >> 5) - 1), shift = header & 31;
    for (int i = 0; i < CODES; i++) {
        uint32_t c = codes[i], bits = (offset + c) << shift;
        if (special)
            bits = c > CODE_LARGEST ? CODE_INFINITY + ((c & 1) << 22) : bits;
        x[i] = float_of(bits & -(uint32_t)(c != 0));
    }
}

TARGET INLINE void NAME(decode_means)(int special, const int8_t *restrict codes, int32_t header,
                                      const float *restrict v, float *restrict m) {
    const uint32_t shift = header & 31, start = (uint32_t)(header >> 5) << 23, offset = start >> shift;
    const float lowest = float_of(start);
    for (int i = 0; i < CODES; i++) {
        int32_t c = codes[i];
        uint32_t size = (uint32_t)(c < 0 ? -c : c);
        uint32_t bits = bits_of(float_of((size + offset) << shift) - lowest);
        if (special)
            bits = size == 128 ? 0x7FC00000 : size == 127 ? CODE_INFINITY : bits;
        m[i] = float_of(bits | ((uint32_t)c & 0x80000000)) * code_root(bits_of(v[i]));
    }
}

/* Whether codes stand for infinities or NaN. */
TARGET static int NAME(has_special)(const uint8_t *block) {
    uint8_t most = 0, mean = 0;
    for (int i = 0; i < CODES; i++) {
        uint8_t c = (uint8_t)(block[i] + CODE_LARGEST_MEAN);
        mean = c > mean ? c : mean;
    }
    for (int i = CODES; i < 3 * CODES; i++)
        most = block[i] > most ? block[i] : most;
    return most > CODE_LARGEST || mean > 2 * CODE_LARGEST_MEAN;
}

TARGET INLINE void NAME(decode_loops)(int special, const uint8_t *block, const code_headers *h, moments *x) {
    NAME(decode_squares)(special, block + CODES, h->square, x->v);
    NAME(decode_squares)(special, block + 2 * CODES, h->variance, x->s);
    NAME(decode_means)(special, (const int8_t *)block, h->mean, x->v, x->m);
}

TARGET static void NAME(decode)(const uint8_t *block, moments *x) {
    code_headers h;
    memcpy(&h, block + 3 * CODES, sizeof h);
    if (NAME(has_special)(block))
        NAME(decode_loops)(1, block, &h, x);
    else
        NAME(decode_loops)(0, block, &h, x);
}

/* The bits of the largest and of the smallest finite number above zero, 0 where there is none. Without `special` the
 * largest may be too large: infinity, NaN or negative. */
TARGET INLINE uint32_t NAME(extents)(int special, const moments *x, code_extents *found) {
    uint32_t most_v = 0, most_s = 0, least_v = 0xFFFFFFFF, least_s = 0xFFFFFFFF;
    for (int i = 0; i < CODES; i++) {
        uint32_t v = bits_of(x->v[i]), s = bits_of(x->s[i]);
        if (special) {
            v = v < CODE_INFINITY ? v : 0;
            s = s < CODE_INFINITY ? s : 0;
        }
        most_v = v > most_v ? v : most_v;
        most_s = s > most_s ? s : most_s;
        least_v = v - 1 < least_v ? v - 1 : least_v;
        least_s = s - 1 < least_s ? s - 1 : least_s;
    }
    found->most_v = most_v;
    found->most_s = most_s;
    found->least_v = least_v + 1;
    found->least_s = least_s + 1;
    return most_v > most_s ? most_v : most_s;
}

/* The code of v or s; in *x the number that is stored. `random` are 32 bits, of which the upper ones count. */
TARGET INLINE uint32_t NAME(code_of_square)(int special, float *x, int32_t offset, int32_t shift, uint32_t random) {
    int32_t bits = (int32_t)bits_of(*x);
    int32_t c = (int32_t)(((uint32_t)bits + (random >> (32 - shift))) >> shift) - offset;
    c = c < 1 ? 1 : c;
    uint32_t stored = (uint32_t)(c + offset) << shift;
    if (special) {
        c = bits < CODE_INFINITY ? c : 254;
        c = (bits & 0x7FFFFFFF) > CODE_INFINITY ? 255 : c;
        stored = c > CODE_LARGEST ? (uint32_t)CODE_INFINITY + ((uint32_t)(c & 1) << 22) : stored;
        bits = c == 255 ? 1 : bits;
    }
    uint32_t live = -(uint32_t)(bits > 0);
    *x = float_of(stored & live);
    return (uint32_t)c & live;
}

/* Codes of v and s, which become what is stored, m in units of its own sqrt(v), and the random bits. Returns the bits of
 * the largest m in these units, of which those of infinities and NaN are larger than any number's. */
TARGET INLINE int32_t NAME(encode_squares)(int special, moments *restrict state, const code_headers *h,
                                           coded_block *restrict coded, uint32_t first) {
    const int32_t shift_v = h->square & 31, offset_v = (h->square >> 5) - 1;
    const int32_t shift_s = h->variance & 31, offset_s = (h->variance >> 5) - 1;
    int32_t most = 0;
    for (int i = 0; i < CODES; i++) {
        uint32_t random = special && h->counter == 1 ? CODE_FIRST : hash32(first + (uint32_t)i);
        float v = state->v[i], s = state->s[i];
        coded->v[i] = NAME(code_of_square)(special, &v, offset_v, shift_v, random);
        coded->s[i] = NAME(code_of_square)(special, &s, offset_s, shift_s, random << 16);
        state->v[i] = v;
        state->s[i] = s;
        coded->random[i] = random << 8;
        float x = state->m[i] * code_inverse_root(bits_of(v));
        coded->x[i] = x;
        int32_t size = (int32_t)(bits_of(x) & 0x7FFFFFFF);
        most = size > most ? size : most;
    }
    return most;
}

/* The bits of the largest finite one. */
TARGET static int32_t NAME(largest_mean)(const float *x) {
    int32_t most = 0;
    for (int i = 0; i < CODES; i++) {
        int32_t size = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF);
        size = size < CODE_INFINITY ? size : 0;
        most = size > most ? size : most;
    }
    return most;
}

/* Where a code of m begins, and how wide its steps are. */
typedef struct {
    uint32_t shift, offset;
    float lowest;
} NAME(range_of_means);

TARGET INLINE NAME(range_of_means) NAME(read_range)(int32_t header) {
    uint32_t shift = header & 31, start = (uint32_t)(header >> 5) << 23;
    return (NAME(range_of_means)){shift, start >> shift, float_of(start)};
}

/* The code of m from m in units of sqrt(v), in *m what is stored. */
TARGET INLINE uint32_t NAME(code_of_mean)(int special, float x, float v, NAME(range_of_means) range, uint32_t random,
                                          float *m) {
    uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF, sign = (uint32_t)((int32_t)bits >> 31);
    uint32_t c = (bits_of(float_of(size) + range.lowest) + (random >> (32 - range.shift))) >> range.shift;
    uint32_t stored = bits_of(float_of(c << range.shift) - range.lowest);
    c = c - range.offset;
    if (special) {
        c = size > CODE_INFINITY ? 128 : size == CODE_INFINITY ? 127 : c;
        stored = size > CODE_INFINITY ? 0x7FC00000 : size == CODE_INFINITY ? CODE_INFINITY : stored;
    }
    *m = float_of(stored | (sign & 0x80000000)) * code_root(bits_of(v));
    return (c ^ sign) - sign;
}

TARGET INLINE void NAME(encode_means)(int special, moments *restrict state, int32_t header, coded_block *restrict coded) {
    const NAME(range_of_means) range = NAME(read_range)(header);
    for (int i = 0; i < CODES; i++)
        coded->m[i] = NAME(code_of_mean)(special, coded->x[i], state->v[i], range, coded->random[i], &state->m[i]);
}

TARGET static void NAME(narrow_codes)(const uint32_t *restrict wide, uint8_t *restrict codes) {
    for (int i = 0; i < CODES; i++)
        codes[i] = (uint8_t)wide[i];
}

/* v and s into codes and what is stored, and the header of m; returns whether m is special. */
TARGET static int NAME(begin_encoding)(moments *state, uint32_t place, code_headers *h, coded_block *coded) {
    h->counter = (int32_t)((uint32_t)h->counter + 1);
    uint32_t first = place + hash32((uint32_t)h->counter);
    code_extents e;
    int special = NAME(extents)(0, state, &e) >= CODE_INFINITY;
    if (special)
        NAME(extents)(1, state, &e);
    h->square = header_of_squares((int32_t)e.most_v, (int32_t)e.least_v);
    h->variance = header_of_squares((int32_t)e.most_s, (int32_t)e.least_s);
    int32_t most = special || h->counter == 1 ? NAME(encode_squares)(1, state, h, coded, first)
                                              : NAME(encode_squares)(0, state, h, coded, first);
    special = most >= CODE_INFINITY;
    h->mean = header_of_means(special ? NAME(largest_mean)(coded->x) : most);
    return special;
}

TARGET static void NAME(write_codes)(const code_headers *h, const coded_block *coded, uint8_t *block) {
    NAME(narrow_codes)(coded->m, block);
    NAME(narrow_codes)(coded->v, block + CODES);
    NAME(narrow_codes)(coded->s, block + 2 * CODES);
    memcpy(block + 3 * CODES, h, sizeof *h);
}

/* Write the moments into a block, rounded stochastically; they become what is stored. */
TARGET static void NAME(encode)(moments *state, uint32_t place, uint8_t *block) {
    code_headers h;
    coded_block coded;
    memcpy(&h, block + 3 * CODES, sizeof h);
    if (NAME(begin_encoding)(state, place, &h, &coded))
        NAME(encode_means)(1, state, h.mean, &coded);
    else
        NAME(encode_means)(0, state, h.mean, &coded);
    NAME(write_codes)(&h, &coded, block);
}

#if REAL_TYPE == TYPE_FLOAT32
/* `encode` and the step of the parameters at once, in the usual case: the processor divides while it encodes. */
TARGET INLINE void NAME(encode_and_move_loop)(int mask, int debias, moments *restrict state, int32_t header,
                                              coded_block *restrict coded, float *restrict p,
                                              const NAME(constants) *constants) {
    const NAME(constants) c = *constants;
    const NAME(range_of_means) range = NAME(read_range)(header);
    for (int i = 0; i < CODES; i++) {
        float mean, v = state->v[i], q = 1;
        coded->m[i] = NAME(code_of_mean)(0, coded->x[i], v, range, coded->random[i], &mean);
        float root = mean * c.inv_bias1;
        if (mask != MASK_NONE)
            q = NAME(mask)(mask, debias, root * root, state->s[i] * c.inv_bias_var, &c);
        float divisor = SQRT(v) * c.inv_root_bias2 + c.eps;
        p[i] = p[i] * (c.keep - c.masked_decay * q) - c.step_size * ((q * mean) / divisor);
    }
}

#define AT_ONCE(mask, debias) NAME(encode_and_move_loop)(mask, debias, state, h.mean, &coded, p, c)
TARGET static void NAME(encode_and_move)(int mask, moments *state, uint32_t place, uint8_t *block, float *p,
                                         const NAME(constants) *c) {
    code_headers h;
    coded_block coded;
    memcpy(&h, block + 3 * CODES, sizeof h);
    if (NAME(begin_encoding)(state, place, &h, &coded)) {
        NAME(encode_means)(1, state, h.mean, &coded);
        NAME(move)(mask, CODES, p, state->m, state->v, state->s, 1, c);
    } else {
        switch (2 * mask + c->debias) {
        case 2 * MASK_SNR: AT_ONCE(MASK_SNR, 0); break;
        case 2 * MASK_SNR + 1: AT_ONCE(MASK_SNR, 1); break;
        case 2 * MASK_SOFT: AT_ONCE(MASK_SOFT, 0); break;
        case 2 * MASK_SOFT + 1: AT_ONCE(MASK_SOFT, 1); break;
        case 2 * MASK_HARD: AT_ONCE(MASK_HARD, 0); break;
        case 2 * MASK_HARD + 1: AT_ONCE(MASK_HARD, 1); break;
        case 2 * MASK_THRESHOLD + 1: AT_ONCE(MASK_THRESHOLD, 1); break;
        default: AT_ONCE(MASK_NONE, 0);
        }
    }
    NAME(write_codes)(&h, &coded, block);
}
#undef AT_ONCE
#endif

#if REAL_TYPE == TYPE_FLOAT32
#define WIDE(x, buffer) (x)
#define NARROW(buffer, x)
#else
TARGET static REAL *NAME(widened)(const float *restrict x, REAL *restrict buffer) {
    for (int i = 0; i < CODES; i++)
        buffer[i] = (REAL)x[i];
    return buffer;
}
TARGET static void NAME(narrowed)(const REAL *restrict buffer, float *restrict x) {
    for (int i = 0; i < CODES; i++)
        x[i] = (float)buffer[i];
}
#define WIDE(x, buffer) NAME(widened)(x, buffer)
#define NARROW(buffer, x) NAME(narrowed)(buffer, x)
#endif

/* `work` of tensors whose state is in blocks; `begin` is the start of one. */
TARGET static void NAME(work_in_codes)(const job *job, const tensor *t, const numbers *x, const NAME(constants) *c,
                                       int64_t begin, int64_t end, int what, REAL given, double *sums) {
    int reads_p = (what & MOVE) || x->coupled;
    REAL buffers[8][CODES];
    moments state;
#if REAL_TYPE == TYPE_FLOAT32
    int at_once = what == (ADVANCE | MOVE) && !t->pooled && !t->pulled && !t->maximum;
#endif
    for (int64_t start = begin; start < end; start += CODES) {
        int64_t n = smaller(end - start, CODES);
        uint8_t *block = (uint8_t *)t->m + start / CODES * CODE_BYTES;
        REAL *p = reads_p ? NAME(load)(t->p, job->p_type, start, n, buffers[0]) : NULL;
        REAL *maximum = t->maximum ? NAME(load)(t->maximum, REAL_TYPE, start, n, buffers[4]) : NULL;
        NAME(decode)(block, &state);
        REAL *m = WIDE(state.m, buffers[1]), *v = WIDE(state.v, buffers[2]), *s = WIDE(state.s, buffers[3]);
        if (what & ADVANCE) {
            const REAL *g = NAME(load)(t->g, job->g_type, start, n, buffers[5]);
            if (t->z)
                NAME(blend_in)(n, s, NAME(load)(t->z, job->z_type, start, n, buffers[6]), c);
            NAME(advance)(x->coupled, n, p, g, m, v, s, c);
#if REAL_TYPE == TYPE_FLOAT32
            if (at_once && n == CODES) {
                NAME(encode_and_move)(x->mask, &state, (uint32_t)start, block, p, c);
                NAME(store_parameters)(job, t, x, start, n, p);
                continue;
            }
#endif
            NARROW(m, state.m);
            NARROW(v, state.v);
            NARROW(s, state.s);
            NAME(encode)(&state, (uint32_t)start, block);
            m = WIDE(state.m, buffers[1]);
            v = WIDE(state.v, buffers[2]);
            s = WIDE(state.s, buffers[3]);
            if (maximum) {
                NAME(raise_maximum)(n, maximum, v);
                NAME(store)(t->maximum, REAL_TYPE, start, n, maximum);
            }
        }
        if (sums)
            NAME(add_up)(n, m, s, sums);
        if (what & MOVE)
            NAME(move_and_pull)(job, t, x, c, start, n, p, m, maximum ? maximum : v, s, given, buffers[7]);
    }
}
#undef WIDE
#undef NARROW
