// Products of inputs with a repacked weight (linear.h), one group of strips at a time.
//
// Two ways. Exact (linear_exact.cpp): codes become the float32 values that the format defines, in registers or a panel, and
// meet float32 inputs. Eight-bit: codes stay bytes, meet 8-bit inputs in integer sums, and scales come in once a block; outliers among inputs add what is beyond 8 bits
// afterwards (outliers.cpp).
// What an output is summed from, and in which order, does not depend on how many tokens there are: a token computed
// alone and one computed among others agree in every bit.
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kTileTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 6;  // of an 8-bit tile, whose sums stay in registers
constexpr int64_t kPrefetchBytes = 16384;  // into the second-level cache

inline int32_t quad_at(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

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
    add_outliers(a, first, strips);
}

}  // namespace

int64_t product_scratch(int64_t tokens) {
    return kStripsTogether * kStripRows * (kExactBlock + tokens + 1);
}

void product_strips(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    if (!a.eight_bit) return exact_product(a, first, strips, scratch);
    switch (a.linear->bits) {
        case 2: return eight_bit<2>(a, first, strips);
        case 3: return eight_bit<3>(a, first, strips);
        case 4: return eight_bit<4>(a, first, strips);
        default: return eight_bit<8>(a, first, strips);
    }
}

}  // namespace ISA
}  // namespace compress
