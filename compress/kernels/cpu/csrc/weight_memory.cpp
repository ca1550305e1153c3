#include "weight_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace compress {
namespace {

constexpr int64_t kLine = 64, kHugePage = 2 << 20, kMapping = 32 << 20;

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

std::shared_ptr<uint8_t> mapping(int64_t bytes) {
#if defined(__linux__)
    const int64_t whole = bytes + kHugePage;  // room to begin at a huge page
    void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    auto* first = reinterpret_cast<uint8_t*>(up(reinterpret_cast<int64_t>(at), kHugePage));
    madvise(first, bytes, MADV_HUGEPAGE);
    return std::shared_ptr<uint8_t>(first, [at, whole](uint8_t*) { munmap(at, whole); });
#else
    void* memory = nullptr;
    if (posix_memalign(&memory, kLine, bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return std::shared_ptr<uint8_t>(static_cast<uint8_t*>(memory), free);
#endif
}

}  // namespace

std::shared_ptr<uint8_t> weight_memory(int64_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<uint8_t> latest;
    static int64_t size = 0, used = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    bytes = up(std::max<int64_t>(bytes, 1), kLine);
    auto whole = latest.lock();
    if (!whole || size - used < bytes) {
        size = up(std::max(bytes, kMapping), kHugePage), used = 0;
        latest = whole = mapping(size);
    }
    uint8_t* piece = whole.get() + used;
    used += bytes;
    return std::shared_ptr<uint8_t>(std::move(whole), piece);
}

}  // namespace compress
