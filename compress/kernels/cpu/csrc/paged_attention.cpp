// Attention over a cache in pages, with an online softmax from page to page (Dao et al., arXiv:2205.14135).
//
// A tile is some queries that read the same keys: the heads that share a key head, of one token or of several. Pages
// are taken in order, and what a query computes does not depend on the others of its tile.
#include "kernels.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kTileQueries = 4;
constexpr int kScoreVectors = kPageTokens / LANES;

inline vf load_any(const float* p) { return load(p); }
inline vf load_any(const uint16_t* p) {
    typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
    halves v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}
inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
    const uint32_t word = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// QUERIES queries meet one page. Their q (dim) and sums (dim) are `stride` floats apart; seen[r] = {first, end} within
// the page, possibly empty.
template <int QUERIES, typename T>
struct Page {
    const T *keys, *values;
    int64_t dim, stride;
    const float* q;
    float *sums, *maximum, *total;
    int64_t (*seen)[2];

    void run() const {
        float weights[QUERIES][kPageTokens];
        score(weights);
        int64_t first = kPageTokens, end = 0;
        for (int r = 0; r < QUERIES; ++r) {
            softmax(r, weights[r]);
            if (seen[r][0] < seen[r][1]) first = least(first, seen[r][0]), end = most(end, seen[r][1]);
        }
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            vf s[QUERIES];
            for (int r = 0; r < QUERIES; ++r) s[r] = load(sums + r * stride + d);
            for (int64_t t = first; t < end; ++t) {
                const vf v = load_any(values + t * dim + d);
                for (int r = 0; r < QUERIES; ++r) s[r] += v * weights[r][t];
            }
            for (int r = 0; r < QUERIES; ++r) store(sums + r * stride + d, s[r]);
        }
        for (; d < dim; ++d)
            for (int r = 0; r < QUERIES; ++r)
                for (int64_t t = first; t < end; ++t) sums[r * stride + d] += widened(values[t * dim + d]) * weights[r][t];
    }

    void score(float (*weights)[kPageTokens]) const {
        vf s[QUERIES][kScoreVectors];
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) s[r][v] = vf{};
        for (int64_t d = 0; d < dim; ++d)
            for (int v = 0; v < kScoreVectors; ++v) {
                const vf k = load_any(keys + d * kPageTokens + v * LANES);
                for (int r = 0; r < QUERIES; ++r) s[r][v] += k * q[r * stride + d];
            }
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) store(weights[r] + v * LANES, s[r][v]);
    }

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
            for (int64_t d = 0; d < dim; ++d) sums[r * stride + d] *= factor;
            total[r] *= factor;
            maximum[r] = now;
        }
        total[r] += sum(added);
    }
};

struct Tile {
    int64_t kv_head, first;  // the first query, counted token by token and head by head within a group
    int queries;
};

int64_t group_of(const PagedArgs& a) { return a.heads / a.cache.kv_heads; }
int64_t tiles_of_head(const PagedArgs& a) { return (a.tokens * group_of(a) + kTileQueries - 1) / kTileQueries; }

template <int QUERIES, typename T>
void attend(const PagedArgs& a, const Tile& tile, float* scratch) {
    const int64_t dim = a.cache.dim, group = group_of(a);
    float *q = scratch, *sums = q + QUERIES * dim;
    float maximum[QUERIES], total[QUERIES];
    int64_t position[QUERIES], offset[QUERIES];
    for (int r = 0; r < QUERIES; ++r) {
        const int64_t token = (tile.first + r) / group, head = tile.kv_head * group + (tile.first + r) % group;
        position[r] = a.position + token;
        maximum[r] = -__builtin_inff(), total[r] = 0;
        const float* from = a.q + token * a.q_stride + head * dim;
        for (int64_t d = 0; d < dim; ++d) q[r * dim + d] = from[d] * a.scale, sums[r * dim + d] = 0;
        offset[r] = token * a.out_stride + head * dim;
    }
    const int64_t begin = most(0, position[0] - a.window + 1) / kPageTokens;
    for (int64_t page = begin; page * kPageTokens <= position[QUERIES - 1]; ++page) {
        int64_t seen[QUERIES][2];
        for (int r = 0; r < QUERIES; ++r) {
            seen[r][0] = most(0, position[r] - a.window + 1 - page * kPageTokens);
            seen[r][1] = least(kPageTokens, position[r] + 1 - page * kPageTokens);
        }
        const int64_t at = (a.pages[page] * a.cache.kv_heads + tile.kv_head) * dim * kPageTokens;
        Page<QUERIES, T>{static_cast<const T*>(a.cache.keys) + at, static_cast<const T*>(a.cache.values) + at,
                         dim, dim, q, sums, maximum, total, seen}.run();
    }
    for (int r = 0; r < QUERIES; ++r)
        for (int64_t d = 0; d < dim; ++d) a.out[offset[r] + d] = sums[r * dim + d] / total[r];
}

template <typename T>
void attend_some(const PagedArgs& a, const Tile& tile, float* scratch) {
    switch (tile.queries) {
        case 1: return attend<1, T>(a, tile, scratch);
        case 2: return attend<2, T>(a, tile, scratch);
        case 3: return attend<3, T>(a, tile, scratch);
        default: return attend<4, T>(a, tile, scratch);
    }
}

}  // namespace

int64_t paged_scratch(const PagedArgs& a) { return 2 * kTileQueries * a.cache.dim; }

int64_t paged_tiles(const PagedArgs& a) { return a.cache.kv_heads * tiles_of_head(a); }

void paged_attention(const PagedArgs& a, int64_t index, float* scratch) {
    const int64_t tiles = tiles_of_head(a), first = index % tiles * kTileQueries;
    const Tile tile{index / tiles, first, int(least(kTileQueries, a.tokens * group_of(a) - first))};
    if (a.cache.bfloat16)
        attend_some<uint16_t>(a, tile, scratch);
    else
        attend_some<float>(a, tile, scratch);
}

}  // namespace ISA
}  // namespace compress
