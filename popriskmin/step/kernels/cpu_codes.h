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

/* Codes of v or s, and in the place of each number the one that is stored. */
TARGET INLINE void NAME(encode_squares)(int special, float *restrict x, int32_t header, const uint32_t *restrict random,
                                        int skipped, uint32_t *restrict codes) {
    const int32_t shift = header & 31, offset = (header >> 5) - 1;
    for (int i = 0; i < CODES; i++) {
        int32_t bits = (int32_t)bits_of(x[i]);
        int32_t c = (int32_t)(((uint32_t)bits + (random[i] << skipped >> (32 - shift))) >> shift) - offset;
        c = c < 1 ? 1 : c;
        uint32_t stored = (uint32_t)(c + offset) << shift;
        if (special) {
            c = bits < CODE_INFINITY ? c : 254;
            c = (bits & 0x7FFFFFFF) > CODE_INFINITY ? 255 : c;
            stored = c > CODE_LARGEST ? (uint32_t)CODE_INFINITY + ((uint32_t)(c & 1) << 22) : stored;
            bits = c == 255 ? 1 : bits;
        }
        uint32_t live = -(uint32_t)(bits > 0);
        codes[i] = (uint32_t)c & live;
        x[i] = float_of(stored & live);
    }
}

/* m in units of its own sqrt(v); returns the bits of the largest, of which those of infinities and NaN are larger. */
TARGET INLINE int32_t NAME(scale_means)(int special, const float *restrict m, const float *restrict v, float *restrict x) {
    int32_t most = 0;
    for (int i = 0; i < CODES; i++) {
        x[i] = m[i] * code_inverse_root(bits_of(v[i]));
        int32_t size = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF);
        if (special)
            size = size < CODE_INFINITY ? size : 0;
        most = size > most ? size : most;
    }
    return most;
}

TARGET INLINE void NAME(encode_means)(int special, const float *restrict x, const float *restrict v, int32_t header,
                                      const uint32_t *restrict random, uint32_t *restrict codes, float *restrict m) {
    const uint32_t shift = header & 31, start = (uint32_t)(header >> 5) << 23, offset = start >> shift;
    const float lowest = float_of(start);
    for (int i = 0; i < CODES; i++) {
        uint32_t bits = bits_of(x[i]), size = bits & 0x7FFFFFFF, negative = bits & 0x80000000;
        uint32_t c = (bits_of(float_of(size) + lowest) + (random[i] << 8 >> (32 - shift))) >> shift;
        uint32_t stored = bits_of(float_of(c << shift) - lowest);
        c = c - offset;
        if (special) {
            c = size > CODE_INFINITY ? 128 : size == CODE_INFINITY ? 127 : c;
            stored = size > CODE_INFINITY ? 0x7FC00000 : size == CODE_INFINITY ? CODE_INFINITY : stored;
        }
        codes[i] = negative ? -c : c;
        m[i] = float_of(stored | negative) * code_root(bits_of(v[i]));
    }
}

TARGET INLINE void NAME(narrow_codes)(const uint32_t *restrict wide, uint8_t *restrict codes) {
    for (int i = 0; i < CODES; i++)
        codes[i] = (uint8_t)wide[i];
}

/* The bits of the largest and of the smallest finite number above zero, 0 where there is none. Without `special` the
 * largest may be too large: infinity, NaN or negative. */
TARGET INLINE void NAME(extent)(int special, const float *restrict x, uint32_t *largest, uint32_t *smallest) {
    uint32_t most = 0, least = 0xFFFFFFFF;
    for (int i = 0; i < CODES; i++) {
        uint32_t bits = bits_of(x[i]);
        if (special)
            bits = bits < CODE_INFINITY ? bits : 0;
        most = bits > most ? bits : most;
        least = bits - 1 < least ? bits - 1 : least;
    }
    *largest = most;
    *smallest = least + 1;
}

TARGET static int32_t NAME(encode_row)(float *x, const uint32_t *random, int skipped, uint8_t *codes) {
    uint32_t most, least, wide[CODES];
    NAME(extent)(0, x, &most, &least);
    int32_t header;
    if (most < CODE_INFINITY) {
        header = header_of_squares((int32_t)most, (int32_t)least);
        NAME(encode_squares)(0, x, header, random, skipped, wide);
    } else {
        NAME(extent)(1, x, &most, &least);
        header = header_of_squares((int32_t)most, (int32_t)least);
        NAME(encode_squares)(1, x, header, random, skipped, wide);
    }
    NAME(narrow_codes)(wide, codes);
    return header;
}

/* Write the moments into a block, rounded stochastically; they become what is stored. */
TARGET static void NAME(encode)(moments *moments, uint32_t place, uint8_t *block) {
    code_headers h;
    memcpy(&h, block + 3 * CODES, sizeof h);
    h.counter = (int32_t)((uint32_t)h.counter + 1);
    uint32_t random[CODES], wide[CODES], first = place + hash32((uint32_t)h.counter);
    for (int i = 0; i < CODES; i++)
        random[i] = hash32(first + (uint32_t)i);
    h.square = NAME(encode_row)(moments->v, random, 0, block + CODES);
    h.variance = NAME(encode_row)(moments->s, random, 16, block + 2 * CODES);
    float x[CODES];
    int32_t most = NAME(scale_means)(0, moments->m, moments->v, x);
    if (most < CODE_INFINITY) {
        h.mean = header_of_means(most);
        NAME(encode_means)(0, x, moments->v, h.mean, random, wide, moments->m);
    } else {
        h.mean = header_of_means(NAME(scale_means)(1, moments->m, moments->v, x));
        NAME(encode_means)(1, x, moments->v, h.mean, random, wide, moments->m);
    }
    NAME(narrow_codes)(wide, block);
    memcpy(block + 3 * CODES, &h, sizeof h);
}

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
