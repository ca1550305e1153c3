// Which instruction set the kernels use: the best that this processor has, or the one that COMPRESS_ISA names.
#pragma once
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace compress {

#define COMPRESS_KERNELS(isa, lanes)                                                                      \
    Kernels {                                                                                             \
        #isa, lanes, isa::gptq_scratch, isa::gptq_tile,      \
            isa::descent_scratch, isa::descent_tile, isa::rounding_scratch, isa::rounding_tile,           \
            isa::search_scratch, isa::search_tile, isa::moment_scratch, isa::moment_panel,                \
            isa::sparse_scratch, isa::sparse_tile, isa::attention_scratch, isa::attention_head,           \
            isa::product_scratch, isa::product_strips, isa::quantize_inputs, isa::round_inputs,           \
            isa::rms_norm, isa::swiglu, isa::geglu, isa::soft_cap, isa::rotate, isa::append,              \
            isa::close_page, isa::paged_scratch, isa::paged_tiles, isa::paged_attention                   \
    }

// Best last; the lane counts are those CMakeLists.txt compiles with.
inline const std::vector<Kernels>& available_kernels() {
    static const std::vector<Kernels> found = [] {
        std::vector<Kernels> list{COMPRESS_KERNELS(portable, 4)};
#if defined(COMPRESS_X86)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
            list.push_back(COMPRESS_KERNELS(avx2, 8));
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        {
            list.push_back(COMPRESS_KERNELS(avx512, 16));
            if (__builtin_cpu_supports("avx512vnni")) {
                list.push_back(COMPRESS_KERNELS(avx512vnni, 16));
                if (__builtin_cpu_supports("avx512bf16")) list.push_back(COMPRESS_KERNELS(avx512bf16, 16));
            }
        }
#endif
        return list;
    }();
    return found;
}

inline const Kernels& kernels_named(const std::string& name) {
    std::string known;
    for (const Kernels& k : available_kernels()) {
        if (name == k.name) return k;
        known += (known.empty() ? "" : ", ") + std::string(k.name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here; available: " + known);
}

inline std::atomic<const Kernels*>& active_slot() {
    static std::atomic<const Kernels*> active{nullptr};
    return active;
}

inline const Kernels& active_kernels() {
    if (const Kernels* k = active_slot().load()) return *k;
    const char* forced = std::getenv("COMPRESS_ISA");
    const Kernels& k = forced && *forced ? kernels_named(forced) : available_kernels().back();
    active_slot().store(&k);
    return k;
}

}  // namespace compress
