#include "quant/blocks.h"

#include <cstring>

namespace fixmin::quant {
namespace {

uint16_t read_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

uint16_t negated(uint16_t half) { return half ^ 0x8000u; }

// `bits` low bits of every code, from bytes that hold several codes each: runs of `run` bytes, first the lowest
// bits of all bytes of a run, then the next ones.
void unpack_low(const uint8_t* packed, uint32_t n, uint32_t run, uint32_t bits, uint8_t* codes) {
    const uint32_t per_byte = 8 / bits, mask = (1u << bits) - 1;
    for (uint32_t first = 0; first < n; first += run * per_byte, packed += run) {
        for (uint32_t part = 0; part < per_byte; ++part) {
            for (uint32_t i = 0; i < run; ++i)
                codes[first + part * run + i] = uint8_t(packed[i] >> (part * bits) & mask);
        }
    }
}

// The same, for bits that go above `shift` bits already there.
void unpack_high(const uint8_t* packed, uint32_t n, uint32_t run, uint32_t bits, uint32_t shift, uint8_t* codes) {
    uint8_t high[max_block_values];
    unpack_low(packed, n, run, bits, high);
    for (uint32_t i = 0; i < n; ++i) codes[i] = uint8_t(codes[i] | high[i] << shift);
}

// Q5_0 and Q5_1: bit i of a little-endian 32-bit word belongs to value i. Four bits at a time: the product puts bit i
// of a nibble to bit 8i.
void add_fifth_bits(const uint8_t* packed, uint8_t* codes) {
    for (uint32_t i = 0; i < 32; i += 4) {
        const uint32_t nibble = packed[i / 8] >> (i % 8) & 15u;
        uint32_t four;
        std::memcpy(&four, codes + i, 4);
        four |= (nibble * 0x00204081u & 0x01010101u) << 4;
        std::memcpy(codes + i, &four, 4);
    }
}

// Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes.
void read_scales_and_mins(const uint8_t* p, Block& out) {
    for (uint32_t i = 0; i < 4; ++i) {
        out.scales[i] = int8_t(p[i] & 63);
        out.mins[i] = int8_t(p[4 + i] & 63);
        out.scales[4 + i] = int8_t((p[8 + i] & 15) | (p[i] >> 6) << 4);
        out.mins[4 + i] = int8_t((p[8 + i] >> 4) | (p[4 + i] >> 6) << 4);
    }
}

void read_q2_k(const uint8_t* p, Block& out) {
    for (uint32_t i = 0; i < 16; ++i) {
        out.scales[i] = int8_t(p[i] & 15);
        out.mins[i] = int8_t(p[i] >> 4);
    }
    unpack_low(p + 16, 256, 32, 2, out.codes);
    out.d = read_u16(p + 80);
    out.m = negated(read_u16(p + 82));
}

void read_q3_k(const uint8_t* p, Block& out) {
    unpack_low(p + 32, 256, 32, 2, out.codes);
    unpack_high(p, 256, 32, 1, 2, out.codes);
    // 6-bit scales, offset 32: low nibbles in 8 bytes, then the two high bits of scale i in byte i % 4.
    const uint8_t* scales = p + 96;
    for (uint32_t i = 0; i < 16; ++i) {
        const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
        const int high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
        out.scales[i] = int8_t((low | high << 4) - 32);
    }
    out.d = read_u16(p + 108);
}

void read_q4_k(const uint8_t* p, Block& out) {
    out.d = read_u16(p);
    out.m = negated(read_u16(p + 2));
    read_scales_and_mins(p + 4, out);
    unpack_low(p + 16, 256, 32, 4, out.codes);
}

void read_q5_k(const uint8_t* p, Block& out) {
    out.d = read_u16(p);
    out.m = negated(read_u16(p + 2));
    read_scales_and_mins(p + 4, out);
    unpack_low(p + 48, 256, 32, 4, out.codes);
    unpack_high(p + 16, 256, 32, 1, 4, out.codes);
}

void read_q6_k(const uint8_t* p, Block& out) {
    unpack_low(p, 256, 64, 4, out.codes);
    unpack_high(p + 128, 256, 32, 2, 4, out.codes);
    std::memcpy(out.scales, p + 192, 16);
    out.d = read_u16(p + 208);
}

void read_iq4_xs(const uint8_t* p, Block& out) {
    out.d = read_u16(p);
    const uint32_t high = read_u16(p + 2);
    for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t low = p[4 + i / 2] >> (4 * (i % 2)) & 15u;
        out.scales[i] = int8_t(int(low | (high >> (2 * i) & 3u) << 4) - 32);
    }
    unpack_low(p + 8, 256, 16, 4, out.codes);
}

}  // namespace

void read_block(WeightType type, const std::byte* bytes, Block& out) {
    const uint8_t* p = reinterpret_cast<const uint8_t*>(bytes);
    const BlockFormat format = block_format(type);
    out.m = 0;
    if (format.values == 32) {
        out.d = read_u16(p);
        if (format.has_min) out.m = read_u16(p + 2);
        out.scales[0] = out.mins[0] = 1;
        p += format.has_min ? 4 : 2;
    }
    switch (type) {
        case WeightType::f32:
        case WeightType::f16:
        case WeightType::bf16: break;
        case WeightType::q8_0:
            for (uint32_t i = 0; i < 32; ++i) out.codes[i] = p[i] ^ 0x80u;
            break;
        case WeightType::q4_0:
        case WeightType::q4_1:
        case WeightType::iq4_nl: unpack_low(p, 32, 16, 4, out.codes); break;
        case WeightType::q5_0:
        case WeightType::q5_1:
            unpack_low(p + 4, 32, 16, 4, out.codes);
            add_fifth_bits(p, out.codes);
            break;
        case WeightType::q2_k: read_q2_k(p, out); break;
        case WeightType::q3_k: read_q3_k(p, out); break;
        case WeightType::q4_k: read_q4_k(p, out); break;
        case WeightType::q5_k: read_q5_k(p, out); break;
        case WeightType::q6_k: read_q6_k(p, out); break;
        case WeightType::iq4_xs: read_iq4_xs(p, out); break;
    }
}

}  // namespace fixmin::quant
