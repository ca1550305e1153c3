// What inputs add to a product of integers where they are too large for 8 bits beside the others of their block: few
// quads of columns, each decoded once more, while the weights that the product has just read are still in the cache.
#include "linear_parts.h"

namespace compress {
namespace ISA {
namespace {

// To STRIPS strips' outputs of one token.
template <int BITS, int STRIPS>
void add(const ProductArgs& a, int64_t strip, int64_t token) {
    const Linear& w = *a.linear;
    const Quantized& x = a.quantized;
    const int64_t line = 64 * (STRIPS == 1 ? w.together(strip) : STRIPS);
    const uint8_t* codes = w.codes + w.line_offset(strip);
    const Outlier* outlier = x.outliers + token * x.most_outliers();
    const Outlier* const end = outlier + x.outlier_count[token];
    vf totals[STRIPS][kVectors] = {};
    for (int64_t g = 0; outlier < end; ++outlier) {
        while ((g + 1) * w.group <= outlier->quad * 4) ++g;
        const uint8_t* chunk = codes + outlier->quad / 8 * BITS * line;
        for (int s = 0; s < STRIPS; ++s)
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = w.scale_index(strip, g) + s * kStripRows + v * LANES;
                const vi quad = quad_of<BITS>(chunk + s * 64, line, v, outlier->quad % 8);
                const vi sum = dot<BITS == 8>(-load_zeros(w, at) * outlier->sum, quad, outlier->high);
                totals[s][v] += to_floats(sum) * (load_scales(w, at) * outlier->scale);
            }
    }
    put(a, strip, STRIPS, token, reinterpret_cast<const float*>(totals), nullptr, true);
}

}  // namespace

template <int BITS>
void add_outliers(const ProductArgs& a, int64_t first, int64_t strips) {
    for (int64_t token = 0; token < a.tokens; ++token) {
        if (a.quantized.outlier_count[token] == 0) continue;
        int64_t s = 0;
        for (; s + kStripsTogether <= strips; s += kStripsTogether) add<BITS, kStripsTogether>(a, first + s, token);
        for (; s < strips; ++s) add<BITS, 1>(a, first + s, token);
    }
}

template void add_outliers<2>(const ProductArgs&, int64_t, int64_t);
template void add_outliers<3>(const ProductArgs&, int64_t, int64_t);
template void add_outliers<4>(const ProductArgs&, int64_t, int64_t);
template void add_outliers<5>(const ProductArgs&, int64_t, int64_t);
template void add_outliers<6>(const ProductArgs&, int64_t, int64_t);
template void add_outliers<8>(const ProductArgs&, int64_t, int64_t);

}  // namespace ISA
}  // namespace compress
