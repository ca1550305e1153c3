// A decoder of the Llama family: what turns tokens into logits in one call.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "packing.h"

namespace compress {

struct DecoderConfig {
    int64_t vocabulary, hidden, heads, kv_heads, dim;
    float epsilon, rope_factor;  // rope_factor: what the rotation's cosines and sines are multiplied by
    CacheType cache;
    int64_t pages;  // of kPageTokens tokens, shared by all sequences
};

typedef std::shared_ptr<PackedLinear> Weight;

// (vocabulary, hidden): codes, of which a row is decoded when it is looked up, or else `dense`, bfloat16 bits or float32,
// which stays where it is.
struct Embedding {
    Weight packed;
    const void* dense;
    bool bfloat16;
};

struct DecoderLayer {
    Weight q, k, v, o, gate, up, down;
    std::vector<float> attention_norm, mlp_norm;  // (hidden)
    std::vector<float> q_norm, k_norm;            // (dim), or empty
    int64_t window;
    Buffer keys, values, key_grids, value_grids;
};

// Tokens in any mixture of sequences; those of one that follow each other are best side by side. All are in range.
struct Step {
    const int32_t *tokens, *positions, *sequences;  // (count)
    int64_t count;
    const int32_t* tables;  // (sequences, table_width): each sequence's pages in order
    int64_t table_width;
    const int32_t* rows;  // (row_count): the tokens whose logits are wanted
    int64_t row_count;
    float* logits;  // (row_count, vocabulary), written
    int threads;
    bool eight_bit;  // inputs of packed linears in 8 bits
};

class Decoder {
public:
    const DecoderConfig config;

    // frequencies (dim / 2).
    Decoder(const DecoderConfig&, Embedding embedding, const float* frequencies, const float* final_norm, Weight head);
    void add(DecoderLayer layer);
    void step(const Step&);
    // Of the keys and values of one token in all layers.
    int64_t cache_bytes() const;

private:
    struct Product {
        const Linear* linear;
        float* out;
        int64_t out_stride;
        bool add;
    };
    struct Run {  // tokens at consecutive positions of one sequence
        int64_t first, count;
    };
    struct Work;  // one step's memory and its shape

    Cache cache_of(const DecoderLayer&) const;
    void embed(Work&, int64_t token) const;
    void attend(Work&, const DecoderLayer&);
    template <typename Prepare>
    void multiply(Work&, const float* x, int64_t columns, int64_t tokens, const std::vector<Product>&, Prepare prepare);

    const Embedding embedding_;
    std::vector<float> frequencies_, final_norm_;
    Weight head_;
    std::vector<DecoderLayer> layers_;
    std::vector<float> memory_;  // of steps, kept between them
    std::mutex busy_;
};

}  // namespace compress
