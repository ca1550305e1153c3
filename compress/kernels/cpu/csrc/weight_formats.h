// What codes stand for, a format a struct: `grid` is what 16 rows share within kSpan columns, `value` a column's values.
// kLate: values are not scaled and not rounded; the sum over late_block columns is.
#pragma once
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

inline int64_t late_block(const Linear& w) { return w.group % kExactBlock == 0 ? kExactBlock : kChunk; }

// What takes a float beyond the digits of a 16-bit type.
constexpr float beyond(ScaleType type) { return type == ScaleType::bfloat16 ? 0x1p16f : 0x1p13f; }

// To nearest, half to even, for |x| < 2^104: floats near 1.5 * beyond * x's octave are as far apart as the type's.
template <ScaleType type>
inline vf rounded(vf x) {
    if constexpr (type == ScaleType::float32) return x;
    vf octave = as_floats((vi)x & 0x7f800000);
    if constexpr (type == ScaleType::float16) octave = octave > 0x1p-14f ? octave : broadcast(0x1p-14f);  // subnormals
    const vf near = octave * (1.5f * beyond(type));
    return (x + near) - near;
}

// x - a * b, rounded once. Left to the compiler, what it contracts could be the product that x is.
#if defined(__AVX512F__)
constexpr bool kFused = true;
inline vf minus_product(vf x, vf a, vf b) { return (vf)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)x); }
#elif defined(__FMA__)
constexpr bool kFused = true;
inline vf minus_product(vf x, vf a, vf b) { return (vf)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)x); }
#else
constexpr bool kFused = false;
inline vf minus_product(vf x, vf a, vf b) { return x - a * b; }
#endif

// level * scale with level = code - zero. Where products are fused they are rounded by Veltkamp's splitting (Dekker,
// Numer. Math. 18, 1971): level * (beyond + 1) * scale rounds itself, half to even, as it has at most 19 digits before
// those beyond; less level * beyond * scale the value is left. A subnormal one is a multiple of the type's smallest.
template <int BITS, ScaleType type>
struct Integers {
    static constexpr int kBits = BITS, kSpan = kChunk, kStep = 8 % BITS ? 8 : BITS, kPlaces = 8 / kStep;
    static constexpr bool kLate = false, kSplits = kFused && type != ScaleType::float32;
    struct Grid {
        vf zero[kPlaces], scale, wide;
    };
    explicit Integers(const Linear&) {}
    Grid grid(const Linear& w, int64_t at) const {
        const vf zero = to_floats(load_zeros(w, at)), scale = load_scales(w, at), wide = scale * beyond(type);
        Grid grid{{}, kSplits ? wide + scale : scale, wide};
        for (int i = 0; i < kPlaces; ++i) grid.zero[i] = zero + float(1 << (15 - i * kStep));
        return grid;
    }
    // A code `digit` bits up in a float whose last digit counts 2^-digit: 2^(23 - digit) + code.
    vf value(const uint8_t* chunk, int64_t line, int v, int column, const Grid& grid) const {
        const int quad = column / 4, place = quad % kPlaces, shift = 8 * (column % 4) - 8, digit = 8 + place * kStep;
        const auto* lines = reinterpret_cast<const int32_t*>(chunk + quad / kPlaces * line);
        const vi word = 8 % BITS ? quad_of<BITS>(chunk, line, v, quad) : load_words(lines + v * LANES);
        const vi placed = shift < 0 ? word << -shift : word >> shift;
        const vi number = (placed & ((1 << BITS) - 1) << digit) | (150 - digit) << 23;
        const vf level = as_floats(number) - grid.zero[place], product = level * grid.scale;
        return kSplits ? minus_product(product, level, grid.wide) : rounded<type>(product);
    }
};

// FP8, of codes that are numbers. In a float16's place the exponent is short by 8, which the scale makes up for.
struct E4m3 {
    static constexpr int kBits = 8, kSpan = kChunk;
    static constexpr bool kLate = true;
    struct Grid {
        vf scale;
    };
    explicit E4m3(const Linear&) {}
    Grid grid(const Linear& w, int64_t at) const { return {load_scales(w, at) * 256}; }
    vf value(const uint8_t* chunk, int64_t line, int v, int column, const Grid&) const {
        const halves pair = load_halves(chunk + column / 4 * line + column % 4 / 2 * 32 + v * LANES * 2);
        const halves sign = column % 2 ? pair : pair << 8, size = column % 2 ? pair >> 1 : pair << 7;
        return from_float16((sign & 0x8000) | (size & 0x3f80));
    }
};

// Codes of 4 bits that number the entries of a table: E2M1, normal floats.
template <ScaleType type, int SPAN>
struct Entries {
    static constexpr int kBits = 4, kSpan = SPAN;
    static constexpr bool kLate = type == ScaleType::float32 && SPAN == kChunk;
    struct Grid {
        vf scale;
    };
#if LANES == 16
    vf all;
    explicit Entries(const Linear& w) : all(load(w.table)) {}
    vf entry(vi code) const { return permute(all, code); }  // by the low four bits
#elif defined(__AVX2__)
    vf low, high;
    explicit Entries(const Linear& w) : low(load(w.table)), high(load(w.table + LANES)) {}
    vf entry(vi code) const {
        return (vf)_mm256_blendv_ps((__m256)permute(low, code), (__m256)permute(high, code), (__m256)(code << 28));
    }
#else
    const float* table;
    explicit Entries(const Linear& w) : table(w.table) {}
    vf entry(vi code) const {
        vf found;
        for (int l = 0; l < LANES; ++l) found[l] = table[code[l] & 15];
        return found;
    }
#endif
    Grid grid(const Linear& w, int64_t at) const { return {load_scales(w, at)}; }
    vf value(const uint8_t* chunk, int64_t line, int v, int column, const Grid& grid) const {
        const vi words = load_words(reinterpret_cast<const int32_t*>(chunk + column / 8 * line) + v * LANES);
        const vf found = entry(words >> (column / 4 % 2 * 4 + column % 4 * 8));
        return kLate ? found : rounded<type>(found * grid.scale);
    }
};

}  // namespace
}  // namespace ISA
}  // namespace compress
