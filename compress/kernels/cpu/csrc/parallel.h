// Deals the tiles of a kernel out to the pool's threads, each with scratch memory of its own.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels.h"
#include "pool.h"

namespace compress {

// Calls work(index, scratch) for every index below `count`. Everything is allocated before the first call.
template <typename Work>
void for_each(int64_t count, int64_t scratch_floats, int threads, Work work) {
    // A cache line more per thread, so that no two threads write to one.
    const int64_t stride = scratch_floats + 16;
    const std::unique_ptr<float[]> scratch(new float[std::min<int64_t>(threads, count) * stride]);
    Pool::shared().run(count, threads,
                       [&](int64_t index, int thread) { work(index, scratch.get() + thread * stride); });
}

// Calls work(first_row, scratch) for every tile of `rows`.
template <typename Work>
void for_each_tile(int64_t rows, int64_t scratch_floats, int threads, Work work) {
    for_each((rows + kTileRows - 1) / kTileRows, scratch_floats, threads,
             [&](int64_t tile, float* scratch) { work(tile * kTileRows, scratch); });
}

}  // namespace compress
