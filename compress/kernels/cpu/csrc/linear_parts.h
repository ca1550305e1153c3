// What both ways of multiplying with a repacked weight share: reading scales, zero points and codes, writing outputs.
#pragma once
#include "bfloat16.h"
#include "kernels.h"
#include "linear.h"
#include "simd.h"
#include "small_floats.h"
#include "vector_math.h"

namespace compress {
namespace ISA {

// float32 inputs (linear_exact.cpp).
constexpr int kExactBlock = 64;  // columns of a float32 panel
void exact_product(const ProductArgs& a, int64_t first, int64_t strips, float* scratch);
// To outputs that hold all else (outliers.cpp).
template <int BITS>
void add_outliers(const ProductArgs& a, int64_t first, int64_t strips);

namespace {

constexpr int kVectors = kStripRows / LANES;  // registers of a strip

inline vf as_floats(vi v) { return (vf)v; }
inline vi spread(int32_t x) { return x - vi{}; }

inline halves load_halves(const void* p) {
    halves v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vf from_float16(halves v) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)v);
#else
    const vi word = __builtin_convertvector(v, vi), magnitude = word & 0x7fff;
    // In a float's place the exponent is short by 112, which the product makes up for, subnormals included.
    const vi scaled = (vi)(as_floats(magnitude << 13) * 0x1p112f);
    const vi infinite = magnitude << 13 | 0x7f800000;
    return as_floats((magnitude >= 0x7c00 ? infinite : scaled) | (word & 0x8000) << 16);
#endif
}

inline vf load_scales(const Linear& w, int64_t at) {
    const uint16_t* half = static_cast<const uint16_t*>(w.scales) + at;
    const uint8_t* byte = static_cast<const uint8_t*>(w.scales) + at;
    switch (w.scale_type) {
        case ScaleType::bfloat16: return load_bfloat16(half);
        case ScaleType::float16: return from_float16(load_halves(half));
        case ScaleType::e4m3: return from_e4m3(load_unsigned(byte)) * w.factor / w.divisor;
        case ScaleType::e8m0: {
            const vi exponent = load_unsigned(byte);
            return as_floats(exponent == 0 ? spread(0x00400000) : exponent << 23);  // the least is subnormal
        }
        default: return load(static_cast<const float*>(w.scales) + at);
    }
}

inline vi load_zeros(const Linear& w, int64_t at) { return w.zeros ? load_unsigned(w.zeros + at) : spread(w.zero); }

// Quad `i` of a chunk, for the rows of vector `v`: lane = row, byte = column of the quad.
template <int BITS>
inline vi quad_of(const uint8_t* chunk, int64_t line_bytes, int v, int i) {
    const auto line = [&](int l) {
        return load_words(reinterpret_cast<const int32_t*>(chunk + l * line_bytes) + v * LANES);
    };
    const CodePlace p = place_of(BITS, i);
    if constexpr (BITS == 8) return line(p.line);
    const vi low = (line(p.line) >> p.shift) & p.mask * 0x01010101;
    if (p.high_mask == 0) return low;
    const vi high = line(p.high_line);
    return low | ((p.up > 0 ? high << p.up : high >> -p.up) & p.high_mask * 0x01010101);
}

// sum + the four products of each lane's bytes with those of `x`. WIDE: bytes of w may exceed 127.
template <bool WIDE>
inline vi dot(vi sum, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
    if constexpr (WIDE) return dot<false>(dot<false>(sum, w & 0x7f7f7f7f, x), w & int32_t(0x80808080), x);
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int j = 0; j < 4; ++j) sum += (w >> 8 * j & 255) * int32_t(int8_t(x >> 8 * j));
    return sum;
#endif
#endif
}

// Writes, or adds to what is there, `sums` of `strips` strips' rows, one after the other, as outputs of one token.
inline void put(const ProductArgs& a, int64_t strip, int64_t strips, int64_t token, const float* sums,
                const float* bias, bool add) {
    const int64_t row = strip * kStripRows, count = least(strips * kStripRows, a.linear->rows - row);
    float* out = a.out + token * a.out_stride + row;
    for (int64_t r = 0; r < count; r += LANES) {
        vf value = load(sums + r);
        if (bias) value += load_some(bias + row + r, count - r);
        if (add) value += load_some(out + r, count - r);
        store_some(out + r, value, count - r);
    }
}

// Completes a token's outputs: with the bias, and what is there already where that is wanted.
inline void finish(const ProductArgs& a, int64_t strip, int64_t strips, int64_t token, const float* sums) {
    put(a, strip, strips, token, sums, a.linear->bias, a.add);
}

}  // namespace
}  // namespace ISA
}  // namespace compress
