// Cyclic coordinate descent on the codes of one tile of rows: each step gives one code of a row its best value while
// the row's other codes stay. It minimises (w - q) H (w - q)^T per row; `gradient` holds (w - q) H throughout.
//
// Columns are taken in chunks. Inside a chunk every step corrects the gradient of the chunk's columns at once, for
// all rows together; the other columns get the chunk's steps afterwards, row by row and only for codes that moved,
// because few do.
#include "tile.h"

namespace compress {
namespace ISA {
namespace {

constexpr int kSpanVectors = LANES == 16 ? 8 : 4;
constexpr int kSpan = kSpanVectors * LANES;

// The codes of one row that moved in a chunk.
struct Moves {
    int count;
    const float* hessian_row[kColumnChunk];
    float step[kColumnChunk];
};

// gradient[begin..end) -= sum over moves of step * hessian_row.
void apply_moves(const Moves& moves, float* gradient, int64_t begin, int64_t end) {
    int64_t k = begin;
    for (; k + kSpan <= end; k += kSpan) {
        vf sums[kSpanVectors] = {};
        for (int m = 0; m < moves.count; ++m)
            for (int v = 0; v < kSpanVectors; ++v)
                sums[v] += moves.step[m] * load(moves.hessian_row[m] + k + v * LANES);
        for (int v = 0; v < kSpanVectors; ++v) {
            float* p = gradient + k + v * LANES;
            store(p, load(p) - sums[v]);
        }
    }
    for (; k < end; ++k) {
        float sum = 0;
        for (int m = 0; m < moves.count; ++m) sum += moves.step[m] * moves.hessian_row[m][k];
        gradient[k] -= sum;
    }
}

// One pass over columns begin..end. steps[column - begin][row] becomes the change of the dequantised value.
// What is pruned by `stays` [column - begin][row], where there is one, goes to zero. Returns whether any code moved.
bool descend_chunk(const DescentArgs& a, const GridTile& grid, int64_t begin, int64_t end, float* gradient,
                   float* codes, float* steps, const float* stays) {
    bool any = false;
    for (int64_t j = begin; j < end; ++j) {
        const float* h = a.hessian + j * a.columns;
        const int64_t at = (j - begin) * kTileRows;
        bool moved = false;
        for (int v = 0; v < kVectors; ++v) {
            vf step = {};
            if (h[j] > 0) {
                const ColumnGrid column = column_grid(grid, j, v);
                const vf old = load(codes + at + v * LANES) - column.zero_point;
                const vf target = old * column.scale + load(gradient + at + v * LANES) / h[j];
                vf level = nearest_level(column, target);
                if (stays) level *= load(stays + at + v * LANES);
                step = (level - old) * column.scale;
                store(codes + at + v * LANES, level + column.zero_point);
                moved |= any_nonzero(step);
            }
            store(steps + at + v * LANES, step);
        }
        if (!moved) continue;
        any = true;
        for (int64_t k = begin; k < end; ++k)
            for (int v = 0; v < kVectors; ++v) {
                float* p = gradient + (k - begin) * kTileRows + v * LANES;
                store(p, load(p) - load(steps + at + v * LANES) * h[k]);
            }
    }
    return any;
}

}  // namespace

int64_t descent_scratch(const DescentArgs& a) { return 4 * kColumnChunk * kTileRows + grid_scratch(a.grid); }

int64_t descent_tile(const DescentArgs& a, int64_t first_row, float* scratch) {
    const int64_t rows = smaller(kTileRows, a.rows - first_row), n = a.columns;
    float* chunk_gradient = scratch;
    float* chunk_codes = chunk_gradient + kColumnChunk * kTileRows;
    float* steps = chunk_codes + kColumnChunk * kTileRows;
    float* stays = steps + kColumnChunk * kTileRows;
    const GridTile grid = load_grid(a.grid, first_row, rows, stays + kColumnChunk * kTileRows);
    float* gradient = a.gradient + first_row * n;
    int8_t* codes = a.codes + first_row * n;

    int64_t changed = 0;
    for (int sweep = 0; sweep < a.sweeps; ++sweep) {
        int64_t before = changed;
        for (int64_t begin = 0; begin < n; begin += kColumnChunk) {
            const int64_t end = smaller(begin + kColumnChunk, n), width = end - begin;
            load_tile(chunk_gradient, gradient + begin, n, rows, width, 0.0f);
            load_tile(chunk_codes, codes + begin, n, rows, width, 0.0f);
            if (a.pruned) load_stays(stays, a.pruned + first_row * n + begin, n, rows, width);
            const float* keep = a.pruned ? stays : nullptr;
            if (!descend_chunk(a, grid, begin, end, chunk_gradient, chunk_codes, steps, keep)) continue;
            store_tile(gradient + begin, chunk_gradient, n, rows, width);
            store_tile(codes + begin, chunk_codes, n, rows, width);
            for (int64_t r = 0; r < rows; ++r) {
                Moves moves;
                moves.count = 0;
                for (int64_t c = 0; c < width; ++c)
                    if (const float step = steps[c * kTileRows + r]; step != 0) {
                        moves.hessian_row[moves.count] = a.hessian + (begin + c) * n;
                        moves.step[moves.count++] = step;
                    }
                if (moves.count == 0) continue;
                changed += moves.count;
                apply_moves(moves, gradient + r * n, 0, begin);
                apply_moves(moves, gradient + r * n, end, n);
            }
        }
        if (changed == before) break;
    }
    return changed;
}

}  // namespace ISA
}  // namespace compress
