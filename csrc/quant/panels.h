// Weights as the kernels read them: panels of 16 output rows.
//
// A matrix W [rows, inner] is cut into ceil(rows / 16) panels. Inside a panel lane r is output row r, so that one
// vector holds the same inner position of 16 rows and no product needs a horizontal sum (docs/kernels.md).
//
//   f32, f16, bf16   [inner][16] elements
//   q8_0             [inner/32] blocks of 512 bytes: 8 vectors of 64 bytes, vector j holding q + 128 of k = 4j..4j+3 of
//   each
//                    row; after all blocks [inner/32][16] binary16 scales
//   q4_0             [inner/32] blocks of 256 bytes: 4 vectors of 64 bytes, low nibbles of vector j holding q + 8 of k
//   = 4j..4j+3,
//                    high nibbles of k = 16+4j..16+4j+3; after all blocks [inner/32][16] binary16 scales
//
// Scales stand behind the blocks, not between them, so that every 64-byte load of weights is aligned.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace fixmin::quant {

inline constexpr uint32_t panel_rows = 16;
inline constexpr uint32_t block_size = 32;  // values that share a scale, in weights and in activations

enum class WeightType : uint8_t { f32, f16, bf16, q8_0, q4_0 };

/// Types whose products run on 8-bit activations.
static constexpr bool is_quantized(WeightType type) { return type == WeightType::q8_0 || type == WeightType::q4_0; }

std::string_view name(WeightType type);

/// Bytes of one row of `inner` values in the file's layout.
size_t row_bytes(WeightType type, uint32_t inner);

/// Bytes of one panel, a multiple of 64.
size_t panel_bytes(WeightType type, uint32_t inner);

/// Repacks up to 16 consecutive rows (file layout) into one panel; missing rows become zeros.
/// Returns false if a weight or scale is NaN or infinite. `rows` holds n_rows * row_bytes, `panel` is 64-byte aligned.
bool pack_panel(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel);

/// One row in the file's layout -> `inner` floats. Returns false if one is NaN or infinite.
bool dequantize_row(WeightType type, const std::byte* row, uint32_t inner, float* out);

}  // namespace fixmin::quant
