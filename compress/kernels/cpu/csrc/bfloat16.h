// bfloat16 numbers as their bits: the upper half of a float32.
#pragma once
#include "simd.h"

namespace compress {
namespace ISA {

typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

static inline vf load_bfloat16(const uint16_t* p) {
    halves v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}

static inline float widened(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Nearest bfloat16, ties to even.
static inline uint16_t narrowed(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace ISA
}  // namespace compress
