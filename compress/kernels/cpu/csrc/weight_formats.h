// What codes stand for, a format a struct: `grid` is what 16 rows share within kSpan columns, `value` a column's values.
// kLate: values are not scaled and not rounded; the sum over late_block columns is.
#pragma once
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

inline int64_t late_block(const Linear& w) { return w.group % kExactBlock == 0 ? kExactBlock : kChunk; }

template <ScaleType type>
inline vf rounded(vf x) {
    if constexpr (type == ScaleType::float32) return x;
    const vi bits = (vi)x;
    if constexpr (type == ScaleType::bfloat16)
        return as_floats((bits + 0x7fff + (bits >> 16 & 1)) & int32_t(0xffff0000));
    const vf normal = as_floats((bits + 0xfff + (bits >> 13 & 1)) & int32_t(0xffffe000));
    const vf magic = broadcast(0.75f);  // floats near it are 2^-24 apart, as float16's subnormals are
    const vf magnitude = as_floats(bits & 0x7fffffff);
    return magnitude < 0x1p-14f ? (x + magic) - magic : normal;
}

// (code - zero) * scale.
template <int BITS, ScaleType type>
struct Integers {
    static constexpr int kBits = BITS, kSpan = kChunk;
    static constexpr bool kLate = false;
    struct Grid {
        vf scale;
        vi zero;
    };
    explicit Integers(const Linear&) {}
    Grid grid(const Linear& w, int64_t at) const { return {load_scales(w, at), load_zeros(w, at)}; }
    vf value(const uint8_t* chunk, int64_t line, int v, int column, const Grid& grid) const {
        const vi code = quad_of<BITS>(chunk, line, v, column / 4) >> 8 * (column % 4) & 255;
        return rounded<type>(to_floats(code - grid.zero) * grid.scale);
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
