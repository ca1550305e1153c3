// The runtime's part of the native module: what a token is drawn from.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <cmath>
#include <utility>

#include "checks.h"
#include "module_runtime.h"
#include "sampling.h"

namespace compress {
namespace {

template <typename T>
using Vector = nb::ndarray<nb::pytorch, T, nb::ndim<1>>;

template <typename T>
Vector<T> owned(std::vector<T>&& values) {
    auto* kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return Vector<T>(kept->data(), {kept->size()}, owner);
}

std::pair<Vector<int64_t>, Vector<double>> keep_tokens(const Input& logits, double temperature, int64_t top_k,
                                                       double top_p, double min_p) {
    if (logits.ndim() != 1 || logits.shape(0) == 0) bad_value("logits", "a vector that is not empty");
    const int64_t vocabulary = int64_t(logits.shape(0));
    const float* values = input<float>(logits, "logits", {vocabulary});
    const Filters filters{float(temperature), top_k, top_p, min_p};
    if (!(filters.temperature > 0 && std::isfinite(filters.temperature))) bad_value("temperature", "above 0");
    if (top_k < 0) bad_value("top_k", "at least 0");
    if (!(top_p > 0 && top_p <= 1)) bad_value("top_p", "above 0 and at most 1");
    if (!(min_p >= 0 && min_p <= 1)) bad_value("min_p", "from 0 to 1");
    float most = -INFINITY;
    for (int64_t id = 0; id < vocabulary; ++id) {
        if (std::isnan(values[id])) bad_value("logits", "free of NaN");
        most = std::fmax(most, values[id]);
    }
    if (!std::isfinite(most)) bad_value("logits", "finite at their largest");
    Kept kept;
    {
        nb::gil_scoped_release release;
        kept = kept_tokens(values, vocabulary, filters);
    }
    return {owned(std::move(kept.ids)), owned(std::move(kept.probabilities))};
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("keep_tokens", &keep_tokens, nb::arg("logits").noconvert(), nb::arg("temperature"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("min_p"));
}

}  // namespace compress
