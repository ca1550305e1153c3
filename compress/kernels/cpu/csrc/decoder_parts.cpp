// What a decoder computes between its products, a row at a time: norms, rotation, activation.
#include "kernels.h"
#include "vector_math.h"

namespace compress {
namespace ISA {

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
