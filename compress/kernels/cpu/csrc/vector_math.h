// Elementary functions of registers, and what reduces one.
#pragma once
#include "simd.h"

namespace compress {
namespace ISA {

// A register of what is left of an array: `count` floats at most, zeros after them.
static inline vf load_some(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    vf v = {};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
}
static inline void store_some(float* p, vf v, int64_t count) {
    if (count >= LANES) return store(p, v);
    std::memcpy(p, &v, count * sizeof(float));
}

// e^x for x <= 0, to the last bit or two: x = n ln 2 + r, and e^r by its series up to r^6.
static inline vf exp_negative(vf x) {
    const vf lowest = broadcast(-87.0f);
    const vf kept = x < lowest ? lowest : x;  // NaN stays NaN
    const vf n = round_even(kept * 1.44269504f);
    const vf r = (kept - n * 0.693359375f) - n * -2.12194440e-4f;
    vf series = broadcast(1.0f / 720);
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf scale;
    std::memcpy(&scale, &power, sizeof scale);
    const vf zero = {};
    return x < lowest ? zero : series * scale;
}

// 1 / (1 + e^-x).
static inline vf sigmoid(vf x) {
    const vf e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : broadcast(1)) / (1 + e);
}

// By its series to x^11 near zero, where the quotient would cancel.
static inline vf tanh_of(vf x) {
    const vf size = x < 0 ? -x : x, e = exp_negative(-2 * size), far = (1 - e) / (1 + e), square = x * x;
    vf series = broadcast(-1382.0f / 155925);
    series = series * square + 62.0f / 2835;
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = x + x * square * series;
    return size < broadcast(0.25f) ? series : x < 0 ? -far : far;
}

}  // namespace ISA
}  // namespace compress
