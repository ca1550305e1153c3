// Registers of bfloat16 numbers.
#pragma once
#include "scalars.h"
#include "simd.h"

namespace compress {
namespace ISA {

typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

static inline vf load_bfloat16(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    halves v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
#endif
}

}  // namespace ISA
}  // namespace compress
