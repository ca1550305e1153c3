// Inputs of a product before it: rounded as the weight's format has it (compress.formats.inputs), in place or to 8-bit
// integers, or to 8 bits for the product's own sake.
#include "kernels.h"
#include "small_floats.h"
#include "vector_math.h"

namespace compress {
namespace ISA {
namespace {

constexpr float kLeastScale = 0x1p-23f, kNarrowRange = 1e-5f, kZeroBlock = 0.125f;

// A block whose largest |x| is beyond kFar times the mean of the others (found by the codes) keeps 8 bits up to kKept times
// the mean. So heavy tails, as gated activations have, mostly stay as they are, and a channel far above the others takes
// none of their bits.
constexpr int kFar = 24, kKept = 8;

// The largest |x| from `begin` to `end`; NaN where something is not finite, so that it shows in the output.
inline float range_of(const float* x, int64_t begin, int64_t end) {
    constexpr int32_t kInfinity = 0x7f800000;
    vi high = {};  // floats without a sign are in the order of their bits, and what is not finite comes last
    for (int64_t k = begin; k < end; k += LANES) {
        const vf v = load_some(x + k, end - k);
        const vi word = (vi)v & 0x7fffffff;
        high = word > high ? word : high;
    }
    const int32_t most = largest(high);
    return float_of(uint32_t(most >= kInfinity ? kInfinity + 1 : most));
}

// The mean |x| of those up to `most`; 0 where there are none.
inline float mean_up_to(float most, const float* x, int64_t begin, int64_t end) {
    vf total = {}, count = {};
    for (int64_t k = begin; k < end; k += LANES) {
        const vf v = load_some(x + k, end - k), magnitude = v < 0 ? -v : v;
        total += magnitude <= most ? magnitude : vf{};
        count += magnitude <= most ? broadcast(1) : vf{};
    }
    const float others = sum(count) - float((begin - end) & (LANES - 1));  // without what lies beyond the end
    return others > 0 ? sum(total) / others : 0;
}

// The octave of `most`, or the next above from 1.75 of it on, put on the octave of the largest code.
inline float power_of_two(float most, int largest_octave) {
    if (!(most - most == 0)) return most;
    const int octave = int(bits_of(most) >> 23) - 127 + ((bits_of(most) & 0x7fffff) >= 0x600000) - largest_octave;
    return octave <= -127 ? 0x1p-127f : float_of(uint32_t(octave + 127) << 23);
}

// What inputs are divided by before they are rounded; NaN where one of them is not finite.
inline float step_of(const float* x, int64_t begin, int64_t end, const InputFormat& format) {
    const float most = range_of(x, begin, end);
    switch (format.kind) {
        case Rounding::mxfp4: return power_of_two(most, 2);
        case Rounding::mxfp8: return power_of_two(most, 8);
        case Rounding::nvfp4: {
            const float step = from_e4m3(e4m3_of(format.scale * (most / kLargestE2m1)));
            return (step == 0 ? kZeroBlock : step) / format.scale;
        }
        default: {
            if (format.scale != 0) return format.scale + most * 0;
            const float step = most / (format.kind == Rounding::fp8 ? kLargestE4m3 : 127.5f);
            return step == 0 ? kLeastScale : step;
        }
    }
}

// To the nearest code, ties to even; beyond the largest the largest.
inline vf nearest_e4m3(vf x) {
    const vf above = x < -kLargestE4m3 ? broadcast(-kLargestE4m3) : x;
    const vf kept = above > kLargestE4m3 ? broadcast(kLargestE4m3) : above;
    vi word;
    std::memcpy(&word, &kept, sizeof word);
    const vi rounded = (word + 0x7ffff + (word >> 20 & 1)) & int32_t(0xfff00000);
    vf normal;
    std::memcpy(&normal, &rounded, sizeof normal);
    const vf magic = broadcast(24576.0f);  // floats near it are 2^-9 apart, as E4M3's subnormals are
    const vf magnitude = kept < 0 ? -kept : kept;
    return magnitude < 0x1p-6f ? (kept + magic) - magic : normal;
}

inline vf nearest_e2m1(vf x) {
    const vf magnitude = x < 0 ? -x : x;
    const vf size = magnitude > kLargestE2m1 ? broadcast(kLargestE2m1) : magnitude;
    const vf coarse = size < 4 ? broadcast(0x1.8p23f) : broadcast(0x1.8p24f);
    const vf magic = size < 2 ? broadcast(0x1.8p22f) : coarse;  // floats near it are as far apart as codes of this size
    const vf level = (size + magic) - magic;
    return x < 0 ? -level : level;
}

inline vf nearest_integer(vf x) {
    return clamp(round_even(x), broadcast(-128), broadcast(127));  // of numbers: what is none has a step of NaN
}

inline vf nearest(vf x, Rounding kind) {
    switch (kind) {
        case Rounding::fp8:
        case Rounding::mxfp8: return nearest_e4m3(x);
        case Rounding::nvfp4:
        case Rounding::mxfp4: return nearest_e2m1(x);
        default: return nearest_integer(x);
    }
}

// 127 steps of each sign, found by multiplication with what torch makes of 127 / most.
inline float narrow_factor(const float* x, int64_t begin, int64_t end) {
    const float most = range_of(x, begin, end);
    return 1 / (most < kNarrowRange ? kNarrowRange : most) * 127;
}

typedef int8_t codes __attribute__((vector_size(LANES)));

// Takes from `code`, of the inputs from column `k` on, what is beyond 8 bits: to the token's outliers.
inline vi take_high(vi code, int64_t k, int64_t token, float scale, const Quantized& out) {
    const vi high = ((code + 64) >> 7) & ((code > 127) | (code < -127));
    const codes narrowed = __builtin_convertvector(high, codes);
    for (int64_t l = 0; l < LANES; l += 4) {
        const int32_t sum = high[l] + high[l + 1] + high[l + 2] + high[l + 3];
        Outlier outlier{int32_t((k + l) / 4), 0, sum, 128 * scale};
        std::memcpy(&outlier.high, reinterpret_cast<const int8_t*>(&narrowed) + l, sizeof outlier.high);
        if (outlier.high) out.outliers[token * out.most_outliers() + out.outlier_count[token]++] = outlier;
    }
    return code - high * 128;
}

}  // namespace

// One token's inputs, in place.
void round_inputs(float* x, int64_t columns, const InputFormat& format) {
    const int64_t group = format.group ? format.group : columns;
    for (int64_t begin = 0, end; begin < columns; begin = end) {
        end = begin + group < columns ? begin + group : columns;
        if (format.kind == Rounding::narrow) {
            const float factor = narrow_factor(x, begin, end);
            for (int64_t k = begin; k < end; k += LANES)
                store_some(x + k, nearest_integer(load_some(x + k, end - k) * factor) / factor, end - k);
            continue;
        }
        const float step = step_of(x, begin, end, format);
        for (int64_t k = begin; k < end; k += LANES)
            store_some(x + k, nearest(load_some(x + k, end - k) / step, format.kind) * step, end - k);
    }
}

// A block whose largest |x| is far from the others: what is beyond 8 bits goes to the token's outliers.
static __attribute__((noinline)) void quantize_apart(const float* x, int64_t columns, int64_t token, int64_t b,
                                                     float most, const Quantized& out) {
    const int64_t begin = b * out.block, end = begin + out.block, last = end < columns ? end : columns;
    const float mean = mean_up_to(kKept * mean_up_to(most, x, begin, last), x, begin, last);
    const float limit = kKept * mean > most / 128 ? kKept * mean : most / 128, scale = limit / 127;
    const vf inverse = broadcast(127 / limit), largest_code = broadcast(127 * 128);
    vi total = {};
    for (int64_t k = begin; k < end; k += LANES) {
        const vf v = k < columns ? load_some(x + k, columns - k) : vf{};
        const vi code = __builtin_convertvector(clamp(round_even(v * inverse), -largest_code, largest_code), vi);
        const vi low = take_high(code, k, token, scale, out);
        const codes narrowed = __builtin_convertvector(low, codes);
        std::memcpy(out.q + out.at(token, b) * out.block + k - begin, &narrowed, sizeof narrowed);
        total += low;
    }
    out.scale[out.at(token, b)] = scale;
    out.sum[out.at(token, b)] = sum(total);
}

// The token's row of x to 8 bits: as the format has it where that is one of integers, else block by block, see Quantized.
// A block of zeros has scale 0.
void quantize_inputs(const float* x, int64_t columns, int64_t token, const Quantized& out) {
    const bool defined = out.inputs.integers(), narrow = out.inputs.kind == Rounding::narrow;
    const float factor = narrow ? narrow_factor(x, 0, columns) : 0;
    const float whole = narrow ? 1 / factor : defined ? step_of(x, 0, columns, out.inputs) : 0;
    out.outlier_count[token] = 0;
    for (int64_t b = 0; b < out.blocks; ++b) {
        const int64_t begin = b * out.block, end = begin + out.block, last = end < columns ? end : columns;
        const float most = defined ? 0 : range_of(x, begin, last);
        const float scale = defined ? whole : most / 127, inverse = most > 0 ? 127 / most : 0;
        int8_t* const q = out.q + out.at(token, b) * out.block;
        vi total = {}, magnitudes = {};
        for (int64_t k = begin; k < end; k += LANES) {
            const vf v = k < columns ? load_some(x + k, columns - k) : vf{};
            const vf level = defined ? nearest_integer(narrow ? v * factor : v / broadcast(whole))
                                     : clamp(round_even(v * inverse), broadcast(-127), broadcast(127));
            const vi code = __builtin_convertvector(level, vi);
            const codes narrowed = __builtin_convertvector(code, codes);
            std::memcpy(q + k - begin, &narrowed, sizeof narrowed);
            total += code;
            magnitudes += code < 0 ? -code : code;
        }
        out.scale[out.at(token, b)] = scale;
        out.sum[out.at(token, b)] = sum(total);
        if (most > 0 && (sum(magnitudes) - 127) * kFar < 127 * (last - begin - 1))
            quantize_apart(x, columns, token, b, most, out);
    }
}

}  // namespace ISA
}  // namespace compress
