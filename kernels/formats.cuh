// Values of any of the three formats, one or four at a time, as float32.
#pragma once

#include "portable.cuh"

// The codes of moeshm.dtypes.DType, for formats that are only known when a kernel runs.
enum { F32 = 0, F16 = 1, BF16 = 2 };

// One element of an array whose format is known at run time.
DEVICE float load_as_float(const void* array, long long index, int dtype) {
    if (dtype == BF16) return widen(((const bf16*)array)[index]);
    if (dtype == F16) return widen(((const f16*)array)[index]);
    return ((const float*)array)[index];
}

DEVICE void store_float(void* array, long long index, int dtype, float value) {
    if (dtype == BF16)
        ((bf16*)array)[index] = narrow<bf16>(value);
    else if (dtype == F16)
        ((f16*)array)[index] = narrow<f16>(value);
    else
        ((float*)array)[index] = value;
}

struct __align__(16) Quad {
    float value[4];
};

struct __align__(8) HalfQuad {
    u32 word[2];
};

DEVICE Quad zero_quad() { return Quad{{0, 0, 0, 0}}; }

template <typename T> DEVICE Quad widen_quad(u32 low, u32 high) {
    return Quad{{widen(T{(u16)low}), widen(T{(u16)(low >> 16)}), widen(T{(u16)high}),
                 widen(T{(u16)(high >> 16)})}};
}

// Aligned to the size of what is read: every row has a multiple of 8 values.
DEVICE Quad load_quad(const float* address) { return *(const Quad*)address; }

DEVICE Quad load_quad(const bf16* address) {
    const HalfQuad loaded = *(const HalfQuad*)address;
    return widen_quad<bf16>(loaded.word[0], loaded.word[1]);
}

DEVICE Quad load_quad(const f16* address) {
    const HalfQuad loaded = *(const HalfQuad*)address;
    return widen_quad<f16>(loaded.word[0], loaded.word[1]);
}

// As `load_as_float`, of four.
DEVICE Quad load_quad(const void* array, long long index, int dtype) {
    if (dtype == BF16) return load_quad((const bf16*)array + index);
    if (dtype == F16) return load_quad((const f16*)array + index);
    return load_quad((const float*)array + index);
}

template <typename T> DEVICE HalfQuad narrow_quad(const Quad& quad) {
    const float* value = quad.value;
    return HalfQuad{{(u32)narrow<T>(value[0]).bits | (u32)narrow<T>(value[1]).bits << 16,
                     (u32)narrow<T>(value[2]).bits | (u32)narrow<T>(value[3]).bits << 16}};
}

// As `store_float`, of four.
DEVICE void store_quad(void* array, long long index, int dtype, const Quad& quad) {
    if (dtype == BF16)
        *(HalfQuad*)((bf16*)array + index) = narrow_quad<bf16>(quad);
    else if (dtype == F16)
        *(HalfQuad*)((f16*)array + index) = narrow_quad<f16>(quad);
    else
        *(Quad*)((float*)array + index) = quad;
}
