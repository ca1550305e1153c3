// The key-value cache and what attention over it is given.
#pragma once
#include <cstdint>

namespace compress {

constexpr int kPageTokens = 32;

constexpr int kFloatBlock = 16;  // dimensions of nvfp4 that share a scale

enum class CacheType { float32, bfloat16, fp8, int8, nvfp4, int4 };

// Keys and values in pages of kPageTokens tokens. int8 and int4 are codes on a grid of each token and head, from its
// smallest value to its largest. fp8 is E4M3 times one scale of all keys, or values, of a layer. nvfp4 is E2M1, a scale
// in E4M3 for every kFloatBlock dimensions, and a number of each token and head. Where a byte holds two codes, those
// are dimension d in its low half and d + dim / 2 in its high half. Scales of blocks lie behind the codes of a page and
// head, as [dim / kFloatBlock][kPageTokens] for keys and the other way round for values.
struct Cache {
    void* keys;                         // [page][kv head][dim or dim / 2][kPageTokens]
    void* values;                       // [page][kv head][kPageTokens][dim or dim / 2]
    uint16_t *key_grids, *value_grids;  // [page][kv head][grids()][kPageTokens] bfloat16 bits: the step, what code 0 is
    CacheType type;
    int64_t kv_heads, dim;
    float key_scale, value_scale;  // of fp8; else 1

    // Numbers of a token and head beside its codes.
    int64_t grids() const {
        return type == CacheType::int8 || type == CacheType::int4 ? 2 : type == CacheType::nvfp4 ? 1 : 0;
    }
    // Bytes of the keys, or of the values, of one token and head, without their grid.
    int64_t head_bytes() const {
        switch (type) {
            case CacheType::float32: return 4 * dim;
            case CacheType::bfloat16: return 2 * dim;
            case CacheType::fp8:
            case CacheType::int8: return dim;
            case CacheType::nvfp4: return dim / 2 + dim / kFloatBlock;
            default: return dim / 2;
        }
    }
};

// Tokens at consecutive positions of one sequence, whose keys and values are in the cache.
struct PagedArgs {
    const float* q;  // (tokens, heads * dim)
    int64_t q_stride, out_stride;
    float* out;            // (tokens, heads * dim), written
    const int32_t* pages;  // of the sequence
    Cache cache;
    int64_t heads, tokens, position;  // position: of the first token
    int64_t window;                   // positions that a token sees, its own among them
    float scale, cap;                 // a score s becomes cap * tanh(s / cap) where cap is not 0
};

}  // namespace compress
