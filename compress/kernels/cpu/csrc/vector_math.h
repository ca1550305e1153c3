// Elementary functions of registers, and what reduces one.
#pragma once
#include "simd.h"

namespace compress {
namespace ISA {

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

static inline float largest(vf v) {
    float best = v[0];
    for (int l = 1; l < LANES; ++l) best = v[l] > best ? v[l] : best;
    return best;
}

}  // namespace ISA
}  // namespace compress
