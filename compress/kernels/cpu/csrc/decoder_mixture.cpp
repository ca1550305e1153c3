// The feed-forward part of a layer: one, or the experts that a router chooses for each token.
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder_work.h"

namespace compress {
namespace {

// The shares of the `chosen` likeliest experts under a softmax over all; the lower number first among equals. Experts
// come out in ascending order, so that what they give is added in one order.
void choose(const float* scores, int64_t experts, int64_t chosen, bool renormalise, int32_t* which, float* share) {
    float high = scores[0], total = 0, kept = 0;
    for (int64_t e = 1; e < experts; ++e) high = std::max(high, scores[e]);
    for (int64_t e = 0; e < experts; ++e) total += std::exp(scores[e] - high);
    std::vector<char> taken(experts, 0);
    for (int64_t c = 0; c < chosen; ++c) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e)
            if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
        taken[best] = 1;
    }
    for (int64_t e = 0, c = 0; e < experts; ++e) {
        if (!taken[e]) continue;
        which[c] = int32_t(e);
        kept += share[c++] = std::exp(scores[e] - high) / total;
    }
    for (int64_t c = 0; renormalise && c < chosen; ++c) share[c] /= kept;
}

}  // namespace

// hidden += norm(branch), row by row.
void Decoder::add_branch(Work& w, const std::vector<float>& norm) {
    const int64_t hidden = config.hidden;
    for_tokens(w.step.count, w.step.threads, [&](int64_t t) {
        float *row = w.branch + t * hidden, *sum = w.hidden + t * hidden;
        w.kernels.rms_norm(row, norm.data(), hidden, config.epsilon, row);
        for (int64_t i = 0; i < hidden; ++i) sum[i] += row[i];
    });
}

void Decoder::feed_forward(Work& w, const DecoderLayer& layer) {
    if (layer.router) return mix_experts(w, layer);
    const int64_t n = w.step.count, hidden = config.hidden;
    const FeedForward& part = layer.experts[0];
    const int64_t inner = part.gate->view.rows;
    const bool normed = !layer.mlp_out_norm.empty();
    for (int64_t first = 0, parts = ceil_div(n, kFeedTokens); parts > 0; --parts) {
        const int64_t count = ceil_div(n - first, parts);
        float *rows = w.hidden + first * hidden, *out = normed ? w.branch + first * hidden : rows;
        multiply(w, w.x, hidden, count,
                 {{&part.gate->view, w.gate, inner, false, 0, count}, {&part.up->view, w.up, inner, false, 0, count}},
                 [&](int64_t t) {
                     w.kernels.rms_norm(rows + t * hidden, layer.mlp_norm.data(), hidden, config.epsilon,
                                        w.x + t * w.width);
                 });
        multiply(w, w.x, inner, count, {{&part.down->view, out, hidden, !normed, 0, count}}, [&](int64_t t) {
            w.activate(config.gelu, w.gate + t * inner, w.up + t * inner, inner, w.x + t * w.width);
        });
        first += count;
    }
    if (normed) add_branch(w, layer.mlp_out_norm);
}

// Rows of tokens are brought together by expert, so that each expert is read once for all of its tokens.
void Decoder::mix_experts(Work& w, const DecoderLayer& layer) {
    const int64_t n = w.step.count, hidden = config.hidden, experts = layer.experts.size(), chosen = layer.chosen;
    const int64_t inner = layer.experts[0].gate->view.rows, rows = n * chosen;
    multiply(w, w.x, hidden, n, {{&layer.router->view, w.router, experts, false, 0, n}}, [&](int64_t t) {
        w.kernels.rms_norm(w.hidden + t * hidden, layer.mlp_norm.data(), hidden, config.epsilon, w.x + t * w.width);
    });
    std::vector<int32_t> which(rows), row_of(rows), token_of(rows);
    std::vector<float> share(rows);
    std::vector<int64_t> begin(experts + 1, 0);
    for (int64_t t = 0; t < n; ++t)
        choose(w.router + t * experts, experts, chosen, layer.renormalise, &which[t * chosen], &share[t * chosen]);
    for (const int32_t e : which) ++begin[e + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < rows; ++i) {
        row_of[i] = int32_t(next[which[i]]++);
        token_of[row_of[i]] = int32_t(i / chosen);
    }

    std::vector<Product> inward, outward;
    int64_t in_block = 128, out_block = 128;  // of all experts: what a token gets must not depend on others' experts
    for (int64_t e = 0; e < experts; ++e) {
        const Linear &gate = layer.experts[e].gate->view, &up = layer.experts[e].up->view;
        const Linear& down = layer.experts[e].down->view;
        for (const Linear* linear : {&gate, &up})
            if (linear->takes_eight_bit()) in_block = std::min(in_block, linear->block());
        if (down.takes_eight_bit()) out_block = std::min(out_block, down.block());
        const int64_t first = begin[e], count = begin[e + 1] - first;
        if (count == 0) continue;
        inward.push_back({&gate, w.gate + first * inner, inner, false, first, count});
        inward.push_back({&up, w.up + first * inner, inner, false, first, count});
        outward.push_back({&down, w.branch + first * hidden, hidden, false, first, count});
    }
    multiply(w, w.routed, hidden, rows, inward, [&](int64_t row) {
        std::memcpy(w.routed + row * w.width, w.x + token_of[row] * w.width, hidden * sizeof(float));
    }, in_block);
    multiply(w, w.routed, inner, rows, outward, [&](int64_t row) {
        w.activate(config.gelu, w.gate + row * inner, w.up + row * inner, inner, w.routed + row * w.width);
    }, out_block);
    for_tokens(n, w.step.threads, [&](int64_t t) {
        float* out = w.hidden + t * hidden;
        float* const sum = w.x + t * w.width;
        for (int64_t i = 0; i < hidden; ++i) sum[i] = 0;
        for (int64_t c = t * chosen; c < (t + 1) * chosen; ++c) {
            const float* row = w.branch + row_of[c] * hidden;
            for (int64_t i = 0; i < hidden; ++i) sum[i] += share[c] * row[i];
        }
        for (int64_t i = 0; i < hidden; ++i) out[i] += sum[i];
    });
}

}  // namespace compress
