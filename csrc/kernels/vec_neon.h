// 16 lanes in four NEON registers. Base armv8-a; with FIXMIN_DOTPROD also the dot product instructions of armv8.2.
//
// Every operation gives what vec_scalar.h gives. Where NEON has an instruction that differs, comments say so.
#pragma once
#include <arm_neon.h>

namespace {

struct VecF {
    float32x4_t v[4];
};
struct VecI {
    int32x4_t v[4];
};
struct Bytes {  // 64 bytes of quantised weights
    uint8x16_t v[4];
};

// An accumulator takes four of the 32 registers: 4 of them leave 16 for a row of weights, its products and a broadcast.
// The quantised tile holds 8 registers of integer sums besides, so 2 is what fits.
constexpr bool has_prefetch = true;
constexpr uint32_t matmul_panels = 1;
constexpr uint32_t matmul_columns = 2;
constexpr uint32_t matmul_columns_float = 4;
constexpr uint32_t matmul_columns_rows = 4;  // W8A8
// Of a single query: 16 keys each, a chain of four registers for each; 16 dimensions each, two such chains for each.
constexpr uint32_t attention_lone_groups = 2, attention_lone_vectors = 2;
// Of several queries: 16 accumulators.
constexpr uint32_t attention_queries = 4, attention_groups = 1, attention_vectors = 1;

// The indices are written out, not looped over, so that a VecF is taken apart into registers before any unrolling.
template <typename F>
VecF each(VecF x, F f) {
    return {{f(x.v[0]), f(x.v[1]), f(x.v[2]), f(x.v[3])}};
}
template <typename F>
VecF each(VecF x, VecF y, F f) {
    return {{f(x.v[0], y.v[0]), f(x.v[1], y.v[1]), f(x.v[2], y.v[2]), f(x.v[3], y.v[3])}};
}

VecF set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {{v, v, v, v}};
}
VecF zero() { return set1(0.0f); }
VecF load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
void store(float* p, VecF x) {
    vst1q_f32(p, x.v[0]);
    vst1q_f32(p + 4, x.v[1]);
    vst1q_f32(p + 8, x.v[2]);
    vst1q_f32(p + 12, x.v[3]);
}
// There are no masked loads and stores: what is not a whole vector goes through memory of our own.
VecF load_first(const float* p, uint32_t n) {
    if (n == 16) return load(p);
    float buffer[16] = {};
    __builtin_memcpy(buffer, p, n * sizeof(float));
    return load(buffer);
}
void store_first(float* p, VecF x, uint32_t n) {
    if (n == 16) return store(p, x);
    float buffer[16];
    store(buffer, x);
    __builtin_memcpy(p, buffer, n * sizeof(float));
}
VecF keep_first(VecF x, uint32_t n) {
    float buffer[16];
    store(buffer, x);
    return load_first(buffer, n);
}

VecF load_f16(const uint16_t* p) {
    const float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p)), hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return {
        {vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo), vcvt_f32_f16(vget_low_f16(hi)), vcvt_high_f32_f16(hi)}};
}
void store_f16(uint16_t* p, VecF x) {  // rounds as FPCR says: to nearest even, which the engine has set
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.v[0]), x.v[1])));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.v[2]), x.v[3])));
}
float32x4_t widen_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(x), 16)); }
VecF load_bf16(const uint16_t* p) {
    return {{widen_bf16(vld1_u16(p)), widen_bf16(vld1_u16(p + 4)), widen_bf16(vld1_u16(p + 8)),
             widen_bf16(vld1_u16(p + 12))}};
}

VecF add(VecF a, VecF b) {
    return each(a, b, [](float32x4_t p, float32x4_t q) { return vaddq_f32(p, q); });
}
VecF sub(VecF a, VecF b) {
    return each(a, b, [](float32x4_t p, float32x4_t q) { return vsubq_f32(p, q); });
}
VecF mul(VecF a, VecF b) {
    return each(a, b, [](float32x4_t p, float32x4_t q) { return vmulq_f32(p, q); });
}
VecF div(VecF a, VecF b) {
    return each(a, b, [](float32x4_t p, float32x4_t q) { return vdivq_f32(p, q); });
}
VecF fma(VecF a, VecF b, VecF c) {
    return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]), vfmaq_f32(c.v[2], a.v[2], b.v[2]),
             vfmaq_f32(c.v[3], a.v[3], b.v[3])}};
}
// fmax and fmin return a NaN from either side and order -0 before 0; x86 and the scalar class give the second operand
// whenever the first does not win.
float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
VecF max(VecF a, VecF b) { return each(a, b, larger); }
VecF min(VecF a, VecF b) { return each(a, b, smaller); }
VecF abs(VecF a) {
    return each(a, [](float32x4_t p) { return vabsq_f32(p); });
}
VecF with_sign_of(VecF magnitude, VecF sign) {
    return each(magnitude, sign, [](float32x4_t m, float32x4_t s) { return vbslq_f32(vdupq_n_u32(1u << 31), s, m); });
}
/// a where x < bound, else b.
VecF select_less(VecF x, VecF bound, VecF a, VecF b) {
    return {{vbslq_f32(vcltq_f32(x.v[0], bound.v[0]), a.v[0], b.v[0]),
             vbslq_f32(vcltq_f32(x.v[1], bound.v[1]), a.v[1], b.v[1]),
             vbslq_f32(vcltq_f32(x.v[2], bound.v[2]), a.v[2], b.v[2]),
             vbslq_f32(vcltq_f32(x.v[3], bound.v[3]), a.v[3], b.v[3])}};
}

// Nearest even. fcvtns saturates and makes a NaN 0; here what is too large and a NaN give INT32_MIN, as cvtps2dq does.
// What is too small saturates to INT32_MIN by itself.
int32x4_t round4(float32x4_t x) {
    const uint32x4_t fits = vcltq_f32(x, vdupq_n_f32(0x1p31f));
    return vbslq_s32(fits, vcvtnq_s32_f32(x), vdupq_n_s32(INT32_MIN));
}
VecI round_to_int(VecF x) { return {{round4(x.v[0]), round4(x.v[1]), round4(x.v[2]), round4(x.v[3])}}; }
VecF to_float(VecI x) {
    return {{vcvtq_f32_s32(x.v[0]), vcvtq_f32_s32(x.v[1]), vcvtq_f32_s32(x.v[2]), vcvtq_f32_s32(x.v[3])}};
}
/// x / 2^N, rounded down.
template <int N>
VecI shift_right(VecI x) {
    return {{vshrq_n_s32(x.v[0], N), vshrq_n_s32(x.v[1], N), vshrq_n_s32(x.v[2], N), vshrq_n_s32(x.v[3], N)}};
}
VecI set1_int(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {{v, v, v, v}};
}
VecI add_int(VecI a, VecI b) {
    return {
        {vaddq_s32(a.v[0], b.v[0]), vaddq_s32(a.v[1], b.v[1]), vaddq_s32(a.v[2], b.v[2]), vaddq_s32(a.v[3], b.v[3])}};
}
float32x4_t pow2_4(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
/// 2^n for n in [-126, 127].
VecF pow2(VecI n) { return {{pow2_4(n.v[0]), pow2_4(n.v[1]), pow2_4(n.v[2]), pow2_4(n.v[3])}}; }
void store_int8(int8_t* p, VecI x) {
    const int16x8_t lo = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
    const int16x8_t hi = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
int32_t reduce_add_int(VecI x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }

// The tree 8-4-2-1: lanes i and i + 8 are two registers apart. faddv and fmaxv would add and compare in another order.
float reduce_add(VecF x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
float reduce_max(VecF x) {
    const float32x4_t four = larger(larger(x.v[0], x.v[2]), larger(x.v[1], x.v[3]));
    const float32x4_t two = larger(four, vextq_f32(four, four, 2));
    const float a = vgetq_lane_f32(two, 0), b = vgetq_lane_f32(two, 1);
    return a > b ? a : b;
}
float sqrt1(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }
float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
template <int Shift, int Mask>
uint8x16_t bits16(uint8x16_t x) {
    if constexpr (Shift > 0) x = vshrq_n_u8(x, Shift);
    if constexpr (Shift < 0) x = vshlq_n_u8(x, -Shift);
    return vandq_u8(x, vdupq_n_u8(Mask));
}
/// Each byte: (x >> Shift) & Mask, or x << -Shift if Shift is negative.
template <int Shift, int Mask>
Bytes bits(Bytes x) {
    return {{bits16<Shift, Mask>(x.v[0]), bits16<Shift, Mask>(x.v[1]), bits16<Shift, Mask>(x.v[2]),
             bits16<Shift, Mask>(x.v[3])}};
}
/// base | bits<Shift, Mask>(x)
template <int Shift, int Mask>
Bytes or_bits(Bytes base, Bytes x) {
    x = bits<Shift, Mask>(x);
    return {{vorrq_u8(base.v[0], x.v[0]), vorrq_u8(base.v[1], x.v[1]), vorrq_u8(base.v[2], x.v[2]),
             vorrq_u8(base.v[3], x.v[3])}};
}
/// table[index] of each byte; indices are below 16.
Bytes lookup(const uint8_t* table, Bytes index) {
    const uint8x16_t t = vld1q_u8(table);
    return {
        {vqtbl1q_u8(t, index.v[0]), vqtbl1q_u8(t, index.v[1]), vqtbl1q_u8(t, index.v[2]), vqtbl1q_u8(t, index.v[3])}};
}
/// Lane i: float((p[i] >> Shift) & Mask).
template <int Shift, int Mask>
VecF load_uint8(const uint8_t* p) {
    const uint8x16_t bytes = bits16<Shift, Mask>(vld1q_u8(p));
    const uint16x8_t lo = vmovl_u8(vget_low_u8(bytes)), hi = vmovl_high_u8(bytes);
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(lo))), vcvtq_f32_u32(vmovl_high_u16(lo)),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(hi))), vcvtq_f32_u32(vmovl_high_u16(hi))}};
}
/// Lane i: float(p[i]).
VecF load_int8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_high_s8(bytes);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_high_s16(lo)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))), vcvtq_f32_s32(vmovl_high_s16(hi))}};
}
Bytes exclusive_or(Bytes a, Bytes b) {
    return {{veorq_u8(a.v[0], b.v[0]), veorq_u8(a.v[1], b.v[1]), veorq_u8(a.v[2], b.v[2]), veorq_u8(a.v[3], b.v[3])}};
}
/// Signed bytes to bytes with offset 128, and back.
Bytes flip_signs(Bytes w) {
    const uint8x16_t signs = vdupq_n_u8(0x80);
    return exclusive_or(w, {{signs, signs, signs, signs}});
}

constexpr uint32_t ceiling_chains = 6;  // of 4 registers
/// The compiler must have x in registers here and knows nothing about it afterwards. Costs no instruction.
template <typename V>
void keep(V& x) {
    __asm__ volatile("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3]));
}

[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p); }
[[gnu::always_inline]] inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// Adds the products of 4 x 4 signed bytes, each four to its lane.
#ifdef FIXMIN_DOTPROD
int32x4_t add_products(int32x4_t acc, int8x16_t w, int8x16_t a) { return vdotq_s32(acc, w, a); }
#else
// Two products of a pair fit 16 bits: activations lie in [-127, 127], so |-128 * 127 * 2| = 32512.
int32x4_t add_products(int32x4_t acc, int8x16_t w, int8x16_t a) {
    const int16x8_t lo = vmull_s8(vget_low_s8(w), vget_low_s8(a)), hi = vmull_high_s8(w, a);
    return vpadalq_s16(acc, vpaddq_s16(lo, hi));
}
#endif

// Both ways multiply signed by signed: the offset of 8-bit weights is taken off them, not off the sum.
using Q8Bytes = Bytes;
Q8Bytes prepare_q8(Bytes w) { return flip_signs(w); }
VecI q8_start(int32_t) { return set1_int(0); }
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) {
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(a));
    return {{add_products(acc.v[0], vreinterpretq_s8_u8(w.v[0]), x),
             add_products(acc.v[1], vreinterpretq_s8_u8(w.v[1]), x),
             add_products(acc.v[2], vreinterpretq_s8_u8(w.v[2]), x),
             add_products(acc.v[3], vreinterpretq_s8_u8(w.v[3]), x)}};
}
VecI dot_q4(VecI acc, Bytes w, int32_t a) { return dot_q8(acc, w, a); }  // 0..63: the sign bit is never set
constexpr bool dot_q4_takes_any_byte = false;

}  // namespace
