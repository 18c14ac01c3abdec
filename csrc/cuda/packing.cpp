#include "cuda/packing.h"

#include <cstring>

#include "cuda/args.h"
#include "quant/panels.h"

namespace fixmin::cuda {
namespace {

// The words of `vectors` vectors of a panel: [vectors][16 rows] -> [8 rows][4 vectors][vectors / 4][2 rows].
void order_by_lanes(std::byte* codes, uint32_t vectors) {
    uint32_t from[8 * quant::panel_rows], to[8 * quant::panel_rows];
    std::memcpy(from, codes, vectors * sizeof(uint32_t) * quant::panel_rows);
    for (uint32_t j = 0; j < vectors; ++j) {
        for (uint32_t row = 0; row < quant::panel_rows; ++row) {
            const uint32_t lane = row % 8 * 4 + j % 4, word = j / 4 * 2 + row / 8;
            to[lane * (vectors / 2) + word] = from[j * quant::panel_rows + row];
        }
    }
    std::memcpy(codes, to, vectors * sizeof(uint32_t) * quant::panel_rows);
}

// The highest bit of each code lies in the last plane, which begins at one of 8, 4, 2 or 1 bits of a code.
void turn_signs(std::byte* codes, uint32_t bits) {
    const uint32_t plane = bits & -bits, first = (bits - plane) * 64;
    // 80, 88, aa, ff
    const std::byte signs{uint8_t(0xff / ((1u << plane) - 1) << (plane - 1))};
    for (uint32_t i = 0; i < plane * 64; ++i) codes[first + i] ^= signs;
}

uint32_t padded(quant::WeightType type, uint32_t inner) {
    const uint32_t pair = 2 * quant::block_size;
    return quant::is_quantized(type) ? (inner + pair - 1) / pair * pair : inner;
}

size_t padded_panel_bytes(quant::WeightType type, uint32_t inner) {
    return quant::panel_bytes(type, padded(type, inner));
}

bool pack_panel(quant::WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    if (padded(type, inner) != inner) std::memset(panel, 0, padded_panel_bytes(type, inner));
    if (!quant::pack_panel(type, rows, n_rows, inner, panel)) return false;
    if (!quant::is_quantized(type)) return true;
    if (quant::scales_rows(type) && padded(type, inner) != inner) {  // the scales go behind the block of zeros
        constexpr size_t bytes = quant::panel_rows * sizeof(float);
        std::byte* const scales = panel + size_t(inner) * quant::panel_rows;
        std::memcpy(panel + padded_panel_bytes(type, inner) - bytes, scales, bytes);
        std::memset(scales, 0, bytes);
    }
    const uint32_t bits = quant::block_format(type).bits;
    const quant::PanelLayout layout = quant::panel_layout(type);
    for (uint32_t b = 0; b < inner / quant::block_size; ++b) {
        std::byte* const codes = panel + quant::codes_at(layout, b);
        const bool unsigned_bytes = quant::scales_rows(type) && quant::scaled_row_offset == 128;
        if (is_centred(type) || unsigned_bytes) turn_signs(codes, bits);
        if (bits >= 4) order_by_lanes(codes, bits == 8 ? 8 : 4);
    }
    return true;
}

}  // namespace

model::Packing packing() { return {quant::panel_rows, padded_panel_bytes, pack_panel}; }

}  // namespace fixmin::cuda
