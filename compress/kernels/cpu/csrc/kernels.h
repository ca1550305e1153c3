// The kernels' arguments, and their compiled versions, one per instruction set.
//
// A kernel works on one tile of rows with scratch memory of its own; the caller deals tiles out to threads. What a
// tile computes depends on nothing outside it, so neither the number of threads nor their order can change a bit.
#pragma once
#include <cstdint>

#include "cache.h"
#include "linear.h"

namespace compress {

constexpr int kTileRows = 32;     // rows of a tile: a multiple of every vector length
constexpr int kColumnChunk = 64;  // columns handled between two trailing updates

// Affine quantisation of a weight (out, in): value = (code - zero_point) * scale.
struct Grid {
    const float* scale;              // (out, groups)
    const float* zero_point;         // (out, groups)
    const int32_t* group_of_column;  // (in)
    int64_t groups;
    float qmin, qmax;
};

struct GptqArgs {
    const float* weight;  // (out, in)
    const float* upper;   // (in, in)
    Grid grid;
    const int8_t* pruned;  // (out, in), 1 where a weight is and stays zero; null where none is
    int8_t* codes;         // (out, in), written
    double* loss;          // (out), written
    int64_t rows, columns;
};

struct DescentArgs {
    float* gradient;       // (out, in), updated
    const float* hessian;  // (in, in)
    Grid grid;
    const int8_t* pruned;  // (out, in), 1 where a code stays at its zero point; null where none does
    int8_t* codes;         // (out, in), updated
    int64_t rows, columns;
    int sweeps;
};

// Candidate column scales for rounding to nearest. importance[k][c] is what a squared error in column c of the scaled
// weight counts under candidate k.
struct RoundingArgs {
    const float* weight;      // (out, in)
    const float* scales;      // (candidates, in)
    const float* importance;  // (candidates, in)
    const float* shares;      // (share_count), the shares of a group's range to try
    double* loss;             // (out, candidates), written
    int64_t rows, columns, candidates, share_count, group_size;
    float levels;  // 2^bits - 1
    bool symmetric;
};

// Candidate ranges for the grid of every group of a row: shares of the whole range, then `offsets` around the best of
// them. Symmetric grids are tried with both signs of their scale.
struct SearchArgs {
    const float* weight;      // (out, in)
    const float* importance;  // (groups, group_size, group_size) symmetric, by which an error counts; null: squared
    const float* shares;      // (share_count)
    const float* offsets;     // (offset_count)
    float *share, *sign;      // (out, groups), written: of the best candidate
    int64_t rows, columns, share_count, offset_count, group_size;
    float levels;  // 2^bits - 1
    bool symmetric;
    ScaleType scale_type;  // scales are rounded to it
    float largest;         // what the type holds, a little reserved for rounding up
};

// out[first:last] += (a^T b)[first:last]. Where only the upper triangle is wanted, of what lies below it some may stay
// as it was; nothing left of column `first` changes.
struct MomentArgs {
    const void *a, *b;  // (tokens, width), bfloat16 bits or float32
    bool bfloat16;
    float* out;  // (width, width), updated
    int64_t tokens, width, first, last;
    bool upper;
};

// Causal attention: softmax(scale * q k^T) v over the tokens up to each query. All contiguous, all bfloat16 bits or all
// float32; query head h reads key and value head h / (heads / kv_heads).
struct AttentionArgs {
    const void *q, *k, *v;  // (batch, heads, tokens, dim); k and v (batch, kv_heads, tokens, dim)
    void* out;              // (batch, tokens, heads, dim), written
    bool bfloat16;
    int64_t batch, heads, kv_heads, tokens, dim;
    float scale;
};

// One block of columns of SparseGPT. With a group, the `drop` least of each `group` columns are chosen on the way.
struct SparseArgs {
    float* weight;       // (out, in), updated: zero where pruned
    const float* upper;  // (in, in)
    int8_t* pruned;      // (out, in), 1 where a weight goes; read where group is 0, else written
    float* errors;       // (out, in), written: what later columns are corrected by, through their part of U
    int64_t rows, columns, group, drop;
};

// One set of kernels; each *_scratch says how many floats of scratch memory a call of the tile function needs.
struct Kernels {
    const char* name;
    int lanes;
    int64_t (*gptq_scratch)(const GptqArgs&);
    void (*gptq_tile)(const GptqArgs&, int64_t first_row, float* scratch);
    int64_t (*descent_scratch)(const DescentArgs&);
    int64_t (*descent_tile)(const DescentArgs&, int64_t first_row, float* scratch);  // -> codes changed
    int64_t (*rounding_scratch)(const RoundingArgs&);
    void (*rounding_tile)(const RoundingArgs&, int64_t first_row, float* scratch);
    int64_t (*search_scratch)(const SearchArgs&);
    void (*search_tile)(const SearchArgs&, int64_t first_row, float* scratch);
    int64_t (*moment_scratch)(const MomentArgs&);
    void (*moment_panel)(const MomentArgs&, float* scratch);
    int64_t (*sparse_scratch)(const SparseArgs&);
    void (*sparse_tile)(const SparseArgs&, int64_t first_row, float* scratch);
    int64_t (*attention_scratch)(const AttentionArgs&);
    void (*attention_head)(const AttentionArgs&, int64_t index, float* scratch);  // index: batch * kv_heads + kv head
    int64_t (*product_scratch)(int64_t tokens);
    void (*product_strips)(const ProductArgs&, int64_t first, int64_t strips, float* scratch);
    void (*quantize_inputs)(const float* x, int64_t columns, int64_t token, const Quantized& out);
    void (*round_inputs)(float* x, int64_t columns, const InputFormat& format);
    void (*rms_norm)(const float* x, const float* weight, int64_t count, float epsilon, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
    void (*geglu)(const float* gate, const float* up, int64_t count, float* out);
    void (*soft_cap)(float* x, int64_t count, float cap);
    void (*rotate)(float* head, const float* cosine, const float* sine, int64_t dim);
    void (*append)(const Cache&, const float* k, const float* v, int64_t page, int64_t slot);
    void (*close_page)(const Cache&, int64_t page, int64_t kv_head);
    int64_t (*paged_scratch)(const PagedArgs&);
    int64_t (*paged_tiles)(const PagedArgs&);
    void (*paged_attention)(const PagedArgs&, int64_t tile, float* scratch);
};

#define COMPRESS_DECLARE_KERNELS(isa)                                    \
    namespace isa {                                                      \
    int64_t gptq_scratch(const GptqArgs&);                               \
    void gptq_tile(const GptqArgs&, int64_t, float*);                    \
    int64_t descent_scratch(const DescentArgs&);                         \
    int64_t descent_tile(const DescentArgs&, int64_t, float*);           \
    int64_t rounding_scratch(const RoundingArgs&);                       \
    void rounding_tile(const RoundingArgs&, int64_t, float*);            \
    int64_t search_scratch(const SearchArgs&);                           \
    void search_tile(const SearchArgs&, int64_t, float*);                \
    int64_t moment_scratch(const MomentArgs&);                           \
    void moment_panel(const MomentArgs&, float*);                        \
    int64_t sparse_scratch(const SparseArgs&);                           \
    void sparse_tile(const SparseArgs&, int64_t, float*);                \
    int64_t attention_scratch(const AttentionArgs&);                     \
    void attention_head(const AttentionArgs&, int64_t, float*);          \
    int64_t product_scratch(int64_t);                                    \
    void product_strips(const ProductArgs&, int64_t, int64_t, float*);   \
    void quantize_inputs(const float*, int64_t, int64_t, const Quantized&); \
    void round_inputs(float*, int64_t, const InputFormat&);              \
    void rms_norm(const float*, const float*, int64_t, float, float*);   \
    void swiglu(const float*, const float*, int64_t, float*);            \
    void geglu(const float*, const float*, int64_t, float*);             \
    void soft_cap(float*, int64_t, float);                               \
    void rotate(float*, const float*, const float*, int64_t);            \
    void append(const Cache&, const float*, const float*, int64_t, int64_t); \
    void close_page(const Cache&, int64_t, int64_t);                     \
    int64_t paged_scratch(const PagedArgs&);                             \
    int64_t paged_tiles(const PagedArgs&);                               \
    void paged_attention(const PagedArgs&, int64_t, float*);             \
    }
COMPRESS_DECLARE_KERNELS(portable)
COMPRESS_DECLARE_KERNELS(avx2)
COMPRESS_DECLARE_KERNELS(avx512)
COMPRESS_DECLARE_KERNELS(avx512vnni)
COMPRESS_DECLARE_KERNELS(avx512bf16)

}  // namespace compress
