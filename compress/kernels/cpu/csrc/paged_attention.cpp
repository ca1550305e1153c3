// Attention over a cache in pages, with an online softmax from page to page (Dao et al., arXiv:2205.14135).
//
// A tile is some queries that read the same keys: the heads that share a key head, of one token or of several. Pages
// are taken in order, and what a query computes does not depend on the others of its tile.
#include "kernels.h"
#include "paged_pages.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kTileQueries = 4;

struct Tile {
    int64_t kv_head, first;  // the first query, counted token by token and head by head within a group
    int queries;
};

int64_t group_of(const PagedArgs& a) { return a.heads / a.cache.kv_heads; }
int64_t tiles_of_head(const PagedArgs& a) { return (a.tokens * group_of(a) + kTileQueries - 1) / kTileQueries; }

// All heads that share a key head, and one page.
template <int QUERIES, typename How>
void meet(const PagedArgs& a, int64_t page, int64_t kv_head, const Queries<QUERIES>& queries) {
    typedef typename How::Element T;
    const Cache& cache = a.cache;
    const int64_t head = page * cache.kv_heads + kv_head, behind = kPageTokens * (cache.dim / How::kParts);
    const uint8_t* const keys = static_cast<const uint8_t*>(cache.keys) + head * cache.key_bytes();
    const uint8_t* const values = static_cast<const uint8_t*>(cache.values) + head * cache.value_bytes();
    const Page<QUERIES, How> met{queries, reinterpret_cast<const T*>(keys), reinterpret_cast<const T*>(values),
                                 How::kBlocks ? keys + behind : nullptr, How::kBlocks ? values + behind : nullptr,
                                 How::kSteps ? cache.key_grids + head * cache.key_numbers() : nullptr,
                                 How::kSteps ? cache.value_grids + head * cache.value_numbers() : nullptr};
    met.run();
}

// A query sees its own page as bfloat16, also where the page has become full since, and those before it as codes: so
// what it sees does not depend on which tokens were computed together.
template <int QUERIES>
void meet_two_bits(const PagedArgs& a, int64_t page, int64_t kv_head, const Queries<QUERIES>& queries,
                   const bool (&own)[QUERIES]) {
    const Cache& cache = a.cache;
    const int64_t head = page * cache.kv_heads + kv_head;
    for (int open = 0; open < 2; ++open) {
        int64_t seen[QUERIES][2];
        bool any = false;
        for (int r = 0; r < QUERIES; ++r) {
            const int64_t* all = queries.seen[r];
            seen[r][0] = own[r] == bool(open) ? all[0] : 0, seen[r][1] = own[r] == bool(open) ? all[1] : 0;
            any |= seen[r][0] < seen[r][1];
        }
        if (!any) continue;
        Queries<QUERIES> some = queries;
        some.seen = seen;
        if (open) {
            const int64_t at = cache.open_at(page, kv_head);
            const Page<QUERIES, Bfloats> met{some, cache.open_keys + at, cache.open_values + at,
                                             nullptr, nullptr, nullptr, nullptr};
            met.run();
        } else {
            const uint8_t* const keys = static_cast<const uint8_t*>(cache.keys) + head * cache.key_bytes();
            const uint8_t* const values = static_cast<const uint8_t*>(cache.values) + head * cache.value_bytes();
            const TwoBitPage<QUERIES> met{some, reinterpret_cast<const uint32_t*>(keys),
                                          reinterpret_cast<const uint32_t*>(values), cache.words(), cache.groups(),
                                          cache.key_grids + head * cache.key_numbers(),
                                          cache.value_grids + head * cache.value_numbers()};
            met.run();
        }
    }
}

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
        const Queries<QUERIES> queries{dim, a.cap, q, q_sums, sums, maximum, total, seen};
        if constexpr (How::kOpen) {
            bool own[QUERIES];
            for (int r = 0; r < QUERIES; ++r) own[r] = position[r] / kPageTokens == page;
            meet_two_bits(a, a.pages[page], tile.kv_head, queries, own);
        } else {
            meet<QUERIES, How>(a, a.pages[page], tile.kv_head, queries);
        }
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
        case CacheType::int2: return attend_some<TwoBits>(a, tile, scratch);
    }
}

}  // namespace ISA
}  // namespace compress
