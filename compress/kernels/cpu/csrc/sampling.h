// Filters of one row of logits before a token is drawn from it.
#pragma once
#include <cstdint>
#include <vector>

namespace compress {

struct Filters {
    float temperature;  // above 0
    int64_t top_k;      // 0: off
    double top_p;       // 1: off
    double min_p;       // 0: off; a share of the likeliest token's probability
};

struct Kept {
    std::vector<int64_t> ids;           // ascending
    std::vector<double> probabilities;  // they sum to 1
};

// The largest logit must be finite, and none NaN.
Kept kept_tokens(const float* logits, int64_t vocabulary, const Filters& filters);

}  // namespace compress
