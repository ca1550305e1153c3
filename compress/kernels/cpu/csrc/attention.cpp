// Causal attention of whole sequences, tiled with an online softmax (Dao et al., arXiv:2205.14135, Algorithm 1).
//
// One call handles the queries that share one key and value head. Keys and values are packed once; then each block of
// queries walks over the blocks of keys up to its diagonal, so that the upper half is never computed.
#include "product.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kRows = LANES == 16 ? 6 : 3;  // as many sums as registers hold, beside one strip
constexpr int kVectors = 4;
constexpr int kStrip = kVectors * LANES;
constexpr int64_t kQueries = 48;          // a block of queries: a multiple of kRows
constexpr int64_t kKeys = 192 / kStrip * kStrip;  // a block of keys: a multiple of kStrip

// The scratch memory of one call, in floats; a unit is as large as a float.
struct Sizes {
    int64_t depth, width, keys;  // units of a head dimension at most; padded head dimension; padded keys
    explicit Sizes(const AttentionArgs& a)
        : depth(a.dim), width(ceil_div(a.dim, kStrip) * kStrip), keys(ceil_div(a.tokens, kStrip) * kStrip) {}
    int64_t packed_keys() const { return keys * depth; }
    int64_t packed_values() const { return keys * width; }
    int64_t total() const {
        return packed_keys() + packed_values() + kQueries * (depth + 2 * kKeys + width) + 2 * kQueries + kKeys;
    }
};

template <typename How, typename T>
struct Head {
    typedef typename How::Unit Unit;
    const AttentionArgs& args;
    const Sizes sizes;
    const int64_t depth;  // units of a head dimension
    Unit *keys, *values, *queries, *weights;
    float *scores, *sums, *maximum, *total, *row;

    Head(const AttentionArgs& a, float* scratch) : args(a), sizes(a), depth(ceil_div(a.dim, How::kLength)) {
        auto take = [&](int64_t count) {
            float* part = scratch;
            scratch += count;
            return part;
        };
        keys = reinterpret_cast<Unit*>(take(sizes.packed_keys()));
        values = reinterpret_cast<Unit*>(take(sizes.packed_values()));
        queries = reinterpret_cast<Unit*>(take(kQueries * sizes.depth));
        weights = reinterpret_cast<Unit*>(take(kQueries * kKeys));
        scores = take(kQueries * kKeys);
        sums = take(kQueries * sizes.width);
        maximum = take(kQueries);
        total = take(kQueries);
        row = take(kKeys);
    }

    // Packed keys: [strip][unit of dim][key]. Packed values: [block of keys][strip of dim][unit of keys][dim].
    void pack(const T* k, const T* v) {
        for (int64_t j = 0; j < args.tokens; j += kStrip)
            pack_columns<How>(keys + j * depth, k + j * args.dim, args.dim, least(kStrip, args.tokens - j), args.dim,
                              kStrip);
        for (int64_t j = 0; j < args.tokens; j += kKeys) {
            const int64_t count = least(kKeys, args.tokens - j), units = ceil_div(count, How::kLength);
            for (int64_t c = 0; c < args.dim; c += kStrip)
                pack_rows<How>(values + j * sizes.width + c * units, v + j * args.dim + c, args.dim, count,
                               least(kStrip, args.dim - c), kStrip);
        }
    }

    void attend(const T* q, T* out, int64_t stride) {
        for (int64_t first = 0; first < args.tokens; first += kQueries) {
            const int64_t count = least(kQueries, args.tokens - first);
            for (int64_t r = 0; r < count; r += kRows)
                pack_columns<How>(queries + r * depth, q + (first + r) * args.dim, args.dim, least(kRows, count - r),
                                  args.dim, kRows);
            std::memset(sums, 0, sizeof(float) * kQueries * sizes.width);
            for (int64_t r = 0; r < count; ++r) maximum[r] = -__builtin_inff(), total[r] = 0;
            for (int64_t begin = 0; begin < first + count; begin += kKeys) block(first, count, begin);
            for (int64_t r = 0; r < count; ++r)
                for (int64_t c = 0; c < args.dim; ++c)
                    put(out + (first + r) * stride + c, sums[r * sizes.width + c] / total[r]);
        }
    }

    static void put(float* at, float value) { *at = value; }
    static void put(uint16_t* at, float value) { *at = narrowed(value); }

    // Queries [first, first + count) meet the keys from `begin` on, as far as the last query sees.
    void block(int64_t first, int64_t count, int64_t begin) {
        const int64_t seen = least(kKeys, first + count - begin), units = ceil_div(seen, How::kLength);
        const int64_t held = least(kKeys, args.tokens - begin);  // values are packed by whole blocks
        std::memset(scores, 0, sizeof(float) * kQueries * kKeys);
        for (int64_t j = 0; j < seen; j += kStrip)
            for (int64_t r = 0; r < count; r += kRows)
                multiply<How, kRows, kVectors>(queries + r * depth, keys + (begin + j) * depth, depth,
                                               scores + r * kKeys + j, kKeys, least(kRows, count - r), kStrip);
        for (int64_t r = 0; r < count; ++r) softmax(r, least(seen, first + r + 1 - begin), units);
        const int64_t strip_depth = ceil_div(held, How::kLength);
        for (int64_t c = 0; c < args.dim; c += kStrip)
            for (int64_t r = 0; r < count; r += kRows)
                multiply<How, kRows, kVectors>(weights + r * (kKeys / How::kLength),
                                               values + begin * sizes.width + c * strip_depth, units,
                                               sums + r * sizes.width + c, sizes.width, least(kRows, count - r),
                                               kStrip);
    }

    // Scores of row r become weights relative to its largest score so far; what was summed before is rescaled.
    // Only the first `visible` keys count; there may be none, where a block begins behind the query.
    void softmax(int64_t r, int64_t visible, int64_t units) {
        float* score = scores + r * kKeys;
        Unit* weight = weights + r / kRows * kRows * (kKeys / How::kLength) + r % kRows;
        const float hidden = -__builtin_inff();
        for (int64_t j = visible > 0 ? visible : 0; j < kKeys; ++j) score[j] = hidden;
        vf high = broadcast(0) + hidden;
        for (int64_t j = 0; j < visible; j += LANES) {
            const vf x = load(score + j);
            high = x > high ? x : high;
        }
        const float before = maximum[r], here = largest(high) * args.scale;
        const float now = here > before ? here : before;
        vf added = {};
        const int64_t end = units * How::kLength;
        for (int64_t j = 0; j < end; j += LANES) {
            const vf p = visible > 0 ? exp_negative(load(score + j) * args.scale - now) : vf{};
            added += p;
            store(row + j, p);
        }
        for (int64_t u = 0; u < units; ++u) weight[u * kRows] = How::pack(row + u * How::kLength, 1, How::kLength > 1);
        if (now != before) {
            const float factor = exp_negative(broadcast(before - now))[0];
            for (int64_t c = 0; c < sizes.width; c += LANES) {
                float* at = sums + r * sizes.width + c;
                store(at, load(at) * factor);
            }
            total[r] *= factor;
            maximum[r] = now;
        }
        total[r] += sum(added);
    }
};

template <typename How, typename T>
void shared_head(const AttentionArgs& a, int64_t index, float* scratch) {
    const int64_t batch = index / a.kv_heads, group = a.heads / a.kv_heads, length = a.tokens * a.dim;
    Head<How, T> head(a, scratch);
    head.pack(static_cast<const T*>(a.k) + index * length, static_cast<const T*>(a.v) + index * length);
    for (int64_t h = index % a.kv_heads * group; h < (index % a.kv_heads + 1) * group; ++h)
        head.attend(static_cast<const T*>(a.q) + (batch * a.heads + h) * length,
                    static_cast<T*>(a.out) + batch * a.heads * length + h * a.dim, a.heads * a.dim);
}

}  // namespace

int64_t attention_scratch(const AttentionArgs& a) { return Sizes(a).total(); }

void attention_head(const AttentionArgs& a, int64_t index, float* scratch) {
    if (!a.bfloat16) return shared_head<Floats, float>(a, index, scratch);
#if defined(__AVX512BF16__)
    shared_head<Pairs, uint16_t>(a, index, scratch);
#else
    shared_head<Floats, uint16_t>(a, index, scratch);
#endif
}

}  // namespace ISA
}  // namespace compress
