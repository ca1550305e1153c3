// A linear's weight as the runtime's products read it, and their arguments.
//
// Rows are interleaved in strips of 16, so that a product never adds across a register. A strip holds its columns in
// chunks of 32, and a chunk of b-bit codes is b lines of 64 bytes: byte 4 * row + j of a line belongs to `row`. Lines
// of four neighbouring strips, a bundle, lie side by side, and so do their scales: a product that takes a bundle at a
// time reads one stream of memory. A chunk has eight quads of columns, quad i being columns 4 i to 4 i + 3, j the place
// within a quad:
//     8 bits   line i: quad i
//     4 bits   line i / 2, bits 4 (i % 2) on
//     2 bits   line i / 4, bits 2 (i % 4) on
//     3 bits   line 0, bit i: the high one; lines 1 and 2: the low two, as above
//     5 bits   line 0, bit i: the high one; lines 1 to 4: the low four, as above
//     6 bits   the same twice, four quads each: a line of the high two, bits 2 (i % 4) on, and two of the low four
// A product reads lines in the order of memory: what is read in another order comes at half the speed.
// FP8 codes lie as pairs of columns instead: byte 2 * row + j % 2 of half j / 2 of line i.
// Integer codes are unsigned, weight = (code - zero) * scale; other codes are floats, FP8 E4M3 in 8 bits or entries of a
// table in 4, weight = value * scale. Either is rounded to `value_type`, as the format defines it. bfloat16 weights lie
// as pairs of columns [16][16 rows][2] in a chunk, float32 ones as [32][16 rows], strip after strip.
#pragma once
#include <cstdint>

namespace compress {

enum class ScaleType { float32, float16, bfloat16, e4m3, e8m0 };  // e8m0: the exponent of a power of two, plus 127
enum class Coding { integer, e4m3, table };

// How a format rounds the inputs of a linear, before the product; as compress.formats.inputs has it.
enum class Rounding { none, int8, narrow, fp8, nvfp4, mxfp4, mxfp8 };
struct InputFormat {
    Rounding kind;
    int64_t group;  // inputs that share a scale; 0: all of a token
    float scale;    // calibrated: the scale itself, or what multiplies those of NVFP4; 0: none, scales follow the inputs
    bool integers() const { return kind == Rounding::int8 || kind == Rounding::narrow; }
};

constexpr int kStripRows = 16;
constexpr int kChunk = 32;  // columns of a chunk: the unit of storage, and what divides every group but NVFP4's of 16
constexpr int kTableSize = 16;
constexpr int kStripsTogether = 4;

// Where the parts of a code of 2 to 6 or 8 bits lie in a chunk: its low bits, `mask`, from bit `shift` of line `line` on;
// its high ones, `high_mask` of the code, if there are any, in `high_line`, `up` bits lower there (higher if negative).
struct CodePlace {
    int line, shift, mask, high_line, up, high_mask;
};
static constexpr CodePlace place_of(int bits, int quad) {
    const int low = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits, high = bits - low;
    const int quads = high ? 8 / high : 8;  // that a line of high bits holds
    const int first = quad / quads * (1 + quads * low / 8), within = quad % quads;
    return {first + (high > 0) + within * low / 8, within * low % 8, (1 << low) - 1,
            first, low - within * high, ((1 << high) - 1) << low};
}

struct Linear {
    int bits;                // 2 to 6 or 8 for codes, 16 for bfloat16, 32 for float32
    int zero;                // the zero point of all codes where `zeros` is null
    int64_t rows, columns;   // of the weight
    int64_t padded;          // columns stored: a multiple of kChunk
    int64_t group, groups;   // columns that share a scale
    Coding coding;
    ScaleType scale_type, value_type;
    float factor, divisor;  // a scale in E4M3 is multiplied by one and divided by the other
    float table[kTableSize];
    const uint8_t* codes;  // [bundle][chunk][bits][strip of the bundle][64]; from 16 bits on [strip][chunk][bits][64]
    const void* scales;    // [bundle][group][strip of the bundle][16]
    const uint8_t* zeros;  // likewise, or null
    const float* bias;     // (rows) or null
    InputFormat inputs;

    int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
    int64_t strip_bytes() const { return padded * kStripRows * bits / 8; }
    bool packed() const { return bits <= 8; }
    bool takes_eight_bit() const { return packed() && coding == Coding::integer; }
    static int64_t bundle_of(int64_t strip) { return strip / kStripsTogether * kStripsTogether; }  // its first strip
    // Strips of the bundle that `strip` is in.
    int64_t together(int64_t strip) const {
        const int64_t left = strips() - bundle_of(strip);
        return left < kStripsTogether ? left : kStripsTogether;
    }
    // Where a strip's first line of codes begins; the next ones follow at 64 * together(strip) bytes.
    int64_t line_offset(int64_t strip) const { return bundle_of(strip) * strip_bytes() + (strip - bundle_of(strip)) * 64; }
    // Index of a strip's 16 scales of a group.
    int64_t scale_index(int64_t strip, int64_t at_group) const {
        return (bundle_of(strip) * groups + at_group * together(strip) + strip - bundle_of(strip)) * kStripRows;
    }
    // The longest run of columns, of those that a product with 8-bit inputs may take together, with one scale.
    int64_t block() const { return group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32; }
};

// What outliers of a block are beyond its 8 bits, in a quad of columns with one at least.
struct Outlier {
    int32_t quad, high, sum;  // its columns begin at 4 * quad; a byte for each of them; their sum
    float scale;              // what a unit of them counts
};

// Inputs in 8 bits: x = q * scale, one scale per token and block of columns, plus what `outliers` add; zero beyond the
// columns. inputs: where a format of integers defines how, without outliers; else none, and a block goes by its largest
// |x|, or, where that is far from the others, by theirs.
struct Quantized {
    int8_t* q;               // (blocks, tokens, block): what a product reads together lies together
    float* scale;            // (blocks, tokens)
    int32_t* sum;            // (blocks, tokens): sums of q
    Outlier* outliers;       // (tokens, most_outliers), by columns
    int32_t* outlier_count;  // (tokens)
    int64_t tokens, block, blocks;  // block is a multiple of kChunk
    InputFormat inputs;

    int64_t most_outliers() const { return blocks * block / 4; }
    int64_t at(int64_t token, int64_t b) const { return b * tokens + token; }
    // The same, counted from `token` on.
    Quantized from(int64_t token) const {
        Quantized rest = *this;
        rest.q += token * block, rest.scale += token, rest.sum += token;
        rest.outliers += token * most_outliers(), rest.outlier_count += token;
        return rest;
    }
};

struct ProductArgs {
    const Linear* linear;
    const float* x;  // (tokens, x_stride)
    int64_t x_stride;
    Quantized quantized;  // what is read instead of x where `eight_bit`
    bool eight_bit;
    float* out;  // (tokens, out_stride), written, or added to
    int64_t out_stride, tokens;
    bool add;
};

}  // namespace compress
