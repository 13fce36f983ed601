/* One number: its bits, and its value where C has no type for it. */
#ifndef GRADCLIP_BITS_H
#define GRADCLIP_BITS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint64_t bits_of_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Comparisons below are of signed integers, which every instruction set has for vectors. */

static inline float float_of_half(uint16_t half) {
    int32_t magnitude = (int32_t)(half & 0x7fff) << 13;
    float normal = float_of((uint32_t)(magnitude + (112 << 23)));
    /* With the exponent of 2^-14 put in, the leading one that a subnormal lacks is subtracted. */
    float subnormal = float_of((uint32_t)(magnitude + (113 << 23))) - 0x1p-14f;
    float special = float_of((uint32_t)magnitude | 0x7f800000);
    float x = magnitude < (1 << 23) ? subnormal : normal;
    x = magnitude >= (31 << 23) ? special : x;
    return float_of(bits_of(x) | (uint32_t)(half & 0x8000) << 16);
}

static inline uint16_t half_of(float x) {
    int32_t magnitude = (int32_t)(bits_of(x) & 0x7fffffff);
    int32_t sign = (int32_t)(bits_of(x) >> 16 & 0x8000);
    int32_t normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    normal = normal > 0x7c00 ? 0x7c00 : normal;
    /* The last place of 0.5f is the last place of a subnormal half: the addition rounds. */
    int32_t subnormal = (int32_t)(bits_of(float_of((uint32_t)magnitude) + 0.5f) - bits_of(0.5f));
    int32_t nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
    int32_t half = magnitude < (113 << 23) ? subnormal : normal;
    half = magnitude > 0x7f800000 ? nan : half;
    return (uint16_t)(half | sign);
}

/* A bfloat16, in the upper half. */
static inline uint32_t bits_of_bfloat(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    uint32_t nan = bits | 0x400000;
    return (int32_t)(bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
}

static inline uint16_t bfloat_of(float x) { return (uint16_t)(bits_of_bfloat(x) >> 16); }

#endif
