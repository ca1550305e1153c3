#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "pool.h"

namespace compress {
namespace {

constexpr int64_t kFewTokens = 4;            // fewer are not worth dealing out
constexpr int64_t kSmallProduct = 1 << 15;   // multiplications likewise

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Calls work(token) for each; on several threads where there are enough.
template <typename Work>
void for_tokens(int64_t count, int threads, Work&& work) {
    Pool::shared().run(count, count < kFewTokens ? 1 : threads, [&](int64_t token, int) { work(token); });
}

}  // namespace

struct Decoder::Work {
    const Step& step;
    const Kernels& kernels;
    float *hidden, *x, *q, *k, *v, *gate, *up, *cosine, *sine, *scratch;
    int64_t width, scratch_floats;  // width: of a row of x
    Quantized quantized;            // memory for the widest row in blocks of kChunk
    std::vector<Run> runs;
};

Decoder::Decoder(const DecoderConfig& c, Embedding embedding, const float* frequencies, const float* final_norm,
                 Weight head)
    : config(c), embedding_(std::move(embedding)), frequencies_(frequencies, frequencies + c.dim / 2),
      final_norm_(final_norm, final_norm + c.hidden), head_(std::move(head)) {}

void Decoder::add(DecoderLayer layer) {
    const Cache cache = cache_of(layer);
    const int64_t slots = config.pages * kPageTokens * config.kv_heads;
    layer.keys = Buffer(slots * cache.head_bytes());
    layer.values = Buffer(slots * cache.head_bytes());
    if (cache.has_grids()) {
        layer.key_grids = Buffer(slots * 2 * sizeof(uint16_t));
        layer.value_grids = Buffer(slots * 2 * sizeof(uint16_t));
    }
    layers_.push_back(std::move(layer));
}

Cache Decoder::cache_of(const DecoderLayer& layer) const {
    return {layer.keys.data(), layer.values.data(), reinterpret_cast<uint16_t*>(layer.key_grids.data()),
            reinterpret_cast<uint16_t*>(layer.value_grids.data()), config.cache, config.kv_heads, config.dim};
}

int64_t Decoder::cache_bytes() const {
    const Cache cache{nullptr, nullptr, nullptr, nullptr, config.cache, config.kv_heads, config.dim};
    return 2 * int64_t(layers_.size()) * config.kv_heads * (cache.head_bytes() + (cache.has_grids() ? 4 : 0));
}

void Decoder::embed(Work& w, int64_t token) const {
    const int64_t n = config.hidden, row = w.step.tokens[token] * n, half = config.dim / 2;
    float* out = w.hidden + token * n;
    if (embedding_.packed)
        embedding_.packed->decode_row(w.step.tokens[token], out);
    else if (embedding_.bfloat16)
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t word = uint32_t(static_cast<const uint16_t*>(embedding_.dense)[row + i]) << 16;
            std::memcpy(out + i, &word, sizeof word);
        }
    else
        std::memcpy(out, static_cast<const float*>(embedding_.dense) + row, n * sizeof(float));
    for (int64_t i = 0; i < half; ++i) {
        const float angle = float(w.step.positions[token]) * frequencies_[i];
        w.cosine[token * half + i] = std::cos(angle) * config.rope_factor;
        w.sine[token * half + i] = std::sin(angle) * config.rope_factor;
    }
}

// x (tokens, columns), rows `width` apart, times several weights. `prepare(token)` fills a row of x beforehand.
template <typename Prepare>
void Decoder::multiply(Work& w, const float* x, int64_t columns, int64_t tokens, const std::vector<Product>& products,
                       Prepare prepare) {
    const int threads = w.step.threads;
    Quantized quantized = w.quantized;
    bool eight_bit = false;
    quantized.block = quantized.width = 0;
    for (const Product& p : products) {
        if (!w.step.eight_bit || !p.linear->packed()) continue;
        quantized.block = eight_bit ? std::min(quantized.block, p.linear->block()) : p.linear->block();
        quantized.width = std::max(quantized.width, p.linear->padded);
        eight_bit = true;
    }
    if (eight_bit) {
        quantized.width = rounded_up(quantized.width, quantized.block);
        quantized.blocks = quantized.width / quantized.block;
    }
    for_tokens(tokens, threads, [&](int64_t token) {
        prepare(token);
        if (eight_bit) w.kernels.quantize_inputs(x + token * w.width, columns, token, quantized);
    });

    std::vector<int64_t> ends;
    int64_t tasks = 0, size = 0;
    for (const Product& p : products) {
        ends.push_back(tasks += (p.linear->strips() + kStripsTogether - 1) / kStripsTogether);
        size += p.linear->rows * p.linear->columns * tokens;
    }
    Pool::shared().run(tasks, size < kSmallProduct ? 1 : threads, [&](int64_t task, int thread) {
        const size_t which = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        const Product& p = products[which];
        const int64_t first = (task - (which ? ends[which - 1] : 0)) * kStripsTogether;
        const ProductArgs args{p.linear, x, w.width, quantized, w.step.eight_bit && p.linear->packed(),
                               p.out, p.out_stride, tokens, p.add};
        w.kernels.product_strips(args, first, std::min<int64_t>(kStripsTogether, p.linear->strips() - first),
                                 w.scratch + thread * w.scratch_floats);
    });
}

void Decoder::attend(Work& w, const DecoderLayer& layer) {
    const Step& step = w.step;
    const int64_t dim = config.dim, q_width = config.heads * dim, kv_width = config.kv_heads * dim;
    const Cache cache = cache_of(layer);
    for_tokens(step.count, step.threads, [&](int64_t t) {
        const auto turn = [&](float* head, const std::vector<float>& norm) {
            if (!norm.empty()) w.kernels.rms_norm(head, norm.data(), dim, config.epsilon, head);
            w.kernels.rotate(head, w.cosine + t * dim / 2, w.sine + t * dim / 2, dim);
        };
        for (int64_t h = 0; h < config.heads; ++h) turn(w.q + t * q_width + h * dim, layer.q_norm);
        for (int64_t h = 0; h < config.kv_heads; ++h) turn(w.k + t * kv_width + h * dim, layer.k_norm);
        const int64_t page = step.tables[step.sequences[t] * step.table_width + step.positions[t] / kPageTokens];
        w.kernels.append(cache, w.k + t * kv_width, w.v + t * kv_width, page, step.positions[t] % kPageTokens);
    });
    std::vector<PagedArgs> runs;
    std::vector<int64_t> ends;
    int64_t tasks = 0, size = 0;
    for (const Run& run : w.runs) {
        const int64_t position = step.positions[run.first];
        runs.push_back({w.q + run.first * q_width, q_width, w.width, w.x + run.first * w.width,
                        step.tables + step.sequences[run.first] * step.table_width, cache, config.heads, run.count,
                        position, layer.window, 1 / std::sqrt(float(dim))});
        ends.push_back(tasks += w.kernels.paged_tiles(runs.back()));
        size += run.count * (position + run.count) * q_width;
    }
    Pool::shared().run(tasks, size < kSmallProduct ? 1 : step.threads, [&](int64_t task, int thread) {
        const size_t which = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        w.kernels.paged_attention(runs[which], task - (which ? ends[which - 1] : 0),
                                  w.scratch + thread * w.scratch_floats);
    });
}

void Decoder::step(const Step& step) {
    std::lock_guard<std::mutex> lock(busy_);
    const int64_t n = step.count, hidden = config.hidden, q_width = config.heads * config.dim;
    const int64_t kv_width = config.kv_heads * config.dim, half = config.dim / 2;
    int64_t ffn = 0;
    for (const DecoderLayer& layer : layers_) ffn = std::max(ffn, layer.gate->view.rows);
    Work w{step, active_kernels(), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    w.width = rounded_up(std::max({hidden, q_width, ffn}), 128);
    PagedArgs shape{};
    shape.cache.dim = config.dim;
    const int64_t rows = std::max(n, step.row_count);
    w.scratch_floats = rounded_up(std::max(w.kernels.product_scratch(rows), w.kernels.paged_scratch(shape)), 16) + 16;

    const int64_t sizes[] = {n * hidden, rows * w.width, n * q_width, n * kv_width, n * kv_width, n * ffn, n * ffn,
                             n * half, n * half, rows * w.width / 4, rows * w.width / kChunk, rows * w.width / kChunk,
                             step.threads * w.scratch_floats};
    float** const parts[] = {&w.hidden, &w.x, &w.q, &w.k, &w.v, &w.gate, &w.up, &w.cosine, &w.sine,
                             reinterpret_cast<float**>(&w.quantized.q), &w.quantized.scale,
                             reinterpret_cast<float**>(&w.quantized.sum), &w.scratch};
    int64_t total = 16;
    for (const int64_t size : sizes) total += rounded_up(size, 16);
    if (int64_t(memory_.size()) < total) memory_.resize(total);
    float* next = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / sizeof(float);
    for (size_t i = 0; i < std::size(sizes); ++i) *parts[i] = next, next += rounded_up(sizes[i], 16);

    for (int64_t t = 0; t < n; ++t) {
        const bool follows = t > 0 && step.sequences[t] == step.sequences[t - 1] &&
                             step.positions[t] == step.positions[t - 1] + 1;
        if (!follows) w.runs.push_back({t, 0});
        ++w.runs.back().count;
    }
    for_tokens(n, step.threads, [&](int64_t t) { embed(w, t); });
    const auto nothing = [](int64_t) {};
    const auto normed = [&](const std::vector<float>& norm) {
        return [&](int64_t t) {
            w.kernels.rms_norm(w.hidden + t * hidden, norm.data(), hidden, config.epsilon, w.x + t * w.width);
        };
    };
    for (const DecoderLayer& layer : layers_) {
        multiply(w, w.x, hidden, n,
                 {{&layer.q->view, w.q, q_width, false},
                  {&layer.k->view, w.k, kv_width, false},
                  {&layer.v->view, w.v, kv_width, false}},
                 normed(layer.attention_norm));
        attend(w, layer);
        multiply(w, w.x, q_width, n, {{&layer.o->view, w.hidden, hidden, true}}, nothing);
        const int64_t inner = layer.gate->view.rows;
        multiply(w, w.x, hidden, n, {{&layer.gate->view, w.gate, inner, false}, {&layer.up->view, w.up, inner, false}},
                 normed(layer.mlp_norm));
        multiply(w, w.x, inner, n, {{&layer.down->view, w.hidden, hidden, true}}, [&](int64_t t) {
            w.kernels.swiglu(w.gate + t * inner, w.up + t * inner, inner, w.x + t * w.width);
        });
    }
    multiply(w, w.x, hidden, step.row_count, {{&head_->view, step.logits, config.vocabulary, false}}, [&](int64_t r) {
        w.kernels.rms_norm(w.hidden + step.rows[r] * hidden, final_norm_.data(), hidden, config.epsilon,
                           w.x + r * w.width);
    });
}

}  // namespace compress
