// Products of float32 inputs with the values that a weight's format defines, in float32.
#include "weight_formats.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kUnrolled = LANES == 4 ? 4 : kChunk;  // columns: with four registers a strip the code grows with no gain
constexpr int kRegisterTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 8;

// One chunk's codes as values, [column][row].
template <typename Format>
inline void decode_chunk(const Linear& w, const Format& format, int64_t strip, int64_t column, const uint8_t* chunk,
                         float* panel) {
    const int64_t line = 64 * w.together(strip);
    for (int part = 0; part < kChunk; part += Format::kSpan) {
        const int64_t at = w.scale_index(strip, (column + part) / w.group);
        for (int v = 0; v < kVectors; ++v) {
            const auto grid = format.grid(w, at + v * LANES);
#pragma GCC unroll 8
            for (int c = part; c < part + Format::kSpan; ++c)
                store(panel + c * kStripRows + v * LANES, format.value(chunk, line, v, c, grid));
        }
    }
}

// A packed weight's columns [column, column + columns) as values.
template <typename Format>
struct Packed {
    static constexpr bool kPacked = true, kLate = Format::kLate;
    // What the sums over columns from `column` on are multiplied by where that is left to them.
    static void late_scales(const Linear& w, int64_t strip, int64_t column, float* scales) {
        const Format format(w);
        for (int v = 0; v < kVectors; ++v)
            store(scales + v * LANES, format.grid(w, w.scale_index(strip, column / w.group) + v * LANES).scale);
    }
    static void decode(const Linear& w, int64_t strip, int64_t column, int64_t columns, float* panel) {
        const Format format(w);
        const int64_t line = 64 * w.together(strip);
        const uint8_t* codes = w.codes + w.line_offset(strip) + column / kChunk * Format::kBits * line;
        for (int64_t k = 0; k < columns; k += kChunk, codes += Format::kBits * line, panel += kChunk * kStripRows)
            decode_chunk(w, format, strip, column + k, codes, panel);
    }
    template <int STRIPS>
    static void one_token(const ProductArgs& a, int64_t first);
};

// A plain weight of 16 or 32 bits.
template <int BITS>
struct Plain {
    static constexpr bool kPacked = false, kLate = false;
    static void decode(const Linear& w, int64_t strip, int64_t column, int64_t columns, float* panel);
    template <int STRIPS>
    static void one_token(const ProductArgs& a, int64_t first);
};

// Pairs of bfloat16 columns to float32 ones: no arithmetic, a bfloat16 is the upper half of a float32.
template <>
void Plain<16>::decode(const Linear& w, int64_t strip, int64_t column, int64_t columns, float* panel) {
    const int32_t* pairs = reinterpret_cast<const int32_t*>(w.codes + strip * w.strip_bytes()) + column * kStripRows / 2;
    for (int64_t k = 0; k < columns; k += 2, panel += 2 * kStripRows, pairs += kStripRows)
        for (int v = 0; v < kVectors; ++v) {
            const vi pair = load_words(pairs + v * LANES);
            store(panel + v * LANES, as_floats(pair << 16));
            store(panel + kStripRows + v * LANES, as_floats(pair & int32_t(0xffff0000)));
        }
}

template <>
void Plain<32>::decode(const Linear&, int64_t, int64_t, int64_t, float*) {}  // float32 weights are read in place

// STRIPS panels, `depth` columns, times TOKENS tokens; the block's sum is added to the totals, LATE times the scales.
template <int TOKENS, int STRIPS, bool LATE>
__attribute__((noinline)) void multiply(const float* const* panels, const float* scales, const float* x,
                                        int64_t x_stride, int64_t depth, float* totals, int64_t stride) {
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
                const vf sum = sums[s][m][v];
                store(at, LATE ? load(at) + sum * load(scales + s * kStripRows + v * LANES) : load(at) + sum);
            }
}

struct Block {
    const float* panels[kStripsTogether];
    const float* scales;  // [strip][16], where they come late
    int64_t strips, depth;
};

template <int TOKENS, int STRIPS, bool LATE>
inline void multiply_strips(const Block& b, const float* x, int64_t x_stride, float* totals, int64_t stride) {
    int64_t s = 0;
    for (; s + STRIPS <= b.strips; s += STRIPS)
        multiply<TOKENS, STRIPS, LATE>(b.panels + s, b.scales + s * kStripRows, x, x_stride, b.depth,
                                       totals + s * kStripRows, stride);
    for (; s < b.strips; ++s)
        multiply<TOKENS, 1, LATE>(b.panels + s, b.scales + s * kStripRows, x, x_stride, b.depth,
                                  totals + s * kStripRows, stride);
}

// One token and STRIPS strips of a plain weight: nothing to decode, so no panel. Sums in the order of `multiply`.
template <int BITS>
template <int STRIPS>
__attribute__((noinline)) void Plain<BITS>::one_token(const ProductArgs& a, int64_t first) {
    const Linear& w = *a.linear;
    constexpr int kStep = BITS == 16 ? 2 : 1;  // columns of a word
    const int32_t* words = reinterpret_cast<const int32_t*>(w.codes + first * w.strip_bytes());
    const int64_t strip_words = w.strip_bytes() / 4;
    vf totals[STRIPS][kVectors] = {};
    for (int64_t k = 0; k < w.columns; k += kExactBlock) {
        const int64_t end = least(w.columns, k + kExactBlock);
        vf sums[STRIPS][kVectors] = {};
        for (int64_t c = k; c < end; c += kStep) {
            const bool second = kStep == 2 && c + 1 < end;
#pragma GCC unroll 4
            for (int s = 0; s < STRIPS; ++s)
                for (int v = 0; v < kVectors; ++v) {
                    const vi word = load_words(words + s * strip_words + c / kStep * kStripRows + v * LANES);
                    sums[s][v] += as_floats(BITS == 16 ? word << 16 : word) * a.x[c];
                    if (second) sums[s][v] += as_floats(word & int32_t(0xffff0000)) * a.x[c + 1];
                }
        }
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) totals[s][v] += sums[s][v];
    }
    finish(a, first, STRIPS, 0, reinterpret_cast<const float*>(totals));
}

// The same of a packed weight, whose columns are a multiple of kChunk: codes become values in registers.
template <typename Format>
template <int STRIPS>
__attribute__((noinline)) void Packed<Format>::one_token(const ProductArgs& a, int64_t first) {
    const Linear& w = *a.linear;
    const Format format(w);
    const int64_t line = 64 * (STRIPS == 1 ? w.together(first) : STRIPS);
    const int64_t block = Format::kLate ? late_block(w) : kExactBlock;
    const uint8_t* codes = w.codes + w.line_offset(first);
    vf totals[STRIPS][kVectors] = {}, sums[STRIPS][kVectors] = {};
    typename Format::Grid grids[STRIPS][kVectors] = {};
    for (int64_t k = 0, group = -1; k < w.columns; k += kChunk, codes += Format::kBits * line) {
#pragma GCC unroll 2
        for (int part = 0; part < kChunk; part += Format::kSpan) {
            if ((k + part) / w.group != group) {
                group = (k + part) / w.group;
                for (int s = 0; s < STRIPS; ++s)
                    for (int v = 0; v < kVectors; ++v)
                        grids[s][v] = format.grid(w, w.scale_index(first, group) + s * kStripRows + v * LANES);
            }
#pragma GCC unroll kUnrolled
            for (int c = part; c < part + Format::kSpan; ++c)
#pragma GCC unroll 4
                for (int s = 0; s < STRIPS; ++s)
                    for (int v = 0; v < kVectors; ++v)
                        sums[s][v] += format.value(codes + s * 64, line, v, c, grids[s][v]) * a.x[k + c];
        }
        if ((k + kChunk) % block != 0 && k + kChunk < w.columns) continue;
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) {
                if constexpr (Format::kLate)
                    totals[s][v] += sums[s][v] * grids[s][v].scale;
                else
                    totals[s][v] += sums[s][v];
                sums[s][v] = vf{};
            }
    }
    finish(a, first, STRIPS, 0, reinterpret_cast<const float*>(totals));
}

template <typename Weight>
void exact(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    const Linear& w = *a.linear;
    if (a.tokens == 1 && (!Weight::kPacked || w.columns % kChunk == 0)) {
        if (strips == kStripsTogether) return Weight::template one_token<kStripsTogether>(a, first);
        for (int64_t s = 0; s < strips; ++s) Weight::template one_token<1>(a, first + s);
        return;
    }
    constexpr bool kLate = Weight::kLate;
    const int64_t stride = kStripsTogether * kStripRows, block = kLate ? late_block(w) : kExactBlock;
    float* totals = scratch + kStripsTogether * kExactBlock * kStripRows;
    float* scales = totals + a.tokens * stride;
    for (int64_t i = 0; i < a.tokens * stride; ++i) totals[i] = 0;
    for (int64_t k = 0; k < w.columns; k += block) {
        const int64_t columns = least(block, w.padded - k);
        Block b{{}, scales, strips, least(columns, w.columns - k)};
        for (int64_t s = 0; s < strips; ++s) {
            float* panel = scratch + s * kExactBlock * kStripRows;
            Weight::decode(w, first + s, k, columns, panel);
            b.panels[s] = panel;
            if (w.bits == 32)
                b.panels[s] = reinterpret_cast<const float*>(w.codes + (first + s) * w.strip_bytes()) + k * kStripRows;
            if constexpr (kLate) Weight::late_scales(w, first + s, k, scales + s * kStripRows);
        }
        int64_t t = 0;
        const float* x = a.x + k;
        for (; t + kRegisterTokens <= a.tokens; t += kRegisterTokens)
            multiply_strips<kRegisterTokens, 1, kLate>(b, x + t * a.x_stride, a.x_stride, totals + t * stride, stride);
        for (; t + 2 <= a.tokens; t += 2)
            multiply_strips<2, 2, kLate>(b, x + t * a.x_stride, a.x_stride, totals + t * stride, stride);
        for (; t < a.tokens; ++t)
            multiply_strips<1, kStripsTogether, kLate>(b, x + t * a.x_stride, a.x_stride, totals + t * stride, stride);
    }
    for (int64_t t = 0; t < a.tokens; ++t) finish(a, first, strips, t, totals + t * stride);
}

// The table of formats: what a weight is made of -> its product.
template <int BITS>
void integers(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    switch (a.linear->value_type) {
        case ScaleType::bfloat16: return exact<Packed<Integers<BITS, ScaleType::bfloat16>>>(a, first, strips, scratch);
        case ScaleType::float16: return exact<Packed<Integers<BITS, ScaleType::float16>>>(a, first, strips, scratch);
        default: return exact<Packed<Integers<BITS, ScaleType::float32>>>(a, first, strips, scratch);
    }
}

template <ScaleType type>
void entries(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    if (a.linear->group % kChunk == 0) return exact<Packed<Entries<type, kChunk>>>(a, first, strips, scratch);
    exact<Packed<Entries<type, kChunk / 2>>>(a, first, strips, scratch);
}

}  // namespace

void exact_product(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    const Linear& w = *a.linear;
    if (w.coding == Coding::e4m3) return exact<Packed<E4m3>>(a, first, strips, scratch);
    if (w.coding == Coding::table) switch (w.value_type) {
        case ScaleType::bfloat16: return entries<ScaleType::bfloat16>(a, first, strips, scratch);
        case ScaleType::float16: return entries<ScaleType::float16>(a, first, strips, scratch);
        default: return entries<ScaleType::float32>(a, first, strips, scratch);
    }
    switch (w.bits) {
        case 2: return integers<2>(a, first, strips, scratch);
        case 3: return integers<3>(a, first, strips, scratch);
        case 4: return integers<4>(a, first, strips, scratch);
        case 5: return integers<5>(a, first, strips, scratch);
        case 6: return integers<6>(a, first, strips, scratch);
        case 8: return integers<8>(a, first, strips, scratch);
        case 16: return exact<Plain<16>>(a, first, strips, scratch);
        default: return exact<Plain<32>>(a, first, strips, scratch);
    }
}

}  // namespace ISA
}  // namespace compress
