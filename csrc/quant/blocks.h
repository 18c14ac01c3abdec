// The quantised weight formats of ggml: what a block holds, as integers.
//
// Every format is one formula. With codes q of `bits` bits, a binary16 scale d of the block, an integer scale s per
// `scale_values` values and, where `has_min`, a binary16 offset m of the block and an integer factor n per
// `scale_values`:
//
//   weight = (d * s) * (q - zero)            [+ m * n]
//   weight = (d * s) * iq4_values[q]         where `table`
//
// Formats without integer scales have s = n = 1. d * s and m * n are exact in float32: 11 + 8 bits.
//
// W8A8 is not one of ggml's: codes are signed bytes, and a row has one scale in float32, which stands behind its codes
// here and in a tensor of its own in a file (docs/design.md).
//
// Functions in this header are static: kernel translation units include it (tests/kernels/test_isolation.py).
#pragma once
#include <cstddef>
#include <cstdint>

namespace fixmin::quant {

enum class WeightType : uint8_t {
    f32,
    f16,
    bf16,
    q8_0,
    q4_0,
    q4_1,
    q5_0,
    q5_1,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
    iq4_nl,
    iq4_xs,
    w8a8,
};

static constexpr WeightType all_weight_types[] = {
    WeightType::f32,  WeightType::f16,    WeightType::bf16,   WeightType::q8_0, WeightType::q4_0, WeightType::q4_1,
    WeightType::q5_0, WeightType::q5_1,   WeightType::q2_k,   WeightType::q3_k, WeightType::q4_k, WeightType::q5_k,
    WeightType::q6_k, WeightType::iq4_nl, WeightType::iq4_xs, WeightType::w8a8};

struct BlockFormat {
    const char* name;       // as the `gguf` package spells it
    uint32_t values;        // weights per block: 1 for the float types, else 32 or 256
    uint32_t bytes;         // of a block in the file
    uint32_t bits;          // of a code; 0 for the float types
    uint32_t scale_values;  // weights that share a scale: 32 or 16
    int32_t zero;           // the code of 0.0
    bool has_min;
    bool table;  // codes are indices into iq4_values
};

static constexpr BlockFormat block_format(WeightType type) {
    switch (type) {
        case WeightType::f32: return {"F32", 1, 4, 0, 0, 0, false, false};
        case WeightType::f16: return {"F16", 1, 2, 0, 0, 0, false, false};
        case WeightType::bf16: return {"BF16", 1, 2, 0, 0, 0, false, false};
        case WeightType::q8_0: return {"Q8_0", 32, 2 + 32, 8, 32, 128, false, false};
        case WeightType::q4_0: return {"Q4_0", 32, 2 + 16, 4, 32, 8, false, false};
        case WeightType::q4_1: return {"Q4_1", 32, 4 + 16, 4, 32, 0, true, false};
        case WeightType::q5_0: return {"Q5_0", 32, 2 + 4 + 16, 5, 32, 16, false, false};
        case WeightType::q5_1: return {"Q5_1", 32, 4 + 4 + 16, 5, 32, 0, true, false};
        case WeightType::q2_k: return {"Q2_K", 256, 16 + 64 + 4, 2, 16, 0, true, false};
        case WeightType::q3_k: return {"Q3_K", 256, 32 + 64 + 12 + 2, 3, 16, 4, false, false};
        case WeightType::q4_k: return {"Q4_K", 256, 4 + 12 + 128, 4, 32, 0, true, false};
        case WeightType::q5_k: return {"Q5_K", 256, 4 + 12 + 32 + 128, 5, 32, 0, true, false};
        case WeightType::q6_k: return {"Q6_K", 256, 128 + 64 + 16 + 2, 6, 16, 32, false, false};
        case WeightType::iq4_nl: return {"IQ4_NL", 32, 2 + 16, 4, 32, 0, false, true};
        case WeightType::iq4_xs: return {"IQ4_XS", 256, 2 + 2 + 4 + 128, 4, 32, 0, false, true};
        case WeightType::w8a8: return {"W8A8", 32, 32, 8, 32, 128, false, false};
    }
    return {};
}

/// ggml's non-linear 4-bit values.
static constexpr int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline constexpr uint32_t max_block_values = 256;

/// One block of any quantised type.
struct Block {
    uint8_t codes[max_block_values];
    uint16_t d;         // binary16
    uint16_t m;         // binary16, 0 without has_min; the K types subtract their minimum: its sign is turned here
    int8_t scales[16];  // s, one per scale_values; 1 without integer scales
    int8_t mins[16];    // n
};

/// Reads one block in the file's layout.
void read_block(WeightType type, const std::byte* bytes, Block& out);

}  // namespace fixmin::quant
