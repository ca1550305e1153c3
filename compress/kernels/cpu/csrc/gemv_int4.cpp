// Matrix-vector product with 4-bit weights that are dequantised in registers.
//
// A word holds eight codes of one row. A vector of words is decoded nibble by nibble: nibble s of all its words at
// once, which is every eighth code. The caller interleaves x to match, so that no lane ever has to move:
//     x[chunk][s][lane] = input[(chunk * LANES + lane) * 8 + s],   zero beyond the end.
// Nibble s < 7 stays where it is in the word and counts 16^s times too much, so the caller divides x[.][s][.] by as
// much, which is exact: decoding takes a mask and a conversion. Stored codes are too large by 8, and so the caller
// also passes -8 times the sum of each word's inputs.
// Several rows are taken together: they share the loads of x, and their chains of additions overlap.
#include "kernels.h"
#include "simd.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kRowsTogether = 4;

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float from_half(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // In a float's place the exponent is short by 112, which the product makes up for, subnormals included.
    const float value = from_bits(magnitude << 13) * from_bits(0x77800000);
    return sign ? -value : value;
#endif
}

// Row `row` of the scales as floats, and a vector of zeros after them.
inline void load_scales(const GemvArgs& a, int64_t row, float* scales) {
    const float* full = static_cast<const float*>(a.scale) + row * a.groups;
    const uint16_t* half = static_cast<const uint16_t*>(a.scale) + row * a.groups;
    if (a.scale_type == ScaleType::float32)
        for (int64_t g = 0; g < a.groups; ++g) scales[g] = full[g];
    else if (a.scale_type == ScaleType::float16)
        for (int64_t g = 0; g < a.groups; ++g) scales[g] = from_half(half[g]);
    else
        for (int64_t g = 0; g < a.groups; ++g) scales[g] = from_bits(uint32_t(half[g]) << 16);
    store(scales + a.groups, vf{});
}

// Sum over groups of scale * zero_point * (the sum of the group's inputs): what the zero points take off a product.
inline float zero_point_share(const GemvArgs& a, int64_t row, const float* scales, const float* group_sums) {
    const int8_t* zero_point = a.zero_point + row * a.groups;
    vf total = {};
    int64_t g = 0;
    for (; g + LANES <= a.groups; g += LANES) {
        total += load(scales + g) * load_bytes(zero_point + g) * load(group_sums + g);
    }
    float share = sum(total);
    for (; g < a.groups; ++g) share += scales[g] * zero_point[g] * group_sums[g];
    return share;
}

inline vi load_last_words(const int32_t* p, int64_t count) {
    vi v = {};
    std::memcpy(&v, p, count * sizeof(int32_t));
    return v;
}

// Which scale each lane of the chunk at word w takes, counted from the first lane's.
inline vi lane_groups(int64_t w, int64_t words_per_group) {
    vi groups;
    const int64_t into = w % words_per_group;
    for (int l = 0; l < LANES; ++l) groups[l] = int32_t((into + l) / words_per_group);
    return groups;
}

// R rows times x, zero points aside. scales are R rows of `stride` floats, zero past the last group.
template <int R>
__attribute__((noinline)) void multiply(const GemvArgs& a, const int32_t* packed, const float* scales, int64_t stride,
                                        const float* x, const float* offsets, float* results) {
    const bool aligned = a.groups == 1 || a.words_per_group % LANES == 0 || LANES % a.words_per_group == 0;
    vi groups = lane_groups(0, a.words_per_group);
    vf totals[R];
    for (int r = 0; r < R; ++r) totals[r] = vf{};
    for (int64_t w = 0; w < a.words; w += LANES) {
        vi words[R];
        vf products[R];
        const vf offset = load(offsets + w);
        for (int r = 0; r < R; ++r) {
            const int32_t* p = packed + r * a.words + w;
            words[r] = w + LANES <= a.words ? load_words(p) : load_last_words(p, a.words - w);
            products[r] = offset;
        }
#pragma GCC unroll 7
        for (int s = 0; s < 7; ++s) {
            const vf inputs = load(x + w * 8 + s * LANES);
            for (int r = 0; r < R; ++r) products[r] += to_floats(words[r] & (15 << 4 * s)) * inputs;
        }
        const vf inputs = load(x + w * 8 + 7 * LANES);
        if (!aligned) groups = lane_groups(w, a.words_per_group);
        const float* scale = scales + w / a.words_per_group;
        for (int r = 0; r < R; ++r) {
            products[r] += to_floats((words[r] >> 28) & 15) * inputs;
            totals[r] += products[r] * permute(load(scale + r * stride), groups);
        }
    }
    for (int r = 0; r < R; ++r) results[r] = sum(totals[r]);
}

}  // namespace

int64_t gemv_int4_scratch(const GemvArgs& a) { return kRowsTogether * (a.groups + LANES); }

void gemv_int4_tile(const GemvArgs& a, int64_t first_row, float* scales) {
    const int64_t end = first_row + kTileRows < a.rows ? first_row + kTileRows : a.rows;
    const int64_t stride = a.groups + LANES;
    for (int64_t row = first_row; row < end;) {
        const int count = row + kRowsTogether <= end ? kRowsTogether : 1;
        for (int r = 0; r < count; ++r) load_scales(a, row + r, scales + r * stride);
        for (int64_t t = 0; t < a.tokens; ++t) {
            const auto multiply_rows = count == kRowsTogether ? multiply<kRowsTogether> : multiply<1>;
            float* results = a.out + t * a.rows + row;
            multiply_rows(a, a.packed + row * a.words, scales, stride, a.x + t * a.padded_words * 8,
                          a.offsets + t * a.padded_words, results);
            if (a.zero_point)
                for (int r = 0; r < count; ++r)
                    results[r] -= zero_point_share(a, row + r, scales + r * stride, a.group_sums + t * a.groups);
        }
        row += count;
    }
}

}  // namespace ISA
}  // namespace compress
