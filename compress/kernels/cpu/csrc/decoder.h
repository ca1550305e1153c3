// A decoder: what turns tokens into logits in one call.
//
// Every layer is attention and a gated feed-forward part, each behind a norm and added to what went in. What families
// differ in is data: norms of heads and of outputs, capped scores, windows, rotations, and mixtures of experts.
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
    int64_t rotary;  // numbers at the beginning of a head that are turned, even, at most dim
    float epsilon, embedding_scale, attention_scale;
    float attention_cap, logit_cap;  // 0: none
    bool gelu;                       // the gate's activation is GELU in its form with a tanh, else SiLU
    int64_t pages;                   // of kPageTokens tokens, shared by all sequences
};

typedef std::shared_ptr<PackedLinear> Weight;

// (vocabulary, hidden): codes, of which a row is decoded when it is looked up, or else `dense`, bfloat16 bits or float32,
// which stays where it is.
struct Embedding {
    Weight packed;
    const void* dense;
    bool bfloat16;
};

struct Rotation {
    std::vector<float> frequencies;  // (rotary / 2)
    float factor;                    // what cosines and sines are multiplied by
};

struct FeedForward {
    Weight gate, up, down;
};

struct DecoderLayer {
    Weight q, k, v, o;
    std::vector<FeedForward> experts;  // one, or those that `router` chooses among
    Weight router;                     // (experts, hidden), or null
    int64_t chosen;                    // experts of a token
    bool renormalise;                  // their shares are made to add to one
    std::vector<float> attention_norm, mlp_norm;          // (hidden)
    std::vector<float> q_norm, k_norm;                    // (dim), or empty
    std::vector<float> attention_out_norm, mlp_out_norm;  // (hidden), or empty; not over a router
    int64_t window, rotation;                             // rotation: the one of context 0
    CacheType cache;
    float key_scale, value_scale;  // of fp8; else 1
    int64_t open_at;               // of int2: where the layer begins in a place for an open page
    Buffer keys, values, key_grids, value_grids;
};

// Tokens in any mixture of sequences; those of one that follow each other are best side by side. All are in range.
struct Step {
    const int32_t *tokens, *positions, *sequences;  // (count)
    int64_t count;
    const int32_t* tables;  // (sequences, table_width): each sequence's pages in order
    int64_t table_width;
    const int32_t* contexts;  // (sequences): how many rotations behind its layer's each takes, 0 mostly
    const int32_t* rows;  // (row_count): the tokens whose logits are wanted
    int64_t row_count;
    float* logits;  // (row_count, vocabulary), written
    int threads;
    bool eight_bit;  // inputs of packed linears in 8 bits
};

class Decoder {
public:
    const DecoderConfig config;
    const int64_t rotations;

    Decoder(const DecoderConfig&, Embedding embedding, std::vector<Rotation> rotations, std::vector<float> final_norm,
            Weight head);
    void add(DecoderLayer layer);
    // Another cache for a layer; what it held is lost, and what int2 held of open pages in any layer.
    void keep(int64_t layer, CacheType type, float key_scale, float value_scale);
    int64_t layers() const { return int64_t(layers_.size()); }
    // What every layer has a rotation for.
    int64_t contexts() const;
    // Throws std::invalid_argument for a token within a page of int2 that was full, or was not begun: such a page has to
    // be computed again from its first token on.
    void step(const Step&);
    // Of the keys and values of one token in all layers, in a page that is full.
    int64_t cache_bytes() const;
    // What a page takes in all layers, beyond that, until it is full.
    int64_t open_page_bytes() const;

private:
    struct Product {
        const Linear* linear;
        float* out;
        int64_t out_stride;
        bool add;
        int64_t first, tokens;  // the rows of x that it takes
    };
    struct Run {  // tokens at consecutive positions of one sequence
        int64_t first, count;
    };
    struct Work;  // one step's memory and its shape

    void allocate(DecoderLayer&) const;
    void allocate_places();
    std::vector<int32_t> open_pages(const Step&);
    void close_pages(const Work&, const DecoderLayer&);
    void give_back(const std::vector<int32_t>& pages);
    Cache cache_of(const DecoderLayer&) const;
    void embed(Work&, int64_t token) const;
    void attend(Work&, const DecoderLayer&);
    void feed_forward(Work&, const DecoderLayer&);
    void mix_experts(Work&, const DecoderLayer&);
    void add_branch(Work&, const std::vector<float>& norm);
    template <typename Prepare>
    void multiply(Work&, float* x, int64_t columns, int64_t rows, const std::vector<Product>&, Prepare prepare,
                  int64_t block = 0);

    const Embedding embedding_;
    const std::vector<Rotation> rotations_;
    const std::vector<float> final_norm_;
    Weight head_;
    std::vector<DecoderLayer> layers_;
    Buffer memory_;  // of steps, kept between them
    int64_t memory_bytes_ = 0;
    Buffer open_;  // [place][layer of int2][keys, values][kv head], as pages of bfloat16
    int64_t open_stride_ = 0;           // numbers in a place; 0 without int2
    std::vector<int32_t> places_;       // by page: the place of an open one; -1
    std::vector<int32_t> free_places_;  // a heap: the lowest first, so that memory is touched only as it is needed
    std::mutex busy_;
};

}  // namespace compress
