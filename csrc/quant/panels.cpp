#include "quant/panels.h"

#include <cmath>
#include <cstring>

#include "quant/half.h"

namespace fixmin::quant {
namespace {

template <typename T>
T read(const std::byte* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// File layouts (ggml): a binary16 scale, then the quantised values of 32 weights.
constexpr size_t q8_0_block_bytes = 2 + 32;
constexpr size_t q4_0_block_bytes = 2 + 16;

constexpr bool f16_is_finite(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }
constexpr bool bf16_is_finite(uint16_t h) { return (h & 0x7f80u) != 0x7f80u; }

// Elements wider than a byte: a transpose of [n_rows][inner] to [inner][16].
template <typename T, typename IsFinite>
bool transpose_rows(const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel, IsFinite is_finite) {
    T* out = reinterpret_cast<T*>(panel);
    bool finite = true;
    if (n_rows < panel_rows) std::memset(panel, 0, size_t(inner) * panel_rows * sizeof(T));
    constexpr uint32_t step = 64 / sizeof(T);  // one cache line of each row at a time
    for (uint32_t k0 = 0; k0 < inner; k0 += step) {
        const uint32_t k1 = k0 + step < inner ? k0 + step : inner;
        for (uint32_t r = 0; r < n_rows; ++r) {
            const std::byte* row = rows + size_t(r) * inner * sizeof(T);
            for (uint32_t k = k0; k < k1; ++k) {
                const T value = read<T>(row + k * sizeof(T));
                finite &= is_finite(value);
                out[size_t(k) * panel_rows + r] = value;
            }
        }
    }
    return finite;
}

// Quantised blocks: 4 consecutive bytes of 16 rows side by side. `offset` is added to each byte by exclusive or.
bool interleave_blocks(const std::byte* rows, uint32_t n_rows, uint32_t inner, size_t block_bytes, uint32_t offset,
                       uint32_t empty, std::byte* panel) {
    const uint32_t n_blocks = inner / block_size;
    const size_t value_bytes = block_bytes - 2;
    std::byte* scales = panel + n_blocks * value_bytes * panel_rows;
    bool finite = true;
    for (uint32_t b = 0; b < n_blocks; ++b) {
        std::byte* values = panel + b * value_bytes * panel_rows;
        for (uint32_t r = 0; r < panel_rows; ++r) {
            const std::byte* block = rows + (size_t(r) * n_blocks + b) * block_bytes;
            const uint16_t scale = r < n_rows ? read<uint16_t>(block) : uint16_t(0);
            finite &= f16_is_finite(scale);
            std::memcpy(scales + (size_t(b) * panel_rows + r) * 2, &scale, 2);
            for (size_t j = 0; j < value_bytes / 4; ++j) {
                const uint32_t word = r < n_rows ? read<uint32_t>(block + 2 + 4 * j) ^ offset : empty;
                std::memcpy(values + (j * panel_rows + r) * 4, &word, 4);
            }
        }
    }
    return finite;
}

}  // namespace

std::string_view name(WeightType type) {
    switch (type) {
        case WeightType::f32: return "F32";
        case WeightType::f16: return "F16";
        case WeightType::bf16: return "BF16";
        case WeightType::q8_0: return "Q8_0";
        case WeightType::q4_0: return "Q4_0";
    }
    return "?";
}

size_t row_bytes(WeightType type, uint32_t inner) {
    switch (type) {
        case WeightType::f32: return size_t(inner) * 4;
        case WeightType::f16:
        case WeightType::bf16: return size_t(inner) * 2;
        case WeightType::q8_0: return size_t(inner / block_size) * q8_0_block_bytes;
        case WeightType::q4_0: return size_t(inner / block_size) * q4_0_block_bytes;
    }
    return 0;
}

size_t panel_bytes(WeightType type, uint32_t inner) { return (row_bytes(type, inner) * panel_rows + 63) / 64 * 64; }

bool pack_panel(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    switch (type) {
        case WeightType::f32:
            return transpose_rows<float>(rows, n_rows, inner, panel, [](float x) { return std::isfinite(x); });
        case WeightType::f16: return transpose_rows<uint16_t>(rows, n_rows, inner, panel, f16_is_finite);
        case WeightType::bf16: return transpose_rows<uint16_t>(rows, n_rows, inner, panel, bf16_is_finite);
        case WeightType::q8_0:
            return interleave_blocks(rows, n_rows, inner, q8_0_block_bytes, 0x80808080u, 0x80808080u, panel);
        case WeightType::q4_0: return interleave_blocks(rows, n_rows, inner, q4_0_block_bytes, 0u, 0x88888888u, panel);
    }
    return false;
}

bool dequantize_row(WeightType type, const std::byte* row, uint32_t inner, float* out) {
    bool finite = true;
    switch (type) {
        case WeightType::f32: std::memcpy(out, row, size_t(inner) * 4); break;
        case WeightType::f16:
            for (uint32_t k = 0; k < inner; ++k) out[k] = f16_to_f32(read<uint16_t>(row + 2 * k));
            break;
        case WeightType::bf16:
            for (uint32_t k = 0; k < inner; ++k) out[k] = bf16_to_f32(read<uint16_t>(row + 2 * k));
            break;
        case WeightType::q8_0:
            for (uint32_t b = 0; b < inner / block_size; ++b) {
                const std::byte* block = row + b * q8_0_block_bytes;
                const float scale = f16_to_f32(read<uint16_t>(block));
                for (uint32_t i = 0; i < block_size; ++i)
                    out[b * block_size + i] = scale * float(read<int8_t>(block + 2 + i));
            }
            break;
        case WeightType::q4_0:
            for (uint32_t b = 0; b < inner / block_size; ++b) {
                const std::byte* block = row + b * q4_0_block_bytes;
                const float scale = f16_to_f32(read<uint16_t>(block));
                for (uint32_t i = 0; i < block_size / 2; ++i) {
                    const int byte = read<uint8_t>(block + 2 + i);
                    out[b * block_size + i] = scale * float((byte & 15) - 8);
                    out[b * block_size + 16 + i] = scale * float((byte >> 4) - 8);
                }
            }
            break;
    }
    for (uint32_t k = 0; k < inner; ++k) finite &= std::isfinite(out[k]);
    return finite;
}

}  // namespace fixmin::quant
