// One step's memory, and the products of a step. For the decoder's own files.
#pragma once
#include <algorithm>
#include <vector>

#include "decoder.h"
#include "isa.h"
#include "pool.h"
#include "scalars.h"

namespace compress {

constexpr int64_t kFewTokens = 4;           // fewer are not worth dealing out
constexpr int64_t kSmallProduct = 1 << 15;  // multiplications likewise
constexpr int64_t kFeedTokens = 144;        // that pass a feed-forward part together: what it holds stays in a cache

// Calls work(token) for each; on several threads where there are enough.
template <typename Work>
void for_tokens(int64_t count, int threads, Work&& work) {
    Pool::shared().run(count, count < kFewTokens ? 1 : threads, [&](int64_t token, int) { work(token); });
}

struct Decoder::Work {
    const Step& step;
    const Kernels& kernels;
    std::vector<int32_t> filled;  // pages that this step makes full, where one is open until then
    std::vector<Run> runs{};
    // branch: what is normed before it is added to hidden, or what experts give; routed: their inputs, one row for each
    // token and expert; router: (tokens, experts) of the layer.
    float *hidden = nullptr, *x = nullptr, *q = nullptr, *k = nullptr, *v = nullptr, *gate = nullptr, *up = nullptr;
    float *branch = nullptr, *routed = nullptr, *router = nullptr, *cosine = nullptr, *sine = nullptr, *scratch = nullptr;
    int64_t width = 0, scratch_floats = 0;  // width: of a row of x and of routed
    Quantized quantized{};                  // memory for the widest row in blocks of kChunk

    void activate(bool gelu, const float* gate_row, const float* up_row, int64_t count, float* out) const {
        (gelu ? kernels.geglu : kernels.swiglu)(gate_row, up_row, count, out);
    }
};

// x (rows, columns), rows `width` apart, times several weights. `prepare(row)` fills a row of x beforehand. block: the
// inputs that share a scale in 8 bits where that does not follow from the products alone. Where a weight's format rounds
// inputs, so does that of every weight which takes the same rows, and x holds the rounded values afterwards.
template <typename Prepare>
void Decoder::multiply(Work& w, float* x, int64_t columns, int64_t rows, const std::vector<Product>& products,
                       Prepare prepare, int64_t block) {
    const int threads = w.step.threads;
    Quantized quantized = w.quantized;
    bool eight_bit = false;
    quantized.tokens = rows;
    quantized.block = block;
    int64_t width = 0;
    for (const Product& p : products) {
        if (!w.step.eight_bit || !p.linear->takes_eight_bit()) continue;
        quantized.block = quantized.block ? std::min(quantized.block, p.linear->block()) : p.linear->block();
        width = std::max(width, p.linear->padded);
        eight_bit = true;
    }
    if (eight_bit) quantized.blocks = ceil_div(width, quantized.block);
    for_tokens(rows, threads, [&](int64_t row) {
        prepare(row);
        InputFormat format{};
        for (const Product& p : products)
            if (row >= p.first && row < p.first + p.tokens) format = p.linear->inputs;
        const bool rounded = format.kind != Rounding::none && !(eight_bit && format.integers());
        if (rounded) w.kernels.round_inputs(x + row * w.width, columns, format);
        Quantized mine = quantized;
        mine.inputs = format;
        if (eight_bit) w.kernels.quantize_inputs(x + row * w.width, columns, row, mine);
    });

    std::vector<int64_t> ends;
    int64_t tasks = 0, size = 0;
    for (const Product& p : products) {
        ends.push_back(tasks += ceil_div(p.linear->strips(), kStripsTogether));
        size += p.linear->rows * p.linear->columns * p.tokens;
    }
    Pool::shared().run(tasks, size < kSmallProduct ? 1 : threads, [&](int64_t task, int thread) {
        const size_t which = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        const Product& p = products[which];
        const int64_t first = (task - (which ? ends[which - 1] : 0)) * kStripsTogether;
        const ProductArgs args{p.linear, x + p.first * w.width, w.width, quantized.from(p.first),
                               w.step.eight_bit && p.linear->takes_eight_bit(), p.out, p.out_stride, p.tokens, p.add};
        w.kernels.product_strips(args, first, std::min<int64_t>(kStripsTogether, p.linear->strips() - first),
                                 w.scratch + thread * w.scratch_floats);
    });
}

}  // namespace compress
