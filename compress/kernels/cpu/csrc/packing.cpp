#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "pool.h"
#include "scalars.h"

namespace compress {
namespace {

constexpr int64_t kLine = 64;

int64_t size_of(ScaleType type) {
    return type == ScaleType::float32 ? 4 : type == ScaleType::float16 || type == ScaleType::bfloat16 ? 2 : 1;
}

// The low four nibbles of x, each in a byte of its own.
uint32_t nibbles_to_bytes(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

// Where byte `column` of a row of codes in 8 bits lies in its strip, whose lines are `line` bytes apart.
int64_t byte_at(int64_t line, int64_t row, int64_t column) { return column / 4 * line + 4 * row + column % 4; }

// A row of codes of BITS bits, packed into words, to its place of a strip with STORED bits a code.
template <int BITS, int STORED>
void pack_codes(const uint32_t* in, int64_t words, int64_t line_bytes, uint8_t* at) {
    constexpr uint32_t kCode = (1 << BITS) - 1, kBytes = 0x01010101;
    for (; words > 0; words -= BITS, in += BITS, at += STORED * line_bytes) {
        uint32_t chunk[BITS + 1] = {}, lines[STORED] = {};
        std::memcpy(chunk, in, std::min<int64_t>(words, BITS) * sizeof *in);
        for (int quad = 0; quad < 8; ++quad) {
            const int bit = quad * 4 * BITS;
            const uint32_t four = uint32_t((chunk[bit / 32] | uint64_t(chunk[bit / 32 + 1]) << 32) >> bit % 32);
            uint32_t bytes = 0;
            for (int j = 0; j < 4; ++j) bytes |= (four >> BITS * j & kCode) << 8 * j;
            const CodePlace p = place_of(STORED, quad);
            const uint32_t high = bytes & p.high_mask * kBytes;
            lines[p.line] |= (bytes & p.mask * kBytes) << p.shift;
            lines[p.high_line] |= p.up > 0 ? high >> p.up : high << -p.up;
        }
        for (int l = 0; l < STORED; ++l) std::memcpy(at + l * line_bytes, &lines[l], sizeof *lines);
    }
}

// A code of a strip.
uint32_t code_in(const uint8_t* strip, int64_t line, int bits, int64_t row, int64_t column) {
    const uint8_t* chunk = strip + column / kChunk * bits * line + 4 * row + column % 4;
    const CodePlace p = place_of(bits, int(column % kChunk / 4));
    const uint32_t low = chunk[p.line * line] >> p.shift & p.mask, high = chunk[p.high_line * line];
    return low | ((p.up > 0 ? high << p.up : high >> -p.up) & p.high_mask);
}

float scale_at(const void* scales, ScaleType type, int64_t at) {
    if (type == ScaleType::float32) return static_cast<const float*>(scales)[at];
    if (size_of(type) == 1) {
        const uint8_t byte = static_cast<const uint8_t*>(scales)[at];
        return type == ScaleType::e4m3 ? from_e4m3(byte) : byte == 0 ? 0x1p-127f : float_of(uint32_t(byte) << 23);
    }
    const uint32_t half = static_cast<const uint16_t*>(scales)[at];
    if (type == ScaleType::bfloat16) return float_of(half << 16);
    const uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return float_of(magnitude << 13 | 0x7f800000 | sign);
    return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | sign);
}

// As linear_exact.cpp rounds a weight.
float rounded(float x, ScaleType type) {
    if (type == ScaleType::float32) return x;
    const uint32_t word = bits_of(x);
    if (type == ScaleType::bfloat16) return float_of((word + 0x7fff + (word >> 16 & 1)) & 0xffff0000u);
    if (std::fabs(x) < 0x1p-14f) return (x + 0.75f) - 0.75f;
    return float_of((word + 0xfff + (word >> 13 & 1)) & 0xffffe000u);
}

// Whether one of the four bytes of a word is a NaN of E4M3.
bool holds_nan(uint32_t word) { return (((word & 0x7f7f7f7f) + 0x01010101) & 0x80808080) != 0; }

void pack_row(const PackedLinear::Source& source, int64_t row, uint8_t* strip, int64_t line_bytes) {
    const int64_t words = (source.columns * source.bits + 31) / 32, lane = row % kStripRows;
    const uint32_t* in = reinterpret_cast<const uint32_t*>(source.words) + row * words;
    switch (source.bits) {
        case 2: return pack_codes<2, 2>(in, words, line_bytes, strip + 4 * lane);
        case 3: return pack_codes<3, 3>(in, words, line_bytes, strip + 4 * lane);
        case 5: return pack_codes<5, 5>(in, words, line_bytes, strip + 4 * lane);
        case 6: return pack_codes<6, 6>(in, words, line_bytes, strip + 4 * lane);
        case 7: return pack_codes<7, 8>(in, words, line_bytes, strip + 4 * lane);
        default: break;
    }
    // A word is eight nibbles of one line, or the four bytes of one.
    for (int64_t w = 0; w < words; ++w) {
        const uint32_t line = source.bits == 8 ? in[w]
                                               : nibbles_to_bytes(in[w] & 0xffff) | nibbles_to_bytes(in[w] >> 16) << 4;
        uint8_t* at = strip + w * line_bytes;
        if (source.coding == Coding::e4m3) {  // pairs of columns
            std::memcpy(at + 2 * lane, &in[w], 2);
            std::memcpy(at + 32 + 2 * lane, reinterpret_cast<const uint8_t*>(&in[w]) + 2, 2);
        } else {
            std::memcpy(at + 4 * lane, &line, sizeof line);
        }
    }
}

}  // namespace

void PackedLinear::allocate(int64_t rows, int64_t columns, int64_t group, int bits, ScaleType type, bool zeros) {
    view.bits = bits, view.rows = rows, view.columns = columns, view.scale_type = view.value_type = type;
    view.factor = view.divisor = 1;
    const bool per_channel = group == columns;
    view.padded = rounded_up(columns, bits <= 8 && per_channel && columns > 64 ? 128 : kChunk);
    view.group = per_channel ? view.padded : group;
    view.groups = bits <= 8 ? view.padded / view.group : 0;
    const int64_t strips = view.strips(), scales = strips * view.groups * kStripRows;
    codes_ = weight_memory(strips * view.strip_bytes());
    scales_ = weight_memory(scales * size_of(type));
    if (zeros) zeros_ = weight_memory(scales);
    view.codes = codes_.get(), view.scales = scales_.get(), view.zeros = zeros_.get();
    bytes_ = strips * view.strip_bytes() + scales * (size_of(type) + zeros);
}

PackedLinear::PackedLinear(const Source& source, int threads) {
    const int bits = source.bits == 7 ? 8 : source.bits;
    allocate(source.rows, source.columns, source.group, bits, source.scale_type, source.zero_point != nullptr);
    view.zero = source.coding == Coding::integer ? 1 << (source.bits - 1) : 0;
    view.coding = source.coding, view.value_type = source.value_type, view.inputs = source.inputs;
    view.factor = source.factor, view.divisor = source.divisor;
    if (source.table) std::copy(source.table, source.table + kTableSize, view.table);
    const int64_t width = size_of(source.scale_type), words = (source.columns * source.bits + 31) / 32;
    const int64_t groups = source.columns / source.group;  // those stored may be one more
    if (source.coding == Coding::e4m3) {
        const auto* word = reinterpret_cast<const uint32_t*>(source.words);
        if (std::any_of(word, word + source.rows * words, holds_nan))
            throw std::invalid_argument("packed must hold numbers: a code of it is NaN");
    }
    Pool::shared().run(view.strips(), threads, [&](int64_t strip, int) {
        const int64_t end = std::min(source.rows, (strip + 1) * kStripRows);
        for (int64_t row = strip * kStripRows; row < end; ++row) {
            pack_row(source, row, codes_.get() + view.line_offset(strip), view.together(strip) * kLine);
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t from = row * groups + g, to = view.scale_index(strip, g) + row % kStripRows;
                std::memcpy(scales_.get() + to * width, static_cast<const uint8_t*>(source.scale) + from * width, width);
                if (source.zero_point) zeros_.get()[to] = uint8_t(source.zero_point[from] + view.zero);
            }
        }
    });
}

void PackedLinear::decode_row(int64_t row, float* out) const {
    const int64_t strip = row / kStripRows, lane = row % kStripRows;
    const uint8_t* codes = view.codes + view.line_offset(strip);
    const int64_t line = view.together(strip) * kLine;
    for (int64_t g = 0, c = 0; g < view.groups; ++g) {
        const int64_t at = view.scale_index(strip, g) + lane;
        const float scale = scale_at(view.scales, view.scale_type, at) * view.factor / view.divisor;
        const int zero = view.zeros ? view.zeros[at] : view.zero;
        for (const int64_t end = std::min(view.columns, c + view.group); c < end; ++c) {
            float value;
            if (view.coding == Coding::e4m3) {
                const int64_t pair = c / 4 * line + c % 4 / 2 * 32 + 2 * lane;
                value = from_e4m3(codes[pair + c % 2]);
            } else {
                const uint32_t code = code_in(codes, line, view.bits, lane, c);
                value = view.coding == Coding::table ? view.table[code] : float(int(code) - zero);
            }
            out[c] = rounded(value * scale, view.value_type);
        }
    }
}

PackedLinear::PackedLinear(const void* weight, bool bfloat16, int64_t rows, int64_t columns, int64_t group,
                           int threads) {
    allocate(rows, columns, group ? group : columns, group ? 8 : bfloat16 ? 16 : 32, ScaleType::float32, false);
    view.zero = 128;
    const auto value = [&](int64_t row, int64_t column) {
        const int64_t at = row * columns + column;
        if (!bfloat16) return static_cast<const float*>(weight)[at];
        const uint32_t word = uint32_t(static_cast<const uint16_t*>(weight)[at]) << 16;
        float found;
        std::memcpy(&found, &word, sizeof found);
        return found;
    };
    Pool::shared().run(view.strips(), threads, [&](int64_t strip, int) {
        uint8_t* target = codes_.get() + (group ? view.line_offset(strip) : strip * view.strip_bytes());
        for (int64_t row = strip * kStripRows; row < std::min(rows, (strip + 1) * kStripRows); ++row) {
            const int64_t lane = row % kStripRows;
            if (!group) {
                for (int64_t c = 0; c < columns; ++c)
                    if (bfloat16)
                        std::memcpy(target + (c / 2 * kStripRows + lane) * 4 + c % 2 * 2,
                                    static_cast<const uint16_t*>(weight) + row * columns + c, 2);
                    else
                        std::memcpy(target + (c * kStripRows + lane) * 4,
                                    static_cast<const float*>(weight) + row * columns + c, 4);
                continue;
            }
            for (int64_t g = 0; g < view.groups; ++g) {
                const int64_t begin = g * view.group, end = std::min(columns, begin + view.group);
                float most = 0;
                for (int64_t c = begin; c < end; ++c) most = std::max(most, std::fabs(value(row, c)));
                const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
                std::memcpy(scales_.get() + (view.scale_index(strip, g) + lane) * 4, &scale, 4);
                for (int64_t c = begin; c < end; ++c)
                    target[byte_at(view.together(strip) * kLine, lane, c)] = uint8_t(128 + std::nearbyint(value(row, c) * inverse));
            }
        }
    });
}

}  // namespace compress
