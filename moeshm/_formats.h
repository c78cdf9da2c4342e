/* Loops over float32, float16 and bfloat16, exact and rounded to nearest even.
 *
 * Every body is compiled twice, for any x86-64 and for AVX2, without intrinsics: GCC and clang
 * vectorise them, and the same source serves ARM64. They choose by masks: of `?:` GCC may make
 * branches, which it does not vectorise.
 */
#ifndef MOESHM_FORMATS_H
#define MOESHM_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ALWAYS float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ALWAYS uint32_t choose(uint32_t condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -condition;
    return (yes & mask) | (no & ~mask);
}

ALWAYS float from_f32(float value) { return value; }

ALWAYS float from_bf16(uint16_t stored) { return float_of((uint32_t)stored << 16); }

/* In float32 position a half's exponent is 112 too small, subnormals included: one exact
 * multiplication finishes it. */
ALWAYS float from_f16(uint16_t stored) {
    uint32_t magnitude = (uint32_t)(stored & 0x7fff) << 13;
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t bits = choose(magnitude >= 0x0f800000u, magnitude | 0x7f800000u, finite);
    return float_of(bits | (uint32_t)(stored & 0x8000) << 16);
}

ALWAYS uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value), upper = bits >> 16;
    uint32_t rounded = (bits + 0x7fff + (upper & 1)) >> 16;
    /* Rounding may carry a NaN over into infinity or zero: keep its sign, make it quiet. */
    return (uint16_t)choose((bits & 0x7fffffffu) > 0x7f800000u, upper | 0x40, rounded);
}

ALWAYS uint16_t to_f16(float value) {
    uint32_t all = bits_of(value), bits = all & 0x7fffffffu;
    /* The last place of 0.5 is that of a half's subnormals: the addition rounds. */
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
    uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t infinite = choose(bits > 0x7f800000u, 0x7e00, 0x7c00);
    uint32_t half = choose(bits < 0x38800000u, subnormal, normal);
    return (uint16_t)(choose(bits >= 0x47800000u, infinite, half) | (all >> 16 & 0x8000));
}

#define CONVERT(name, source_type, target_type, body)                                          \
    ALWAYS void name##_body(const source_type *restrict source, target_type *restrict target,  \
                            size_t count) {                                                    \
        for (size_t i = 0; i < count; i++) target[i] = body(source[i]);                        \
    }                                                                                          \
    CLONES(name, source_type, target_type)

#define ADD(name, source_type, body)                                                           \
    ALWAYS void name##_body(const source_type *restrict source, float *restrict target,        \
                            size_t count) {                                                    \
        for (size_t i = 0; i < count; i++) target[i] += body(source[i]);                       \
    }                                                                                          \
    CLONES(name, source_type, float)

#if defined(__x86_64__)
#define CLONES(name, source_type, target_type)                                                 \
    __attribute__((target("avx2"))) static void name##_avx2(                                   \
        const source_type *restrict source, target_type *restrict target, size_t count) {      \
        name##_body(source, target, count);                                                    \
    }                                                                                          \
    static void name(const void *source, void *target, size_t count) {                         \
        if (__builtin_cpu_supports("avx2")) name##_avx2(source, target, count);                \
        else name##_body(source, target, count);                                               \
    }
#else
#define CLONES(name, source_type, target_type)                                                 \
    static void name(const void *source, void *target, size_t count) {                         \
        name##_body(source, target, count);                                                    \
    }
#endif

CONVERT(moeshm_widen_f16, uint16_t, float, from_f16)
CONVERT(moeshm_widen_bf16, uint16_t, float, from_bf16)
CONVERT(moeshm_narrow_f16, float, uint16_t, to_f16)
CONVERT(moeshm_narrow_bf16, float, uint16_t, to_bf16)
ADD(moeshm_add_f32, float, from_f32)
ADD(moeshm_add_f16, uint16_t, from_f16)
ADD(moeshm_add_bf16, uint16_t, from_bf16)

#endif
