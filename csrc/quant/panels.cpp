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

constexpr bool f16_is_finite(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }

// Packing reads 16 rows at a time, more streams than the processor follows by itself, and writes lines that are in no
// cache. Asking for both in time makes it 1.5 to 2 times as fast; an address that does not exist does no harm.
// The next panel's rows follow this one's in the file: its part of `bytes` that lies where `offset` is in this panel.
void prefetch_next(const std::byte* rows, size_t panel, size_t offset, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows + panel + offset + i);
}

void prefetch_written(const std::byte* panel, size_t bytes) {
    constexpr size_t ahead = 4096;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(panel + ahead + i, 1);
}

// n rows of n elements of 64/n bits, a word per row with the first element in its lowest bits, become n columns.
template <uint32_t n>
void transpose(uint64_t (&w)[n]) {
    for (uint32_t step = n / 2; step > 0; step /= 2) {
        const uint32_t shift = 64 / n * step;
        const uint64_t low = ~uint64_t(0) / ((uint64_t(1) << shift) + 1);  // alternately `shift` ones and zeros
        for (uint32_t i = 0; i < n; ++i) {
            if (i & step) continue;
            const uint64_t moved = ((w[i] >> shift) ^ w[i + step]) & low;
            w[i] ^= moved << shift;
            w[i + step] ^= moved;
        }
    }
}

// A whole panel of elements wider than a byte, [16][inner] to [inner][16], in squares of 8 bytes by 8 bytes.
template <typename T>
void transpose_panel(const std::byte* rows, uint32_t inner, std::byte* panel) {
    constexpr uint32_t n = 8 / sizeof(T);
    const size_t row = size_t(inner) * sizeof(T), line = panel_rows * sizeof(T);
    for (uint32_t k = 0; k < inner; k += n, panel += n * line) {
        prefetch_next(rows, panel_rows * row, k * line, n * line);
        prefetch_written(panel, n * line);
        for (uint32_t r = 0; r < panel_rows; r += n) {
            uint64_t square[n];
            for (uint32_t i = 0; i < n; ++i) square[i] = read<uint64_t>(rows + (r + i) * row + k * sizeof(T));
            transpose(square);
            for (uint32_t i = 0; i < n; ++i) std::memcpy(panel + i * line + r * sizeof(T), &square[i], 8);
        }
    }
}

// The same element by element, for a last panel of fewer rows or an inner length of any number.
template <typename T>
void transpose_part(const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    std::memset(panel, 0, size_t(inner) * panel_rows * sizeof(T));
    for (uint32_t r = 0; r < n_rows; ++r) {
        for (uint32_t k = 0; k < inner; ++k)
            std::memcpy(panel + (size_t(k) * panel_rows + r) * sizeof(T), rows + (size_t(r) * inner + k) * sizeof(T),
                        sizeof(T));
    }
}

// Whether no element has all of its exponent bits set.
template <typename T>
bool all_finite(const std::byte* data, size_t n, T exponent) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; ++i) bad |= (read<T>(data + i * sizeof(T)) & exponent) == exponent;
    return !bad;
}

template <typename T>
bool pack_floats(const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel, T exponent) {
    if (n_rows == panel_rows && inner % (8 / sizeof(T)) == 0)
        transpose_panel<T>(rows, inner, panel);
    else
        transpose_part<T>(rows, n_rows, inner, panel);
    return all_finite(rows, size_t(n_rows) * inner, exponent);
}

// One row of a block of 32: its words of 4 codes go into the planes of panels.h. `out` is the row's place in vector 0.
void store_codes(uint32_t bits, const uint8_t* codes, std::byte* out) {
    uint32_t w[8];
    std::memcpy(w, codes, sizeof w);
    const auto put = [&](uint32_t word) {
        std::memcpy(out, &word, 4);
        out += 64;
    };
    const auto low = [&](uint32_t j, uint32_t mask) { return w[j] & mask; };
    const auto drop = [&](uint32_t n) {
        for (uint32_t& word : w) word = word >> n & 0x01010101u * (0xffu >> n);
    };
    if (bits == 8) {
        for (const uint32_t word : w) put(word);
    }
    if (bits >= 4 && bits < 8) {
        for (uint32_t j = 0; j < 4; ++j) put(low(j, 0x0f0f0f0fu) | low(j + 4, 0x0f0f0f0fu) << 4);
        drop(4);
    }
    if (bits % 4 >= 2) {
        constexpr uint32_t mask = 0x03030303u;
        for (uint32_t j = 0; j < 2; ++j)
            put(low(j, mask) | low(j + 2, mask) << 2 | low(j + 4, mask) << 4 | low(j + 6, mask) << 6);
        drop(2);
    }
    if (bits % 2 == 1) {
        uint32_t word = 0;
        for (uint32_t j = 0; j < 8; ++j) word |= low(j, 0x01010101u) << j;
        put(word);
    }
}

// One row of a record of scales.
void store_scales(WeightType type, const Block& block, uint32_t row, std::byte* record) {
    const BlockFormat format = block_format(type);
    const auto put_half = [&](uint16_t half) {
        std::memcpy(record + row * 2, &half, 2);
        record += panel_rows * 2;
    };
    const auto put_byte = [&](int value) {
        record[row] = std::byte(value);
        record += panel_rows;
    };
    put_half(block.d);
    if (format.has_min) put_half(block.m);
    if (format.values == block_size) return;
    const uint32_t n = format.values / format.scale_values;
    if (type == WeightType::q2_k) {
        for (uint32_t i = 0; i < n; ++i) put_byte(block.scales[i] | block.mins[i] << 4);
        return;
    }
    for (uint32_t i = 0; i < n; ++i) put_byte(block.scales[i]);
    for (uint32_t i = 0; format.has_min && i < n; ++i) put_byte(block.mins[i]);
}

// A panel of a type that stores 32 codes of 4 or 8 bits behind d and m as the planes do: words are copied, which is
// three times as fast as taking codes apart and joining them again.
template <WeightType Type>
bool copy_planes(const std::byte* rows, uint32_t n_rows, uint32_t n_blocks, std::byte* panel) {
    constexpr BlockFormat format = block_format(Type);
    constexpr PanelLayout layout = panel_layout(Type);
    constexpr uint32_t halves = format.has_min ? 2 : 1;
    constexpr size_t block_bytes = format.bytes;
    bool finite = true;
    for (uint32_t b = 0; b < n_blocks; ++b) {
        prefetch_next(rows, size_t(n_blocks) * panel_rows * block_bytes, b * panel_rows * block_bytes,
                      panel_rows * block_bytes);
        std::byte *scales = panel + scales_at(layout, b), *codes = panel + codes_at(layout, b);
        prefetch_written(codes, layout.codes_bytes);
        for (uint32_t r = 0; r < n_rows; ++r) {
            const std::byte* block = rows + (size_t(r) * n_blocks + b) * block_bytes;
            for (uint32_t h = 0; h < halves; ++h) {
                const uint16_t half = read<uint16_t>(block + 2 * h);
                finite &= f16_is_finite(half);
                std::memcpy(scales + (h * panel_rows + r) * 2, &half, 2);
            }
            for (uint32_t j = 0; j < format.bits; ++j) {
                const uint32_t word = read<uint32_t>(block + 2 * halves + 4 * j);
                std::memcpy(codes + (j * panel_rows + r) * 4, &word, 4);
            }
        }
    }
    return finite;
}

bool pack_blocks(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t n_blocks, std::byte* panel) {
    const BlockFormat format = block_format(type);
    const PanelLayout layout = panel_layout(type);
    const uint32_t parts = layout.record_blocks;
    bool finite = true;
    Block block;
    for (uint32_t b = 0; b < n_blocks; ++b) {
        std::byte *scales = panel + scales_at(layout, b * parts), *codes = panel + codes_at(layout, b * parts);
        for (uint32_t r = 0; r < n_rows; ++r) {
            read_block(type, rows + (size_t(r) * n_blocks + b) * format.bytes, block);
            finite &= f16_is_finite(block.d) && f16_is_finite(block.m);
            store_scales(type, block, r, scales);
            for (uint32_t i = 0; i < parts; ++i)
                store_codes(format.bits, block.codes + i * block_size, codes + i * layout.codes_bytes + r * 4);
        }
    }
    return finite;
}

bool pack_quantized(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    const uint32_t n_blocks = inner / block_format(type).values;
    // A missing row has scales of zero.
    if (n_rows < panel_rows) std::memset(panel, 0, panel_bytes(type, inner));
    switch (type) {
        case WeightType::q8_0: return copy_planes<WeightType::q8_0>(rows, n_rows, n_blocks, panel);
        case WeightType::q4_0:
        case WeightType::iq4_nl: return copy_planes<WeightType::q4_0>(rows, n_rows, n_blocks, panel);
        case WeightType::q4_1: return copy_planes<WeightType::q4_1>(rows, n_rows, n_blocks, panel);
        default: return pack_blocks(type, rows, n_rows, n_blocks, panel);
    }
}

// Rows of signed bytes and a scale.
bool pack_scaled_rows(const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    const size_t row_size = row_bytes(WeightType::w8a8, inner);
    std::byte* const scales = panel + size_t(inner) * panel_rows;
    if (n_rows < panel_rows) {
        std::memset(panel, scaled_row_offset, size_t(inner) * panel_rows);
        std::memset(scales, 0, panel_rows * sizeof(float));
    }
    constexpr uint32_t offset = scaled_row_offset * 0x01010101u;  // 128 is added to each byte as it is taken off
    bool usable = true;
    for (uint32_t k = 0; k < inner; k += 4) {
        if (k % block_size == 0) prefetch_written(panel + k * panel_rows, block_size * panel_rows);
        for (uint32_t r = 0; r < n_rows; ++r) {
            const uint32_t word = read<uint32_t>(rows + r * row_size + k);
            usable &=
                ((word ^ 0x80808080u) - 0x01010101u & ~(word ^ 0x80808080u) & 0x80808080u) == 0;  // no byte is 0x80
            const uint32_t stored = word ^ offset;
            std::memcpy(panel + (k * panel_rows + r * 4), &stored, 4);
        }
    }
    for (uint32_t r = 0; r < n_rows; ++r) {
        const float scale = read<float>(rows + r * row_size + inner);
        usable &= is_row_scale(scale);
        std::memcpy(scales + r * sizeof scale, &scale, sizeof scale);
    }
    return usable;
}

void dequantize_blocks(WeightType type, const std::byte* row, uint32_t inner, float* out) {
    const BlockFormat format = block_format(type);
    Block block;
    for (uint32_t first = 0; first < inner; first += format.values, row += format.bytes) {
        read_block(type, row, block);
        const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
        for (uint32_t k = 0; k < format.values; ++k) {
            const float scale = d * float(block.scales[k / format.scale_values]);
            const int code = block.codes[k];
            const float value = scale * float(format.table ? iq4_values[code] : code - format.zero);
            out[first + k] = format.has_min ? value + m * float(block.mins[k / format.scale_values]) : value;
        }
    }
}

}  // namespace

size_t panel_bytes(WeightType type, uint32_t inner) {
    if (!is_quantized(type)) return (row_bytes(type, inner) * panel_rows + 63) / 64 * 64;
    const PanelLayout layout = panel_layout(type);
    const uint32_t n_blocks = inner / block_size;
    if (scales_rows(type)) return n_blocks * layout.codes_bytes + panel_rows * sizeof(float);
    const uint32_t n_parcels = (n_blocks + layout.parcel_blocks - 1) / layout.parcel_blocks;
    return n_parcels * layout.parcel_records * layout.record_bytes + n_blocks * layout.codes_bytes;
}

bool pack_panel(WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* panel) {
    switch (type) {
        case WeightType::f32: return pack_floats<uint32_t>(rows, n_rows, inner, panel, 0x7f800000u);
        case WeightType::f16: return pack_floats<uint16_t>(rows, n_rows, inner, panel, 0x7c00u);
        case WeightType::bf16: return pack_floats<uint16_t>(rows, n_rows, inner, panel, 0x7f80u);
        case WeightType::w8a8: return pack_scaled_rows(rows, n_rows, inner, panel);
        default: return pack_quantized(type, rows, n_rows, inner, panel);
    }
}

bool dequantize_row(WeightType type, const std::byte* row, uint32_t inner, float* out) {
    bool usable = true;
    switch (type) {
        case WeightType::f32: std::memcpy(out, row, size_t(inner) * 4); break;
        case WeightType::f16:
            for (uint32_t k = 0; k < inner; ++k) out[k] = f16_to_f32(read<uint16_t>(row + 2 * k));
            break;
        case WeightType::bf16:
            for (uint32_t k = 0; k < inner; ++k) out[k] = bf16_to_f32(read<uint16_t>(row + 2 * k));
            break;
        case WeightType::w8a8: {
            const float scale = read<float>(row + inner);
            usable = is_row_scale(scale);
            for (uint32_t k = 0; k < inner; ++k) {
                const int8_t code = read<int8_t>(row + k);
                usable &= code != -128;
                out[k] = scale * float(code);
            }
            break;
        }
        default: dequantize_blocks(type, row, inner, out); break;
    }
    for (uint32_t k = 0; k < inner; ++k) usable &= std::isfinite(out[k]);
    return usable;
}

}  // namespace fixmin::quant
