// What rounding to nearest would cost for many candidate column scales at once: the inner loop of AWQ's search.
//
// A row's group stays in the first-level cache while every candidate is tried on it: scale the columns, find the
// range, round on the grids that cover shares of it, and add up the squared errors by the columns' importance. The
// best share counts.
#include "tile.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

// One group of one row: `begin` columns into the row, `count` of them, padded with zeros to whole vectors. A zero is
// on every grid, so padding changes neither the range nor the loss.
struct Group {
    const float* weight;
    const float* scale;
    const float* importance;
    int64_t count;
};

// The loss of `scaled` on the grid from -bottom to top.
float grid_loss(const RoundingArgs& a, const Group& g, const float* scaled, float bottom, float top) {
    const float smallest = 1e-8f;
    float step, zero = 0, qmin, qmax;
    if (a.symmetric) {
        const float span = top > bottom ? top : bottom;
        step = span / (a.levels / 2);
        qmin = -(a.levels + 1) / 2, qmax = (a.levels - 1) / 2;
    } else {
        step = (top + bottom) / a.levels;
        qmin = 0, qmax = a.levels;
    }
    step = step < smallest ? smallest : step;
    if (!a.symmetric) {
        zero = round_even(broadcast(bottom / step))[0];
        zero = zero < 0 ? 0 : zero > qmax ? qmax : zero;
    }
    const vf lowest = broadcast(qmin - zero), highest = broadcast(qmax - zero);
    vf total = {};
    for (int64_t c = 0; c < g.count; c += LANES) {
        const vf x = load(scaled + c);
        const vf error = round_even(clamp(x / broadcast(step), lowest, highest)) * step - x;
        total += error * error * load_some(g.importance + c, g.count - c);
    }
    return sum(total);
}

float group_loss(const RoundingArgs& a, const Group& g, float* scaled) {
    vf high = {}, low = {};
    for (int64_t c = 0; c < g.count; c += LANES) {
        const vf x = load_some(g.weight + c, g.count - c) * load_some(g.scale + c, g.count - c);
        store(scaled + c, x);
        high = x > high ? x : high;
        low = -x > low ? -x : low;  // the lower end of the range, its sign turned
    }
    const float top = largest(high), bottom = largest(low);
    float best = grid_loss(a, g, scaled, bottom * a.shares[0], top * a.shares[0]);
    for (int64_t i = 1; i < a.share_count; ++i) {
        const float loss = grid_loss(a, g, scaled, bottom * a.shares[i], top * a.shares[i]);
        best = loss < best ? loss : best;
    }
    return best;
}

}  // namespace

int64_t rounding_scratch(const RoundingArgs& a) { return a.group_size + LANES; }

void rounding_tile(const RoundingArgs& a, int64_t first_row, float* scratch) {
    const int64_t rows = smaller(kTileRows, a.rows - first_row);
    for (int64_t r = first_row; r < first_row + rows; ++r) {
        double* loss = a.loss + r * a.candidates;
        for (int64_t k = 0; k < a.candidates; ++k) loss[k] = 0;
        for (int64_t begin = 0; begin < a.columns; begin += a.group_size)
            for (int64_t k = 0; k < a.candidates; ++k) {
                const int64_t at = k * a.columns + begin;
                const Group group{a.weight + r * a.columns + begin, a.scales + at, a.importance + at, a.group_size};
                loss[k] += group_loss(a, group, scratch);
            }
    }
}

}  // namespace ISA
}  // namespace compress
