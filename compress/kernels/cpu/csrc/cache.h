// The key-value cache and what attention over it is given.
#pragma once
#include <cstdint>

namespace compress {

constexpr int kPageTokens = 32;

enum class CacheType { float32, bfloat16, int8, int4 };

// Keys and values in pages of kPageTokens tokens. int8 and int4 are codes on a grid of each token and head, from its
// smallest value to its largest; in int4 a byte holds dimension d in its low half and d + dim / 2 in its high half.
struct Cache {
    void* keys;                           // [page][kv head][dim][kPageTokens]; int4: [dim / 2]
    void* values;                         // [page][kv head][kPageTokens][dim]; int4: [dim / 2]
    uint16_t *key_grids, *value_grids;    // [page][kv head][2][kPageTokens] bfloat16 bits: the step, and what code 0 is
    CacheType type;
    int64_t kv_heads, dim;

    bool has_grids() const { return type == CacheType::int8 || type == CacheType::int4; }
    // Bytes of the keys, or of the values, of one token and head, without their grid.
    int64_t head_bytes() const {
        return type == CacheType::float32 ? 4 * dim : type == CacheType::bfloat16 ? 2 * dim
               : type == CacheType::int8  ? dim
                                          : dim / 2;
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
