// Products of float32 inputs with the values that a weight's format defines, in float32.
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kRegisterTokens = LANES == 4 ? 2 : LANES == 8 ? 4 : 8;

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

// One token and STRIPS strips of a plain weight: nothing to decode, so no panel. Sums in the order of `multiply`.
template <int BITS, int STRIPS>
__attribute__((noinline)) void plain_strips(const ProductArgs& a, int64_t first) {
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
    for (int s = 0; s < STRIPS; ++s) finish(a, first + s, 0, reinterpret_cast<const float*>(totals[s]));
}

// The same of a packed weight, whose columns are a multiple of kChunk: codes become values in registers.
template <int BITS, ScaleType type, int STRIPS>
__attribute__((noinline)) void packed_strips(const ProductArgs& a, int64_t first) {
    const Linear& w = *a.linear;
    const int64_t line = 64 * (STRIPS == 1 ? w.together(first) : STRIPS);
    const uint8_t* codes = w.codes + w.line_offset(first);
    vf totals[STRIPS][kVectors] = {}, sums[STRIPS][kVectors] = {}, scales[STRIPS][kVectors];
    vi zeros[STRIPS][kVectors];
    for (int64_t k = 0, group = -1; k < w.columns; k += kChunk, codes += BITS * line) {
        if (k / w.group != group) {
            group = k / w.group;
            for (int s = 0; s < STRIPS; ++s)
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = w.scale_index(first, group) + s * kStripRows + v * LANES;
                    scales[s][v] = load_scales(w, at), zeros[s][v] = load_zeros(w, at);
                }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int s = 0; s < STRIPS; ++s)
                    for (int v = 0; v < kVectors; ++v) {
                        const vi code = quad_of<BITS>(codes + s * 64, line, v, i) >> 8 * j & 255;
                        sums[s][v] +=
                            rounded<type>(to_floats(code - zeros[s][v]) * scales[s][v]) * a.x[k + 4 * i + j];
                    }
        if ((k + kChunk) % kExactBlock != 0 && k + kChunk < w.columns) continue;
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) totals[s][v] += sums[s][v], sums[s][v] = vf{};
    }
    for (int s = 0; s < STRIPS; ++s) finish(a, first + s, 0, reinterpret_cast<const float*>(totals[s]));
}

template <int BITS, int STRIPS>
void packed_strips(const ProductArgs& a, int64_t first) {
    switch (a.linear->scale_type) {
        case ScaleType::bfloat16: return packed_strips<BITS, ScaleType::bfloat16, STRIPS>(a, first);
        case ScaleType::float16: return packed_strips<BITS, ScaleType::float16, STRIPS>(a, first);
        default: return packed_strips<BITS, ScaleType::float32, STRIPS>(a, first);
    }
}

template <int BITS, int STRIPS>
void one_token(const ProductArgs& a, int64_t first) {
    if constexpr (BITS > 8)
        plain_strips<BITS, STRIPS>(a, first);
    else
        packed_strips<BITS, STRIPS>(a, first);
}

template <int BITS>
void exact(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    if (a.tokens == 1 && (BITS > 8 || a.linear->columns % kChunk == 0)) {
        if (strips == kStripsTogether) return one_token<BITS, kStripsTogether>(a, first);
        for (int64_t s = 0; s < strips; ++s) one_token<BITS, 1>(a, first + s);
        return;
    }
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

void exact_product(const ProductArgs& a, int64_t first, int64_t strips, float* scratch) {
    switch (a.linear->bits) {
        case 2: return exact<2>(a, first, strips, scratch);
        case 3: return exact<3>(a, first, strips, scratch);
        case 4: return exact<4>(a, first, strips, scratch);
        case 8: return exact<8>(a, first, strips, scratch);
        case 16: return exact<16>(a, first, strips, scratch);
        default: return exact<32>(a, first, strips, scratch);
    }
}

}  // namespace ISA
}  // namespace compress
