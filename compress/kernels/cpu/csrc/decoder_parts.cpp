// What a decoder computes between its products, a row at a time: norms, rotation, activation, 8-bit inputs, the cache.
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

inline uint16_t narrowed(float value) {  // nearest bfloat16, ties to even
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline void put(void* memory, bool bfloat16, int64_t at, float value) {
    if (bfloat16)
        static_cast<uint16_t*>(memory)[at] = narrowed(value);
    else
        static_cast<float*>(memory)[at] = value;
}

}  // namespace

// The token's row of x to 8 bits: each block by its largest magnitude. A block of zeros has scale 0.
void quantize_inputs(const float* x, int64_t columns, int64_t token, const Quantized& out) {
    typedef int8_t codes __attribute__((vector_size(LANES)));
    const int64_t blocks = out.blocks;
    int8_t* q = out.q + token * out.width;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * out.block, end = begin + out.block;
        vf high = {}, poison = {};
        for (int64_t k = begin; k < end && k < columns; k += LANES) {
            const vf v = load_some(x + k, columns - k), magnitude = v < 0 ? -v : v;
            high = magnitude > high ? magnitude : high;
            poison += v * 0;  // what is not finite makes the scale NaN, and so shows in the output
        }
        const float most = largest(high), scale = most / 127 + sum(poison), inverse = most > 0 ? 127 / most : 0;
        vi total = {};
        for (int64_t k = begin; k < end; k += LANES) {
            const vf v = k < columns ? load_some(x + k, columns - k) : vf{};
            const vi code = __builtin_convertvector(clamp(round_even(v * inverse), broadcast(-127), broadcast(127)), vi);
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
        const vf g = load_some(gate + i, count - i), e = exp_negative(g < 0 ? g : -g);
        const vf sigmoid = (g < 0 ? e : broadcast(1)) / (1 + e);
        store_some(out + i, g * sigmoid * load_some(up + i, count - i), count - i);
    }
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
    for (int64_t h = 0; h < cache.kv_heads; ++h) {
        const int64_t head = (page * cache.kv_heads + h) * cache.dim * kPageTokens;
        for (int64_t d = 0; d < cache.dim; ++d) {
            put(cache.keys, cache.bfloat16, head + d * kPageTokens + slot, k[h * cache.dim + d]);
            put(cache.values, cache.bfloat16, head + slot * cache.dim + d, v[h * cache.dim + d]);
        }
    }
}

}  // namespace ISA
}  // namespace compress
