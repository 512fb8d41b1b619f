/* The numbers in memory: the types that a tensor may have, and what turns the narrow ones into floats and back. */
#include <stdint.h>
#include <string.h>

/* What takes its options as constants must be inlined, or the options become branches in the loop. The tests under
 * sanitizers leave that out: they then compile six times as fast, and the numbers are the same. */
#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

#define TYPE_FLOAT32 0
#define TYPE_FLOAT64 1
#define TYPE_BFLOAT16 2
#define TYPE_FLOAT16 3
#define TYPE_CODES 4 /* m, v and s of a tensor are in 8-bit blocks: cpu_codes.h */

/* All without branches, so that compilers turn loops over them into vector code. */

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float from_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

INLINE float from_float16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7FFF;
    uint32_t normal = (rest << 13) + (112u << 23);
    uint32_t special = (rest << 13) + (224u << 23);
    uint32_t tiny = bits_of((float)(int32_t)rest * 0x1p-24f);
    return float_of(sign | (rest >= 0x7C00 ? special : rest < 0x400 ? tiny : normal));
}

INLINE uint16_t to_float16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    uint32_t normal = (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
    /* Adding 1/2 rounds to multiples of 2^-24, the smallest number of this type. */
    uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3F000000;
    uint32_t value = rest < 0x38800000 ? tiny : normal;
    value = rest >= 0x477FF000 ? 0x7C00 : value;
    value = rest > 0x7F800000 ? 0x7E00 : value;
    return (uint16_t)(sign | value);
}

/* The hash and the rounding of popriskmin.step.rounding. */
INLINE uint32_t hash32(uint32_t x) {
    x = x * 0x9E3779B1u;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* What spreads the old values of a parameter over all numbers of 32 bits. */
#define SPREAD_OLD 0x85EBCA77u

/* From the largest finite number of bfloat16 on, to nearest; NaN without a sum that could run over into a number. */
INLINE float round_stochastically(float x, uint32_t bits16) {
    uint32_t bits = bits_of(x), rest = bits & 0x7FFFFFFF;
    return float_of((bits + (rest < 0x7F7F0000 ? bits16 : rest <= 0x7F800000 ? 0x8000 : 0)) & 0xFFFF0000);
}

/* A number rounded to one of float16, still a float; what is larger than the largest of these, and NaN, as they are. */
INLINE float round_stochastically_to_float16(float x, uint32_t bits16) {
    uint32_t bits = bits_of(x), sign = bits & 0x80000000, rest = bits & 0x7FFFFFFF;
    uint32_t raised = (rest + (bits16 >> 3)) & ~0x1FFFu;
    /* Below the smallest normal number there are multiples of 2^-24. What is larger is not to overflow an integer. */
    float units = float_of(rest < 0x38800000 ? rest : 0) * 0x1p24f;
    int32_t whole = (int32_t)units;
    float tiny = (float)(whole + ((units - (float)whole) * 0x1p16f > (float)(int32_t)bits16)) * 0x1p-24f;
    uint32_t value = rest < 0x38800000 ? bits_of(tiny) : raised;
    return float_of(rest >= 0x477FE000 ? bits : sign | value);
}
