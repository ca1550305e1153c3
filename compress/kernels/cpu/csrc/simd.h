// A register of floats, once per instruction set. Written with the vector extensions of GCC and Clang so that one
// source serves every instruction set; each kernel file is compiled once per set with LANES and ISA defined.
//
// Nothing here or in the kernel files may use inline functions of the C++ library: the linker keeps one copy of
// those, and it could keep the one compiled for a processor that this machine does not have.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace compress {
namespace ISA {

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vi load_words(const int32_t* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vf load_bytes(const int8_t* p) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vf);
}
// Bytes, each in a lane.
static inline vi load_unsigned(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vi v;
    for (int l = 0; l < LANES; ++l) v[l] = p[l];
    return v;
#endif
}
static inline vf to_floats(vi v) { return __builtin_convertvector(v, vf); }
static inline vf broadcast(float x) { return x - vf{}; }

// Both comparisons are false for NaN, so a NaN becomes `lo`: a code is always within its range.
static inline vf clamp(vf x, vf lo, vf hi) {
    x = x > lo ? x : lo;
    return x < hi ? x : hi;
}

// Round half to even for |x| < 2^22: at 1.5 * 2^23 the spacing of floats is one, and the addition rounds to even.
static inline vf round_even(vf x) {
    const vf magic = broadcast(12582912.0f);
    return (x + magic) - magic;
}

static inline bool any_nonzero(vf v) {
    bool any = false;
    for (int l = 0; l < LANES; ++l) any |= v[l] != 0;
    return any;
}

// result[lane] = v[index[lane]].
static inline vf permute(vf v, vi index) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
    return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
    vf result;
    for (int l = 0; l < LANES; ++l) result[l] = v[index[l]];
    return result;
#endif
}

// Lane 0: all lanes combined, two and two.
template <typename Combine>
static inline vf folded(vf v, Combine combine) {
    vi lanes;
    for (int l = 0; l < LANES; ++l) lanes[l] = l;
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2) v = combine(v, permute(v, (lanes + n) & (LANES - 1)));
    return v;
}
static inline float sum(vf v) {
    return folded(v, [](vf a, vf b) { return a + b; })[0];
}
static inline float largest(vf v) {
    return folded(v, [](vf a, vf b) { return a > b ? a : b; })[0];
}
static inline int32_t sum(vi v) {
    return ((vi)folded((vf)v, [](vf a, vf b) { return (vf)((vi)a + (vi)b); }))[0];
}
static inline int32_t largest(vi v) {
    return ((vi)folded((vf)v, [](vf a, vf b) { return (vf)((vi)a > (vi)b ? (vi)a : (vi)b); }))[0];
}

}  // namespace ISA
}  // namespace compress
