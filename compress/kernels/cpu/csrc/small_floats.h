// Numbers of 8 and 4 bits as the cache keeps them: E4M3 (1 sign, 4 exponent, 3 mantissa, no infinities) and E2M1.
#pragma once
#include "scalars.h"
#include "simd.h"

namespace compress {
namespace ISA {

constexpr float kLargestE4m3 = 448, kLargestE2m1 = 6;

// Nearest, ties to even; beyond the largest the largest, and NaN for what is not finite.
static inline uint8_t e4m3_of(float x) {
    if (!(x - x == 0)) return 0x7f;
    const uint8_t sign = uint8_t(bits_of(x) >> 24 & 0x80);
    const float size = x < 0 ? -x : x;
    if (size >= kLargestE4m3) return sign | 0x7e;
    if (size < 0.015625f) return sign | uint8_t((size * 512 + 12582912.0f) - 12582912.0f);
    const uint32_t word = bits_of(size) + 0x7ffff + (bits_of(size) >> 20 & 1);
    return sign | uint8_t((word >> 20) - (120 << 3));
}

// LANES codes, one in the low byte of each word.
static inline vf from_e4m3(vi code) {
    const vi size = code & 0x7f, negative = (code & 0x80) << 24;
    const vi normal = (size << 20) + (120 << 23);
    const vf tiny = to_floats(size) * (1.0f / 512);
    vi bits, tiny_bits;
    std::memcpy(&tiny_bits, &tiny, sizeof bits);
    bits = size < 8 ? tiny_bits : normal;
    bits = (size == 0x7f ? vi{} + 0x7fc00000 : bits) | negative;
    vf value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

using compress::from_e4m3;  // of one

static inline uint8_t e2m1_of(float x) {
    const float size = x < 0 ? -x : x;
    const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                     (size >= 3.5f) + (size > 5);
    return uint8_t(code | (x < 0 ? 8 : 0));
}

// LANES codes of 4 bits: twice their values are small integers.
static inline vf from_e2m1(vi code) {
    const vi size = code & 7, large = (2 | (size & 1)) << ((size >> 1) - (size > 1 ? vi{} + 1 : vi{}));
    const vi twice = size < 2 ? size : large;
    return to_floats((code & 8) != 0 ? -twice : twice) * 0.5f;
}

static inline float from_e2m1(int code) {
    const int size = code & 7, twice = size < 2 ? size : (2 | (size & 1)) << ((size >> 1) - 1);
    return (code & 8 ? -0.5f : 0.5f) * float(twice);
}

}  // namespace ISA
}  // namespace compress
