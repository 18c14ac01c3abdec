// 16 lanes in plain arrays: runs on any CPU, and is what the vector ISAs are compared with, bit for bit.
#pragma once
#include "quant/half.h"

namespace {

struct VecF {
    float v[16];
};
struct VecI {
    int32_t v[16];
};
struct Bytes {  // 64 bytes of quantised weights
    uint8_t v[64];
};

constexpr bool has_prefetch = false;
constexpr uint32_t matmul_panels = 1;
constexpr uint32_t matmul_columns = 2;
constexpr uint32_t matmul_columns_float = 2;
constexpr uint32_t matmul_columns_rows = 2;  // W8A8
constexpr uint32_t attention_lone_groups = 2, attention_lone_vectors = 2;
constexpr uint32_t attention_queries = 4, attention_groups = 1, attention_vectors = 1;

template <typename F>
VecF lanewise(F f) {
    VecF out;
    for (int i = 0; i < 16; ++i) out.v[i] = f(i);
    return out;
}

VecF set1(float x) {
    return lanewise([&](int) { return x; });
}
VecF zero() { return set1(0.0f); }
VecF load(const float* p) {
    return lanewise([&](int i) { return p[i]; });
}
void store(float* p, VecF x) {
    for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
VecF load_first(const float* p, uint32_t n) {
    return lanewise([&](int i) { return uint32_t(i) < n ? p[i] : 0.0f; });
}
void store_first(float* p, VecF x, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) p[i] = x.v[i];
}
VecF keep_first(VecF x, uint32_t n) {
    return lanewise([&](int i) { return uint32_t(i) < n ? x.v[i] : 0.0f; });
}

VecF load_f16(const uint16_t* p) {
    return lanewise([&](int i) { return fixmin::quant::f16_to_f32(p[i]); });
}
void store_f16(uint16_t* p, VecF x) {
    for (int i = 0; i < 16; ++i) p[i] = fixmin::quant::f32_to_f16(x.v[i]);
}
VecF load_bf16(const uint16_t* p) {
    return lanewise([&](int i) { return fixmin::quant::bf16_to_f32(p[i]); });
}

float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
float sqrt1(float x) { return __builtin_sqrtf(x); }
VecF add(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
VecF sub(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
VecF mul(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
VecF div(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] / b.v[i]; });
}
VecF fma(VecF a, VecF b, VecF c) {
    return lanewise([&](int i) { return fma1(a.v[i], b.v[i], c.v[i]); });
}
VecF max(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
VecF min(VecF a, VecF b) {
    return lanewise([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
VecF abs(VecF a) {
    return lanewise([&](int i) { return __builtin_fabsf(a.v[i]); });
}
VecF with_sign_of(VecF magnitude, VecF sign) {
    return lanewise([&](int i) { return __builtin_copysignf(magnitude.v[i], sign.v[i]); });
}
/// a where x < bound, else b.
VecF select_less(VecF x, VecF bound, VecF a, VecF b) {
    return lanewise([&](int i) { return x.v[i] < bound.v[i] ? a.v[i] : b.v[i]; });
}

// Nearest even. What does not fit gives INT32_MIN, as cvtps2dq does; a C++ cast would be undefined.
VecI round_to_int(VecF x) {
    VecI out;
    for (int i = 0; i < 16; ++i) {
        const bool fits = x.v[i] >= -0x1p31f && x.v[i] < 0x1p31f;
        out.v[i] = fits ? int32_t(__builtin_rintf(x.v[i])) : INT32_MIN;
    }
    return out;
}
VecF to_float(VecI x) {
    return lanewise([&](int i) { return float(x.v[i]); });
}
/// 16 bytes, each (p[i] >> Shift) & Mask.
template <int Shift, int Mask>
VecF load_uint8(const uint8_t* p) {
    return lanewise([&](int i) { return float(p[i] >> Shift & Mask); });
}
VecF load_int8(const int8_t* p) {
    return lanewise([&](int i) { return float(p[i]); });
}
/// x / 2^N, rounded down.
template <int N>
VecI shift_right(VecI x) {
    for (int32_t& v : x.v) v >>= N;
    return x;
}
VecI set1_int(int32_t x) {
    VecI out;
    for (int i = 0; i < 16; ++i) out.v[i] = x;
    return out;
}
VecI add_int(VecI a, VecI b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
}
/// 2^n for n in [-126, 127].
VecF pow2(VecI n) {
    return lanewise([&](int i) { return fixmin::quant::float_from_bits(uint32_t(n.v[i] + 127) << 23); });
}
void store_int8(int8_t* p, VecI x) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(x.v[i]);
}
int32_t reduce_add_int(VecI x) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += uint32_t(x.v[i]);
    return int32_t(sum);
}

float reduce_add(VecF x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] = x.v[i] + x.v[i + half];
    return x.v[0];
}
float reduce_max(VecF x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
    return x.v[0];
}

Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.v[i] = p[i];
    return out;
}
/// Of each byte: x shifted right by Shift (left by -Shift where that is negative), and Mask.
template <int Shift, int Mask>
Bytes bits(Bytes x) {
    static_assert((Shift >= 0 ? 0xff >> Shift & Mask : 0xff << -Shift & Mask) == Mask);
    for (int i = 0; i < 64; ++i) x.v[i] = uint8_t((Shift >= 0 ? x.v[i] >> Shift : x.v[i] << -Shift) & Mask);
    return x;
}
/// base | bits<Shift, Mask>(x)
template <int Shift, int Mask>
Bytes or_bits(Bytes base, Bytes x) {
    x = bits<Shift, Mask>(x);
    for (int i = 0; i < 64; ++i) base.v[i] |= x.v[i];
    return base;
}
/// table[index] of each byte; indices are below 16.
Bytes lookup(const uint8_t* table, Bytes index) {
    for (int i = 0; i < 64; ++i) index.v[i] = table[index.v[i]];
    return index;
}
[[gnu::always_inline]] inline void prefetch(const void*) {}
[[gnu::always_inline]] inline void prefetch_far(const void*) {}
Bytes exclusive_or(Bytes a, Bytes b) {
    for (int i = 0; i < 64; ++i) a.v[i] ^= b.v[i];
    return a;
}
/// Signed bytes to bytes with offset 128, and back.
Bytes flip_signs(Bytes w) {
    for (int i = 0; i < 64; ++i) w.v[i] ^= 0x80;
    return w;
}

// Of tiles (tiles.inl):
inline VecI load_int(const int32_t* p) {
    VecI out;
    for (int i = 0; i < 16; ++i) out.v[i] = p[i];
    return out;
}
inline Bytes set1_bytes(uint8_t x) {
    Bytes out;
    for (uint8_t& v : out.v) v = x;
    return out;
}
inline Bytes sub_bytes(Bytes a, Bytes b) {
    for (int i = 0; i < 64; ++i) a.v[i] = uint8_t(a.v[i] - b.v[i]);
    return a;
}
inline void store_bytes(uint8_t* p, Bytes x) {
    for (int i = 0; i < 64; ++i) p[i] = x.v[i];
}

constexpr uint32_t ceiling_chains = 2;
/// The compiler must have x in memory here and knows nothing about it afterwards.
template <typename V>
void keep(V& x) {
    __asm__ volatile("" : "+m"(x));
}

using Q8Bytes = Bytes;
Q8Bytes prepare_q8(Bytes w) { return w; }
VecI q8_start(int32_t activation_sum) { return set1_int(int32_t(-128u * uint32_t(activation_sum))); }
/// Lane i: acc + sum over b of w[4i + b] * (signed byte b of a). Weights are unsigned, at most 63 here.
VecI dot_q4(VecI acc, Bytes w, int32_t a) {
    for (int i = 0; i < 16; ++i)
        for (int b = 0; b < 4; ++b) {
            const int32_t product = int32_t(w.v[4 * i + b]) * int8_t(uint32_t(a) >> (8 * b));
            acc.v[i] = int32_t(uint32_t(acc.v[i]) + uint32_t(product));  // of long rows more than 32 bits on the way
        }
    return acc;
}
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) { return dot_q4(acc, w, a); }
constexpr bool dot_q4_takes_any_byte = true;

}  // namespace
