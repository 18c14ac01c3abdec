// 16 lanes in one zmm register. Needs AVX-512 F, BW, DQ, VL; with FIXMIN_VNNI also AVX512_VNNI.
#pragma once
#include <immintrin.h>

namespace {

struct VecF {
    __m512 v;
};
struct VecI {
    __m512i v;
};
struct Bytes {  // 64 bytes of quantised weights
    __m512i v;
};

// 12 accumulators, 12 dot products, 2 vectors of weights, temporaries: 32 registers. Two panels, because a load of
// activations for each product would be more than the load ports give.
constexpr bool has_prefetch = true;
constexpr uint32_t matmul_panels = 2;
constexpr uint32_t matmul_columns = 6;
constexpr uint32_t matmul_columns_float = 12;
constexpr uint32_t matmul_columns_rows = 8;  // W8A8
// Of a single query: 16 keys each, a chain for each; 16 dimensions each, two chains for each. 8 cover the latency of
// fma.
constexpr uint32_t attention_lone_groups = 2, attention_lone_vectors = 4;
// Of several queries: 16 accumulators, and few loads for each product.
constexpr uint32_t attention_queries = 8, attention_groups = 2, attention_vectors = 2;

VecF zero() { return {_mm512_setzero_ps()}; }
VecF set1(float x) { return {_mm512_set1_ps(x)}; }
VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
__mmask16 first_mask(uint32_t n) { return __mmask16((1u << n) - 1u); }
VecF load_first(const float* p, uint32_t n) { return {_mm512_maskz_loadu_ps(first_mask(n), p)}; }
void store_first(float* p, VecF x, uint32_t n) { _mm512_mask_storeu_ps(p, first_mask(n), x.v); }
VecF keep_first(VecF x, uint32_t n) { return {_mm512_maskz_mov_ps(first_mask(n), x.v)}; }

VecF load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
void store_f16(uint16_t* p, VecF x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VecF load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
VecF div(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
VecF with_sign_of(VecF magnitude, VecF sign) {
    return {_mm512_or_ps(magnitude.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
/// a where x < bound, else b.
VecF select_less(VecF x, VecF bound, VecF a, VecF b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), b.v, a.v)};
}

VecI round_to_int(VecF x) { return {_mm512_cvtps_epi32(x.v)}; }  // nearest even
VecF to_float(VecI x) { return {_mm512_cvtepi32_ps(x.v)}; }
/// 16 bytes, each (p[i] >> Shift) & Mask.
template <int Shift, int Mask>
VecF load_uint8(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return to_float({_mm512_and_si512(_mm512_srli_epi32(wide, Shift), _mm512_set1_epi32(Mask))});
}
VecF load_int8(const int8_t* p) { return to_float({_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}); }
VecI set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
/// x / 2^N, rounded down.
template <int N>
VecI shift_right(VecI x) {
    return {_mm512_srai_epi32(x.v, N)};
}
VecI add_int(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
/// 2^n for n in [-126, 127].
VecF pow2(VecI n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
void store_int8(int8_t* p, VecI x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }
int32_t reduce_add_int(VecI x) { return _mm512_reduce_add_epi32(x.v); }

float tree4(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
float reduce_add(VecF x) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    return tree4(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
float reduce_max(VecF x) { return _mm512_reduce_max_ps(x.v); }
float sqrt1(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
/// Of each byte: x shifted right by Shift (left by -Shift where that is negative), and Mask. Mask removes what a shift
/// of 16 bits brings in from the neighbour.
template <int Shift>
__m512i shifted(__m512i x) {
    if constexpr (Shift > 0) return _mm512_srli_epi16(x, Shift);
    if constexpr (Shift < 0) return _mm512_slli_epi16(x, -Shift);
    return x;
}
template <int Shift, int Mask>
Bytes bits(Bytes x) {
    return {_mm512_and_si512(shifted<Shift>(x.v), _mm512_set1_epi8(char(Mask)))};
}
/// base | bits<Shift, Mask>(x)
template <int Shift, int Mask>
Bytes or_bits(Bytes base, Bytes x) {
    constexpr int a_or_b_and_c = 0xf8;
    return {_mm512_ternarylogic_epi32(base.v, shifted<Shift>(x.v), _mm512_set1_epi8(char(Mask)), a_or_b_and_c)};
}
/// table[index] of each byte; indices are below 16.
Bytes lookup(const uint8_t* table, Bytes index) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index.v)};
}
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
[[gnu::always_inline]] inline void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
Bytes exclusive_or(Bytes a, Bytes b) { return {_mm512_xor_si512(a.v, b.v)}; }
/// Signed bytes to bytes with offset 128, and back.
Bytes flip_signs(Bytes w) { return exclusive_or(w, {_mm512_set1_epi8(char(0x80))}); }

// Of tiles (tiles.inl):
inline VecI load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes set1_bytes(uint8_t x) { return {_mm512_set1_epi8(char(x))}; }
inline Bytes sub_bytes(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x.v); }

constexpr uint32_t ceiling_chains = 12;
/// The compiler must have x in a register here and knows nothing about it afterwards. Costs no instruction.
template <typename V>
void keep(V& x) {
    __asm__ volatile("" : "+v"(x.v));
}

#ifdef FIXMIN_VNNI
// vpdpbusd takes unsigned weights; the offset 128 is taken off through the sum of the activations.
using Q8Bytes = Bytes;
Q8Bytes prepare_q8(Bytes w) { return w; }
VecI q8_start(int32_t activation_sum) { return set1_int(int32_t(-128u * uint32_t(activation_sum))); }
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(a))}; }
VecI dot_q4(VecI acc, Bytes w, int32_t a) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(a))}; }
#define FIXMIN_DOT_IN_MEMORY
/// dot_q4 and dot_q8 with four activations in memory, which the instruction itself repeats; compilers do not see that.
VecI dot_in_memory(VecI acc, Bytes w, const int8_t* a) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int8_t (*)[4])a));
    return acc;
}
constexpr bool dot_q4_takes_any_byte = true;
#else
// vpmaddubsw saturates at 16 bits, so 8-bit weights go in as |w| <= 128 with their sign moved to the activation:
// 2 * 128 * 127 = 32512 fits. Codes of up to 6 bits fit as they are.
struct Q8Bytes {
    __m512i magnitude;
    __mmask64 negative;
};
Q8Bytes prepare_q8(Bytes w) {
    const Bytes value = flip_signs(w);
    return {_mm512_abs_epi8(value.v), _mm512_movepi8_mask(value.v)};
}
VecI q8_start(int32_t) { return {_mm512_setzero_si512()}; }
VecI add_pairs(VecI acc, __m512i products) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))};
}
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) {
    const __m512i x = _mm512_set1_epi32(a);
    const __m512i signed_x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
    return add_pairs(acc, _mm512_maddubs_epi16(w.magnitude, signed_x));
}
VecI dot_q4(VecI acc, Bytes w, int32_t a) { return add_pairs(acc, _mm512_maddubs_epi16(w.v, _mm512_set1_epi32(a))); }
constexpr bool dot_q4_takes_any_byte = false;
#define FIXMIN_PAIRS
/// 16-bit sums of products of two neighbouring bytes, for weights of few bits: several fit before they are widened.
struct Pairs {
    __m512i v;
};
Pairs multiply_pairs(Bytes w, int32_t a) { return {_mm512_maddubs_epi16(w.v, _mm512_set1_epi32(a))}; }
Pairs add(Pairs a, Pairs b) { return {_mm512_add_epi16(a.v, b.v)}; }
VecI add_pairs(VecI acc, Pairs p) { return add_pairs(acc, p.v); }
#endif

}  // namespace
