// Registers of bfloat16 numbers.
#pragma once
#include "scalars.h"
#include "simd.h"

namespace compress {
namespace ISA {

typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

static inline vf load_bfloat16(const uint16_t* p) {
    halves v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}

}  // namespace ISA
}  // namespace compress
