// What queries compute of one page of the cache, however that is kept.
#pragma once
#include "paged_reads.h"
#include "vector_math.h"

namespace compress {
namespace ISA {

constexpr int kScoreVectors = kPageTokens / LANES;
constexpr int kTogether = 4;  // registers of a token's values

// Queries that read the same keys, and what they have summed so far. Their q (dim) and sums (dim) are `dim` floats
// apart; q_sums: the sum of each q, for codes, whose values are low + step * code. seen[r] = {first, end} within the
// page at hand, possibly empty.
template <int QUERIES>
struct Queries {
    int64_t dim;
    float cap;
    const float *q, *q_sums;
    float *sums, *maximum, *total;
    const int64_t (*seen)[2];

    int64_t first() const {
        int64_t found = kPageTokens;
        for (int r = 0; r < QUERIES; ++r)
            if (seen[r][0] < seen[r][1]) found = least(found, seen[r][0]);
        return found;
    }
    int64_t end() const {
        int64_t found = 0;
        for (int r = 0; r < QUERIES; ++r)
            if (seen[r][0] < seen[r][1]) found = most(found, seen[r][1]);
        return found;
    }

    void weigh(const vf (&s)[QUERIES][kScoreVectors], float (*weights)[kPageTokens]) const {
        for (int r = 0; r < QUERIES; ++r) {
            for (int v = 0; v < kScoreVectors; ++v)
                store(weights[r] + v * LANES, cap == 0 ? s[r][v] : cap * tanh_of(s[r][v] / cap));
            softmax(r, weights[r]);
        }
    }

private:
    // Scores become weights relative to the largest so far; what was summed before is rescaled.
    void softmax(int r, float* weight) const {
        const float hidden = -__builtin_inff();
        if (seen[r][0] >= seen[r][1]) {
            for (int64_t t = 0; t < kPageTokens; ++t) weight[t] = 0;
            return;
        }
        for (int64_t t = 0; t < seen[r][0]; ++t) weight[t] = hidden;
        for (int64_t t = seen[r][1]; t < kPageTokens; ++t) weight[t] = hidden;
        vf high = load(weight);
        for (int v = 1; v < kScoreVectors; ++v) {
            const vf x = load(weight + v * LANES);
            high = x > high ? x : high;
        }
        const float before = maximum[r], here = largest(high), now = here > before ? here : before;
        vf added = {};
        for (int v = 0; v < kScoreVectors; ++v) {
            const vf p = exp_negative(load(weight + v * LANES) - now);
            store(weight + v * LANES, p);
            added += p;
        }
        if (now != before) {
            const float factor = exp_negative(broadcast(before - now))[0];
            for (int64_t d = 0; d < dim; ++d) sums[r * dim + d] *= factor;
            total[r] *= factor;
            maximum[r] = now;
        }
        total[r] += sum(added);
    }
};

// Any page but a full one of int2.
template <int QUERIES, typename How>
struct Page {
    typedef typename How::Element T;
    Queries<QUERIES> of;
    const T *keys, *values;
    const uint8_t *key_scales, *value_scales;  // of blocks
    const uint16_t *key_grid, *value_grid;

    void run() const {
        float weights[QUERIES][kPageTokens], added[QUERIES] = {};
        score(weights);
        const int64_t dim = of.dim, first = of.first(), end = of.end();
        float* const sums = of.sums;
        if constexpr (How::kSteps)
            for (int r = 0; r < QUERIES; ++r)
                for (int64_t t = first; t < end; ++t) {
                    if constexpr (How::kGrids) added[r] += weights[r][t] * widened(value_grid[kPageTokens + t]);
                    weights[r][t] *= widened(value_grid[t]);
                }
        const int64_t blocks = dim / kFloatBlock, width = dim / How::kParts;
        for (int part = 0; part < How::kParts; ++part) {
            float* out = sums + part * width;
            int64_t d = 0;
            for (; d + kTogether * LANES <= width; d += kTogether * LANES)
                weigh_values<kTogether>(weights, added, part, d, first, end);
            for (; d + LANES <= width; d += LANES) weigh_values<1>(weights, added, part, d, first, end);
            for (; d < width; ++d)
                for (int r = 0; r < QUERIES; ++r) {
                    if constexpr (How::kGrids) out[r * dim + d] += added[r];
                    for (int64_t t = first; t < end; ++t) {
                        float v = How::one(values[t * width + d], part);
                        if constexpr (How::kBlocks)
                            v *= from_e4m3(value_scales[t * blocks + (part * width + d) / kFloatBlock]);
                        out[r * dim + d] += v * weights[r][t];
                    }
                }
        }
    }

    // Adds the values' dimensions [d, d + VECTORS * LANES) of a part to the sums, token by token.
    template <int VECTORS>
    void weigh_values(const float (&weights)[QUERIES][kPageTokens], const float (&added)[QUERIES], int part, int64_t d,
                      int64_t first, int64_t end) const {
        const int64_t dim = of.dim, blocks = dim / kFloatBlock, width = dim / How::kParts;
        float* const out = of.sums + part * width + d;
        vf s[QUERIES][VECTORS];
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                s[r][v] = load(out + r * dim + v * LANES);
                if constexpr (How::kGrids) s[r][v] += added[r];
            }
        for (int64_t t = first; t < end; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                vf value = How::load(values + t * width + d + v * LANES, part);
                if constexpr (How::kBlocks)
                    value *= from_e4m3(value_scales[t * blocks + (part * width + d + v * LANES) / kFloatBlock]);
                for (int r = 0; r < QUERIES; ++r) s[r][v] += value * weights[r][t];
            }
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < VECTORS; ++v) store(out + r * dim + v * LANES, s[r][v]);
    }

    void score(float (*weights)[kPageTokens]) const {
        vf s[QUERIES][kScoreVectors];
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) s[r][v] = vf{};
        const float *q = of.q, *q_sums = of.q_sums;
        const int64_t dim = of.dim, width = dim / How::kParts;
        [[maybe_unused]] vf scales[kScoreVectors];
        for (int part = 0; part < How::kParts; ++part)
            for (int64_t d = 0; d < width; ++d) {
                if constexpr (How::kBlocks)
                    if (d == 0 || (part * width + d) % kFloatBlock == 0)
                        for (int v = 0; v < kScoreVectors; ++v)
                            scales[v] = from_e4m3(load_unsigned(
                                key_scales + (part * width + d) / kFloatBlock * kPageTokens + v * LANES));
                for (int v = 0; v < kScoreVectors; ++v) {
                    vf k = How::load(keys + d * kPageTokens + v * LANES, part);
                    if constexpr (How::kBlocks) k *= scales[v];
                    for (int r = 0; r < QUERIES; ++r) s[r][v] += k * q[r * dim + part * width + d];
                }
            }
        if constexpr (How::kGrids)
            for (int v = 0; v < kScoreVectors; ++v) {
                const vf step = load_bfloat16(key_grid + v * LANES);
                const vf low = load_bfloat16(key_grid + kPageTokens + v * LANES);
                for (int r = 0; r < QUERIES; ++r) s[r][v] = s[r][v] * step + low * q_sums[r];
            }
        else if constexpr (How::kSteps)
            for (int v = 0; v < kScoreVectors; ++v)
                for (int r = 0; r < QUERIES; ++r) s[r][v] *= load_bfloat16(key_grid + v * LANES);
        of.weigh(s, weights);
    }
};

// A full page of int2.
template <int QUERIES>
struct TwoBitPage {
    Queries<QUERIES> of;
    const uint32_t *keys, *values;
    int64_t words, groups;  // of a token's values
    const uint16_t *key_grid, *value_grid;

    void run() const {
        float weights[QUERIES][kPageTokens];
        score(weights);
        const int64_t dim = of.dim, first = of.first(), end = of.end();
        const auto value = [&](int64_t t, int64_t d) { return values[t * words + d / kWordCodes] >> 2 * (d % kWordCodes); };
        const auto step = [&](int64_t t, int64_t d) { return widened(value_grid[t * groups + d / kValueGroup]); };
        const auto low = [&](int64_t t, int64_t d) {
            return widened(value_grid[(kPageTokens + t) * groups + d / kValueGroup]);
        };
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            vf s[QUERIES];
            for (int r = 0; r < QUERIES; ++r) s[r] = load(of.sums + r * dim + d);
            for (int64_t t = first; t < end; ++t) {
                const vf v = TwoBits::load(value(t, d)) * step(t, d) + low(t, d);
                for (int r = 0; r < QUERIES; ++r) s[r] += v * weights[r][t];
            }
            for (int r = 0; r < QUERIES; ++r) store(of.sums + r * dim + d, s[r]);
        }
        for (; d < dim; ++d)
            for (int r = 0; r < QUERIES; ++r)
                for (int64_t t = first; t < end; ++t)
                    of.sums[r * dim + d] += (TwoBits::one(value(t, d)) * step(t, d) + low(t, d)) * weights[r][t];
    }

    void score(float (*weights)[kPageTokens]) const {
        const int64_t dim = of.dim;
        vf s[QUERIES][kScoreVectors];
        float lowest[QUERIES] = {};  // what code 0 of every channel comes to
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) s[r][v] = vf{};
        for (int64_t d = 0; d < dim; ++d) {
            const float step = widened(key_grid[d]), low = widened(key_grid[dim + d]);
            const uint32_t* word = keys + d * (kPageTokens / kWordCodes);
            float scaled[QUERIES];
            for (int r = 0; r < QUERIES; ++r) {
                scaled[r] = of.q[r * dim + d] * step;
                lowest[r] += of.q[r * dim + d] * low;
            }
            for (int v = 0; v < kScoreVectors; ++v) {
                const int64_t at = v * LANES;
                const vf k = TwoBits::load(word[at / kWordCodes] >> 2 * (at % kWordCodes));
                for (int r = 0; r < QUERIES; ++r) s[r][v] += k * scaled[r];
            }
        }
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) s[r][v] += lowest[r];
        of.weigh(s, weights);
    }
};

}  // namespace ISA
}  // namespace compress
