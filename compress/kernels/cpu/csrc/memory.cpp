#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "scalars.h"

namespace compress {
namespace {

constexpr int64_t kLine = 64, kHugePage = 2 << 20, kLargeBuffer = 2 * kHugePage, kShared = 32 << 20;

}  // namespace

Buffer::Buffer(int64_t bytes) {
#if defined(__linux__)
    if (bytes >= kLargeBuffer) {
        const int64_t whole = bytes + kHugePage;  // room to begin at a huge page
        void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        mapping_ = at, mapped_ = whole;
        memory_ = reinterpret_cast<uint8_t*>(rounded_up(reinterpret_cast<int64_t>(at), kHugePage));
        madvise(memory_, bytes, MADV_HUGEPAGE);
        return;
    }
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, kLine, most(bytes, kLine)) != 0) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    std::memset(memory, 0, bytes);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

Buffer::~Buffer() {
#if defined(__linux__)
    if (mapping_) {
        munmap(mapping_, mapped_);
        return;
    }
#endif
    free(memory_);
}

std::shared_ptr<uint8_t> weight_memory(int64_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Buffer> latest;
    static int64_t size = 0, used = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    bytes = rounded_up(most(bytes, 1), kLine);
    auto whole = latest.lock();
    if (!whole || size - used < bytes) {
        size = rounded_up(most(bytes, kShared), kHugePage), used = 0;
        latest = whole = std::make_shared<Buffer>(size);
    }
    uint8_t* piece = whole->data() + used;
    used += bytes;
    return std::shared_ptr<uint8_t>(std::move(whole), piece);
}

}  // namespace compress
