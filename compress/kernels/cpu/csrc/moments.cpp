// Second moments of activations, out += a^T b: what GPTQ's Hessian is made of.
//
// A panel of rows of `out` is a matrix product whose long side, the tokens, is the reduction. Tokens are taken in
// blocks, packed as a whole; a strip stays in the first-level cache while every group of rows is multiplied with it.
#include "product.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kRows = LANES == 16 ? 8 : 4;  // as many sums as registers hold, beside one strip of b
constexpr int kVectors = 3;
constexpr int kStrip = kVectors * LANES;
constexpr int64_t kDepth = 128;  // units in a block of tokens

static inline int64_t padded(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

// Strips of `width` columns, each packed as pack_rows does. Goes along the rows of source, which lie far apart.
template <typename How, typename T>
void pack_strips(typename How::Unit* target, const T* source, int64_t stride, int64_t rows, int64_t columns,
                 int64_t width) {
    const int64_t depth = ceil_div(rows, How::kLength);
    for (int64_t d = 0; d < depth; ++d, source += stride * How::kLength, rows -= How::kLength)
        for (int64_t c = 0; c < columns; c += width)
            pack_rows<How>(target + c * depth + d * width, source + c, stride, least(How::kLength, rows),
                           least(width, columns - c), width);
}

template <typename How, typename T>
void panel(const MomentArgs& p, const T* a, const T* b, typename How::Unit* scratch) {
    const int64_t left = p.upper ? p.first : 0;
    typename How::Unit* groups = scratch;
    typename How::Unit* strips = scratch + kDepth * padded(p.last - p.first, kRows);
    for (int64_t t = 0; t < p.tokens; t += kDepth * How::kLength) {
        const int64_t tokens = least(kDepth * How::kLength, p.tokens - t), depth = ceil_div(tokens, How::kLength);
        pack_strips<How>(groups, a + t * p.width + p.first, p.width, tokens, p.last - p.first, kRows);
        pack_strips<How>(strips, b + t * p.width + left, p.width, tokens, p.width - left, kStrip);
        for (int64_t c = left; c < p.width; c += kStrip) {
            const int64_t columns = least(kStrip, p.width - c);
            const int64_t last = p.upper ? least(p.last, c + columns) : p.last;  // at most to the diagonal
            for (int64_t r = p.first; r < last; r += kRows)
                multiply<How, kRows, kVectors>(groups + (r - p.first) * depth, strips + (c - left) * depth, depth,
                                               p.out + r * p.width + c, p.width, least(kRows, p.last - r), columns);
        }
    }
}

}  // namespace

int64_t moment_scratch(const MomentArgs& p) {
    return kDepth * (padded(p.last - p.first, kRows) + padded(p.width, kStrip));
}

void moment_panel(const MomentArgs& p, float* scratch) {
    if (!p.bfloat16) return panel<Floats>(p, static_cast<const float*>(p.a), static_cast<const float*>(p.b), scratch);
    const uint16_t *a = static_cast<const uint16_t*>(p.a), *b = static_cast<const uint16_t*>(p.b);
#if defined(__AVX512BF16__)
    panel<Pairs>(p, a, b, reinterpret_cast<uint32_t*>(scratch));
#else
    panel<Floats>(p, a, b, scratch);
#endif
}

}  // namespace ISA
}  // namespace compress
