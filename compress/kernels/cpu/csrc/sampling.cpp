// Which tokens top-k, top-p and min-p keep of one row of logits, and their probabilities, without sorting the row.
#include "sampling.h"

#include <algorithm>
#include <cmath>

namespace compress {
namespace {

struct Candidate {
    float logit;
    int64_t id;
};

// The order in which tokens are kept: the likelier first, of equals the lower id.
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// The `count` foremost of a row, in no order. What cannot be among them is seen by one comparison: the buffer holds
// twice as many at most, and the last of its foremost half is the bar for all that follow.
std::vector<Candidate> foremost(const float* logits, int64_t vocabulary, int64_t count) {
    std::vector<Candidate> buffer;
    buffer.reserve(2 * count);
    float bar = -INFINITY;
    bool full = false;
    for (int64_t id = 0; id < vocabulary; ++id) {
        if (full && !(logits[id] > bar)) continue;  // an equal one has a higher id
        buffer.push_back({logits[id], id});
        if (int64_t(buffer.size()) < 2 * count) continue;
        std::nth_element(buffer.begin(), buffer.begin() + count - 1, buffer.end(), before);
        buffer.resize(count);
        bar = buffer[count - 1].logit, full = true;
    }
    if (int64_t(buffer.size()) > count) {
        std::nth_element(buffer.begin(), buffer.begin() + count - 1, buffer.end(), before);
        buffer.resize(count);
    }
    return buffer;
}

// e^((logit - most) / temperature) of any token, and the sum over the row, from a fixed number of partial sums.
class Weights {
   public:
    Weights(const float* logits, int64_t vocabulary, float temperature)
        : logits_(logits), vocabulary_(vocabulary), most_(*std::max_element(logits, logits + vocabulary)),
          temperature_(temperature) {}
    float of(float logit) const { return std::exp((logit - most_) / temperature_); }
    double total() const {
        double part[4] = {};
        for (int64_t id = 0; id < vocabulary_; ++id) part[id % 4] += of(logits_[id]);
        return part[0] + part[1] + (part[2] + part[3]);
    }

   private:
    const float* logits_;
    int64_t vocabulary_;
    float most_, temperature_;
};

// The likeliest of `found`, in order, until they hold `needed` of the weight; false where all of them hold less.
bool cut_at(std::vector<Candidate>& found, const Weights& weights, double needed) {
    std::sort(found.begin(), found.end(), before);
    double held = 0;
    for (size_t i = 0; i < found.size(); ++i)
        if ((held += weights.of(found[i].logit)) >= needed) return found.resize(i + 1), true;
    return false;
}

// The smallest set of likeliest tokens that holds `share` of the row's weight. Most rows hold it in a few tokens.
std::vector<Candidate> nucleus(const float* logits, int64_t vocabulary, const Weights& weights, double share) {
    const double needed = share * weights.total();
    for (int64_t count = std::min<int64_t>(64, vocabulary);; count = std::min(count * 8, vocabulary)) {
        std::vector<Candidate> found = foremost(logits, vocabulary, count);
        if (cut_at(found, weights, needed) || count == vocabulary) return found;
    }
}

}  // namespace

Kept kept_tokens(const float* logits, int64_t vocabulary, const Filters& filters) {
    const Weights weights(logits, vocabulary, filters.temperature);
    Kept kept;
    double total = 0;
    const auto keep = [&](int64_t id) {
        const double weight = weights.of(logits[id]);
        if (weight < filters.min_p) return;
        kept.ids.push_back(id), kept.probabilities.push_back(weight);
        total += weight;
    };
    const bool few = filters.top_k > 0 && filters.top_k < vocabulary;
    if (few || filters.top_p < 1) {
        std::vector<Candidate> found =
            few ? foremost(logits, vocabulary, filters.top_k) : nucleus(logits, vocabulary, weights, filters.top_p);
        if (few && filters.top_p < 1) {
            double held = 0;
            for (const Candidate& each : found) held += weights.of(each.logit);
            cut_at(found, weights, filters.top_p * held);
        }
        std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
        for (const Candidate& each : found) keep(each.id);
    } else {
        kept.ids.reserve(vocabulary), kept.probabilities.reserve(vocabulary);
        for (int64_t id = 0; id < vocabulary; ++id) keep(id);
    }
    for (double& each : kept.probabilities) each /= total;
    return kept;
}

}  // namespace compress
