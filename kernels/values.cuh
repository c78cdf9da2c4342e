// Weights and values, four at a time, as float32.
#pragma once

#include "ffn.cuh"

// Weights in 16 bytes.
#define VALUES (16 / (int)sizeof(WEIGHT))

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
