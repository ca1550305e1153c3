// Deals the tiles of a kernel out to threads: fork, work, join. No pool stays behind, so a later fork() is safe.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace compress {

// Calls work(index, scratch) for every index below `count`. Everything is allocated before the first call.
template <typename Work>
void for_each(int64_t count, int64_t scratch_floats, int threads, Work work) {
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, count));
    // A cache line more per thread, so that no two threads write to one.
    const int64_t stride = scratch_floats + 16;
    std::unique_ptr<float[]> scratch(new float[workers * stride]);
    std::atomic<int64_t> next{0};
    auto loop = [&](int64_t thread) {
        for (int64_t index; (index = next.fetch_add(1)) < count;) work(index, scratch.get() + thread * stride);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(workers - 1);
    struct Join {
        std::vector<std::thread>& all;
        ~Join() {
            for (std::thread& t : all) t.join();
        }
    } join{helpers};
    for (int64_t t = 1; t < workers; ++t) helpers.emplace_back(loop, t);
    loop(0);
}

// Calls work(first_row, scratch) for every tile of `rows`.
template <typename Work>
void for_each_tile(int64_t rows, int64_t scratch_floats, int threads, Work work) {
    for_each((rows + kTileRows - 1) / kTileRows, scratch_floats, threads,
             [&](int64_t tile, float* scratch) { work(tile * kTileRows, scratch); });
}

}  // namespace compress
