// Second moments of activations, out += a^T b: what GPTQ's Hessian is made of.
//
// A panel of rows of `out` is a matrix product whose long side, the tokens, is the reduction. Tokens are taken in
// blocks, so that a packed strip stays in the first-level cache while every group of rows is multiplied with it.
#include "product.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kRows = LANES == 16 ? 8 : 4;  // as many sums as registers hold, beside one strip of b
constexpr int kVectors = 3;
constexpr int kStrip = kVectors * LANES;
constexpr int64_t kDepth = 128;  // units in a block of tokens

template <typename How, typename T>
void panel(const MomentArgs& p, const T* a, const T* b, typename How::Unit* scratch) {
    typename How::Unit* strip = scratch;
    typename How::Unit* groups = scratch + kDepth * kStrip;
    for (int64_t t = 0; t < p.tokens; t += kDepth * How::kLength) {
        const int64_t tokens = least(kDepth * How::kLength, p.tokens - t), depth = ceil_div(tokens, How::kLength);
        for (int64_t r = p.first; r < p.last; r += kRows)
            pack_rows<How>(groups + (r - p.first) * depth, a + t * p.width + r, p.width, tokens,
                           least(kRows, p.last - r), kRows);
        for (int64_t c = p.upper ? p.first : 0; c < p.width; c += kStrip) {
            const int64_t columns = least(kStrip, p.width - c);
            pack_rows<How>(strip, b + t * p.width + c, p.width, tokens, columns, kStrip);
            for (int64_t r = p.first; r < p.last; r += kRows)
                multiply<How, kRows, kVectors>(groups + (r - p.first) * depth, strip, depth, p.out + r * p.width + c,
                                               p.width, least(kRows, p.last - r), columns);
        }
    }
}

}  // namespace

int64_t moment_scratch(const MomentArgs& p) { return kDepth * (kStrip + p.last - p.first + kRows); }

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
