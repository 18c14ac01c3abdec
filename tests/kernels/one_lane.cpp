// csrc/numerics/elementary.inl compiled for a class of one lane, as a GPU does: one_lane FUNCTION < float32 > float32.
//
// norm reads x, weight and bias, [n] each with n a multiple of 16; rope reads x [dim], cos and sin [dim/2].
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "quant/half.h"

namespace {

using VecF = float;
using VecI = int32_t;

VecF set1(float x) { return x; }
VecF zero() { return 0.0f; }
VecF add(VecF a, VecF b) { return a + b; }
VecF sub(VecF a, VecF b) { return a - b; }
VecF mul(VecF a, VecF b) { return a * b; }
VecF div(VecF a, VecF b) { return a / b; }
VecF fma(VecF a, VecF b, VecF c) { return __builtin_fmaf(a, b, c); }
VecF max(VecF a, VecF b) { return a > b ? a : b; }
VecF min(VecF a, VecF b) { return a < b ? a : b; }
VecF abs(VecF a) { return __builtin_fabsf(a); }
VecF with_sign_of(VecF magnitude, VecF sign) { return __builtin_copysignf(magnitude, sign); }
VecF select_less(VecF x, VecF bound, VecF a, VecF b) { return x < bound ? a : b; }
VecI round_to_int(VecF x) { return x >= -0x1p31f && x < 0x1p31f ? int32_t(__builtin_rintf(x)) : INT32_MIN; }
VecF to_float(VecI x) { return float(x); }
VecF pow2(VecI n) { return fixmin::quant::float_from_bits(uint32_t(n + 127) << 23); }
float sqrt1(float x) { return __builtin_sqrtf(x); }

#define FIXMIN_ELEMENTARY [[maybe_unused]]
#include "numerics/elementary.inl"

// One mean, reciprocal deviation, weight and bias for every value: what a norm does once its sums are known.
std::vector<float> norm(const std::vector<float>& in) {
    const uint32_t n = uint32_t(in.size() / 3);
    const float *x = in.data(), *weight = x + n, *bias = weight + n;
    float partial[16] = {}, squares[16] = {};
    const auto sum = [](float* p) {  // 8-4-2-1
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) p[i] = add(p[i], p[i + half]);
        return p[0];
    };
    for (uint32_t i = 0; i < n; ++i) partial[i % 16] = add(partial[i % 16], x[i]);
    const float mean = sum(partial) / float(n);
    for (uint32_t i = 0; i < n; ++i) squares[i % 16] = add_square_from(squares[i % 16], x[i], mean);
    const float rstd = reciprocal_deviation(sum(squares), n, 1e-5f);
    std::vector<float> out(n);
    for (uint32_t i = 0; i < n; ++i) out[i] = normalized(x[i], mean, rstd, weight[i], bias[i]);
    return out;
}

// x [dim], cos [dim/2], sin [dim/2]; pairs i, i + dim/2.
std::vector<float> rope(const std::vector<float>& in) {
    const uint32_t pairs = uint32_t(in.size() / 4);
    std::vector<float> out(2 * pairs);
    for (uint32_t i = 0; i < pairs; ++i) {
        const Pair turned = rotated({in[i], in[pairs + i]}, in[2 * pairs + i], in[3 * pairs + i]);
        out[i] = turned.first;
        out[pairs + i] = turned.second;
    }
    return out;
}

}  // namespace

int main(int, char** argv) {
    const std::string name = argv[1];
    std::vector<float> values;
    for (float x; std::fread(&x, sizeof x, 1, stdin) == 1;) values.push_back(x);
    if (name == "norm") values = norm(values);
    if (name == "rope") values = rope(values);
    for (float& x : values) {
        if (name == "gelu") x = gelu(x);
        if (name == "gelu_tanh") x = gelu_by_tanh(x);
        if (name == "silu") x = silu(x);
    }
    return std::fwrite(values.data(), sizeof(float), values.size(), stdout) != values.size();
}
