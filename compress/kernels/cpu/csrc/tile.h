// What the two column-by-column kernels share: a tile of rows held column-major, so that a vector holds the same
// column of neighbouring rows, and the step that turns a vector of values into codes.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace compress {
namespace ISA {

constexpr int kVectors = kTileRows / LANES;  // vectors in one column of a tile

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// tile[column][row] = source[row][column]; rows past the end read as `fill`.
template <typename T>
static inline void load_tile(float* tile, const T* source, int64_t stride, int64_t rows, int64_t columns, float fill) {
    for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t c = 0; c < columns; ++c) tile[c * kTileRows + r] = r < rows ? float(source[r * stride + c]) : fill;
}

template <typename T>
static inline void store_tile(T* target, const float* tile, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) target[r * stride + c] = T(tile[c * kTileRows + r]);
}

// The scales and zero points of a tile's rows, [group][row].
struct GridTile {
    const float* scale;
    const float* zero_point;
    const int32_t* group_of_column;
    float qmin, qmax;
};

static inline int64_t grid_scratch(const Grid& grid) { return 2 * grid.groups * kTileRows; }

static inline GridTile load_grid(const Grid& grid, int64_t first_row, int64_t rows, float* scratch) {
    float* zero_point = scratch + grid.groups * kTileRows;
    load_tile(scratch, grid.scale + first_row * grid.groups, grid.groups, rows, grid.groups, 1.0f);
    load_tile(zero_point, grid.zero_point + first_row * grid.groups, grid.groups, rows, grid.groups, 0.0f);
    return {scratch, zero_point, grid.group_of_column, grid.qmin, grid.qmax};
}

struct ColumnGrid {
    vf scale, zero_point, lowest, highest;
};

// The grid of vector v of a column; lowest and highest are levels, that is codes less the zero point.
static inline ColumnGrid column_grid(const GridTile& grid, int64_t column, int v) {
    const int64_t at = int64_t(grid.group_of_column[column]) * kTileRows + v * LANES;
    const vf zero_point = load(grid.zero_point + at);
    return {load(grid.scale + at), zero_point, grid.qmin - zero_point, grid.qmax - zero_point};
}

// clamp(round(value / scale)) in levels. The clamp comes first, which is the same because its bounds are integers,
// and keeps the rounding within its domain.
static inline vf nearest_level(const ColumnGrid& grid, vf values) {
    return round_even(clamp(values / grid.scale, grid.lowest, grid.highest));
}

// Columns begin..end of a tile of marks as [column - begin][row]: 0 where a weight is pruned, else 1.
static inline void load_stays(float* stays, const int8_t* pruned, int64_t stride, int64_t rows, int64_t columns) {
    load_tile(stays, pruned, stride, rows, columns, 0.0f);
    for (int64_t i = 0; i < columns * kTileRows; ++i) stays[i] = stays[i] == 0.0f ? 1.0f : 0.0f;
}

}  // namespace ISA
}  // namespace compress
