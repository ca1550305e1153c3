#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder_work.h"

namespace compress {

Decoder::Decoder(const DecoderConfig& c, Embedding embedding, std::vector<Rotation> rotations,
                 std::vector<float> final_norm, Weight head)
    : config(c), rotations(int64_t(rotations.size())), embedding_(std::move(embedding)),
      rotations_(std::move(rotations)), final_norm_(std::move(final_norm)), head_(std::move(head)) {}

void Decoder::add(DecoderLayer layer) {
    allocate(layer);
    layers_.push_back(std::move(layer));
}

void Decoder::embed(Work& w, int64_t token) const {
    const int64_t n = config.hidden, row = w.step.tokens[token] * n, half = config.rotary / 2;
    float* out = w.hidden + token * n;
    if (embedding_.packed)
        embedding_.packed->decode_row(w.step.tokens[token], out);
    else if (embedding_.bfloat16)
        for (int64_t i = 0; i < n; ++i) out[i] = widened(static_cast<const uint16_t*>(embedding_.dense)[row + i]);
    else
        std::memcpy(out, static_cast<const float*>(embedding_.dense) + row, n * sizeof(float));
    if (config.embedding_scale != 1)
        for (int64_t i = 0; i < n; ++i) out[i] *= config.embedding_scale;
    for (int64_t r = 0; r < rotations; ++r) {
        const int64_t at = (r * w.step.count + token) * half;
        for (int64_t i = 0; i < half; ++i) {
            const float angle = float(w.step.positions[token]) * rotations_[r].frequencies[i];
            w.cosine[at + i] = std::cos(angle) * rotations_[r].factor;
            w.sine[at + i] = std::sin(angle) * rotations_[r].factor;
        }
    }
}

void Decoder::attend(Work& w, const DecoderLayer& layer) {
    const Step& step = w.step;
    const int64_t dim = config.dim, q_width = config.heads * dim, kv_width = config.kv_heads * dim;
    const Cache cache = cache_of(layer);
    const int64_t half = config.rotary / 2;
    for_tokens(step.count, step.threads, [&](int64_t t) {
        const int64_t turned = ((layer.rotation + step.contexts[step.sequences[t]]) * step.count + t) * half;
        const auto turn = [&](float* head, const std::vector<float>& norm) {
            if (!norm.empty()) w.kernels.rms_norm(head, norm.data(), dim, config.epsilon, head);
            w.kernels.rotate(head, w.cosine + turned, w.sine + turned, config.rotary);
        };
        for (int64_t h = 0; h < config.heads; ++h) turn(w.q + t * q_width + h * dim, layer.q_norm);
        for (int64_t h = 0; h < config.kv_heads; ++h) turn(w.k + t * kv_width + h * dim, layer.k_norm);
        const int64_t page = step.tables[step.sequences[t] * step.table_width + step.positions[t] / kPageTokens];
        w.kernels.append(cache, w.k + t * kv_width, w.v + t * kv_width, page, step.positions[t] % kPageTokens);
    });
    close_pages(w, layer);
    std::vector<PagedArgs> runs;
    std::vector<int64_t> ends;
    int64_t tasks = 0, size = 0;
    for (const Run& run : w.runs) {
        const int64_t position = step.positions[run.first];
        runs.push_back({w.q + run.first * q_width, q_width, w.width, w.x + run.first * w.width,
                        step.tables + step.sequences[run.first] * step.table_width, cache, config.heads, run.count,
                        position, layer.window, config.attention_scale, config.attention_cap});
        ends.push_back(tasks += w.kernels.paged_tiles(runs.back()));
        size += run.count * (position + run.count) * q_width;
    }
    Pool::shared().run(tasks, size < kSmallProduct ? 1 : step.threads, [&](int64_t task, int thread) {
        const size_t which = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        w.kernels.paged_attention(runs[which], task - (which ? ends[which - 1] : 0),
                                  w.scratch + thread * w.scratch_floats);
    });
}

int64_t Decoder::contexts() const {
    int64_t last = 0;
    for (const DecoderLayer& layer : layers_) last = std::max(last, layer.rotation);
    return rotations - last;
}

void Decoder::step(const Step& step) {
    std::lock_guard<std::mutex> lock(busy_);
    const int64_t n = step.count, hidden = config.hidden, q_width = config.heads * config.dim;
    const int64_t kv_width = config.kv_heads * config.dim, half = config.rotary / 2;
    int64_t ffn = 0, inner = 0, routed = 0, experts = 0;  // inner: of all rows of one feed-forward part together
    bool branches = false;
    for (const DecoderLayer& layer : layers_) {
        const int64_t rows = layer.router ? n * layer.chosen : std::min(n, kFeedTokens), width = layer.experts[0].gate->view.rows;
        ffn = std::max(ffn, width), inner = std::max(inner, rows * width);
        branches = branches || !layer.attention_out_norm.empty() || !layer.mlp_out_norm.empty();
        if (layer.router) routed = std::max(routed, rows), experts = std::max<int64_t>(experts, layer.experts.size());
    }
    Work w{step, active_kernels(), open_pages(step)};
    w.width = rounded_up(std::max({hidden, q_width, ffn}), 128);
    PagedArgs shape{};
    shape.cache.dim = config.dim;
    const int64_t rows = std::max({n, step.row_count, routed});
    w.scratch_floats = rounded_up(
        std::max(w.kernels.product_scratch(std::max(n, step.row_count)), w.kernels.paged_scratch(shape)), 16) + 16;

    const auto lay_out = [&](auto place) {  // calls place(part, how many it holds) for every part of the step's memory
        place(w.hidden, n * hidden);
        place(w.x, std::max(n, step.row_count) * w.width);
        place(w.q, n * q_width);
        place(w.k, n * kv_width);
        place(w.v, n * kv_width);
        place(w.gate, inner);
        place(w.up, inner);
        place(w.branch, std::max(branches ? n : 0, routed) * hidden);
        place(w.routed, routed * w.width);
        place(w.router, n * experts);
        place(w.cosine, rotations * n * half);
        place(w.sine, rotations * n * half);
        place(w.quantized.q, rows * w.width);
        place(w.quantized.scale, rows * w.width / kChunk);
        place(w.quantized.sum, rows * w.width / kChunk);
        place(w.quantized.outliers, rows * w.width / 4);
        place(w.quantized.outlier_count, rows);
        place(w.scratch, step.threads * w.scratch_floats);
    };
    const auto bytes_of = [](auto* part, int64_t count) { return rounded_up(count * int64_t(sizeof *part), 64); };
    int64_t total = 0;
    lay_out([&](auto*& part, int64_t count) { total += bytes_of(part, count); });
    if (memory_bytes_ < total) memory_ = Buffer(), memory_ = Buffer(total), memory_bytes_ = total;
    uint8_t* next = memory_.data();
    lay_out([&](auto*& part, int64_t count) {
        part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
        next += bytes_of(part, count);
    });

    for (int64_t t = 0; t < n; ++t) {
        const bool follows = t > 0 && step.sequences[t] == step.sequences[t - 1] &&
                             step.positions[t] == step.positions[t - 1] + 1;
        if (!follows) w.runs.push_back({t, 0});
        ++w.runs.back().count;
    }
    for_tokens(n, step.threads, [&](int64_t t) { embed(w, t); });
    for (const DecoderLayer& layer : layers_) {
        multiply(w, w.x, hidden, n,
                 {{&layer.q->view, w.q, q_width, false, 0, n},
                  {&layer.k->view, w.k, kv_width, false, 0, n},
                  {&layer.v->view, w.v, kv_width, false, 0, n}},
                 [&](int64_t t) {
                     w.kernels.rms_norm(w.hidden + t * hidden, layer.attention_norm.data(), hidden, config.epsilon,
                                        w.x + t * w.width);
                 });
        attend(w, layer);
        const bool normed = !layer.attention_out_norm.empty();
        multiply(w, w.x, q_width, n, {{&layer.o->view, normed ? w.branch : w.hidden, hidden, !normed, 0, n}},
                 [](int64_t) {});
        if (normed) add_branch(w, layer.attention_out_norm);
        feed_forward(w, layer);
    }
    const int64_t count = step.row_count;
    multiply(w, w.x, hidden, count, {{&head_->view, step.logits, config.vocabulary, false, 0, count}}, [&](int64_t r) {
        w.kernels.rms_norm(w.hidden + step.rows[r] * hidden, final_norm_.data(), hidden, config.epsilon,
                           w.x + r * w.width);
    });
    if (config.logit_cap != 0)
        for_tokens(count, step.threads, [&](int64_t r) {
            w.kernels.soft_cap(step.logits + r * config.vocabulary, config.vocabulary, config.logit_cap);
        });
    give_back(w.filled);
}

}  // namespace compress
