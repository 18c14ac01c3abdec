// Weights as the kernels read them: panels of 16 output rows.
//
// A matrix W [rows, inner] is cut into ceil(rows / 16) panels. Inside a panel lane r is output row r, so that one
// vector holds the same inner position of 16 rows and no product needs a horizontal sum (docs/kernels.md).
//
//   float types      [inner][16] elements
//   quantised types  parcels: a record of scales, then the codes of its values, 64 * bits bytes for every 32 of them;
//                    or two records and the codes of both, where a record is not a multiple of 64 bytes
//   W8A8             codes only, with scaled_row_offset, then the scales [16] in float32
//
// Codes of a block of 32 are 8 vectors of 64 bytes, vector j holding k = 4j..4j+3 of each row. They are stored as
// planes of 8, 4, 2 or 1 bits, in this order (5 bits are a plane of 4 and one of 1):
//
//   8 bits  8 vectors: vector j as it is (signed bytes)
//   4 bits  4 vectors: vector j in the low nibbles, vector j + 4 in the high nibbles
//   2 bits  2 vectors: byte i of vector p holds vectors p, p + 2, p + 4, p + 6, from the lowest bits up
//   1 bit   1 vector: bit j of a byte belongs to vector j
//
// A record of scales holds d [16] binary16, m [16] binary16 (has_min), and for blocks of 256 values
// scales [256/scale_values][16] and mins [256/scale_values][16] of one byte each (Q2_K: nibbles of the same byte, the
// scale below).
//
// So every 64-byte load of codes is aligned, and a panel is read from its first byte to its last (docs/kernels.md). A
// last parcel of one record instead of two has room for both.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "quant/blocks.h"

namespace fixmin::quant {

inline constexpr uint32_t panel_rows = 16;
inline constexpr uint32_t block_size = 32;  // values that share a scale of activations

/// Types whose products run on 8-bit activations.
static constexpr bool is_quantized(WeightType type) { return block_format(type).bits != 0; }

/// Whether a row has one scale, and so has what it is multiplied with.
static constexpr bool scales_rows(WeightType type) { return type == WeightType::w8a8; }
/// Values of a row of such a type, at most: a sum of products of two bytes of -127..127 fits an int32.
inline constexpr uint32_t max_scaled_row = 133000;
/// What the bytes of such a row have added in panels, so that no kernel has to: vpdpbusd and tdpbsud multiply bytes
/// without a sign by bytes with one; sdot and smull take two with a sign.
#if defined(__x86_64__) || defined(_M_X64)
inline constexpr uint8_t scaled_row_offset = 128;
#else
inline constexpr uint8_t scaled_row_offset = 0;
#endif
/// Whether this is a scale of such a row: all weights are finite, and none of another sign than its code.
static constexpr bool is_row_scale(float scale) { return scale >= 0 && scale <= 3.402823466e+38f / 127; }

/// Where the parts of a panel of a quantised type lie. Without member functions: they would be shared by the units of
/// all ISAs (kernels.h).
struct PanelLayout {
    size_t codes_bytes;   // of the codes of 32 values of 16 rows
    size_t record_bytes;  // of the scales of one block of 16 rows
    size_t parcel_bytes;
    uint32_t record_blocks, parcel_records, parcel_blocks;  // blocks of 32
};

static constexpr PanelLayout panel_layout(WeightType type) {
    const BlockFormat format = block_format(type);
    const bool mins_of_their_own = format.has_min && type != WeightType::q2_k;
    const size_t halves = format.has_min ? 2 : 1;
    const size_t bytes = format.values == 256 ? 256 / format.scale_values * (mins_of_their_own ? 2 : 1) : 0;
    PanelLayout layout{};
    layout.codes_bytes = size_t(format.bits) * 64;
    layout.record_bytes = scales_rows(type) ? 0 : (2 * halves + bytes) * panel_rows;
    layout.record_blocks = format.values / block_size;
    layout.parcel_records = layout.record_bytes % 64 ? 2 : 1;
    layout.parcel_blocks = layout.parcel_records * layout.record_blocks;
    layout.parcel_bytes = layout.parcel_records * layout.record_bytes + layout.parcel_blocks * layout.codes_bytes;
    return layout;
}

/// Offset of the scales of block b in a panel.
static constexpr size_t scales_at(const PanelLayout& layout, uint32_t b) {
    return b / layout.parcel_blocks * layout.parcel_bytes +
           b / layout.record_blocks % layout.parcel_records * layout.record_bytes;
}

/// Offset of the codes of block b in a panel.
static constexpr size_t codes_at(const PanelLayout& layout, uint32_t b) {
    return (b / layout.parcel_blocks + 1) * layout.parcel_records * layout.record_bytes + b * layout.codes_bytes;
}

static constexpr std::string_view name(WeightType type) { return block_format(type).name; }

/// Bytes of one row of `inner` values in the file's layout.
static constexpr size_t row_bytes(WeightType type, uint32_t inner) {
    const BlockFormat format = block_format(type);
    return size_t(inner / format.values) * format.bytes + (scales_rows(type) ? sizeof(float) : 0);
}

/// Bytes of one panel, a multiple of 64.
size_t panel_bytes(WeightType type, uint32_t inner);

/// Repacks up to 16 consecutive rows (file layout) into one panel; missing rows become zeros.
/// Returns false if a weight or scale is NaN or infinite, or a code of W8A8 is -128. `rows` holds n_rows * row_bytes,
/// `panel` is 64-byte aligned.
bool pack_panel(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel);

/// One row in the file's layout -> `inner` floats. Returns false if one is NaN or infinite, or no weight of its type.
bool dequantize_row(WeightType type, const std::byte* row, uint32_t inner, float* out);

}  // namespace fixmin::quant
