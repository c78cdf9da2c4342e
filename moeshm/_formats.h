/* Loops over float32, float16 and bfloat16, exact and rounded to nearest even.
 *
 * Every body is compiled twice, for any x86-64 and for AVX2: GCC and clang vectorise them, and the
 * same source serves ARM64. They choose by masks: of `?:` GCC may make branches, which it does not
 * vectorise. Only float16 has instructions of its own on x86 (F16C), three times as fast.
 */
#ifndef MOESHM_FORMATS_H
#define MOESHM_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

ALWAYS uint16_t f16_to_bf16(uint16_t stored) { return to_bf16(from_f16(stored)); }

ALWAYS uint16_t bf16_to_f16(uint16_t stored) { return to_f16(from_bf16(stored)); }

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

/* Eight at a time, by a body that ends with a store; what is left goes the portable way. */
#define F16C(name, source_type, target_type, body, ...)                                        \
    __attribute__((target("avx2,f16c"))) static void name##_f16c(                              \
        const source_type *source, target_type *target, size_t count) {                        \
        size_t i = 0;                                                                          \
        for (; i + 8 <= count; i += 8) __VA_ARGS__;                                            \
        for (; i < count; i++) body;                                                           \
    }                                                                                          \
    static void name(const void *source, void *target, size_t count) {                         \
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))                  \
            name##_f16c(source, target, count);                                                \
        else name##_portable(source, target, count);                                           \
    }
#else
#define CLONES(name, source_type, target_type)                                                 \
    static void name(const void *source, void *target, size_t count) {                         \
        name##_body(source, target, count);                                                    \
    }
#define F16C(name, source_type, target_type, body, ...)                                        \
    static void name(const void *source, void *target, size_t count) {                         \
        name##_portable(source, target, count);                                                \
    }
#endif

#define HALVES(i) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + (i))))

CONVERT(moeshm_widen_f16_portable, uint16_t, float, from_f16)
F16C(moeshm_widen_f16, uint16_t, float, target[i] = from_f16(source[i]),
     _mm256_storeu_ps(target + i, HALVES(i)))
CONVERT(moeshm_widen_bf16, uint16_t, float, from_bf16)
CONVERT(moeshm_narrow_f16_portable, float, uint16_t, to_f16)
F16C(moeshm_narrow_f16, float, uint16_t, target[i] = to_f16(source[i]),
     _mm_storeu_si128((__m128i *)(target + i),
                      _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT)))
CONVERT(moeshm_narrow_bf16, float, uint16_t, to_bf16)
CONVERT(moeshm_f16_to_bf16, uint16_t, uint16_t, f16_to_bf16)
CONVERT(moeshm_bf16_to_f16, uint16_t, uint16_t, bf16_to_f16)
ADD(moeshm_add_f32, float, from_f32)
ADD(moeshm_add_f16_portable, uint16_t, from_f16)
F16C(moeshm_add_f16, uint16_t, float, target[i] += from_f16(source[i]),
     _mm256_storeu_ps(target + i, _mm256_add_ps(_mm256_loadu_ps(target + i), HALVES(i))))
ADD(moeshm_add_bf16, uint16_t, from_bf16)

#endif
