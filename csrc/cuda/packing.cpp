#include "cuda/packing.h"

#include <cstring>

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

bool pack_panel(quant::WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    if (!quant::pack_panel(type, rows, n_rows, inner, panel)) return false;
    const uint32_t bits = quant::block_format(type).bits, vectors = bits == 8 ? 8 : 4;
    if (bits < 4) return true;
    const quant::PanelLayout layout = quant::panel_layout(type);
    for (uint32_t b = 0; b < inner / quant::block_size; ++b)
        order_by_lanes(panel + quant::codes_at(layout, b), vectors);
    return true;
}

}  // namespace

model::Packing packing() { return {quant::panel_rows, quant::panel_bytes, pack_panel}; }

}  // namespace fixmin::cuda
