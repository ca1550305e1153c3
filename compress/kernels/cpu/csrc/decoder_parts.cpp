// What a decoder computes between its products, a row at a time: norms, rotation, activation, 8-bit inputs.
#include "kernels.h"
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

}  // namespace ISA
}  // namespace compress
