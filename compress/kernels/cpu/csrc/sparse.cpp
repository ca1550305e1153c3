// SparseGPT's column loop (arXiv 2301.00774, algorithm 1) within one block of columns, for one tile of rows.
//
// A removed weight corrects the columns after it in the block at once; what the block asks of later columns is left in
// `errors`, for one matrix product. Rows are independent and contiguous, so each is walked along on its own.
#include "tile.h"

namespace compress {
namespace ISA {
namespace {

// Marks the `drop` least of `count` columns, by w^2 / U_cc^2; of equal ones the first.
void choose(const float* weight, const float* upper, int64_t stride, int64_t count, int64_t drop, int8_t* pruned) {
    for (int64_t c = 0; c < count; ++c) pruned[c] = 0;
    for (int64_t d = 0; d < drop; ++d) {
        int64_t least = -1;
        float lowest = 0;
        for (int64_t c = 0; c < count; ++c) {
            if (pruned[c]) continue;
            const float root = weight[c] / upper[c * stride + c];
            const float score = root * root;
            if (least < 0 || score < lowest) least = c, lowest = score;
        }
        pruned[least] = 1;
    }
}

void correct(float* weight, const float* upper, float error, int64_t count) {
    for (int64_t c = 0; c < count; ++c) weight[c] -= error * upper[c];
}

}  // namespace

int64_t sparse_scratch(const SparseArgs&) { return 0; }

void sparse_tile(const SparseArgs& a, int64_t first_row, float*) {
    const int64_t rows = smaller(kTileRows, a.rows - first_row);
    for (int64_t r = first_row; r < first_row + rows; ++r) {
        float* weight = a.weight + r * a.columns;
        float* errors = a.errors + r * a.columns;
        int8_t* pruned = a.pruned + r * a.columns;
        for (int64_t c = 0; c < a.columns; ++c) {
            const float* upper = a.upper + c * a.columns;
            if (a.group && c % a.group == 0) choose(weight + c, upper + c, a.columns, a.group, a.drop, pruned + c);
            errors[c] = 0;
            if (!pruned[c]) continue;
            const float error = weight[c] / upper[c];
            errors[c] = error;
            weight[c] = 0;
            correct(weight + c + 1, upper + c + 1, error, a.columns - c - 1);
        }
    }
}

}  // namespace ISA
}  // namespace compress
