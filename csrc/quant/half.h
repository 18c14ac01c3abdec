// Conversions between float32 and the 16-bit formats of a file, in integer arithmetic: the same bits on every machine.
// `static` on purpose: this header is also used inside kernel translation units, which must not share inline code.
#pragma once
#include <cstdint>
#include <cstring>

namespace fixmin::quant {

static inline uint32_t float_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

static inline float float_from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

/// IEEE binary16 -> binary32, exact.
static inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 31u;
    const uint32_t mantissa = h & 0x3ffu;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    // Subnormal: mantissa * 2^-24 is exact in float32.
    const float magnitude = float(mantissa) * 0x1p-24f;
    return float_from_bits(sign | float_bits(magnitude));
}

/// binary32 -> IEEE binary16, round to nearest even; overflow gives infinity, as vcvtps2ph does.
static inline uint16_t f32_to_f16(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);  // >= 2^16
    if (magnitude < 0x38800000u) {                                  // < 2^-14: subnormal or zero
        // Adding 0.5 puts the rounding position of 2^-24 at the last bit of the float32 mantissa.
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t round = 0xfffu + ((magnitude >> 13) & 1u);
    return uint16_t(sign | ((magnitude - 0x38000000u + round) >> 13));
}

static inline float bf16_to_f32(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

}  // namespace fixmin::quant
