// Weights repacked once, at load, into the layout of linear.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear.h"
#include "memory.h"

namespace compress {

class PackedLinear {
public:
    Linear view{};

    // Codes as compressed-tensors packs them: int32 words (rows, ceil(columns * bits / 32)), stored code = signed code
    // + 2^(bits-1), bit i * bits on. zero_point (rows, groups) signed or null. group divides columns and is a multiple
    // of 32, or is columns itself.
    //
    // Codes that are floats lie in words likewise, as they are; group is a multiple of 16 for those of 4 bits.
    struct Source {
        const int32_t* words;
        const void* scale;
        ScaleType scale_type, value_type;
        const int8_t* zero_point;
        int64_t rows, columns, group;
        int bits;
        Coding coding;
        const float* table;  // (kTableSize) of Coding::table
        float factor, divisor;
        InputFormat inputs;
    };
    // std::invalid_argument where a code of FP8 is no number.
    PackedLinear(const Source&, int threads);

    // A plain weight (rows, columns) as it is, bfloat16 bits or float32; with `group` not 0 in 8 bits, rounded to
    // nearest, symmetric, one float32 scale per group of columns.
    PackedLinear(const void* weight, bool bfloat16, int64_t rows, int64_t columns, int64_t group, int threads);

    void set_bias(const float* bias) {
        bias_.assign(bias, bias + view.rows);
        view.bias = bias_.data();
    }
    int64_t bytes() const { return bytes_; }
    // One row of a packed weight as the values that its codes stand for: out (columns).
    void decode_row(int64_t row, float* out) const;

private:
    void allocate(int64_t rows, int64_t columns, int64_t group, int bits, ScaleType type, bool zeros);

    std::shared_ptr<uint8_t> codes_, scales_, zeros_;
    std::vector<float> bias_;
    int64_t bytes_ = 0;
};

}  // namespace compress
