// Keys and values as the cache keeps them: what is written of a token, and what a page becomes when it is full.
#include "bfloat16.h"
#include "kernels.h"
#include "small_floats.h"

namespace compress {
namespace ISA {
namespace {

// One token and head of the keys or the values: `stride` elements between dimensions.
template <typename T>
inline void put_plain(T* memory, int64_t stride, const float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d)
        if constexpr (sizeof(T) == 2)
            memory[d * stride] = narrowed(x[d]);
        else
            memory[d * stride] = x[d];
}

inline uint16_t upper_half(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return uint16_t(word >> 16);
}
struct Grid {
    uint16_t step, low;  // bfloat16 bits, rounded so that the grid covers the values
    float from, inverse;
};

// Of `levels` steps over the values. What is not finite makes the step NaN, and so shows in the output.
inline Grid grid_of(const float* x, int64_t dim, float levels) {
    float low = x[0], high = x[0], poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
        low = x[d] < low ? x[d] : low;
        high = x[d] > high ? x[d] : high;
        poison += x[d] * 0;
    }
    Grid grid;
    grid.low = upper_half(low);
    if (widened(grid.low) > low) ++grid.low;  // only of negative numbers: one further from zero
    grid.from = widened(grid.low);
    const float step = (high - grid.from) / levels;
    grid.step = upper_half(step + poison);
    if (widened(grid.step) < step) ++grid.step;
    const float rounded = widened(grid.step);
    grid.inverse = rounded > 0 ? 1 / rounded : 0;
    return grid;
}

inline uint8_t code_of(const Grid& grid, float x, int levels) {
    const float code = (x - grid.from) * grid.inverse + 0.5f;
    return code > 0 ? code < float(levels) ? uint8_t(code) : uint8_t(levels) : 0;
}

inline void put_codes(uint8_t* memory, int64_t stride, uint16_t* grids, int64_t slot, const float* x, int64_t dim,
                      bool nibbles) {
    const int levels = nibbles ? 15 : 255;
    const Grid grid = grid_of(x, dim, float(levels));
    grids[slot] = grid.step;
    grids[kPageTokens + slot] = grid.low;
    const int64_t half = dim / 2;
    if (!nibbles)
        for (int64_t d = 0; d < dim; ++d) memory[d * stride] = code_of(grid, x[d], levels);
    else
        for (int64_t d = 0; d < half; ++d)
            memory[d * stride] =
                uint8_t(code_of(grid, x[d], levels) | code_of(grid, x[d + half], levels) << 4);
}

// Codes and scales of blocks of one token and head; `stride` elements between dimensions and between blocks.
inline void put_nvfp4(uint8_t* codes, uint8_t* scales, int64_t stride, uint16_t* grids, int64_t slot, const float* x,
                      int64_t dim) {
    float high = 0, poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const float size = x[d] < 0 ? -x[d] : x[d];
        high = size > high ? size : high;
        poison += x[d] * 0;
    }
    const float least = high / (kLargestE2m1 * kLargestE4m3);
    uint16_t step = upper_half(least + poison);
    if (widened(step) < least) ++step;
    grids[slot] = step;
    const float token = widened(step), inverse = token > 0 ? 1 / token : 0;
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; ++d) codes[d * stride] = 0;
    for (int64_t block = 0; block < dim; block += kFloatBlock) {
        float most = 0;
        for (int64_t d = block; d < block + kFloatBlock; ++d) {
            const float size = x[d] < 0 ? -x[d] : x[d];
            most = size > most ? size : most;
        }
        const uint8_t scale = e4m3_of(most * inverse / kLargestE2m1);
        scales[block / kFloatBlock * stride] = scale;
        const float whole = from_e4m3(scale) * token, each = whole > 0 ? 1 / whole : 0;
        for (int64_t d = block; d < block + kFloatBlock; ++d)
            codes[d % half * stride] |= uint8_t(e2m1_of(x[d] * each) << (d < half ? 0 : 4));
    }
}

inline void put_fp8(uint8_t* memory, int64_t stride, const float* x, int64_t dim, float scale) {
    for (int64_t d = 0; d < dim; ++d) memory[d * stride] = e4m3_of(x[d] / scale);
}

// Up to 32 numbers on a grid of their own.
inline void put_two_bits(const uint16_t* from, int64_t count, uint32_t* words, uint16_t* step, uint16_t* low) {
    float x[2 * kWordCodes] = {};
    for (int64_t i = 0; i < count; ++i) x[i] = widened(from[i]);
    const Grid grid = grid_of(x, count, 3);
    *step = grid.step, *low = grid.low;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t& word = words[i / kWordCodes];
        if (i % kWordCodes == 0) word = 0;
        word |= uint32_t(code_of(grid, x[i], 3)) << 2 * (i % kWordCodes);
    }
}

}  // namespace

// A token's keys and values (kv_heads, dim) into a slot of a page.
void append(const Cache& cache, const float* k, const float* v, int64_t page, int64_t slot) {
    const int64_t dim = cache.dim;
    for (int64_t h = 0; h < cache.kv_heads; ++h, k += dim, v += dim) {
        const int64_t head = page * cache.kv_heads + h;
        uint8_t* keys = static_cast<uint8_t*>(cache.keys) + head * cache.key_bytes();
        uint8_t* values = static_cast<uint8_t*>(cache.values) + head * cache.value_bytes();
        uint16_t *key_grid = cache.key_grids + head * cache.key_numbers();
        uint16_t *value_grid = cache.value_grids + head * cache.value_numbers();
        switch (cache.type) {
            case CacheType::float32:
                put_plain(reinterpret_cast<float*>(keys) + slot, kPageTokens, k, dim);
                put_plain(reinterpret_cast<float*>(values) + slot * dim, 1, v, dim);
                break;
            case CacheType::bfloat16:
                put_plain(reinterpret_cast<uint16_t*>(keys) + slot, kPageTokens, k, dim);
                put_plain(reinterpret_cast<uint16_t*>(values) + slot * dim, 1, v, dim);
                break;
            case CacheType::fp8:
                put_fp8(keys + slot, kPageTokens, k, dim, cache.key_scale);
                put_fp8(values + slot * dim, 1, v, dim, cache.value_scale);
                break;
            case CacheType::nvfp4: {
                const int64_t half = dim / 2, blocks = dim / kFloatBlock;
                put_nvfp4(keys + slot, keys + half * kPageTokens + slot, kPageTokens, key_grid, slot, k, dim);
                put_nvfp4(values + slot * half, values + half * kPageTokens + slot * blocks, 1, value_grid, slot, v, dim);
                break;
            }
            case CacheType::int8:
            case CacheType::int4: {
                const bool nibbles = cache.type == CacheType::int4;
                put_codes(keys + slot, kPageTokens, key_grid, slot, k, dim, nibbles);
                put_codes(values + slot * (nibbles ? dim / 2 : dim), 1, value_grid, slot, v, dim, nibbles);
                break;
            }
            case CacheType::int2: {
                const int64_t at = cache.open_at(page, h);
                put_plain(cache.open_keys + at + slot, kPageTokens, k, dim);
                put_plain(cache.open_values + at + slot * dim, 1, v, dim);
            }
        }
    }
}

// One head of an open page of int2, which is full, as codes; its place can be given away afterwards.
void close_page(const Cache& cache, int64_t page, int64_t h) {
    const int64_t dim = cache.dim, words = cache.words(), groups = cache.groups();
    const int64_t head = page * cache.kv_heads + h, at = cache.open_at(page, h);
    const uint16_t *keys = cache.open_keys + at, *values = cache.open_values + at;
    constexpr int64_t key_words = kPageTokens / kWordCodes;
    uint32_t* codes = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(cache.keys) + head * cache.key_bytes());
    uint16_t* grids = cache.key_grids + head * cache.key_numbers();
    for (int64_t d = 0; d < dim; ++d)
        put_two_bits(keys + d * kPageTokens, kPageTokens, codes + d * key_words, grids + d, grids + dim + d);
    codes = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(cache.values) + head * cache.value_bytes());
    grids = cache.value_grids + head * cache.value_numbers();
    for (int64_t t = 0; t < kPageTokens; ++t)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * kValueGroup, left = dim - begin;
            put_two_bits(values + t * dim + begin, left < kValueGroup ? left : kValueGroup,
                         codes + t * words + begin / kWordCodes, grids + t * groups + g,
                         grids + (kPageTokens + t) * groups + g);
        }
}

}  // namespace ISA
}  // namespace compress
