// Attention over a cache in pages, with an online softmax from page to page (Dao et al., arXiv:2205.14135).
//
// A tile is some queries that read the same keys: the heads that share a key head, of one token or of several. Pages
// are taken in order, and what a query computes does not depend on the others of its tile.
#include "bfloat16.h"
#include "kernels.h"
#include "small_floats.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kTileQueries = 4;
constexpr int kScoreVectors = kPageTokens / LANES;

typedef uint8_t bytes __attribute__((vector_size(LANES)));

// How elements are read: LANES of them from a position, or one. `part` tells which half of a head's dimensions. kSteps:
// a token and head has a step; kGrids: and what code 0 is; kBlocks: and a scale for every kFloatBlock dimensions.
struct Floats {
    typedef float Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false;
    static vf load(const float* p, int) { return ISA::load(p); }
    static float one(float x, int) { return x; }
};
struct Bfloats {
    typedef uint16_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false;
    static vf load(const uint16_t* p, int) { return load_bfloat16(p); }
    static float one(uint16_t x, int) { return widened(x); }
};
inline vi load_unsigned(const uint8_t* p) {
    bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vi);
}
struct Bytes {
    typedef uint8_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = true, kGrids = true, kBlocks = false;
    static vf load(const uint8_t* p, int) { return to_floats(load_unsigned(p)); }
    static float one(uint8_t x, int) { return float(x); }
};
struct Nibbles {
    typedef uint8_t Element;
    static constexpr int kParts = 2;
    static constexpr bool kSteps = true, kGrids = true, kBlocks = false;
    static vf load(const uint8_t* p, int part) { return to_floats(load_unsigned(p) >> 4 * part & 15); }
    static float one(uint8_t x, int part) { return float(x >> 4 * part & 15); }
};
struct Eights {
    typedef uint8_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false;
    static vf load(const uint8_t* p, int) { return from_e4m3(load_unsigned(p)); }
    static float one(uint8_t x, int) { return from_e4m3(x); }
};
struct Fours {
    typedef uint8_t Element;
    static constexpr int kParts = 2;
    static constexpr bool kSteps = true, kGrids = false, kBlocks = true;
    static vf load(const uint8_t* p, int part) { return from_e2m1(load_unsigned(p) >> 4 * part & 15); }
    static float one(uint8_t x, int part) { return from_e2m1(x >> 4 * part & 15); }
};

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// QUERIES queries meet one page. Their q (dim) and sums (dim) are `dim` floats apart; q_sums: the sum of each q, for
// codes, whose values are low + step * code. seen[r] = {first, end} within the page, possibly empty.
template <int QUERIES, typename How>
struct Page {
    typedef typename How::Element T;
    const T *keys, *values;
    const uint8_t *key_scales, *value_scales;  // of blocks
    const uint16_t *key_grid, *value_grid;
    int64_t dim;
    float cap;
    const float *q, *q_sums;
    float *sums, *maximum, *total;
    int64_t (*seen)[2];

    void run() const {
        float weights[QUERIES][kPageTokens], added[QUERIES] = {};
        score(weights);
        int64_t first = kPageTokens, end = 0;
        for (int r = 0; r < QUERIES; ++r) {
            softmax(r, weights[r]);
            if (seen[r][0] < seen[r][1]) first = least(first, seen[r][0]), end = most(end, seen[r][1]);
        }
        if constexpr (How::kSteps)
            for (int r = 0; r < QUERIES; ++r)
                for (int64_t t = first; t < end; ++t) {
                    if constexpr (How::kGrids) added[r] += weights[r][t] * widened(value_grid[kPageTokens + t]);
                    weights[r][t] *= widened(value_grid[t]);
                }
        const int64_t blocks = dim / kFloatBlock;
        const int64_t width = dim / How::kParts;
        for (int part = 0; part < How::kParts; ++part) {
            float* out = sums + part * width;
            int64_t d = 0;
            for (; d + LANES <= width; d += LANES) {
                vf s[QUERIES];
                for (int r = 0; r < QUERIES; ++r) {
                    s[r] = load(out + r * dim + d);
                    if constexpr (How::kGrids) s[r] += added[r];
                }
                for (int64_t t = first; t < end; ++t) {
                    vf v = How::load(values + t * width + d, part);
                    if constexpr (How::kBlocks)
                        v *= from_e4m3(value_scales[t * blocks + (part * width + d) / kFloatBlock]);
                    for (int r = 0; r < QUERIES; ++r) s[r] += v * weights[r][t];
                }
                for (int r = 0; r < QUERIES; ++r) store(out + r * dim + d, s[r]);
            }
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

    void score(float (*weights)[kPageTokens]) const {
        vf s[QUERIES][kScoreVectors];
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v) s[r][v] = vf{};
        const int64_t width = dim / How::kParts;
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
        for (int r = 0; r < QUERIES; ++r)
            for (int v = 0; v < kScoreVectors; ++v)
                store(weights[r] + v * LANES, cap == 0 ? s[r][v] : cap * tanh_of(s[r][v] / cap));
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
            for (int64_t d = 0; d < dim; ++d) sums[r * dim + d] *= factor;
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

template <int QUERIES, typename How>
void attend(const PagedArgs& a, const Tile& tile, float* scratch) {
    const int64_t dim = a.cache.dim, group = group_of(a);
    float *q = scratch, *sums = q + QUERIES * dim;
    float maximum[QUERIES], total[QUERIES], q_sums[QUERIES] = {};
    int64_t position[QUERIES], offset[QUERIES];
    for (int r = 0; r < QUERIES; ++r) {
        const int64_t token = (tile.first + r) / group, head = tile.kv_head * group + (tile.first + r) % group;
        position[r] = a.position + token;
        maximum[r] = -__builtin_inff(), total[r] = 0;
        const float* from = a.q + token * a.q_stride + head * dim;
        for (int64_t d = 0; d < dim; ++d) {
            q[r * dim + d] = from[d] * (a.scale * a.cache.key_scale), sums[r * dim + d] = 0;
            if constexpr (How::kGrids) q_sums[r] += q[r * dim + d];
        }
        offset[r] = token * a.out_stride + head * dim;
    }
    const int64_t begin = most(0, position[0] - a.window + 1) / kPageTokens;
    for (int64_t page = begin; page * kPageTokens <= position[QUERIES - 1]; ++page) {
        int64_t seen[QUERIES][2];
        for (int r = 0; r < QUERIES; ++r) {
            seen[r][0] = most(0, position[r] - a.window + 1 - page * kPageTokens);
            seen[r][1] = least(kPageTokens, position[r] + 1 - page * kPageTokens);
        }
        typedef typename How::Element T;
        const int64_t head = a.pages[page] * a.cache.kv_heads + tile.kv_head;
        const int64_t grid = head * a.cache.grids() * kPageTokens;
        const int64_t at = head * kPageTokens * a.cache.head_bytes(), behind = kPageTokens * (dim / How::kParts);
        const uint8_t* const keys = static_cast<const uint8_t*>(a.cache.keys) + at;
        const uint8_t* const values = static_cast<const uint8_t*>(a.cache.values) + at;
        Page<QUERIES, How>{reinterpret_cast<const T*>(keys), reinterpret_cast<const T*>(values),
                           How::kBlocks ? keys + behind : nullptr, How::kBlocks ? values + behind : nullptr,
                           How::kSteps ? a.cache.key_grids + grid : nullptr,
                           How::kSteps ? a.cache.value_grids + grid : nullptr,
                           dim, a.cap, q, q_sums, sums, maximum, total, seen}.run();
    }
    for (int r = 0; r < QUERIES; ++r)
        for (int64_t d = 0; d < dim; ++d) a.out[offset[r] + d] = sums[r * dim + d] / total[r] * a.cache.value_scale;
}

template <typename How>
void attend_some(const PagedArgs& a, const Tile& tile, float* scratch) {
    switch (tile.queries) {
        case 1: return attend<1, How>(a, tile, scratch);
        case 2: return attend<2, How>(a, tile, scratch);
        case 3: return attend<3, How>(a, tile, scratch);
        default: return attend<4, How>(a, tile, scratch);
    }
}

}  // namespace

int64_t paged_scratch(const PagedArgs& a) { return 2 * kTileQueries * a.cache.dim; }

int64_t paged_tiles(const PagedArgs& a) { return a.cache.kv_heads * tiles_of_head(a); }

void paged_attention(const PagedArgs& a, int64_t index, float* scratch) {
    const int64_t tiles = tiles_of_head(a), first = index % tiles * kTileQueries;
    const Tile tile{index / tiles, first, int(least(kTileQueries, a.tokens * group_of(a) - first))};
    switch (a.cache.type) {
        case CacheType::float32: return attend_some<Floats>(a, tile, scratch);
        case CacheType::bfloat16: return attend_some<Bfloats>(a, tile, scratch);
        case CacheType::fp8: return attend_some<Eights>(a, tile, scratch);
        case CacheType::nvfp4: return attend_some<Fours>(a, tile, scratch);
        case CacheType::int8: return attend_some<Bytes>(a, tile, scratch);
        case CacheType::int4: return attend_some<Nibbles>(a, tile, scratch);
    }
}

}  // namespace ISA
}  // namespace compress
