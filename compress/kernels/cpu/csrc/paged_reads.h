// How elements of the cache are read.
#pragma once
#include "bfloat16.h"
#include "cache.h"
#include "small_floats.h"

namespace compress {
namespace ISA {

// LANES of them from a position, or one. `part` tells which half of a head's dimensions. kSteps: a token and head has a
// step; kGrids: and what code 0 is; kBlocks: and a scale for every kFloatBlock dimensions. kOpen: a page that is not full
// is kept otherwise.
struct Floats {
    typedef float Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false, kOpen = false;
    static vf load(const float* p, int) { return ISA::load(p); }
    static float one(float x, int) { return x; }
};
struct Bfloats {
    typedef uint16_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false, kOpen = false;
    static vf load(const uint16_t* p, int) { return load_bfloat16(p); }
    static float one(uint16_t x, int) { return widened(x); }
};
struct Bytes {
    typedef uint8_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = true, kGrids = true, kBlocks = false, kOpen = false;
    static vf load(const uint8_t* p, int) { return to_floats(load_unsigned(p)); }
    static float one(uint8_t x, int) { return float(x); }
};
struct Nibbles {
    typedef uint8_t Element;
    static constexpr int kParts = 2;
    static constexpr bool kSteps = true, kGrids = true, kBlocks = false, kOpen = false;
    static vf load(const uint8_t* p, int part) { return to_floats(load_unsigned(p) >> 4 * part & 15); }
    static float one(uint8_t x, int part) { return float(x >> 4 * part & 15); }
};
struct Eights {
    typedef uint8_t Element;
    static constexpr int kParts = 1;
    static constexpr bool kSteps = false, kGrids = false, kBlocks = false, kOpen = false;
    static vf load(const uint8_t* p, int) { return from_e4m3(load_unsigned(p)); }
    static float one(uint8_t x, int) { return from_e4m3(x); }
};
struct Fours {
    typedef uint8_t Element;
    static constexpr int kParts = 2;
    static constexpr bool kSteps = true, kGrids = false, kBlocks = true, kOpen = false;
    static vf load(const uint8_t* p, int part) { return from_e2m1(load_unsigned(p) >> 4 * part & 15); }
    static float one(uint8_t x, int part) { return from_e2m1(x >> 4 * part & 15); }
};

struct TwoBits {
    static constexpr bool kGrids = false, kOpen = true;
    // LANES codes of a word, from the lowest on.
    static vf load(uint32_t word) {
        vi shifts;
        for (int l = 0; l < LANES; ++l) shifts[l] = 2 * l;
        return to_floats((vi{} + int32_t(word)) >> shifts & 3);
    }
    static float one(uint32_t word) { return float(word & 3); }
};

}  // namespace ISA
}  // namespace compress
