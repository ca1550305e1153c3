// Repacked linears, as Python makes and multiplies them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "checks.h"
#include "decoder.h"
#include "isa.h"
#include "module_runtime.h"
#include "pool.h"
#include "scalars.h"

namespace compress {
namespace {

ScaleType type_of(const Input& scale) {
    if (scale.dtype() == kFloat32) return ScaleType::float32;
    if (scale.dtype() == kFloat16) return ScaleType::float16;
    if (scale.dtype() == kBfloat16) return ScaleType::bfloat16;
    bad_type("scale", "float32, float16 or bfloat16");
}

void check_group(int64_t group_size, int64_t columns) {
    if (group_size != columns && (group_size < kChunk || group_size % kChunk != 0 || columns % group_size != 0))
        bad_value("group_size", "a divisor of the " + std::to_string(columns) + " columns and a multiple of " +
                                    std::to_string(kChunk) + ", or all of the columns");
}

void set_bias(PackedLinear& linear, const std::optional<Input>& bias) {
    if (bias) linear.set_bias(input<float>(*bias, "bias", {linear.view.rows}));
}

// How a format rounds inputs: a name, the inputs that share a scale (0: a token's), a calibrated scale (0: none).
typedef std::tuple<std::string, int64_t, float> Inputs;

template <typename T, size_t count>
T named(const std::pair<const char*, T> (&known)[count], const std::string& name, const char* argument) {
    std::string names;
    for (const auto& [one, value] : known) {
        if (one == name) return value;
        names += (names.empty() ? "" : ", ") + std::string(one);
    }
    bad_value(argument, "one of " + names);
}

InputFormat input_format(const Inputs& inputs) {
    static const std::pair<const char*, Rounding> known[] = {
        {"none", Rounding::none},   {"int8", Rounding::int8},   {"narrow", Rounding::narrow}, {"fp8", Rounding::fp8},
        {"nvfp4", Rounding::nvfp4}, {"mxfp4", Rounding::mxfp4}, {"mxfp8", Rounding::mxfp8}};
    const auto& [name, group, scale] = inputs;
    const InputFormat found{named(known, name, "inputs"), group, scale};
    if (group < 0 || !(scale >= 0) || !std::isfinite(scale)) bad_value("inputs", "a group and a scale of at least 0");
    if (group != 0 && found.integers()) bad_value("inputs", "of integers with one scale for all of a token");
    if (scale == 0 && found.kind == Rounding::nvfp4) bad_value("inputs", "of nvfp4 with a calibrated number");
    return found;
}

Weight packed(const PackedLinear::Source& source, const std::optional<Input>& bias, int threads) {
    positive("threads", threads);
    Weight made;
    {
        nb::gil_scoped_release release;
        made = std::make_shared<PackedLinear>(source, threads);
    }
    set_bias(*made, bias);
    return made;
}

Weight pack_codes(const Input& words_of, const Input& scale, const std::optional<Input>& zero_point, int64_t columns,
                  int64_t group_size, int bits, const std::optional<Input>& bias, int threads,
                  const Inputs& inputs) {
    const auto [rows, words] = extents(words_of, "packed");
    if (bits < 2 || bits > 8) bad_value("bits", "from 2 to 8");
    if (columns < 1 || columns > words * 32 || words != (columns * bits + 31) / 32)
        bad_value("packed", "of as many words as " + std::to_string(columns) + " codes take");
    check_group(group_size, columns);
    const ScaleType type = type_of(scale);
    PackedLinear::Source source{input<int32_t>(words_of, "packed", {rows, words}), nullptr, type, type, nullptr, rows,
                                columns, group_size, bits, Coding::integer, nullptr, 1, 1, input_format(inputs)};
    const int64_t groups = columns / group_size;
    source.scale = memory_of(scale, "scale", {rows, groups});
    if (zero_point) {
        source.zero_point = input<int8_t>(*zero_point, "zero_point", {rows, groups});
        for (int64_t i = 0; i < rows * groups; ++i)
            if (source.zero_point[i] < -(1 << (bits - 1)) || source.zero_point[i] >= 1 << (bits - 1))
                bad_value("zero_point", "within the range of the codes");
    }
    return packed(source, bias, threads);
}

Weight pack_floats(const Input& words_of, const Input& scale, int64_t columns, int64_t group_size,
                   const std::optional<Input>& table, const std::string& scale_type, const std::string& value_type,
                   float factor, float divisor, const std::optional<Input>& bias, int threads, const Inputs& inputs) {
    static const std::pair<const char*, ScaleType> scale_types[] = {
        {"float32", ScaleType::float32}, {"e4m3", ScaleType::e4m3}, {"e8m0", ScaleType::e8m0}};
    static const std::pair<const char*, ScaleType> value_types[] = {
        {"float32", ScaleType::float32}, {"bfloat16", ScaleType::bfloat16}, {"float16", ScaleType::float16}};
    const auto [rows, words] = extents(words_of, "packed");
    const int bits = table ? 4 : 8;
    if (columns < 1 || columns > words * 32 || words != (columns * bits + 31) / 32)
        bad_value("packed", "of as many words as " + std::to_string(columns) + " codes take");
    if (!(table && group_size == kChunk / 2 && columns % group_size == 0)) check_group(group_size, columns);
    if (!(factor > 0) || !(divisor > 0) || !std::isfinite(factor) || !std::isfinite(divisor))
        bad_value("factor and divisor", "positive numbers");
    PackedLinear::Source source{input<int32_t>(words_of, "packed", {rows, words}), nullptr,
                                named(scale_types, scale_type, "scale_type"), named(value_types, value_type, "value_type"),
                                nullptr, rows, columns, group_size, bits, table ? Coding::table : Coding::e4m3,
                                table ? input<float>(*table, "table", {kTableSize}) : nullptr, factor, divisor,
                                input_format(inputs)};
    if (!table && source.value_type != ScaleType::float32) bad_value("value_type", "float32 for codes of FP8");
    if (source.scale_type != ScaleType::e4m3 && (factor != 1.0f || divisor != 1.0f))
        bad_value("factor and divisor", "1 where scales are no FP8");
    const int64_t groups = columns / group_size;
    if (source.scale_type == ScaleType::float32)
        source.scale = input<float>(scale, "scale", {rows, groups});
    else
        source.scale = input<uint8_t>(scale, "scale", {rows, groups});
    return packed(source, bias, threads);
}

Weight pack_dense(const Input& weight, int64_t group_size, const std::optional<Input>& bias, int threads) {
    const auto [rows, columns] = extents(weight, "weight");
    const bool bfloat16 = is_bfloat16(weight, "weight");
    if (group_size != 0) check_group(group_size, columns);
    const void* memory = memory_of(weight, "weight", {rows, columns});
    positive("threads", threads);
    Weight made;
    {
        nb::gil_scoped_release release;
        made = std::make_shared<PackedLinear>(memory, bfloat16, rows, columns, group_size, threads);
    }
    set_bias(*made, bias);
    return made;
}

void multiply(const PackedLinear& linear, const Input& x, const Output& out, bool eight_bit, int threads) {
    const Linear& w = linear.view;
    const auto [tokens, columns] = extents(x, "x");
    if (columns != w.columns) bad_value("x", "of " + std::to_string(w.columns) + " columns");
    if (eight_bit && !w.takes_eight_bit()) bad_value("eight_bit", "False for a weight that is not of packed integers");
    ProductArgs args{&w, input<float>(x, "x", {tokens, columns}), columns, {}, eight_bit,
                     output<float>(out, "out", {tokens, w.rows}), w.rows, tokens, false};
    positive("threads", threads);
    const Kernels& kernels = active_kernels();
    nb::gil_scoped_release release;
    const int64_t block = w.block(), blocks = ceil_div(w.padded, block);
    std::vector<int8_t> q(eight_bit ? tokens * blocks * block : 0);
    std::vector<float> scales(eight_bit ? tokens * blocks : 0);
    std::vector<int32_t> sums(eight_bit ? tokens * blocks : 0);
    std::vector<Outlier> outliers(q.size() / 4);
    std::vector<int32_t> outlier_counts(eight_bit ? tokens : 0);
    if (eight_bit) {
        args.quantized = {q.data(),  scales.data(), sums.data(), outliers.data(), outlier_counts.data(),
                          tokens,   block,         blocks,      w.inputs};
        Pool::shared().run(tokens, threads, [&](int64_t t, int) {
            kernels.quantize_inputs(args.x + t * columns, columns, t, args.quantized);
        });
    }
    std::vector<float> rounded;
    if (w.inputs.kind != Rounding::none && !eight_bit) {
        rounded.assign(args.x, args.x + tokens * columns);
        for (int64_t t = 0; t < tokens; ++t) kernels.round_inputs(rounded.data() + t * columns, columns, w.inputs);
        args.x = rounded.data();
    }
    const int64_t scratch = kernels.product_scratch(tokens) + 16;
    const Buffer memory(scratch * threads * int64_t(sizeof(float)));
    Pool::shared().run(ceil_div(w.strips(), kStripsTogether), threads, [&](int64_t task, int thread) {
        const int64_t first = task * kStripsTogether, count = std::min<int64_t>(kStripsTogether, w.strips() - first);
        kernels.product_strips(args, first, count, reinterpret_cast<float*>(memory.data()) + thread * scratch);
    });
}

}  // namespace

void bind_linears(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def_prop_ro("rows", [](const PackedLinear& self) { return self.view.rows; })
        .def_prop_ro("columns", [](const PackedLinear& self) { return self.view.columns; })
        .def_prop_ro("bits", [](const PackedLinear& self) { return self.view.bits; })
        .def_prop_ro("takes_eight_bit", [](const PackedLinear& self) { return self.view.takes_eight_bit(); })
        .def_prop_ro("nbytes", [](const PackedLinear& self) { return self.bytes(); })
        .def("multiply", &multiply, nb::arg("x").noconvert(), nb::arg("out").noconvert(), nb::arg("eight_bit"),
             nb::arg("threads"));
    m.def("pack_codes", &pack_codes, nb::arg("packed").noconvert(), nb::arg("scale").noconvert(),
          nb::arg("zero_point").noconvert().none(), nb::arg("columns"), nb::arg("group_size"), nb::arg("bits"),
          nb::arg("bias").noconvert().none(), nb::arg("threads"), nb::arg("inputs"));
    m.def("pack_floats", &pack_floats, nb::arg("packed").noconvert(), nb::arg("scale").noconvert(), nb::arg("columns"),
          nb::arg("group_size"), nb::arg("table").noconvert().none(), nb::arg("scale_type"), nb::arg("value_type"),
          nb::arg("factor"), nb::arg("divisor"), nb::arg("bias").noconvert().none(), nb::arg("threads"),
          nb::arg("inputs"));
    m.def("pack_dense", &pack_dense, nb::arg("weight").noconvert(), nb::arg("group_size"),
          nb::arg("bias").noconvert().none(), nb::arg("threads"));
}

}  // namespace compress
