// The decoder's key-value cache: its memory, and the pages of int2, which are open until they are full.
#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "decoder_work.h"

namespace compress {

void Decoder::keep(int64_t layer, CacheType type, float key_scale, float value_scale) {
    std::lock_guard<std::mutex> lock(busy_);
    DecoderLayer& changed = layers_[layer];
    changed.cache = type, changed.key_scale = key_scale, changed.value_scale = value_scale;
    allocate(changed);
    allocate_places();
}

void Decoder::allocate(DecoderLayer& layer) const {
    const Cache cache = cache_of(layer);
    const int64_t heads = config.pages * config.kv_heads, number = sizeof(uint16_t);
    const auto memory = [](int64_t bytes) { return bytes ? Buffer(bytes) : Buffer(); };
    layer.keys = memory(heads * cache.key_bytes());
    layer.values = memory(heads * cache.value_bytes());
    layer.key_grids = memory(heads * cache.key_numbers() * number);
    layer.value_grids = memory(heads * cache.value_numbers() * number);
}

void Decoder::allocate_places() {
    open_stride_ = 0;
    for (DecoderLayer& layer : layers_) {
        layer.open_at = open_stride_;
        if (layer.cache == CacheType::int2) open_stride_ += 2 * config.kv_heads * config.dim * kPageTokens;
    }
    open_ = open_stride_ ? Buffer(config.pages * open_page_bytes()) : Buffer();
    places_.assign(config.pages, -1);
    free_places_.resize(config.pages);
    std::iota(free_places_.begin(), free_places_.end(), 0);
}

Cache Decoder::cache_of(const DecoderLayer& layer) const {
    const bool opens = layer.cache == CacheType::int2;
    uint16_t* const open = opens ? reinterpret_cast<uint16_t*>(open_.data()) + layer.open_at : nullptr;
    const auto numbers = [](const Buffer& memory) { return reinterpret_cast<uint16_t*>(memory.data()); };
    return {layer.keys.data(), layer.values.data(), numbers(layer.key_grids), numbers(layer.value_grids), layer.cache,
            config.kv_heads, config.dim, layer.key_scale, layer.value_scale, open,
            opens ? open + config.kv_heads * config.dim * kPageTokens : nullptr, open_stride_, places_.data()};
}

int64_t Decoder::cache_bytes() const {
    int64_t total = 0;
    for (const DecoderLayer& layer : layers_) {
        const Cache cache = cache_of(layer);
        const int64_t numbers = (cache.key_numbers() + cache.value_numbers()) * int64_t(sizeof(uint16_t));
        total += config.kv_heads * (cache.key_bytes() + cache.value_bytes() + numbers);
    }
    return (total + kPageTokens - 1) / kPageTokens;
}

int64_t Decoder::open_page_bytes() const { return open_stride_ * int64_t(sizeof(uint16_t)); }

// Gives every page that the step writes to a place, and returns those that are full with it.
std::vector<int32_t> Decoder::open_pages(const Step& step) {
    std::vector<int32_t> filled;
    if (open_stride_ == 0) return filled;
    for (int64_t t = 0; t < step.count; ++t) {
        const int64_t slot = step.positions[t] % kPageTokens;
        const int32_t page = step.tables[step.sequences[t] * step.table_width + step.positions[t] / kPageTokens];
        if (places_[page] < 0) {
            if (slot != 0)
                throw std::invalid_argument("positions must begin a page of int2 anew once it was full");
            std::pop_heap(free_places_.begin(), free_places_.end(), std::greater<int32_t>());
            places_[page] = free_places_.back();
            free_places_.pop_back();
        }
        if (slot == kPageTokens - 1) filled.push_back(page);
    }
    return filled;
}

void Decoder::close_pages(const Work& w, const DecoderLayer& layer) {
    if (layer.cache != CacheType::int2) return;
    const Cache cache = cache_of(layer);
    const int64_t count = int64_t(w.filled.size()) * config.kv_heads;
    Pool::shared().run(count, w.step.threads, [&](int64_t index, int) {
        w.kernels.close_page(cache, w.filled[index / config.kv_heads], index % config.kv_heads);
    });
}

void Decoder::give_back(const std::vector<int32_t>& pages) {
    for (const int32_t page : pages) {
        if (places_[page] < 0) continue;
        free_places_.push_back(places_[page]);
        std::push_heap(free_places_.begin(), free_places_.end(), std::greater<int32_t>());
        places_[page] = -1;
    }
}

}  // namespace compress
