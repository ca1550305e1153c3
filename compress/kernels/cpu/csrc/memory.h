// Memory that is zero at first, and, where it is large, in huge pages: what a step reads once from end to end makes the
// processor wait for addresses if its pages are small.
#pragma once
#include <cstdint>
#include <memory>

namespace compress {

// Aligned to a cache line. Where it is large the system gives it page by page on first touch. Throws std::bad_alloc.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t bytes);
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer();
    uint8_t* data() const { return memory_; }

private:
    uint8_t* memory_ = nullptr;
    void* mapping_ = nullptr;  // null where the memory is of the heap
    int64_t mapped_ = 0;       // its bytes
};

// Memory that weights are repacked into. Pieces asked for one after another lie side by side in one large buffer, which a
// small linear alone would not fill; it goes back to the system with the last of its pieces. Throws std::bad_alloc.
std::shared_ptr<uint8_t> weight_memory(int64_t bytes);

}  // namespace compress
