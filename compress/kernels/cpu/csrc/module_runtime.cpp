// The runtime's part of the native module: the decoder.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "checks.h"
#include "decoder.h"
#include "isa.h"
#include "module_runtime.h"
#include "pool.h"

namespace compress {
namespace {

// A decoder and the embedding whose memory it reads, where that is not packed.
struct BoundDecoder {
    std::optional<Input> embedding;
    Decoder decoder;
};

std::vector<float> vector_of(const Input& array, const char* name, int64_t count) {
    const float* values = input<float>(array, name, {count});
    return std::vector<float>(values, values + count);
}

void check_shape(const Weight& weight, const char* name, int64_t rows, int64_t columns) {
    if (!weight) bad_type(name, "a PackedLinear");
    if (weight->view.rows != rows || weight->view.columns != columns)
        bad_value(name, "of shape (" + std::to_string(rows) + ", " + std::to_string(columns) + "), not (" +
                            std::to_string(weight->view.rows) + ", " + std::to_string(weight->view.columns) + ")");
}

void make_decoder(BoundDecoder* self, const std::optional<Input>& embedding, const Weight& packed_embedding,
                  const Input& final_norm, const Weight& head, const Input& frequencies, const Input& factors,
                  int64_t heads, int64_t kv_heads, int64_t head_dim, float epsilon, float embedding_scale,
                  float attention_scale, float attention_cap, float logit_cap, bool gelu, int64_t pages) {
    if (!head) bad_type("head", "a PackedLinear");
    if (bool(embedding) == bool(packed_embedding)) bad_value("embedding", "given once, as it is or packed");
    const int64_t vocabulary = head->view.rows, hidden = head->view.columns;
    Embedding table{packed_embedding, nullptr, false};
    if (packed_embedding) {
        check_shape(packed_embedding, "packed_embedding", vocabulary, hidden);
        if (!packed_embedding->view.packed()) bad_value("packed_embedding", "of codes");
    } else {
        table.bfloat16 = is_bfloat16(*embedding, "embedding");
        table.dense = memory_of(*embedding, "embedding", {vocabulary, hidden});
    }
    if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) bad_value("kv_heads", "a divisor of heads");
    if (pages < 1 || pages > 1 << 24) bad_value("pages", "at least 1");
    if (!(attention_cap >= 0) || !(logit_cap >= 0)) bad_value("caps", "at least 0");
    const auto [count, half] = extents(frequencies, "frequencies");
    if (head_dim < 2 || head_dim > 8192 || head_dim % 2 != 0) bad_value("head_dim", "even, from 2 to 8192");
    if (half > head_dim / 2) bad_value("frequencies", "of at most head_dim / 2 columns");
    const float* turns = input<float>(frequencies, "frequencies", {count, half});
    const float* factor = input<float>(factors, "factors", {count});
    std::vector<Rotation> rotations;
    for (int64_t r = 0; r < count; ++r)
        rotations.push_back({std::vector<float>(turns + r * half, turns + (r + 1) * half), factor[r]});
    const DecoderConfig config{vocabulary, hidden, heads, kv_heads, head_dim, 2 * half, epsilon, embedding_scale,
                               attention_scale, attention_cap, logit_cap, gelu, pages};
    new (self) BoundDecoder{embedding, Decoder(config, std::move(table), std::move(rotations),
                                               vector_of(final_norm, "final_norm", hidden), head)};
}

CacheType cache_named(const std::string& name, int64_t dim) {
    const std::pair<const char*, CacheType> types[] = {
        {"float32", CacheType::float32}, {"bfloat16", CacheType::bfloat16}, {"fp8", CacheType::fp8},
        {"int8", CacheType::int8},       {"nvfp4", CacheType::nvfp4},       {"int4", CacheType::int4},
        {"int2", CacheType::int2}};
    for (const auto& [known, type] : types) {
        if (known != name) continue;
        if (type == CacheType::nvfp4 && dim != kFloatBlock && dim % (2 * kFloatBlock) != 0)
            bad_value("cache", "nvfp4 for heads of 16 or of a multiple of 32 only");
        return type;
    }
    bad_value("cache", "float32, bfloat16, fp8, int8, nvfp4, int4 or int2");
}

void keep(BoundDecoder& self, int64_t layer, const std::string& cache, float key_scale, float value_scale) {
    if (layer < 0 || layer >= self.decoder.layers()) bad_value("layer", "one of those that there are");
    const CacheType type = cache_named(cache, self.decoder.config.dim);
    for (const float scale : {key_scale, value_scale})
        if (!(scale > 0) || !std::isfinite(scale) || (scale != 1 && type != CacheType::fp8))
            bad_value("scales", "positive numbers, and 1 where the cache is not fp8");
    self.decoder.keep(layer, type, key_scale, value_scale);
}

typedef std::vector<Weight> Weights;

void add_layer(BoundDecoder& self, const Weights& attention, const Weights& gates, const Weights& ups,
               const Weights& downs, const Weight& router, int64_t chosen, bool renormalise,
               const Input& attention_norm, const Input& mlp_norm, const std::optional<Input>& q_norm,
               const std::optional<Input>& k_norm, const std::optional<Input>& attention_out_norm,
               const std::optional<Input>& mlp_out_norm, int64_t window, int64_t rotation) {
    const DecoderConfig& c = self.decoder.config;
    const int64_t q_width = c.heads * c.dim, kv_width = c.kv_heads * c.dim;
    if (attention.size() != 4) bad_value("attention", "q, k, v and o");
    check_shape(attention[0], "q", q_width, c.hidden);
    check_shape(attention[1], "k", kv_width, c.hidden);
    check_shape(attention[2], "v", kv_width, c.hidden);
    check_shape(attention[3], "o", c.hidden, q_width);
    const size_t experts = gates.size();
    if (experts == 0 || ups.size() != experts || downs.size() != experts)
        bad_value("gates, ups and downs", "as many as experts");
    if (!gates[0]) bad_type("gates", "PackedLinears");
    const int64_t ffn = gates[0]->view.rows;
    DecoderLayer layer{};
    for (size_t e = 0; e < experts; ++e) {
        check_shape(gates[e], "gate", ffn, c.hidden);
        check_shape(ups[e], "up", ffn, c.hidden);
        check_shape(downs[e], "down", c.hidden, ffn);
        layer.experts.push_back({gates[e], ups[e], downs[e]});
    }
    if (router) {
        check_shape(router, "router", int64_t(experts), c.hidden);
        if (router->view.packed()) bad_value("router", "no packed weight");
        if (chosen < 1 || chosen > int64_t(experts)) bad_value("chosen", "from 1 to the number of experts");
        if (mlp_out_norm) bad_value("mlp_out_norm", "None behind a router");
    } else if (experts != 1) {
        bad_value("router", "given for several experts");
    }
    if (window < 1) bad_value("window", "at least 1");
    if (rotation < 0 || rotation >= self.decoder.rotations) bad_value("rotation", "one of those that there are");
    layer.q = attention[0], layer.k = attention[1], layer.v = attention[2], layer.o = attention[3];
    layer.router = router, layer.chosen = chosen, layer.renormalise = renormalise;
    layer.attention_norm = vector_of(attention_norm, "attention_norm", c.hidden);
    layer.mlp_norm = vector_of(mlp_norm, "mlp_norm", c.hidden);
    if (q_norm) layer.q_norm = vector_of(*q_norm, "q_norm", c.dim);
    if (k_norm) layer.k_norm = vector_of(*k_norm, "k_norm", c.dim);
    if (attention_out_norm) layer.attention_out_norm = vector_of(*attention_out_norm, "attention_out_norm", c.hidden);
    if (mlp_out_norm) layer.mlp_out_norm = vector_of(*mlp_out_norm, "mlp_out_norm", c.hidden);
    layer.window = window, layer.rotation = rotation;
    layer.cache = CacheType::float32, layer.key_scale = layer.value_scale = 1;
    self.decoder.add(std::move(layer));
}

void step(BoundDecoder& self, const Input& tokens, const Input& positions, const Input& sequences, const Input& tables,
          const Input& contexts, const Input& rows, const Output& logits, bool eight_bit, int threads) {
    const DecoderConfig& c = self.decoder.config;
    if (tokens.ndim() != 1 || tokens.shape(0) == 0) bad_value("tokens", "a vector of at least one token");
    if (rows.ndim() != 1) bad_value("rows", "a vector");
    const int64_t count = tokens.shape(0), row_count = rows.shape(0);
    const auto [sequence_count, width] = extents(tables, "tables");
    const Step s{input<int32_t>(tokens, "tokens", {count}), input<int32_t>(positions, "positions", {count}),
                 input<int32_t>(sequences, "sequences", {count}), count,
                 input<int32_t>(tables, "tables", {sequence_count, width}), width,
                 input<int32_t>(contexts, "contexts", {sequence_count}),
                 input<int32_t>(rows, "rows", {row_count}), row_count,
                 output<float>(logits, "logits", {row_count, c.vocabulary}), positive("threads", threads), eight_bit};
    const auto within = [](const char* name, int64_t value, int64_t end) {
        if (value < 0 || value >= end) bad_value(name, "within [0, " + std::to_string(end) + ")");
    };
    for (int64_t i = 0; i < sequence_count; ++i) within("contexts", s.contexts[i], self.decoder.contexts());
    for (int64_t r = 0; r < row_count; ++r) within("rows", s.rows[r], count);
    for (int64_t t = 0; t < count; ++t) {
        within("tokens", s.tokens[t], c.vocabulary);
        within("sequences", s.sequences[t], sequence_count);
        within("positions", s.positions[t], width * kPageTokens);
        for (int64_t p = 0; p <= s.positions[t] / kPageTokens; ++p)
            within("tables", s.tables[s.sequences[t] * width + p], c.pages);
    }
    nb::gil_scoped_release release;
    self.decoder.step(s);
}

}  // namespace

void bind_runtime(nb::module_& m) {
    m.attr("PAGE_TOKENS") = kPageTokens;
    bind_linears(m);
    nb::class_<BoundDecoder>(m, "Decoder")
        .def("__init__", &make_decoder, nb::arg("embedding").noconvert().none(), nb::arg("packed_embedding").none(),
             nb::arg("final_norm").noconvert(), nb::arg("head"), nb::arg("frequencies").noconvert(),
             nb::arg("factors").noconvert(), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"),
             nb::arg("epsilon"), nb::arg("embedding_scale"), nb::arg("attention_scale"), nb::arg("attention_cap"),
             nb::arg("logit_cap"), nb::arg("gelu"), nb::arg("pages"))
        .def_prop_ro("cache_bytes", [](const BoundDecoder& self) { return self.decoder.cache_bytes(); })
        .def_prop_ro("open_page_bytes", [](const BoundDecoder& self) { return self.decoder.open_page_bytes(); })
        .def("add_layer", &add_layer, nb::arg("attention"), nb::arg("gates"), nb::arg("ups"), nb::arg("downs"),
             nb::arg("router").none(), nb::arg("chosen"), nb::arg("renormalise"), nb::arg("attention_norm").noconvert(),
             nb::arg("mlp_norm").noconvert(), nb::arg("q_norm").noconvert().none(),
             nb::arg("k_norm").noconvert().none(), nb::arg("attention_out_norm").noconvert().none(),
             nb::arg("mlp_out_norm").noconvert().none(), nb::arg("window"), nb::arg("rotation"))
        .def("keep", &keep, nb::arg("layer"), nb::arg("cache"), nb::arg("key_scale"), nb::arg("value_scale"))
        .def("step", &step, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(),
             nb::arg("sequences").noconvert(), nb::arg("tables").noconvert(), nb::arg("contexts").noconvert(),
             nb::arg("rows").noconvert(),
             nb::arg("logits").noconvert(), nb::arg("eight_bit"), nb::arg("threads"));
}

}  // namespace compress
