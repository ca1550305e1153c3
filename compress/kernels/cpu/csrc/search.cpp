// The search for the range that each group's grid should cover: every candidate is rounded to and its error weighed,
// with the group's tile of rows in the first-level cache throughout.
//
// A tile is held column-major, so that a vector holds one column of neighbouring rows, each with a scale of its own.
// The weight of an error is a quadratic form e B e^T. B is symmetric, so half of it will do: what lies above a diagonal
// block of columns counts twice.
#include "tile.h"

namespace compress {
namespace ISA {
namespace {

// Vectors of rows and columns of B that are multiplied at a time, as many sums as registers hold.
constexpr int kPair = 2;
constexpr int kBlock = LANES == 16 ? 8 : 4;
constexpr float kSmallestScale = 0x1p-24f;

// Half to even, as numbers of the stored type.
static inline float stored(ScaleType type, float value) {
    if (type == ScaleType::float32) return value;
    const int dropped = type == ScaleType::bfloat16 ? 16 : 13;
    if (type == ScaleType::float16 && value < 0x1p-14f && value > -0x1p-14f) {
        const float magic = 12582912.0f, steps = value * 0x1p24f;
        return ((steps + magic) - magic) * 0x1p-24f;
    }
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    word += (uint32_t(1) << (dropped - 1)) - 1 + (word >> dropped & 1);
    word &= ~((uint32_t(1) << dropped) - 1);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// `scale` as stored, kept where codes up to `reach` can be divided by it and decoded to numbers.
static inline float stored_scale(const SearchArgs& a, float scale, float reach) {
    const float largest = a.largest / reach;
    if ((scale < 0 ? -scale : scale) < kSmallestScale) scale = scale < 0 ? -kSmallestScale : kSmallestScale;
    scale = scale < -largest ? -largest : scale;
    return stored(a.scale_type, scale < largest ? scale : largest);
}

// One group of a tile of rows.
struct Group {
    float *weight, *error;  // [column][row]
    const float* form;      // B (size, size), or null: squared errors count
    int64_t size;
    float low[kTileRows], high[kTileRows];  // the range, zero included
};

struct Candidate {
    float share[kTileRows], sign[kTileRows], loss[kTileRows];
};

void find_range(Group& g) {
    for (int v = 0; v < kVectors; ++v) {
        vf low = {}, high = {};
        for (int64_t c = 0; c < g.size; ++c) {
            const vf x = load(g.weight + c * kTileRows + v * LANES);
            low = x < low ? x : low;
            high = x > high ? x : high;
        }
        store(g.low + v * LANES, low);
        store(g.high + v * LANES, high);
    }
}

// total += what columns first..first+C of B add to the weight of the error, for kPair vectors of rows.
// Not inlined: the sums must have the registers for themselves.
template <int C>
__attribute__((noinline)) void add_columns(const float* form, int64_t size, int64_t first, const float* error,
                                           float* total) {
    vf sums[C][kPair];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int v = 0; v < kPair; ++v) sums[c][v] = vf{};
    const float* b = form + first;
    auto add_rows = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i, b += size) {
            vf e[kPair];
            for (int v = 0; v < kPair; ++v) e[v] = load(error + i * kTileRows + v * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c)
                for (int v = 0; v < kPair; ++v) sums[c][v] += e[v] * b[c];
        }
    };
    add_rows(0, first);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int v = 0; v < kPair; ++v) sums[c][v] += sums[c][v];
    add_rows(first, first + C);
    for (int v = 0; v < kPair; ++v) {
        vf all = load(total + v * LANES);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) all += sums[c][v] * load(error + (first + c) * kTileRows + v * LANES);
        store(total + v * LANES, all);
    }
}

// Fills `tried.loss` for its shares and signs.
void weigh(const SearchArgs& a, Group& g, Candidate& tried) {
    float scale[kTileRows], lowest[kTileRows], highest[kTileRows];
    const float half = (a.levels + 1) / 2;
    for (int r = 0; r < kTileRows; ++r) {
        const float low = g.low[r] * tried.share[r], high = g.high[r] * tried.share[r];
        float zero = half;
        if (a.symmetric) {
            const float span = -low > high ? -low : high;
            scale[r] = stored_scale(a, span / (a.levels / 2) * tried.sign[r], half);
        } else {
            scale[r] = stored_scale(a, (high - low) / a.levels, half);
            const float exact = -low / scale[r];
            zero = round_even(broadcast(exact < a.levels ? exact : a.levels))[0];
            scale[r] = stored_scale(a, scale[r], zero > a.levels - zero ? zero : a.levels - zero);
        }
        lowest[r] = -zero, highest[r] = a.levels - zero;
    }
    for (int v = 0; v < kVectors; ++v) {
        const vf s = load(scale + v * LANES), lo = load(lowest + v * LANES), hi = load(highest + v * LANES);
        vf squares = {};
        for (int64_t c = 0; c < g.size; ++c) {
            const int64_t at = c * kTileRows + v * LANES;
            const vf x = load(g.weight + at);
            const vf error = round_even(clamp(x / s, lo, hi)) * s - x;
            store(g.error + at, error);
            squares += error * error;
        }
        store(tried.loss + v * LANES, g.form ? vf{} : squares);
    }
    if (!g.form) return;
    for (int r = 0; r < kTileRows; r += kPair * LANES) {
        int64_t c = 0;
        for (; c + kBlock <= g.size; c += kBlock) add_columns<kBlock>(g.form, g.size, c, g.error + r, tried.loss + r);
        for (; c < g.size; ++c) add_columns<1>(g.form, g.size, c, g.error + r, tried.loss + r);
    }
}

void keep_better(Candidate& best, const Candidate& tried) {
    for (int r = 0; r < kTileRows; ++r)
        if (tried.loss[r] < best.loss[r]) {
            best.loss[r] = tried.loss[r];
            best.share[r] = tried.share[r];
            best.sign[r] = tried.sign[r];
        }
}

Candidate search(const SearchArgs& a, Group& g) {
    Candidate best, tried;
    for (int r = 0; r < kTileRows; ++r) best.loss[r] = __builtin_inff(), best.share[r] = best.sign[r] = 1;
    for (float sign = 1; sign >= (a.symmetric ? -1 : 1); sign -= 2)
        for (int64_t i = 0; i < a.share_count; ++i) {
            for (int r = 0; r < kTileRows; ++r) tried.share[r] = a.shares[i], tried.sign[r] = sign;
            weigh(a, g, tried);
            keep_better(best, tried);
        }
    const Candidate centre = best;
    for (int64_t i = 0; i < a.offset_count; ++i) {
        for (int r = 0; r < kTileRows; ++r)
            tried.share[r] = centre.share[r] + a.offsets[i], tried.sign[r] = centre.sign[r];
        weigh(a, g, tried);
        keep_better(best, tried);
    }
    return best;
}

}  // namespace

int64_t search_scratch(const SearchArgs& a) { return 2 * kTileRows * a.group_size; }

void search_tile(const SearchArgs& a, int64_t first_row, float* scratch) {
    const int64_t rows = smaller(kTileRows, a.rows - first_row), groups = a.columns / a.group_size;
    Group g;
    g.size = a.group_size;
    g.weight = scratch;
    g.error = scratch + g.size * kTileRows;
    for (int64_t group = 0; group < groups; ++group) {
        load_tile(g.weight, a.weight + first_row * a.columns + group * g.size, a.columns, rows, g.size, 0.0f);
        g.form = a.importance ? a.importance + group * g.size * g.size : nullptr;
        find_range(g);
        const Candidate best = search(a, g);
        for (int64_t r = 0; r < rows; ++r) {
            a.share[(first_row + r) * groups + group] = best.share[r];
            a.sign[(first_row + r) * groups + group] = best.sign[r];
        }
    }
}

}  // namespace ISA
}  // namespace compress
