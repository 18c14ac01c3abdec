// 16 lanes in two ymm registers. Needs AVX2, FMA, F16C; with FIXMIN_VNNI also AVX-VNNI.
#pragma once
#include <immintrin.h>

namespace {

struct VecF {
    __m256 lo, hi;  // lanes 0-7, 8-15
};
struct VecI {
    __m256i lo, hi;
};
struct Bytes {  // 64 bytes of quantised weights
    __m256i lo, hi;
};

constexpr bool has_prefetch = true;
constexpr uint32_t matmul_panels = 1;
constexpr uint32_t matmul_columns = 4;  // 16 registers: 8 hold accumulators
constexpr uint32_t matmul_columns_float = 6;
constexpr uint32_t matmul_columns_rows = 6;  // W8A8
// Of a single query: 16 keys each, a chain of two registers for each; 16 dimensions each, two such chains for each.
constexpr uint32_t attention_lone_groups = 2, attention_lone_vectors = 2;
// Of several queries: 8 accumulators.
constexpr uint32_t attention_queries = 4, attention_groups = 1, attention_vectors = 1;

VecF zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VecF set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VecF load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
void store(float* p, VecF x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
// Lane i of the result is all ones where base + i < n.
__m256i first_mask(uint32_t n, int base) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane);
}
// Masked stores, and some masked loads, are slow: mostly all lanes are wanted.
VecF load_first(const float* p, uint32_t n) {
    if (n == 16) return load(p);
    return {_mm256_maskload_ps(p, first_mask(n, 0)), _mm256_maskload_ps(p + 8, first_mask(n, 8))};
}
void store_first(float* p, VecF x, uint32_t n) {
    if (n == 16) return store(p, x);
    _mm256_maskstore_ps(p, first_mask(n, 0), x.lo);
    _mm256_maskstore_ps(p + 8, first_mask(n, 8), x.hi);
}
VecF keep_first(VecF x, uint32_t n) {
    return {_mm256_and_ps(x.lo, _mm256_castsi256_ps(first_mask(n, 0))),
            _mm256_and_ps(x.hi, _mm256_castsi256_ps(first_mask(n, 8)))};
}

VecF load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
void store_f16(uint16_t* p, VecF x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
}
__m256 widen_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
VecF load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
VecF div(VecF a, VecF b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
VecF abs(VecF a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
VecF with_sign_of(VecF magnitude, VecF s) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(magnitude.lo, _mm256_and_ps(s.lo, sign)),
            _mm256_or_ps(magnitude.hi, _mm256_and_ps(s.hi, sign))};
}
/// a where x < bound, else b.
VecF select_less(VecF x, VecF bound, VecF a, VecF b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ))};
}

VecI round_to_int(VecF x) { return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)}; }  // nearest even
VecF to_float(VecI x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
/// 16 bytes, each (p[i] >> Shift) & Mask.
template <int Shift, int Mask>
VecF load_uint8(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi32(Mask);
    const __m256i lo = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    const __m256i hi = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)));
    return to_float(
        {_mm256_and_si256(_mm256_srli_epi32(lo, Shift), mask), _mm256_and_si256(_mm256_srli_epi32(hi, Shift), mask)});
}
VecF load_int8(const int8_t* p) {
    return to_float({_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                     _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
/// x / 2^N, rounded down.
template <int N>
VecI shift_right(VecI x) {
    return {_mm256_srai_epi32(x.lo, N), _mm256_srai_epi32(x.hi, N)};
}
VecI set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
VecI add_int(VecI a, VecI b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
/// 2^n for n in [-126, 127].
VecF pow2(VecI n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
void store_int8(int8_t* p, VecI x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}
int32_t reduce_add_int(VecI x) {
    const __m256i a = _mm256_add_epi32(x.lo, x.hi);
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}

float tree4(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
float reduce_add(VecF x) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi);
    return tree4(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
float reduce_max(VecF x) {
    const __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}
float sqrt1(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
/// Of each byte: x shifted right by Shift (left by -Shift where that is negative), and Mask. Mask removes what a shift
/// of 16 bits brings in from the neighbour.
template <int Shift, int Mask>
__m256i bits_of(__m256i x) {
    if constexpr (Shift > 0) x = _mm256_srli_epi16(x, Shift);
    if constexpr (Shift < 0) x = _mm256_slli_epi16(x, -Shift);
    return _mm256_and_si256(x, _mm256_set1_epi8(char(Mask)));
}
template <int Shift, int Mask>
Bytes bits(Bytes x) {
    return {bits_of<Shift, Mask>(x.lo), bits_of<Shift, Mask>(x.hi)};
}
/// base | bits<Shift, Mask>(x)
template <int Shift, int Mask>
Bytes or_bits(Bytes base, Bytes x) {
    return {_mm256_or_si256(base.lo, bits_of<Shift, Mask>(x.lo)), _mm256_or_si256(base.hi, bits_of<Shift, Mask>(x.hi))};
}
/// table[index] of each byte; indices are below 16.
Bytes lookup(const uint8_t* table, Bytes index) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(values, index.lo), _mm256_shuffle_epi8(values, index.hi)};
}
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
[[gnu::always_inline]] inline void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
Bytes exclusive_or(Bytes a, Bytes b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
/// Signed bytes to bytes with offset 128, and back.
Bytes flip_signs(Bytes w) {
    const __m256i signs = _mm256_set1_epi8(char(0x80));
    return exclusive_or(w, {signs, signs});
}

/// The compiler must have x in registers here and knows nothing about it afterwards. Costs no instruction.
template <typename V>
void keep(V& x) {
    __asm__ volatile("" : "+x"(x.lo), "+x"(x.hi));
}

#ifdef FIXMIN_VNNI
constexpr uint32_t ceiling_chains = 6;  // of 2 registers
// vpdpbusd takes unsigned weights; the offset 128 is taken off through the sum of the activations.
using Q8Bytes = Bytes;
Q8Bytes prepare_q8(Bytes w) { return w; }
VecI q8_start(int32_t activation_sum) { return set1_int(int32_t(-128u * uint32_t(activation_sum))); }
VecI dot_q4(VecI acc, Bytes w, int32_t a) {
    const __m256i x = _mm256_set1_epi32(a);
    return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, x), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, x)};
}
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) { return dot_q4(acc, w, a); }
constexpr bool dot_q4_takes_any_byte = true;
#else
constexpr uint32_t ceiling_chains = 4;  // of 2 registers; more would not stay in them
// vpmaddubsw saturates at 16 bits, so 8-bit weights go in as |w| <= 128 with their sign moved to the activation:
// 2 * 128 * 127 = 32512 fits. Codes of up to 6 bits fit as they are.
struct Q8Bytes {
    __m256i magnitude_lo, magnitude_hi, value_lo, value_hi;
};
Q8Bytes prepare_q8(Bytes w) {
    const Bytes value = flip_signs(w);
    return {_mm256_abs_epi8(value.lo), _mm256_abs_epi8(value.hi), value.lo, value.hi};
}
VecI q8_start(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
__m256i add_pairs(__m256i acc, __m256i products) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
VecI dot_q8(VecI acc, Q8Bytes w, int32_t a) {
    const __m256i x = _mm256_set1_epi32(a);
    return {add_pairs(acc.lo, _mm256_maddubs_epi16(w.magnitude_lo, _mm256_sign_epi8(x, w.value_lo))),
            add_pairs(acc.hi, _mm256_maddubs_epi16(w.magnitude_hi, _mm256_sign_epi8(x, w.value_hi)))};
}
VecI dot_q4(VecI acc, Bytes w, int32_t a) {
    const __m256i x = _mm256_set1_epi32(a);
    return {add_pairs(acc.lo, _mm256_maddubs_epi16(w.lo, x)), add_pairs(acc.hi, _mm256_maddubs_epi16(w.hi, x))};
}
constexpr bool dot_q4_takes_any_byte = false;
#define FIXMIN_PAIRS
/// 16-bit sums of products of two neighbouring bytes, for weights of few bits: several fit before they are widened.
struct Pairs {
    __m256i lo, hi;
};
Pairs multiply_pairs(Bytes w, int32_t a) {
    const __m256i x = _mm256_set1_epi32(a);
    return {_mm256_maddubs_epi16(w.lo, x), _mm256_maddubs_epi16(w.hi, x)};
}
Pairs add(Pairs a, Pairs b) { return {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)}; }
VecI add_pairs(VecI acc, Pairs p) { return {add_pairs(acc.lo, p.lo), add_pairs(acc.hi, p.hi)}; }

#define FIXMIN_WIDE_ROWS
/// Sums of products of 16 bits, of 8 rows: of the first and of the second two of each four k. Sign, maddubs and madd of
/// dot_q8 share two ports of many CPUs; of 32 products here two instructions of four do.
struct WideSums {
    __m256i first, second;  // rows 0-3, 4-7

    static WideSums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

    struct Weights {
        __m256i first, second;
    };
    /// 4 unsigned bytes of each of 8 rows.
    static Weights load(const uint8_t* p) {
        return {_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
                _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
    }
    /// In the 16 registers there is just room for six of these; GCC 12 would keep copies of sums and weights in memory.
    [[gnu::always_inline]] void add(Weights w, const int16_t* four) {
        __m256i a = first, b = second, x, y;
        __asm__(
            "vpbroadcastq %4, %2\n\t"
            "vpmaddwd %2, %6, %3\n\t"
            "vpmaddwd %2, %5, %2\n\t"
            "vpaddd %3, %1, %1\n\t"
            "vpaddd %2, %0, %0"
            : "+x"(a), "+x"(b), "=&x"(x), "=&x"(y)
            : "m"(*(const int16_t (*)[4])four), "x"(w.first), "x"(w.second));
        first = a;
        second = b;
    }
    __m256i rows() const { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8); }
};
VecI join(const WideSums& lower, const WideSums& upper) { return {lower.rows(), upper.rows()}; }
void widen(const int8_t* x, uint32_t n, int16_t* to) {
    for (uint32_t i = 0; i < n; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(x + i))));
}
#endif

}  // namespace
