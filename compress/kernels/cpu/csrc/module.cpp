// The native module: checks arguments, drops the GIL, and deals tiles out to threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "isa.h"
#include "module_runtime.h"
#include "parallel.h"

namespace compress {
namespace {

Grid checked_grid(const Input& scale, const Input& zero_point, const Input& group_of_column, int qmin, int qmax,
                  int64_t rows, int64_t columns) {
    const int64_t groups = extents(scale, "scale").second;
    Grid grid{input<float>(scale, "scale", {rows, groups}), input<float>(zero_point, "zero_point", {rows, groups}),
              input<int32_t>(group_of_column, "group_of_column", {columns}), groups, float(qmin), float(qmax)};
    if (qmin < -128 || qmax > 127 || qmin >= qmax) bad_value("qmin, qmax", "in order and within int8");
    for (int64_t c = 0; c < columns; ++c)
        if (grid.group_of_column[c] < 0 || grid.group_of_column[c] >= groups)
            bad_value("group_of_column", "within [0, " + std::to_string(groups) + ")");
    for (int64_t i = 0; i < rows * groups; ++i)
        if (const float z = grid.zero_point[i]; !(std::fabs(z) <= 128 && z == std::nearbyint(z)))
            bad_value("zero_point", "whole numbers within int8");
    return grid;
}

void gptq_quantize(const Input& weight, const Input& upper, const Input& scale, const Input& zero_point,
                   const Input& group_of_column, int qmin, int qmax, const Output& codes, const Output& loss,
                   int threads, const std::optional<Input>& pruned) {
    const auto [rows, columns] = extents(weight, "weight");
    std::vector<double> totals(rows);
    const GptqArgs args{input<float>(weight, "weight", {rows, columns}),
                        input<float>(upper, "upper", {columns, columns}),
                        checked_grid(scale, zero_point, group_of_column, qmin, qmax, rows, columns),
                        pruned ? input<int8_t>(*pruned, "pruned", {rows, columns}) : nullptr,
                        output<int8_t>(codes, "codes", {rows, columns}),
                        totals.data(), rows, columns};
    float* loss_out = output<float>(loss, "loss", {rows});
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    for_each_tile(args.rows, kernels.gptq_scratch(args), count,
                  [&](int64_t row, float* scratch) { kernels.gptq_tile(args, row, scratch); });
    std::copy(totals.begin(), totals.end(), loss_out);
}

void prune_columns(const Output& weight, const Input& upper, const Output& pruned, const Output& errors, int64_t group,
                   int64_t drop, int threads) {
    const auto [rows, columns] = extents(weight, "weight");
    const SparseArgs args{output<float>(weight, "weight", {rows, columns}),
                          input<float>(upper, "upper", {columns, columns}),
                          output<int8_t>(pruned, "pruned", {rows, columns}),
                          output<float>(errors, "errors", {rows, columns}), rows, columns, group, drop};
    if (group < 0 || (group && columns % group != 0)) bad_value("group", "0 or a divisor of the columns");
    if (drop < 0 || drop > group) bad_value("drop", "within the group");
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    for_each_tile(args.rows, kernels.sparse_scratch(args), count,
                  [&](int64_t row, float* scratch) { kernels.sparse_tile(args, row, scratch); });
}

int64_t coordinate_descent(const Output& gradient, const Input& hessian, const Input& scale, const Input& zero_point,
                           const Input& group_of_column, int qmin, int qmax, const Output& codes, int sweeps,
                           int threads, const std::optional<Input>& pruned) {
    const auto [rows, columns] = extents(gradient, "gradient");
    const DescentArgs args{output<float>(gradient, "gradient", {rows, columns}),
                           input<float>(hessian, "hessian", {columns, columns}),
                           checked_grid(scale, zero_point, group_of_column, qmin, qmax, rows, columns),
                           pruned ? input<int8_t>(*pruned, "pruned", {rows, columns}) : nullptr,
                           output<int8_t>(codes, "codes", {rows, columns}), rows, columns, sweeps};
    if (sweeps < 0) bad_value("sweeps", "at least 0");
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    std::atomic<int64_t> changed{0};
    for_each_tile(args.rows, kernels.descent_scratch(args), count,
                  [&](int64_t row, float* scratch) { changed += kernels.descent_tile(args, row, scratch); });
    return changed;
}

void rounding_loss(const Input& weight, const Input& scales, const Input& importance, const Input& shares,
                   int64_t group_size, int bits, bool symmetric, const Output& loss, int threads) {
    const auto [rows, columns] = extents(weight, "weight");
    const int64_t candidates = extents(scales, "scales").first;
    if (shares.ndim() != 1 || shares.shape(0) == 0) bad_value("shares", "a vector of at least one share");
    const int64_t share_count = int64_t(shares.shape(0));
    if (group_size < 1 || columns % group_size != 0)
        bad_value("group_size", "a divisor of " + std::to_string(columns));
    if (bits < 2 || bits > 8) bad_value("bits", "from 2 to 8");
    std::vector<double> losses(rows * candidates);
    const RoundingArgs args{input<float>(weight, "weight", {rows, columns}),
                            input<float>(scales, "scales", {candidates, columns}),
                            input<float>(importance, "importance", {candidates, columns}),
                            input<float>(shares, "shares", {share_count}), losses.data(), rows, columns, candidates,
                            share_count, group_size,
                            float((1 << bits) - 1), symmetric};
    float* loss_out = output<float>(loss, "loss", {candidates});
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    for_each_tile(args.rows, kernels.rounding_scratch(args), count,
                  [&](int64_t row, float* scratch) { kernels.rounding_tile(args, row, scratch); });
    for (int64_t k = 0; k < candidates; ++k) {
        double total = 0;
        for (int64_t r = 0; r < rows; ++r) total += losses[r * candidates + k];
        loss_out[k] = float(total);
    }
}

// Vectors of at least `least` numbers.
std::pair<const float*, int64_t> numbers(const Input& array, const char* name, int64_t least) {
    if (array.ndim() != 1 || int64_t(array.shape(0)) < least)
        bad_value(name, "a vector of at least " + std::to_string(least));
    return {input<float>(array, name, {int64_t(array.shape(0))}), int64_t(array.shape(0))};
}

void search_range(const Input& weight, const std::optional<Input>& importance, const Input& shares,
                  const Input& offsets, int64_t group_size, int bits, bool symmetric, const std::string& scale_type,
                  const Output& share, const Output& sign, int threads) {
    const auto [rows, columns] = extents(weight, "weight");
    if (group_size < 1 || columns % group_size != 0)
        bad_value("group_size", "a divisor of " + std::to_string(columns));
    if (bits < 2 || bits > 8) bad_value("bits", "from 2 to 8");
    const int64_t groups = columns / group_size;
    SearchArgs args{};
    args.weight = input<float>(weight, "weight", {rows, columns});
    if (importance) args.importance = input<float>(*importance, "importance", {groups, group_size, group_size});
    std::tie(args.shares, args.share_count) = numbers(shares, "shares", 1);
    std::tie(args.offsets, args.offset_count) = numbers(offsets, "offsets", 0);
    args.share = output<float>(share, "share", {rows, groups});
    args.sign = output<float>(sign, "sign", {rows, groups});
    args.rows = rows, args.columns = columns, args.group_size = group_size;
    args.levels = float((1 << bits) - 1), args.symmetric = symmetric;
    if (scale_type == "float32") {
        args.scale_type = ScaleType::float32, args.largest = 0x1.fffffep127 * (1 - 0x1p-23);
    } else if (scale_type == "float16") {
        args.scale_type = ScaleType::float16, args.largest = 65504.0 * (1 - 0x1p-10);
    } else if (scale_type == "bfloat16") {
        args.scale_type = ScaleType::bfloat16, args.largest = 0x1.fep127 * (1 - 0x1p-7);
    } else {
        bad_value("scale_type", "float32, float16 or bfloat16");
    }
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    for_each_tile(args.rows, kernels.search_scratch(args), count,
                  [&](int64_t row, float* scratch) { kernels.search_tile(args, row, scratch); });
}

void add_moment(const Output& out, const Input& a, const Input& b, int64_t first, int64_t last, bool upper) {
    const auto [tokens, width] = extents(a, "a");
    const bool bfloat16 = a.dtype() == kBfloat16;
    if (!bfloat16 && a.dtype() != kFloat32) bad_type("a", "float32 or bfloat16");
    if (b.dtype() != a.dtype()) bad_type("b", "of the dtype of a");
    if (first < 0 || first >= last || last > width) bad_value("first, last", "in order and within the columns of a");
    const MomentArgs args{memory_of(a, "a", {tokens, width}), memory_of(b, "b", {tokens, width}), bfloat16,
                          output<float>(out, "out", {width, width}), tokens, width, first, last, upper};
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    std::unique_ptr<float[]> scratch(new float[kernels.moment_scratch(args)]);
    kernels.moment_panel(args, scratch.get());
}

void causal_attention(const Input& q, const Input& k, const Input& v, const Output& out, float scale, int threads) {
    if (q.ndim() != 4 || k.ndim() != 4) bad_value("q and k", "of four dimensions");
    const int64_t batch = q.shape(0), heads = q.shape(1), tokens = q.shape(2), dim = q.shape(3), kv_heads = k.shape(1);
    if (batch * heads * tokens * dim * kv_heads == 0) bad_value("q and k", "not empty");
    if (heads % kv_heads != 0) bad_value("k", "of a number of heads that divides that of q");
    const bool bfloat16 = q.dtype() == kBfloat16;
    if (!bfloat16 && q.dtype() != kFloat32) bad_type("q", "float32 or bfloat16");
    if (k.dtype() != q.dtype() || v.dtype() != q.dtype() || out.dtype() != q.dtype())
        bad_type("k, v and out", "of the dtype of q");
    const AttentionArgs args{memory_of(q, "q", {batch, heads, tokens, dim}),
                             memory_of(k, "k", {batch, kv_heads, tokens, dim}),
                             memory_of(v, "v", {batch, kv_heads, tokens, dim}),
                             memory_of(out, "out", {batch, tokens, heads, dim}), bfloat16,
                             batch, heads, kv_heads, tokens, dim, scale};
    const int count = positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    for_each(batch * kv_heads, kernels.attention_scratch(args), count,
             [&](int64_t index, float* scratch) { kernels.attention_head(args, index, scratch); });
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels& k : available_kernels()) names.emplace_back(k.name);
    return names;
}

}  // namespace
}  // namespace compress

NB_MODULE(_native, m) {
    using namespace compress;
    bind_runtime(m);
    bind_sampling(m);
    m.def("isa", [] { return std::string(active_kernels().name); });
    m.def("set_isa", [](const std::string& name) { active_slot().store(&kernels_named(name)); }, nb::arg("name"));
    m.def("available_isas", &available_isas);
    m.def("gptq_quantize", &gptq_quantize, nb::arg("weight").noconvert(), nb::arg("upper").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("zero_point").noconvert(), nb::arg("group_of_column").noconvert(),
          nb::arg("qmin"), nb::arg("qmax"), nb::arg("codes").noconvert(), nb::arg("loss").noconvert(),
          nb::arg("threads"), nb::arg("pruned").noconvert().none() = nb::none());
    m.def("coordinate_descent", &coordinate_descent, nb::arg("gradient").noconvert(), nb::arg("hessian").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("zero_point").noconvert(), nb::arg("group_of_column").noconvert(),
          nb::arg("qmin"), nb::arg("qmax"), nb::arg("codes").noconvert(), nb::arg("sweeps"), nb::arg("threads"),
          nb::arg("pruned").noconvert().none() = nb::none());
    m.def("prune_columns", &prune_columns, nb::arg("weight").noconvert(), nb::arg("upper").noconvert(),
          nb::arg("pruned").noconvert(), nb::arg("errors").noconvert(), nb::arg("group"), nb::arg("drop"),
          nb::arg("threads"));
    m.def("add_moment", &add_moment, nb::arg("out").noconvert(), nb::arg("a").noconvert(), nb::arg("b").noconvert(),
          nb::arg("first"), nb::arg("last"), nb::arg("upper"));
    m.def("causal_attention", &causal_attention, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("v").noconvert(), nb::arg("out").noconvert(), nb::arg("scale"), nb::arg("threads"));
    m.def("rounding_loss", &rounding_loss, nb::arg("weight").noconvert(), nb::arg("scales").noconvert(),
          nb::arg("importance").noconvert(), nb::arg("shares").noconvert(), nb::arg("group_size"), nb::arg("bits"), nb::arg("symmetric"),
          nb::arg("loss").noconvert(), nb::arg("threads"));
    m.def("search_range", &search_range, nb::arg("weight").noconvert(), nb::arg("importance").noconvert().none(),
          nb::arg("shares").noconvert(), nb::arg("offsets").noconvert(), nb::arg("group_size"), nb::arg("bits"),
          nb::arg("symmetric"), nb::arg("scale_type"), nb::arg("share").noconvert(), nb::arg("sign").noconvert(),
          nb::arg("threads"));
}
