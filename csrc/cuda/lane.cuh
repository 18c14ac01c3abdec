// The elementary functions of the contract on one lane, and sums of a row as its 16 lanes make them.
#pragma once
#include "cuda/simt.h"

namespace fixmin::cuda {

namespace lane {

struct VecF {
    float v;
};
struct VecI {
    int v;
};

FIXMIN_DEVICE VecF set1(float x) { return {x}; }
FIXMIN_DEVICE VecF zero() { return {0.0f}; }
FIXMIN_DEVICE VecF add(VecF a, VecF b) { return {a.v + b.v}; }
FIXMIN_DEVICE VecF sub(VecF a, VecF b) { return {a.v - b.v}; }
FIXMIN_DEVICE VecF mul(VecF a, VecF b) { return {a.v * b.v}; }
FIXMIN_DEVICE VecF div(VecF a, VecF b) { return {a.v / b.v}; }
FIXMIN_DEVICE VecF fma(VecF a, VecF b, VecF c) { return {__fmaf_rn(a.v, b.v, c.v)}; }
FIXMIN_DEVICE VecF max(VecF a, VecF b) { return {a.v > b.v ? a.v : b.v}; }
FIXMIN_DEVICE VecF min(VecF a, VecF b) { return {a.v < b.v ? a.v : b.v}; }
FIXMIN_DEVICE VecF abs(VecF a) { return {__int_as_float(__float_as_int(a.v) & 0x7fffffff)}; }
FIXMIN_DEVICE VecF with_sign_of(VecF magnitude, VecF sign) {
    const int bits = __float_as_int(magnitude.v) & 0x7fffffff;
    return {__int_as_float(bits | int(unsigned(__float_as_int(sign.v)) & 0x80000000u))};
}
FIXMIN_DEVICE VecF select_less(VecF x, VecF bound, VecF a, VecF b) { return {x.v < bound.v ? a.v : b.v}; }
FIXMIN_DEVICE VecI round_to_int(VecF x) { return {__float2int_rn(x.v)}; }
FIXMIN_DEVICE VecF to_float(VecI x) { return {float(x.v)}; }
FIXMIN_DEVICE VecF pow2(VecI n) { return {__int_as_float((n.v + 127) << 23)}; }
FIXMIN_DEVICE float sqrt1(float x) { return __fsqrt_rn(x); }

#define FIXMIN_ELEMENTARY FIXMIN_DEVICE
#include "numerics/elementary.inl"
#undef FIXMIN_ELEMENTARY

}  // namespace lane

constexpr unsigned whole_warp = 0xffffffffu;

FIXMIN_DEVICE float max_of_warp(float x) {
    for (int by = 16; by; by /= 2) {
        const float other = __shfl_xor_sync(whole_warp, x, by);
        x = x > other ? x : other;
    }
    return x;
}

/// Lanes 0 to 15 of a warp hold a partial sum each; every lane gets the sum of the tree 8-4-2-1.
FIXMIN_DEVICE float tree_sum(float partial) {
    for (int by = 8; by; by /= 2) partial += __shfl_down_sync(whole_warp, partial, by);
    return __shfl_sync(whole_warp, partial, 0);
}

/// Sum over x[0..n) as 16 lanes make it: called by one warp, f(sum, value). Of a last vector that is not full, f(0,
/// value) is added.
template <typename F>
FIXMIN_DEVICE float sum_of(const float* x, uint32_t n, F f) {
    float sum = 0;
    const uint32_t lane = threadIdx.x % 16;
    uint32_t i = 0;
    for (; i < n / 16 * 16; i += 16) sum = f(sum, x[i + lane]);
    if (i + lane < n) sum += f(0.0f, x[i + lane]);
    return tree_sum(sum);
}

/// 32 values of a row, one in each lane of a warp, in 8 bits (docs/numerics.md).
struct Quantized {
    int code;
    float scale;
};
FIXMIN_DEVICE Quantized quantize(float x) {
    const float amax = max_of_warp(lane::abs({x}).v);
    const bool empty = amax < 1e-30f;
    return {__float2int_rn(x * (empty ? 0.0f : 127.0f / amax)), empty ? 0.0f : amax / 127.0f};
}

/// The bytes of lanes 4i..4i+3 in lane 4i.
FIXMIN_DEVICE uint32_t join_bytes(int byte) {
    unsigned word = unsigned(byte) & 255u;
    word |= __shfl_down_sync(whole_warp, word, 1) << 8;
    word |= __shfl_down_sync(whole_warp, word, 2) << 16;
    return word;
}

}  // namespace fixmin::cuda
