// Products of inputs with a repacked weight (linear.h), one group of strips at a time.
//
// Two ways. Exact: codes become the float32 values that the format defines, in a panel that stays in the cache, and
// meet float32 inputs. Eight-bit: codes stay bytes, meet 8-bit inputs in integer sums, and scales come in once a block.
// What an output is summed from, and in which order, does not depend on how many tokens there are: a token computed
// alone and one computed among others agree in every bit.
#include "bfloat16.h"
#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kVectors = kStripRows / LANES;  // registers of a strip
constexpr int kExactBlock = 64;               // columns of a float32 panel
constexpr int kTileTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 6;  // of an 8-bit tile, whose sums stay in registers
constexpr int64_t kPrefetchBytes = 16384;  // into the second-level cache
constexpr int kRegisterTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 8;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline vf as_floats(vi v) { return (vf)v; }
inline vi spread(int32_t x) { return x - vi{}; }

inline vf load_float16(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    halves v;
    std::memcpy(&v, p, sizeof v);
    const vi word = __builtin_convertvector(v, vi), magnitude = word & 0x7fff;
    // In a float's place the exponent is short by 112, which the product makes up for, subnormals included.
    const vi scaled = (vi)(as_floats(magnitude << 13) * 0x1p112f);
    const vi infinite = magnitude << 13 | 0x7f800000;
    return as_floats((magnitude >= 0x7c00 ? infinite : scaled) | (word & 0x8000) << 16);
#endif
}

inline vf load_scales(const Linear& w, int64_t at) {
    if (w.scale_type == ScaleType::float32) return load(static_cast<const float*>(w.scales) + at);
    const uint16_t* half = static_cast<const uint16_t*>(w.scales) + at;
    return w.scale_type == ScaleType::bfloat16 ? load_bfloat16(half) : load_float16(half);
}

inline vi load_zeros(const Linear& w, int64_t at) {
    if (!w.zeros) return spread(w.zero);
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zeros + at)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(w.zeros + at)));
#else
    vi v;
    for (int l = 0; l < LANES; ++l) v[l] = w.zeros[at + l];
    return v;
#endif
}

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

// Quad `i` of a chunk, for the rows of vector `v`: lane = row, byte = column of the quad.
template <int BITS>
inline vi quad_of(const uint8_t* chunk, int64_t line_bytes, int v, int i) {
    const auto line = [&](int l) {
        return load_words(reinterpret_cast<const int32_t*>(chunk + l * line_bytes) + v * LANES);
    };
    if constexpr (BITS == 8) {
        return line(i);
    } else if constexpr (BITS == 4) {
        return (line(i / 2) >> 4 * (i % 2)) & 0x0f0f0f0f;
    } else {
        const vi low = (line(i / 4) >> 2 * (i % 4)) & 0x03030303;
        if constexpr (BITS == 2) return low;
        const vi high = line(2);
        return low | ((i < 2 ? high << (2 - i) : high >> (i - 2)) & 0x04040404);
    }
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

inline int32_t quad_at(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void finish(const ProductArgs& a, int64_t strip, int64_t token, const float* sums) {
    const Linear& w = *a.linear;
    const int64_t row = strip * kStripRows, count = least(kStripRows, w.rows - row);
    float* out = a.out + token * a.out_stride + row;
    for (int64_t r = 0; r < count; ++r) {
        const float value = w.bias ? sums[r] + w.bias[row + r] : sums[r];
        out[r] = a.add ? out[r] + value : value;
    }
}

// ---------------------------------------------------------------------------------------------- 8-bit inputs

// Strips that a tile of so many tokens takes together: a bundle where its sums fit the registers, else one.
constexpr int strips_of_tile(int tokens) {
    return tokens * kVectors * kStripsTogether <= (LANES == 16 ? 24 : LANES == 8 ? 8 : 4) ? kStripsTogether : 1;
}

// What streams from memory while a tile of several tokens computes: where one token's products wait for memory anyway,
// the processor finds the stream by itself and does better alone. Measured on Zen 4.
constexpr bool prefetches(int bits, int tokens, int strips) {
    return tokens >= 3 && bits < 8 && strips == kStripsTogether;
}

// STRIPS strips (one, or a whole bundle) and TOKENS tokens, from packed registers straight to outputs.
template <int BITS, int TOKENS, int STRIPS>
__attribute__((noinline)) void tile(const ProductArgs& a, int64_t strip, int64_t token) {
    const Linear& w = *a.linear;
    const Quantized& x = a.quantized;
    constexpr int kSums = TOKENS * STRIPS * kVectors, kChains = kSums >= 4 ? 1 : 4 / kSums;
    const int64_t group_blocks = w.group / x.block, line = 64 * (STRIPS == 1 ? w.together(strip) : STRIPS);
    const uint8_t* codes = w.codes + w.line_offset(strip);
    const int8_t* q = x.q + token * x.width;
    vf totals[STRIPS][TOKENS][kVectors] = {};
    for (int64_t b = 0, g = 0, left = group_blocks; b < x.blocks && g < w.groups; ++b) {
        vi sums[STRIPS][TOKENS][kVectors][kChains];  // integer sums: any order gives the same
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = w.scale_index(strip, g) + s * kStripRows + v * LANES;
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    const int32_t sum = x.sum[(token + m) * x.blocks + b];
                    for (int c = 0; c < kChains; ++c) sums[s][m][v][c] = vi{};
                    sums[s][m][v][0] = w.zeros ? -load_zeros(w, at) * sum : spread(-w.zero * sum);
                }
            }
        for (int64_t k = 0; k < x.block; k += kChunk, q += kChunk, codes += BITS * line) {
            if constexpr (prefetches(BITS, TOKENS, STRIPS))
                for (int l = 0; l < BITS * STRIPS; ++l) __builtin_prefetch(codes + l * 64 + kPrefetchBytes, 0, 2);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                vi quads[STRIPS][kVectors];
#pragma GCC unroll 4
                for (int s = 0; s < STRIPS; ++s)
                    for (int v = 0; v < kVectors; ++v) quads[s][v] = quad_of<BITS>(codes + s * 64, line, v, i);
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    const int32_t input = quad_at(q + m * x.width + 4 * i);
#pragma GCC unroll 4
                    for (int s = 0; s < STRIPS; ++s)
                        for (int v = 0; v < kVectors; ++v)
                            sums[s][m][v][i % kChains] =
                                dot<BITS == 8>(sums[s][m][v][i % kChains], quads[s][v], input);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) {
                const vf scale = load_scales(w, w.scale_index(strip, g) + s * kStripRows + v * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    vi sum = sums[s][m][v][0];
                    for (int c = 1; c < kChains; ++c) sum += sums[s][m][v][c];
                    totals[s][m][v] += to_floats(sum) * (scale * x.scale[(token + m) * x.blocks + b]);
                }
            }
        if (--left == 0) ++g, left = group_blocks;
    }
    for (int s = 0; s < STRIPS; ++s)
        for (int m = 0; m < TOKENS; ++m)
            finish(a, strip + s, token + m, reinterpret_cast<const float*>(totals[s][m]));
}

template <int BITS, int TOKENS>
void tiles(const ProductArgs& a, int64_t strip, int64_t strips, int64_t token) {
    constexpr int kTogether = strips_of_tile(TOKENS);
    int64_t s = 0;
    for (; s + kTogether <= strips; s += kTogether) tile<BITS, TOKENS, kTogether>(a, strip + s, token);
    if constexpr (kTogether > 1)
        for (; s < strips; ++s) tile<BITS, TOKENS, 1>(a, strip + s, token);
}

template <int BITS>
void eight_bit(const ProductArgs& a, int64_t first, int64_t strips) {
    // Tiles of as equal size as can be: one of 4 tokens and another keep the multipliers busier than one of 6 and one of 2.
    for (int64_t t = 0, parts = (a.tokens + kTileTokens - 1) / kTileTokens; parts > 0; --parts) {
        const int64_t count = (a.tokens - t + parts - 1) / parts;
        switch (count) {
            case 1: tiles<BITS, 1>(a, first, strips, t); break;
            case 2: tiles<BITS, 2>(a, first, strips, t); break;
            case 3: tiles<BITS, least(3, kTileTokens)>(a, first, strips, t); break;
            case 4: tiles<BITS, least(4, kTileTokens)>(a, first, strips, t); break;
            case 5: tiles<BITS, least(5, kTileTokens)>(a, first, strips, t); break;
            default: tiles<BITS, least(6, kTileTokens)>(a, first, strips, t);
        }
        t += count;
    }
}

// ---------------------------------------------------------------------------------------------- float32 inputs

// One chunk's codes as values, [column][row].
template <int BITS, ScaleType type>
inline void decode_chunk(const Linear& w, int64_t strip, int64_t column, const uint8_t* chunk, float* panel) {
    const int64_t at = w.scale_index(strip, column / w.group), line = 64 * w.together(strip);
    for (int v = 0; v < kVectors; ++v) {
        const vi zero = load_zeros(w, at + v * LANES);
        const vf scale = load_scales(w, at + v * LANES);
        for (int i = 0; i < 8; ++i) {
            const vi quad = quad_of<BITS>(chunk, line, v, i);
            for (int j = 0; j < 4; ++j)
                store(panel + (4 * i + j) * kStripRows + v * LANES,
                      rounded<type>(to_floats((quad >> 8 * j & 255) - zero) * scale));
        }
    }
}

template <int BITS>
void decode_block(const Linear& w, int64_t strip, int64_t column, int64_t columns, float* panel) {
    const int64_t line = 64 * w.together(strip);
    const uint8_t* codes = w.codes + w.line_offset(strip) + column / kChunk * BITS * line;
    for (int64_t k = 0; k < columns; k += kChunk, codes += BITS * line, panel += kChunk * kStripRows) {
        if (w.scale_type == ScaleType::bfloat16)
            decode_chunk<BITS, ScaleType::bfloat16>(w, strip, column + k, codes, panel);
        else if (w.scale_type == ScaleType::float16)
            decode_chunk<BITS, ScaleType::float16>(w, strip, column + k, codes, panel);
        else
            decode_chunk<BITS, ScaleType::float32>(w, strip, column + k, codes, panel);
    }
}

// Pairs of bfloat16 columns to float32 ones: no arithmetic, a bfloat16 is the upper half of a float32.
template <>
void decode_block<16>(const Linear& w, int64_t strip, int64_t column, int64_t columns, float* panel) {
    const int32_t* pairs = reinterpret_cast<const int32_t*>(w.codes + strip * w.strip_bytes()) + column * kStripRows / 2;
    for (int64_t k = 0; k < columns; k += 2, panel += 2 * kStripRows, pairs += kStripRows)
        for (int v = 0; v < kVectors; ++v) {
            const vi pair = load_words(pairs + v * LANES);
            store(panel + v * LANES, as_floats(pair << 16));
            store(panel + kStripRows + v * LANES, as_floats(pair & int32_t(0xffff0000)));
        }
}

template <>
void decode_block<32>(const Linear&, int64_t, int64_t, int64_t, float*) {}  // float32 weights are read in place

// STRIPS panels, `depth` columns, times TOKENS tokens; the block's sum is added to the totals.
template <int TOKENS, int STRIPS>
__attribute__((noinline)) void multiply(const float* const* panels, const float* x, int64_t x_stride, int64_t depth,
                                        float* totals, int64_t stride) {
    vf sums[STRIPS][TOKENS][kVectors];
#pragma GCC unroll 4
    for (int s = 0; s < STRIPS; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m)
            for (int v = 0; v < kVectors; ++v) sums[s][m][v] = vf{};
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) {
                const vf w = load(panels[s] + k * kStripRows + v * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) sums[s][m][v] += w * x[m * x_stride + k];
            }
#pragma GCC unroll 4
    for (int s = 0; s < STRIPS; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m)
            for (int v = 0; v < kVectors; ++v) {
                float* at = totals + m * stride + s * kStripRows + v * LANES;
                store(at, load(at) + sums[s][m][v]);
            }
}

template <int TOKENS, int STRIPS>
inline void multiply_strips(const float* const* panels, int64_t strips, const float* x, int64_t x_stride, int64_t depth,
                            float* totals, int64_t stride) {
    int64_t s = 0;
    for (; s + STRIPS <= strips; s += STRIPS)
        multiply<TOKENS, STRIPS>(panels + s, x, x_stride, depth, totals + s * kStripRows, stride);
    for (; s < strips; ++s) multiply<TOKENS, 1>(panels + s, x, x_stride, depth, totals + s * kStripRows, stride);
}

template <int BITS>
void exact(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    const Linear& w = *a.linear;
    const int64_t stride = kStripsTogether * kStripRows;
    float* totals = scratch + kStripsTogether * kExactBlock * kStripRows;
    for (int64_t i = 0; i < a.tokens * stride; ++i) totals[i] = 0;
    for (int64_t k = 0; k < w.columns; k += kExactBlock) {
        const int64_t columns = least(kExactBlock, w.padded - k), depth = least(columns, w.columns - k);
        const float* panels[kStripsTogether];
        for (int64_t s = 0; s < strips; ++s) {
            float* panel = scratch + s * kExactBlock * kStripRows;
            decode_block<BITS>(w, first + s, k, columns, panel);
            panels[s] = panel;
            if (BITS == 32)
                panels[s] = reinterpret_cast<const float*>(w.codes + (first + s) * w.strip_bytes()) + k * kStripRows;
        }
        int64_t t = 0;
        const float* x = a.x + k;
        for (; t + kRegisterTokens <= a.tokens; t += kRegisterTokens)
            multiply_strips<kRegisterTokens, 1>(panels, strips, x + t * a.x_stride, a.x_stride, depth,
                                                totals + t * stride, stride);
        for (; t + 2 <= a.tokens; t += 2)
            multiply_strips<2, 2>(panels, strips, x + t * a.x_stride, a.x_stride, depth, totals + t * stride, stride);
        for (; t < a.tokens; ++t)
            multiply_strips<1, kStripsTogether>(panels, strips, x + t * a.x_stride, a.x_stride, depth,
                                                totals + t * stride, stride);
    }
    for (int64_t t = 0; t < a.tokens; ++t)
        for (int64_t s = 0; s < strips; ++s) finish(a, first + s, t, totals + t * stride + s * kStripRows);
}

}  // namespace

int64_t product_scratch(int64_t tokens) {
    return kStripsTogether * kStripRows * (kExactBlock + tokens);
}

void product_strips(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    switch (a.linear->bits) {
        case 2: return a.eight_bit ? eight_bit<2>(a, first, strips) : exact<2>(a, first, strips, scratch);
        case 3: return a.eight_bit ? eight_bit<3>(a, first, strips) : exact<3>(a, first, strips, scratch);
        case 4: return a.eight_bit ? eight_bit<4>(a, first, strips) : exact<4>(a, first, strips, scratch);
        case 8: return a.eight_bit ? eight_bit<8>(a, first, strips) : exact<8>(a, first, strips, scratch);
        case 16: return exact<16>(a, first, strips, scratch);
        default: return exact<32>(a, first, strips, scratch);
    }
}

}  // namespace ISA
}  // namespace compress
