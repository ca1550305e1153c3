// Memory that weights are repacked into.
#pragma once
#include <cstdint>
#include <memory>

namespace compress {

// `bytes` zeroed bytes from a cache line on. Pieces asked for one after another lie side by side in large mappings of
// huge pages, which a small linear alone would not fill: a decode step reads all of them once, and with small pages the
// processor waits for addresses. A mapping goes back to the system with the last of its pieces. Throws std::bad_alloc.
std::shared_ptr<uint8_t> weight_memory(int64_t bytes);

}  // namespace compress
