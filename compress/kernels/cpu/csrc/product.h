// Matrix products of packed operands, summed in float32: groups of kRows rows of the left one times strips of columns
// of the right one, both packed so that the innermost loop reads them in order.
//
// A packed unit is what one step of the reduction takes: one float, or, where the processor multiplies bfloat16 pairs,
// two neighbouring bfloat16 values. Products of bfloat16 are exact in float32, so both ways differ only in the order
// in which they are summed.
#pragma once
#include "bfloat16.h"
#include "kernels.h"
#include "simd.h"

namespace compress {
namespace ISA {

struct Floats {
    typedef float Unit;
    static constexpr int64_t kLength = 1;  // reduction steps in one unit
    template <typename T>
    static inline float pack(const T* x, int64_t, bool) {
        return widened(*x);
    }
    static inline vf add(vf sum, const float* b, float a) { return sum + load(b) * a; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    typedef uint32_t Unit;
    static constexpr int64_t kLength = 2;
    // x[0] and, unless it lies beyond the end, x[stride].
    static inline uint32_t pack(const uint16_t* x, int64_t stride, bool second) {
        return uint32_t(x[0]) | (second ? uint32_t(x[stride]) << 16 : 0);
    }
    static inline uint32_t pack(const float* x, int64_t stride, bool second) {
        return uint32_t(narrowed(x[0])) | (second ? uint32_t(narrowed(x[stride])) << 16 : 0);
    }
    static inline vf add(vf sum, const uint32_t* b, uint32_t a) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(b), (__m512bh)_mm512_set1_epi32(int(a)));
    }
};
#endif

// The rows of source are the reduction: target[unit][column] of `columns` columns, padded with zeros to `width`.
template <typename How, typename T>
static inline void pack_rows(typename How::Unit* target, const T* source, int64_t stride, int64_t rows,
                             int64_t columns, int64_t width) {
    for (int64_t r = 0; r < rows; r += How::kLength, source += stride * How::kLength, target += width) {
        const bool second = r + 1 < rows;
        for (int64_t c = 0; c < columns; ++c) target[c] = How::pack(source + c, stride, second);
        for (int64_t c = columns; c < width; ++c) target[c] = 0;
    }
}

// The columns of source are the reduction: target[unit][row] of `rows` rows, padded with zeros to `width`.
template <typename How, typename T>
static inline void pack_columns(typename How::Unit* target, const T* source, int64_t stride, int64_t rows,
                                int64_t columns, int64_t width) {
    for (int64_t c = 0; c < columns; c += How::kLength, target += width) {
        const bool second = c + 1 < columns;
        for (int64_t r = 0; r < rows; ++r) target[r] = How::pack(source + r * stride + c, 1, second);
        for (int64_t r = rows; r < width; ++r) target[r] = 0;
    }
}

// out (rows, columns) += a (kRows wide) times b (kVectors * LANES wide), `depth` units deep.
template <typename How, int kRows, int kVectors>
static inline void multiply(const typename How::Unit* a, const typename How::Unit* b, int64_t depth, float* out,
                            int64_t stride, int64_t rows, int64_t columns) {
    constexpr int kStrip = kVectors * LANES;
    vf sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = vf{};
    for (int64_t d = 0; d < depth; ++d, a += kRows, b += kStrip)
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) sums[r][v] = How::add(sums[r][v], b + v * LANES, a[r]);
    if (rows == kRows && columns == kStrip) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) {
                float* at = out + r * stride + v * LANES;
                store(at, load(at) + sums[r][v]);
            }
        return;
    }
    float found[kRows * kStrip];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(found + r * kStrip + v * LANES, sums[r][v]);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) out[r * stride + c] += found[r * kStrip + c];
}

}  // namespace ISA
}  // namespace compress
