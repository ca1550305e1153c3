// The key-value cache and what attention over it is given.
#pragma once
#include <cstdint>

namespace compress {

constexpr int kPageTokens = 32;

constexpr int kFloatBlock = 16;  // dimensions of nvfp4 that share a scale
constexpr int kWordCodes = 16;   // codes of int2 in a word
constexpr int kValueGroup = 32;  // dimensions of a token's values that share a grid in int2

enum class CacheType { float32, bfloat16, fp8, int8, nvfp4, int4, int2 };

// Keys and values in pages of kPageTokens tokens. int8 and int4 are codes on a grid of each token and head, from its
// smallest value to its largest. fp8 is E4M3 times one scale of all keys, or values, of a layer. nvfp4 is E2M1, a scale
// in E4M3 for every kFloatBlock dimensions, and a number of each token and head. Where a byte holds two codes, those
// are dimension d in its low half and d + dim / 2 in its high half. Scales of blocks lie behind the codes of a page and
// head, as [dim / kFloatBlock][kPageTokens] for keys and the other way round for values.
//
// int2 has a grid for each channel of a page's keys, and one for kValueGroup values of a token (Liu et al., KIVI, 2024,
// arXiv:2402.02750); word by word, the first code lowest. A grid of keys needs all tokens of the page, so a page is
// open until it is full: its tokens are bfloat16, in a place of its own, and those of the same page see them so.
struct Cache {
    void* keys;                         // [page][kv head][dim or dim / 2][kPageTokens]; int2: [dim][2] words
    void* values;                       // [page][kv head][kPageTokens][dim or dim / 2]; int2: [kPageTokens][words()]
    uint16_t *key_grids, *value_grids;  // [page][kv head][numbers][kPageTokens] bfloat16 bits: the step, what code 0 is
                                        // int2: [2][dim] for keys, [2][kPageTokens][groups()] for values
    CacheType type;
    int64_t kv_heads, dim;
    float key_scale, value_scale;  // of fp8; else 1
    uint16_t *open_keys, *open_values;  // int2: [place][kv head], as a page of bfloat16, places `open_stride` apart
    int64_t open_stride;
    const int32_t* places;  // int2: of each open page

    int64_t words() const { return (dim + kWordCodes - 1) / kWordCodes; }
    int64_t groups() const { return (dim + kValueGroup - 1) / kValueGroup; }

    // Where an open page's head begins.
    int64_t open_at(int64_t page, int64_t head) const { return places[page] * open_stride + head * kPageTokens * dim; }

    // Of one page and head: bytes of the codes, and how many numbers are beside them.
    int64_t key_bytes() const { return type == CacheType::int2 ? dim * kPageTokens / 4 : kPageTokens * token_bytes(); }
    int64_t value_bytes() const { return type == CacheType::int2 ? kPageTokens * words() * 4 : key_bytes(); }
    int64_t key_numbers() const { return type == CacheType::int2 ? 2 * dim : kPageTokens * token_numbers(); }
    int64_t value_numbers() const { return type == CacheType::int2 ? 2 * kPageTokens * groups() : key_numbers(); }

private:
    int64_t token_numbers() const {
        return type == CacheType::int8 || type == CacheType::int4 ? 2 : type == CacheType::nvfp4 ? 1 : 0;
    }
    int64_t token_bytes() const {
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
