// GPTQ's column loop (arXiv 2210.17323, algorithm 1) for one tile of rows.
//
// Columns are taken in chunks. Inside a chunk each quantised column corrects the columns after it at once; the
// columns after the chunk get the corrections of the whole chunk in one register-tiled product.
#include "tile.h"

namespace compress {
namespace ISA {
namespace {

// A strip of the trailing update keeps kStripVectors x kStripColumns sums in registers.
constexpr int kStripVectors = 2;
constexpr int kStripColumns = LANES == 16 ? 8 : LANES == 8 ? 6 : 4;
constexpr int kPrefetchAhead = 32;

// columns[c] -= sum over i of errors[i] * upper[i][c], for C columns and kStripVectors vectors of rows.
// Not inlined: the sums must have the registers for themselves.
template <int C>
__attribute__((noinline)) void update_strip(float* columns, const float* errors, const float* upper, int64_t stride, int64_t depth) {
    vf sums[C][kStripVectors];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int v = 0; v < kStripVectors; ++v) sums[c][v] = vf{};
    for (int64_t i = 0; i < depth; ++i) {
        // A row of `upper` is a page away from the next: the processor does not see the next strip coming.
        __builtin_prefetch(upper + i * stride + kPrefetchAhead, 0, 2);
        vf e[kStripVectors];
        for (int v = 0; v < kStripVectors; ++v) e[v] = load(errors + i * kTileRows + v * LANES);
        for (int c = 0; c < C; ++c)
            for (int v = 0; v < kStripVectors; ++v) sums[c][v] += e[v] * upper[i * stride + c];
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
        for (int v = 0; v < kStripVectors; ++v) {
            float* p = columns + c * kTileRows + v * LANES;
            store(p, load(p) - sums[c][v]);
        }
}

// Quantises columns begin..end of the tile; leaves their errors [column - begin][row], codes and loss. What is pruned
// by `stays` [column - begin][row], where there is one, becomes zero.
void quantise_chunk(const GptqArgs& a, const GridTile& grid, float* tile, int64_t begin, int64_t end, float* errors,
                    float* codes, float* loss, const float* stays) {
    for (int64_t i = begin; i < end; ++i) {
        const float* u = a.upper + i * a.columns;
        const int64_t row = (i - begin) * kTileRows;
        for (int v = 0; v < kVectors; ++v) {
            const ColumnGrid column = column_grid(grid, i, v);
            const vf w = load(tile + i * kTileRows + v * LANES);
            vf level = nearest_level(column, w);
            if (stays) level *= load(stays + row + v * LANES);
            const vf e = (w - level * column.scale) / u[i];
            store(codes + row + v * LANES, level + column.zero_point);
            store(errors + row + v * LANES, e);
            store(loss + v * LANES, load(loss + v * LANES) + e * e);
        }
        for (int v = 0; v < kVectors; ++v) {
            const vf e = load(errors + row + v * LANES);
            for (int64_t j = i + 1; j < end; ++j) {
                float* p = tile + j * kTileRows + v * LANES;
                store(p, load(p) - e * u[j]);
            }
        }
    }
}

}  // namespace

int64_t gptq_scratch(const GptqArgs& a) {
    return (a.columns + 3 * kColumnChunk) * kTileRows + grid_scratch(a.grid);
}

void gptq_tile(const GptqArgs& a, int64_t first_row, float* scratch) {
    const int64_t rows = smaller(kTileRows, a.rows - first_row), n = a.columns;
    float* tile = scratch;  // the weights, corrected as the loop goes on
    float* errors = tile + n * kTileRows;
    float* codes = errors + kColumnChunk * kTileRows;
    float* stays = codes + kColumnChunk * kTileRows;
    const GridTile grid = load_grid(a.grid, first_row, rows, stays + kColumnChunk * kTileRows);
    load_tile(tile, a.weight + first_row * n, n, rows, n, 0.0f);

    double loss[kTileRows] = {};
    for (int64_t begin = 0; begin < n; begin += kColumnChunk) {
        const int64_t end = smaller(begin + kColumnChunk, n);
        float chunk_loss[kTileRows] = {};
        if (a.pruned) load_stays(stays, a.pruned + first_row * n + begin, n, rows, end - begin);
        quantise_chunk(a, grid, tile, begin, end, errors, codes, chunk_loss, a.pruned ? stays : nullptr);
        store_tile(a.codes + first_row * n + begin, codes, n, rows, end - begin);
        for (int r = 0; r < kTileRows; ++r) loss[r] += 0.5 * chunk_loss[r];

        const float* upper = a.upper + begin * n;
        for (int v = 0; v < kVectors; v += kStripVectors) {
            const float* e = errors + v * LANES;
            int64_t j = end;
            for (; j + kStripColumns <= n; j += kStripColumns)
                update_strip<kStripColumns>(tile + j * kTileRows + v * LANES, e, upper + j, n, end - begin);
            for (; j < n; ++j) update_strip<1>(tile + j * kTileRows + v * LANES, e, upper + j, n, end - begin);
        }
    }
    for (int64_t r = 0; r < rows; ++r) a.loss[first_row + r] = loss[r];
}

}  // namespace ISA
}  // namespace compress
