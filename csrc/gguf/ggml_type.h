// The tensor types of ggml: id in a GGUF file, name, elements per block, bytes per block.
//
// Sources: ggml's `enum ggml_type` and its block structs, compared with the type table of the installed ggml
// library in tests/gguf.  Ids that ggml has withdrawn (4, 5, 31-33, 36-38) are unknown here too.
#pragma once
#include <cstdint>
#include <iterator>

namespace fixmin::gguf {

/// A known id; their names are in the table below.
enum class GgmlType : uint32_t { I8 = 24 };

/// A row of a tensor is a sequence of blocks: `block_size` elements stored in `block_bytes` bytes.
struct TypeTraits {
    const char* name;  // as the `gguf` package spells it; nullptr for a withdrawn id
    uint32_t block_size;
    uint32_t block_bytes;
};

inline constexpr TypeTraits kTypeTraits[] = {
    /* 0 */ {"F32", 1, 4},
    /* 1 */ {"F16", 1, 2},
    /* 2 */ {"Q4_0", 32, 2 + 16},
    /* 3 */ {"Q4_1", 32, 2 + 2 + 16},
    /* 4 */ {nullptr, 0, 0},
    /* 5 */ {nullptr, 0, 0},
    /* 6 */ {"Q5_0", 32, 2 + 4 + 16},
    /* 7 */ {"Q5_1", 32, 2 + 2 + 4 + 16},
    /* 8 */ {"Q8_0", 32, 2 + 32},
    /* 9 */ {"Q8_1", 32, 2 + 2 + 32},
    /* 10 */ {"Q2_K", 256, 16 + 64 + 2 + 2},
    /* 11 */ {"Q3_K", 256, 32 + 64 + 12 + 2},
    /* 12 */ {"Q4_K", 256, 2 + 2 + 12 + 128},
    /* 13 */ {"Q5_K", 256, 2 + 2 + 12 + 32 + 128},
    /* 14 */ {"Q6_K", 256, 128 + 64 + 16 + 2},
    /* 15 */ {"Q8_K", 256, 4 + 256 + 32},
    /* 16 */ {"IQ2_XXS", 256, 2 + 64},
    /* 17 */ {"IQ2_XS", 256, 2 + 64 + 8},
    /* 18 */ {"IQ3_XXS", 256, 2 + 96},
    /* 19 */ {"IQ1_S", 256, 2 + 32 + 16},
    /* 20 */ {"IQ4_NL", 32, 2 + 16},
    /* 21 */ {"IQ3_S", 256, 2 + 64 + 8 + 32 + 4},
    /* 22 */ {"IQ2_S", 256, 2 + 64 + 8 + 8},
    /* 23 */ {"IQ4_XS", 256, 2 + 2 + 4 + 128},
    /* 24 */ {"I8", 1, 1},
    /* 25 */ {"I16", 1, 2},
    /* 26 */ {"I32", 1, 4},
    /* 27 */ {"I64", 1, 8},
    /* 28 */ {"F64", 1, 8},
    /* 29 */ {"IQ1_M", 256, 32 + 16 + 8},
    /* 30 */ {"BF16", 1, 2},
    /* 31 */ {nullptr, 0, 0},
    /* 32 */ {nullptr, 0, 0},
    /* 33 */ {nullptr, 0, 0},
    /* 34 */ {"TQ1_0", 256, 48 + 4 + 2},
    /* 35 */ {"TQ2_0", 256, 64 + 2},
    /* 36 */ {nullptr, 0, 0},
    /* 37 */ {nullptr, 0, 0},
    /* 38 */ {nullptr, 0, 0},
    /* 39 */ {"MXFP4", 32, 1 + 16},
    /* 40 */ {"NVFP4", 64, 4 + 32},
    /* 41 */ {"Q1_0", 128, 2 + 16},
    /* 42 */ {"Q2_0", 64, 2 + 16},
};

/// The traits of the type with this id in the file; nullptr if ggml has no such type.
constexpr const TypeTraits* type_traits(uint32_t raw_type) noexcept {
    if (raw_type >= std::size(kTypeTraits)) return nullptr;
    const TypeTraits& traits = kTypeTraits[raw_type];
    return traits.name != nullptr ? &traits : nullptr;
}

/// Never fails: a GgmlType that came out of GgufFile is known.
constexpr const TypeTraits& type_traits(GgmlType type) noexcept { return kTypeTraits[static_cast<uint32_t>(type)]; }

}  // namespace fixmin::gguf
