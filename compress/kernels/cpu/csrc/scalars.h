// Small arithmetic on single numbers. All static: the files that are compiled once per instruction set each need a copy of
// their own (simd.h).
#pragma once
#include <cstdint>
#include <cstring>

namespace compress {

static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t rounded_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

static inline uint32_t bits_of(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    return word;
}
static inline float float_of(uint32_t word) {
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}

// bfloat16 numbers as their bits: the upper half of a float32.
static inline float widened(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
static inline float widened(float value) { return value; }

// Nearest bfloat16, ties to even.
static inline uint16_t narrowed(float value) {
    const uint32_t word = bits_of(value);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// E4M3: 1 sign, 4 exponent, 3 mantissa, no infinities.
static inline float from_e4m3(uint8_t code) {
    const uint32_t size = code & 0x7f;
    const float value = size == 0x7f ? float_of(0x7fc00000) : float_of(size << 20) * 0x1p120f;
    return code & 0x80 ? -value : value;
}

}  // namespace compress
