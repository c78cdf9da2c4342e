// Four values at a time, of any of the three formats, as float32.
#pragma once

#include "ffn.cuh"

// Weights in 16 bytes.
#define VALUES (16 / (int)sizeof(WEIGHT))

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

DEVICE Quad unpack(const vec16& loaded, int part, bf16) {
    return widen_quad<bf16>(loaded.word[part * 2], loaded.word[part * 2 + 1]);
}

DEVICE Quad unpack(const vec16& loaded, int part, f16) {
    return widen_quad<f16>(loaded.word[part * 2], loaded.word[part * 2 + 1]);
}

DEVICE Quad unpack(const vec16& loaded, int, float) {
    return Quad{{bits_to_float(loaded.word[0]), bits_to_float(loaded.word[1]),
                 bits_to_float(loaded.word[2]), bits_to_float(loaded.word[3])}};
}

// Of the weights in 16 bytes, the four from 4 * part on.
DEVICE Quad unpack_weights(const vec16& loaded, int part) {
    return unpack(loaded, part, WEIGHT());
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
