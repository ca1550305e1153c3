// What a decoder computes between its products, a row at a time: norms, rotation, activation, 8-bit inputs, the cache.
#include "bfloat16.h"
#include "kernels.h"
#include "small_floats.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

inline vf load_some(const float* p, int64_t count) {
    vf v = {};
    std::memcpy(&v, p, (count < LANES ? count : LANES) * sizeof(float));
    return v;
}
inline void store_some(float* p, vf v, int64_t count) {
    std::memcpy(p, &v, (count < LANES ? count : LANES) * sizeof(float));
}

// One token and head of the keys or the values: `stride` elements between dimensions.
template <typename T>
inline void put_plain(T* memory, int64_t stride, const float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d)
        if constexpr (sizeof(T) == 2)
            memory[d * stride] = narrowed(x[d]);
        else
            memory[d * stride] = x[d];
}

inline uint16_t upper_half(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return uint16_t(word >> 16);
}
struct Grid {
    uint16_t step, low;  // bfloat16 bits, rounded so that the grid covers the values
    float from, inverse;
};

// Of `levels` steps over the values. What is not finite makes the step NaN, and so shows in the output.
inline Grid grid_of(const float* x, int64_t dim, float levels) {
    float low = x[0], high = x[0], poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
        low = x[d] < low ? x[d] : low;
        high = x[d] > high ? x[d] : high;
        poison += x[d] * 0;
    }
    Grid grid;
    grid.low = upper_half(low);
    if (widened(grid.low) > low) ++grid.low;  // only of negative numbers: one further from zero
    grid.from = widened(grid.low);
    const float step = (high - grid.from) / levels;
    grid.step = upper_half(step + poison);
    if (widened(grid.step) < step) ++grid.step;
    const float rounded = widened(grid.step);
    grid.inverse = rounded > 0 ? 1 / rounded : 0;
    return grid;
}

inline uint8_t code_of(const Grid& grid, float x, int levels) {
    const float code = (x - grid.from) * grid.inverse + 0.5f;
    return code > 0 ? code < float(levels) ? uint8_t(code) : uint8_t(levels) : 0;
}

inline void put_codes(uint8_t* memory, int64_t stride, uint16_t* grids, int64_t slot, const float* x, int64_t dim,
                      bool nibbles) {
    const int levels = nibbles ? 15 : 255;
    const Grid grid = grid_of(x, dim, float(levels));
    grids[slot] = grid.step;
    grids[kPageTokens + slot] = grid.low;
    const int64_t half = dim / 2;
    if (!nibbles)
        for (int64_t d = 0; d < dim; ++d) memory[d * stride] = code_of(grid, x[d], levels);
    else
        for (int64_t d = 0; d < half; ++d)
            memory[d * stride] =
                uint8_t(code_of(grid, x[d], levels) | code_of(grid, x[d + half], levels) << 4);
}

// Codes and scales of blocks of one token and head; `stride` elements between dimensions and between blocks.
inline void put_nvfp4(uint8_t* codes, uint8_t* scales, int64_t stride, uint16_t* grids, int64_t slot, const float* x,
                      int64_t dim) {
    float high = 0, poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const float size = x[d] < 0 ? -x[d] : x[d];
        high = size > high ? size : high;
        poison += x[d] * 0;
    }
    const float least = high / (kLargestE2m1 * kLargestE4m3);
    uint16_t step = upper_half(least + poison);
    if (widened(step) < least) ++step;
    grids[slot] = step;
    const float token = widened(step), inverse = token > 0 ? 1 / token : 0;
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; ++d) codes[d * stride] = 0;
    for (int64_t block = 0; block < dim; block += kFloatBlock) {
        float most = 0;
        for (int64_t d = block; d < block + kFloatBlock; ++d) {
            const float size = x[d] < 0 ? -x[d] : x[d];
            most = size > most ? size : most;
        }
        const uint8_t scale = e4m3_of(most * inverse / kLargestE2m1);
        scales[block / kFloatBlock * stride] = scale;
        const float whole = from_e4m3(scale) * token, each = whole > 0 ? 1 / whole : 0;
        for (int64_t d = block; d < block + kFloatBlock; ++d)
            codes[d % half * stride] |= uint8_t(e2m1_of(x[d] * each) << (d < half ? 0 : 4));
    }
}

inline void put_fp8(uint8_t* memory, int64_t stride, const float* x, int64_t dim, float scale) {
    for (int64_t d = 0; d < dim; ++d) memory[d * stride] = e4m3_of(x[d] / scale);
}

}  // namespace

namespace {

// The largest |x| from `begin` to `end`; NaN where something is not finite, so that it shows in the output.
inline float range_of(const float* x, int64_t begin, int64_t end) {
    vf high = {}, poison = {};
    for (int64_t k = begin; k < end; k += LANES) {
        const vf v = load_some(x + k, end - k), magnitude = v < 0 ? -v : v;
        high = magnitude > high ? magnitude : high;
        poison += v * 0;
    }
    return largest(high) + sum(poison);
}

// As formats.inputs has it: symmetric, a row of zeros gets a scale that divides.
inline float token_scale(const float* x, int64_t columns) {
    const float scale = range_of(x, 0, columns) / 127.5f;
    return scale == 0 ? 0x1p-23f : scale;
}
inline vf token_codes(vf x, float scale) {
    return clamp(round_even(x / broadcast(scale)), broadcast(-128), broadcast(127));
}

}  // namespace

// One token's inputs as its format rounds them, in place.
void round_inputs(float* x, int64_t columns) {
    const float scale = token_scale(x, columns);
    for (int64_t k = 0; k < columns; k += LANES)
        store_some(x + k, token_codes(load_some(x + k, columns - k), scale) * scale, columns - k);
}

// The token's row of x to 8 bits: each block by its largest magnitude, or all of them by the token's. A block of zeros
// has scale 0.
void quantize_inputs(const float* x, int64_t columns, int64_t token, const Quantized& out) {
    typedef int8_t codes __attribute__((vector_size(LANES)));
    const int64_t blocks = out.blocks;
    int8_t* q = out.q + token * out.width;
    const float whole = out.by_token ? token_scale(x, columns) : 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * out.block, end = begin + out.block;
        const float most = out.by_token ? 0 : range_of(x, begin, end < columns ? end : columns);
        const float scale = out.by_token ? whole : most / 127, inverse = most > 0 ? 127 / most : 0;
        vi total = {};
        for (int64_t k = begin; k < end; k += LANES) {
            const vf v = k < columns ? load_some(x + k, columns - k) : vf{};
            const vf level = out.by_token ? token_codes(v, whole)
                                          : clamp(round_even(v * inverse), broadcast(-127), broadcast(127));
            const vi code = __builtin_convertvector(level, vi);
            const codes narrow = __builtin_convertvector(code, codes);
            std::memcpy(q + k, &narrow, sizeof narrow);
            total += code;
        }
        int32_t sum = 0;
        for (int l = 0; l < LANES; ++l) sum += total[l];
        out.scale[token * blocks + b] = scale;
        out.sum[token * blocks + b] = sum;
    }
}

// out = weight * x / sqrt(mean(x^2) + epsilon); out may be x.
void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
    vf squares = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const vf v = load_some(x + i, count - i);
        squares += v * v;
    }
    const float factor = 1 / __builtin_sqrtf(sum(squares) / float(count) + epsilon);
    for (int64_t i = 0; i < count; i += LANES)
        store_some(out + i, load_some(x + i, count - i) * factor * load_some(weight + i, count - i), count - i);
}

// out = up * gate / (1 + e^-gate); out may be gate.
void swiglu(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vf g = load_some(gate + i, count - i);
        store_some(out + i, g * sigmoid(g) * load_some(up + i, count - i), count - i);
    }
}

// out = up * gelu(gate) in its form with a tanh, of which (1 + tanh u) / 2 = 1 / (1 + e^-2u); out may be gate.
void geglu(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vf g = load_some(gate + i, count - i), u = 0.7978845608f * (g + 0.044715f * g * g * g);
        store_some(out + i, g * sigmoid(2 * u) * load_some(up + i, count - i), count - i);
    }
}

// x = cap * tanh(x / cap).
void soft_cap(float* x, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += LANES)
        store_some(x + i, cap * tanh_of(load_some(x + i, count - i) / cap), count - i);
}

// Rotary position embedding of one head: halves (a, b) become (a cos - b sin, b cos + a sin).
void rotate(float* head, const float* cosine, const float* sine, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const vf a = load_some(head + i, half - i), b = load_some(head + half + i, half - i);
        const vf c = load_some(cosine + i, half - i), s = load_some(sine + i, half - i);
        store_some(head + i, a * c - b * s, half - i);
        store_some(head + half + i, b * c + a * s, half - i);
    }
}

// A token's keys and values (kv_heads, dim) into a slot of a page.
void append(const Cache& cache, const float* k, const float* v, int64_t page, int64_t slot) {
    const int64_t dim = cache.dim;
    for (int64_t h = 0; h < cache.kv_heads; ++h, k += dim, v += dim) {
        const int64_t head = page * cache.kv_heads + h, at = head * kPageTokens * cache.head_bytes();
        uint8_t *keys = static_cast<uint8_t*>(cache.keys) + at, *values = static_cast<uint8_t*>(cache.values) + at;
        uint16_t *key_grid = cache.key_grids + head * cache.grids() * kPageTokens;
        uint16_t *value_grid = cache.value_grids + head * cache.grids() * kPageTokens;
        switch (cache.type) {
            case CacheType::float32:
                put_plain(reinterpret_cast<float*>(keys) + slot, kPageTokens, k, dim);
                put_plain(reinterpret_cast<float*>(values) + slot * dim, 1, v, dim);
                break;
            case CacheType::bfloat16:
                put_plain(reinterpret_cast<uint16_t*>(keys) + slot, kPageTokens, k, dim);
                put_plain(reinterpret_cast<uint16_t*>(values) + slot * dim, 1, v, dim);
                break;
            case CacheType::fp8:
                put_fp8(keys + slot, kPageTokens, k, dim, cache.key_scale);
                put_fp8(values + slot * dim, 1, v, dim, cache.value_scale);
                break;
            case CacheType::nvfp4: {
                const int64_t half = dim / 2, blocks = dim / kFloatBlock;
                put_nvfp4(keys + slot, keys + half * kPageTokens + slot, kPageTokens, key_grid, slot, k, dim);
                put_nvfp4(values + slot * half, values + half * kPageTokens + slot * blocks, 1, value_grid, slot, v, dim);
                break;
            }
            case CacheType::int8:
            case CacheType::int4: {
                const bool nibbles = cache.type == CacheType::int4;
                put_codes(keys + slot, kPageTokens, key_grid, slot, k, dim, nibbles);
                put_codes(values + slot * cache.head_bytes(), 1, value_grid, slot, v, dim, nibbles);
            }
        }
    }
}

}  // namespace ISA
}  // namespace compress
