// Products of inputs with a repacked weight (linear.h), one group of strips at a time.
//
// Two ways. Exact (linear_exact.cpp): codes become the float32 values that the format defines, in registers or a panel,
// and meet float32 inputs. Eight-bit: codes stay bytes, meet 8-bit inputs in integer sums, and scales come in once a
// block; outliers among inputs add what is beyond 8 bits afterwards (outliers.cpp).
// What an output is summed from, and in which order, does not depend on how many tokens there are: a token computed
// alone and one computed among others agree in every bit.
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kTileTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 6;  // of an 8-bit tile, whose sums stay in registers
constexpr int kGroupTokens = 6 * kTileTokens;  // whose totals, and a block's codes, stay in the first-level cache

inline int32_t quad_at(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Strips that a tile of so many tokens takes together: a bundle where its sums fit the registers, else one.
constexpr int strips_of_tile(int tokens) {
    return tokens * kVectors * kStripsTogether <= (LANES == 16 ? 24 : LANES == 8 ? 8 : 4) ? kStripsTogether : 1;
}

// What a tile fetches into the second-level cache while it computes: every `step`-th line, so many bytes ahead. Codes of 4
// to 6 bits of one or two tokens are found best by the processor alone, and those of 8 bits of three or more. Measured on
// Zen 4.
struct Fetch {
    int64_t bytes, step;
};
constexpr Fetch fetch_of(int bits, int tokens, int strips) {
    if (strips != kStripsTogether) return {};
    if (bits == 8) return tokens <= 2 ? Fetch{4096, 2} : Fetch{};
    return bits < 4 || tokens >= 3 ? Fetch{16384, 1} : Fetch{};
}

// Blocks of columns from `first` on; group: of scales, that the first is in; left: that group's blocks from the first on.
struct Blocks {
    int64_t first, count, group, left;
};

// Blocks of columns for STRIPS strips (one, or a whole bundle) and TOKENS tokens: from packed registers to totals, (token,
// kStripsTogether, 16). ALONE: no other tokens and strips meet these lines, so that they are gone through at one go, as the
// processor fetches memory best; else one block, which the next find in the cache.
template <int BITS, int TOKENS, int STRIPS, bool ALONE>
__attribute__((noinline)) void tile(const Linear& w, const Quantized& x, int64_t strip, int64_t token, Blocks blocks,
                                    float* totals) {
    constexpr int kSums = TOKENS * STRIPS * kVectors, kChains = kSums >= 4 ? 1 : 4 / kSums;
    constexpr Fetch kFetch = fetch_of(BITS, TOKENS, STRIPS);
    const int64_t together = w.together(strip), line = 64 * (STRIPS == 1 ? together : STRIPS);
    const int64_t group_blocks = w.group / x.block, block_scales = together * kStripRows;
    const uint8_t* codes = w.codes + w.line_offset(strip) + blocks.first * x.block / kChunk * BITS * line;
    const bool ahead = token == 0;  // the first to read these lines
    int64_t at = w.scale_index(strip, blocks.group);
    const int64_t end = blocks.first + (ALONE ? blocks.count : 1);
    for (int64_t b = blocks.first, left = blocks.left; b < end; ++b) {
        const int8_t* q = x.q + x.at(token, b) * x.block;
        const float* input_scales = x.scale + x.at(token, b);
        const int32_t* input_sums = x.sum + x.at(token, b);
        vi sums[STRIPS][TOKENS][kVectors][kChains];  // integer sums: any order gives the same
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    for (int c = 0; c < kChains; ++c) sums[s][m][v][c] = vi{};
                    sums[s][m][v][0] = w.zeros ? -load_zeros(w, at + s * kStripRows + v * LANES) * input_sums[m]
                                               : spread(-w.zero * input_sums[m]);
                }
        for (int64_t k = 0; k < x.block; k += kChunk, q += kChunk, codes += BITS * line) {
            if constexpr (kFetch.bytes > 0)
                for (int64_t l = 0; ahead && l < BITS * STRIPS; l += kFetch.step)
                    __builtin_prefetch(codes + l * 64 + kFetch.bytes, 0, 2);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                vi quads[STRIPS][kVectors];
#pragma GCC unroll 4
                for (int s = 0; s < STRIPS; ++s)
                    for (int v = 0; v < kVectors; ++v) quads[s][v] = quad_of<BITS>(codes + s * 64, line, v, i);
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    const int32_t input = quad_at(q + m * x.block + 4 * i);
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
                const vf scale = load_scales(w, at + s * kStripRows + v * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    vi sum = sums[s][m][v][0];
                    for (int c = 1; c < kChains; ++c) sum += sums[s][m][v][c];
                    float* const total = totals + (m * kStripsTogether + s) * kStripRows + v * LANES;
                    store(total, load(total) + to_floats(sum) * (scale * input_scales[m]));
                }
            }
        if (--left == 0) at += block_scales, left = group_blocks;
    }
}

// The same for `strips` strips.
template <int BITS, int TOKENS, bool ALONE>
void tiles(const Linear& w, const Quantized& x, int64_t strip, int64_t strips, int64_t token, Blocks blocks,
           float* totals) {
    constexpr int kTogether = strips_of_tile(TOKENS);
    int64_t s = 0;
    for (; s + kTogether <= strips; s += kTogether)
        tile<BITS, TOKENS, kTogether, ALONE>(w, x, strip + s, token, blocks, totals + s * kStripRows);
    if constexpr (kTogether > 1)
        for (; s < strips; ++s)
            tile<BITS, TOKENS, 1, ALONE>(w, x, strip + s, token, blocks, totals + s * kStripRows);
}

// Calls work(first, count) for `total` things in parts of `most` at most, a multiple of `step` each but the last, and else
// as equal as can be: tiles of 4 tokens and 4 keep the multipliers busier than ones of 6 and 2.
template <typename Work>
inline void in_parts(int64_t total, int64_t most, int64_t step, Work work) {
    for (int64_t first = 0, parts = ceil_div(total, most); first < total; --parts) {
        const int64_t count = least(rounded_up(ceil_div(total - first, parts), step), total - first);
        work(first, count);
        first += count;
    }
}

// The outputs of `count` tokens from `token` on will be written: they are brought near meanwhile.
inline void expect(const ProductArgs& a, int64_t strip, int64_t token, int64_t count) {
    for (int64_t t = token; t < token + count; ++t) {
        const float* out = a.out + t * a.out_stride + strip * kStripRows;
        for (int s = 0; s < kStripsTogether; ++s) __builtin_prefetch(out + s * kStripRows, 1);
    }
}

// Tiles of `count` tokens, kTileTokens at most.
template <int BITS, bool ALONE>
void tiles_of(const ProductArgs& a, int64_t strip, int64_t strips, int64_t token, int64_t count, Blocks blocks,
              float* totals) {
    const auto take = [&](auto run) { run(*a.linear, a.quantized, strip, strips, token, blocks, totals); };
    switch (count) {
        case 1: return take(tiles<BITS, 1, ALONE>);
        case 2: return take(tiles<BITS, 2, ALONE>);
        case 3: return take(tiles<BITS, least(3, kTileTokens), ALONE>);
        case 4: return take(tiles<BITS, least(4, kTileTokens), ALONE>);
        case 5: return take(tiles<BITS, least(5, kTileTokens), ALONE>);
        default: return take(tiles<BITS, least(6, kTileTokens), ALONE>);
    }
}

template <int BITS>
void eight_bit(const ProductArgs& a, int64_t strip, int64_t strips) {
    constexpr int kStride = kStripsTogether * kStripRows;
    const int64_t group_blocks = a.linear->group / a.quantized.block;
    const int64_t blocks = least(a.quantized.blocks, a.linear->groups * group_blocks);
    in_parts(a.tokens, kGroupTokens, kTileTokens, [&](int64_t first, int64_t count) {
        alignas(64) float totals[kGroupTokens * kStride];
        for (int64_t i = 0; i < count * kStride; ++i) totals[i] = 0;
        if (count <= kTileTokens && strips_of_tile(int(count)) == kStripsTogether) {
            expect(a, strip, first, count);
            tiles_of<BITS, true>(a, strip, strips, first, count, {0, blocks, 0, group_blocks}, totals);
        } else {
            for (int64_t b = 0; b < blocks; ++b) {
                expect(a, strip, first + count * b / blocks, count * (b + 1) / blocks - count * b / blocks);
                in_parts(count, kTileTokens, 1, [&](int64_t t, int64_t tokens) {
                    const Blocks one{b, 1, b / group_blocks, group_blocks - b % group_blocks};
                    tiles_of<BITS, false>(a, strip, strips, first + t, tokens, one, totals + t * kStride);
                });
            }
        }
        for (int64_t t = 0; t < count; ++t) finish(a, strip, strips, first + t, totals + t * kStride);
    });
    add_outliers<BITS>(a, strip, strips);
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
        case 5: return eight_bit<5>(a, first, strips);
        case 6: return eight_bit<6>(a, first, strips);
        default: return eight_bit<8>(a, first, strips);
    }
}

}  // namespace ISA
}  // namespace compress
