// The one body of kernels. Included by one translation unit per ISA after a header that defines the 16-lane classes
// VecF, VecI, Bytes, Q8Bytes and their operations. Everything here has internal linkage and uses no inline function
// from elsewhere (no std::): code compiled for one ISA must never be what the linker picks for another.
//
// The order of every floating-point operation is part of the contract (docs/numerics.md); change it here only.

namespace {

using namespace fixmin::kernels;
using fixmin::quant::WeightType;

constexpr uint32_t block = fixmin::quant::block_size;

int32_t read_int32(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// ---- elementary functions -------------------------------------------------------------------------------------------
// Coefficients and errors: bench/fit_polynomials.py.

// Relative error below 1e-7. Results under 2^-126 are 0; above exp(88.3) the result stays at exp(88.3).
VecF exp(VecF x) {
    const VecF low = set1(-87.3f), high = set1(88.3f);
    const VecF clamped = min(high, max(low, x));  // in this order a NaN stays one
    const VecI n = round_to_int(mul(clamped, set1(1.44269504f)));
    const VecF nf = to_float(n);
    VecF r = fma(nf, set1(-0.693359375f), clamped);
    r = fma(nf, set1(2.12194440e-4f), r);
    VecF p = set1(1.990978344e-04f);
    p = fma(p, r, set1(1.394656138e-03f));
    p = fma(p, r, set1(8.333280683e-03f));
    p = fma(p, r, set1(4.166626185e-02f));
    p = fma(p, r, set1(1.666666716e-01f));
    p = fma(p, r, set1(5.000000000e-01f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return select_less(x, low, zero(), mul(p, pow2(n)));
}

// Absolute error below 1.4e-7: x P(x^2) under 1, 1 - exp(Q(|x|)) above.
VecF erf(VecF x) {
    const VecF t = min(set1(4.0f), abs(x));
    const VecF s = mul(t, t);
    VecF p = set1(7.933485904e-05f);
    p = fma(p, s, set1(-8.034844068e-04f));
    p = fma(p, s, set1(5.191218108e-03f));
    p = fma(p, s, set1(-2.685539983e-02f));
    p = fma(p, s, set1(1.128362566e-01f));
    p = fma(p, s, set1(-3.761262894e-01f));
    p = fma(p, s, set1(1.128379226e+00f));
    VecF q = set1(6.428265351e-07f);
    q = fma(q, t, set1(-3.071786705e-05f));
    q = fma(q, t, set1(4.957722849e-04f));
    q = fma(q, t, set1(-4.388493951e-03f));
    q = fma(q, t, set1(2.558944188e-02f));
    q = fma(q, t, set1(-1.089149565e-01f));
    q = fma(q, t, set1(-6.328230500e-01f));
    q = fma(q, t, set1(-1.129756570e+00f));
    q = fma(q, t, set1(2.224631608e-04f));
    const VecF magnitude = select_less(t, set1(1.0f), mul(t, p), sub(set1(1.0f), exp(q)));
    return with_sign_of(magnitude, x);
}

// x * sigmoid(y)
VecF times_sigmoid(VecF x, VecF y) { return div(x, add(set1(1.0f), exp(sub(zero(), y)))); }

template <typename F>
void map(float* x, uint32_t n, F f) {
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) store(x + i, f(load(x + i)));
    if (i < n) store_first(x + i, f(load_first(x + i, n - i)), n - i);
}

void gelu_erf(float* x, uint32_t n) {
    map(x, n, [](VecF v) { return mul(mul(set1(0.5f), v), add(set1(1.0f), erf(mul(v, set1(0.707106781f))))); });
}

void gelu_tanh(float* x, uint32_t n) {
    // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    map(x, n, [](VecF v) {
        const VecF cubic = mul(mul(v, v), v);
        return times_sigmoid(v, mul(set1(1.59576912f), fma(set1(0.044715f), cubic, v)));
    });
}

void silu_mul(const float* gate, float* up, uint32_t n) {
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        const VecF g = load(gate + i);
        store(up + i, mul(times_sigmoid(g, g), load(up + i)));
    }
    if (i < n) {
        const VecF g = load_first(gate + i, n - i);
        store_first(up + i, mul(times_sigmoid(g, g), load_first(up + i, n - i)), n - i);
    }
}

void scale(float* x, uint32_t n, float factor) {
    map(x, n, [=](VecF v) { return mul(v, set1(factor)); });
}

// ---- norms ----------------------------------------------------------------------------------------------------------

// Sum over f(x[i]); lane i takes elements i, i + 16, ...; f must map the padding 0 of the last vector to 0 or be cut.
template <typename F>
float sum_of(const float* x, uint32_t n, F f) {
    VecF acc = zero();
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) acc = f(acc, load(x + i));
    if (i < n) acc = add(acc, keep_first(f(zero(), load_first(x + i, n - i)), n - i));
    return reduce_add(acc);
}

void normalize(const float* x, uint32_t n, float mean, float rstd, const float* weight, const float* bias, float* y) {
    const VecF m = set1(mean), r = set1(rstd);
    for (uint32_t i = 0; i < n; i += lanes) {
        const uint32_t left = n - i < lanes ? n - i : lanes;
        const VecF unit = mul(sub(load_first(x + i, left), m), r);
        const VecF w = load_first(weight + i, left);
        store_first(y + i, bias ? fma(unit, w, load_first(bias + i, left)) : mul(unit, w), left);
    }
}

void layer_norm(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y) {
    const float mean = sum_of(x, n, [](VecF acc, VecF v) { return add(acc, v); }) / float(n);
    const VecF m = set1(mean);
    const float square = sum_of(x, n, [=](VecF acc, VecF v) {
        const VecF d = sub(v, m);
        return fma(d, d, acc);
    });
    normalize(x, n, mean, 1.0f / sqrt1(square / float(n) + eps), weight, bias, y);
}

void rms_norm(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y) {
    const float square = sum_of(x, n, [](VecF acc, VecF v) { return fma(v, v, acc); });
    normalize(x, n, 0.0f, 1.0f / sqrt1(square / float(n) + eps), weight, bias, y);
}

// ---- rotary positions -----------------------------------------------------------------------------------------------

void rope(float* x, uint32_t dim, RopeStyle style, const float* cos, const float* sin) {
    const uint32_t pairs = dim / 2;
    if (style == RopeStyle::half) {
        for (uint32_t i = 0; i < pairs; i += lanes) {
            const uint32_t left = pairs - i < lanes ? pairs - i : lanes;
            const VecF a = load_first(x + i, left), b = load_first(x + pairs + i, left);
            const VecF c = load_first(cos + i, left), s = load_first(sin + i, left);
            store_first(x + i, fma(a, c, sub(zero(), mul(b, s))), left);
            store_first(x + pairs + i, fma(b, c, mul(a, s)), left);
        }
    } else {
        for (uint32_t i = 0; i < pairs; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = fma1(a, cos[i], 0.0f - b * sin[i]);
            x[2 * i + 1] = fma1(b, cos[i], a * sin[i]);
        }
    }
}

// ---- matrix products ------------------------------------------------------------------------------------------------

void quantize_activations(const float* x, uint32_t n, ActivationBlock* out) {
    for (uint32_t b = 0; b < n / block; ++b, x += block) {
        const VecF lo = load(x), hi = load(x + lanes);
        const float amax = reduce_max(max(abs(lo), abs(hi)));
        // Below this 127 / amax would overflow; such a block is zero for every purpose. A NaN goes on.
        const bool empty = amax < 1e-30f;
        const VecF inverse = set1(empty ? 0.0f : 127.0f / amax);
        const VecI q_lo = round_to_int(mul(lo, inverse)), q_hi = round_to_int(mul(hi, inverse));
        store_int8(out[b].q, q_lo);
        store_int8(out[b].q + lanes, q_hi);
        out[b].scale = empty ? 0.0f : amax / 127.0f;
        out[b].half_sum = reduce_add_int(q_lo);
        out[b].sum = reduce_add_int(add_int(q_lo, q_hi));
        out[b].scaled_sum = out[b].scale * float(out[b].sum);
    }
}

template <int... J>
struct Indices {};
using EachVector = Indices<0, 1, 2, 3, 4, 5, 6, 7>;

// Readers give vector J, k = 4J..4J+3 of 16 rows, of a block of 32 codes that is stored in the planes of
// quant/panels.h.

// 2 to 6 bits: unsigned bytes.
template <uint32_t Bits>
struct CodeReader {
    static VecI start(int32_t zero, int32_t activation_sum) { return set1_int(-zero * activation_sum); }
    static VecI dot(VecI acc, Bytes w, int32_t a) { return dot_q4(acc, w, a); }

    template <int J>
    static Bytes read(const uint8_t* p) {
        static_assert(Bits >= 2 && Bits <= 6);
        constexpr int pair = 2 * (J / 2);  // place of vector J in a plane of 2 bits
        if constexpr (Bits <= 3) {
            const Bytes low = bits<pair, 3>(load_bytes(p + 64 * (J % 2)));
            if constexpr (Bits == 2) return low;
            return or_bits<J - 2, 4>(low, load_bytes(p + 128));
        } else {
            const Bytes low = bits<J / 4 * 4, 15>(load_bytes(p + 64 * (J % 4)));
            if constexpr (Bits == 4) return low;
            if constexpr (Bits == 5) return or_bits<J - 4, 16>(low, load_bytes(p + 256));
            return or_bits<pair - 4, 48>(low, load_bytes(p + 256 + 64 * (J % 2)));
        }
    }
};

// Bytes with offset 128: too large for dot_q4.
template <>
struct CodeReader<8> {
    static VecI start(int32_t, int32_t activation_sum) { return q8_start(activation_sum); }
    static VecI dot(VecI acc, Q8Bytes w, int32_t a) { return dot_q8(acc, w, a); }

    template <int J>
    static Q8Bytes read(const uint8_t* p) {
        return prepare_q8(load_bytes(p + 64 * J));
    }
};

// quant::iq4_values + 128
constexpr uint8_t iq4_offset_values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

struct TableReader : CodeReader<8> {
    template <int J>
    static Q8Bytes read(const uint8_t* p) {
        return prepare_q8(lookup(iq4_offset_values, CodeReader<4>::read<J>(p)));
    }
};

template <uint32_t Bits, bool Table>
struct ReaderOf {
    using Type = CodeReader<Bits>;
};
template <uint32_t Bits>
struct ReaderOf<Bits, true> {
    using Type = TableReader;
};

// The codes and scales of 32 weights of 16 rows. Kept: the codes are unpacked once and used for several tokens; for a
// single one they are unpacked where they are used, which 16 registers can hold.
template <WeightType Type, bool Kept>
struct WeightBlock {
    static constexpr auto format = fixmin::quant::block_format(Type);
    static constexpr uint32_t per_record = format.values / block;  // blocks of 32
    static constexpr uint32_t scales_per_record = format.values / format.scale_values;
    static constexpr bool halves = format.scale_values == 16;
    static constexpr size_t code_bytes = fixmin::quant::code_bytes(Type);
    static constexpr size_t record_bytes = fixmin::quant::scale_record_bytes(Type);
    using Reader = typename ReaderOf<format.bits, format.table>::Type;

    const uint8_t* planes;
    decltype(Reader::template read<0>(nullptr)) kept[Kept ? 8 : 1];
    VecF scale;          // d, or d * s where 32 weights share s
    VecF offset;         // m, or m * n likewise
    VecF half_scale[2];  // s where 16 weights share it
    VecF half_min[2];    // n

    WeightBlock(const uint8_t* panel, uint32_t n_blocks, uint32_t b) : planes(panel + b * code_bytes) {
        if constexpr (Kept) keep(EachVector{});
        const uint8_t* p = panel + n_blocks * code_bytes + b / per_record * record_bytes;
        scale = load_f16((const uint16_t*)p);
        p += 2 * lanes;
        if constexpr (format.has_min) {
            offset = load_f16((const uint16_t*)p);
            p += 2 * lanes;
        }
        if constexpr (Type == WeightType::q2_k) {
            for (uint32_t h = 0; h < 2; ++h) {
                const uint8_t* both = p + (b % per_record * 2 + h) * lanes;
                half_scale[h] = load_uint8<0, 15>(both);
                half_min[h] = load_uint8<4, 15>(both);
            }
        } else if constexpr (halves) {
            for (uint32_t h = 0; h < 2; ++h)
                half_scale[h] = load_int8((const int8_t*)p + (b % per_record * 2 + h) * lanes);
        } else if constexpr (per_record > 1) {
            const int8_t* s = (const int8_t*)p + b % per_record * lanes;
            scale = mul(scale, load_int8(s));  // exact
            if constexpr (format.has_min) offset = mul(offset, load_int8(s + scales_per_record * lanes));
        }
    }

    template <int... J>
    void keep(Indices<J...>) {
        ((kept[J] = Reader::template read<J>(planes)), ...);
    }
    template <int J>
    auto codes() const {
        if constexpr (Kept)
            return kept[J];
        else
            return Reader::template read<J>(planes);
    }

    // Adds to two chains: the first and the second 16 weights where these have scales of their own, else even and odd
    // vectors, because one chain alone would be bound by the latency of a dot product, 4-5.
    template <int... J>
    void dot(VecI* chains, const int8_t* q, Indices<J...>) const {
        constexpr auto chain = [](int j) { return halves ? j / 4 : j % 2; };
        ((chains[chain(J)] = Reader::dot(chains[chain(J)], codes<J>(), read_int32(q + 4 * J))), ...);
    }

    // acc + weights . activations. Every value but a_scale * scale and the results of the last fma of a term is exact.
    VecF add_to(VecF acc, const ActivationBlock& a) const {
        if constexpr (!halves) {
            VecI chains[2] = {Reader::start(format.zero, a.sum), set1_int(0)};
            dot(chains, a.q, EachVector{});
            acc = fma(to_float(add_int(chains[0], chains[1])), mul(scale, set1(a.scale)), acc);
            if constexpr (format.has_min) acc = fma(offset, set1(a.scaled_sum), acc);
        } else {
            const int32_t sums[2] = {a.half_sum, a.sum - a.half_sum};
            VecI chains[2] = {Reader::start(format.zero, sums[0]), Reader::start(format.zero, sums[1])};
            dot(chains, a.q, EachVector{});
            // |s * dot| <= 128 * 32 * 127 * 16 = 2^23 - 2^16, so that even the sum of two is exact in float32.
            const VecF total = fma(half_scale[1], to_float(chains[1]), mul(half_scale[0], to_float(chains[0])));
            acc = fma(total, mul(scale, set1(a.scale)), acc);
            if constexpr (format.has_min) {
                const VecF low = mul(half_min[0], set1(float(sums[0])));
                acc = fma(fma(half_min[1], set1(float(sums[1])), low), mul(offset, set1(a.scale)), acc);
            }
        }
        return acc;
    }
};

// One panel times N tokens, block after block.
template <WeightType Type, uint32_t N>
void quantized_tile(const uint8_t* panel, uint32_t n_blocks, const ActivationBlock* rows, VecF* result) {
    using Block = WeightBlock<Type, (N > 1)>;
    // What a block takes with its part of the scales: one pass over a panel prefetches as many bytes as a panel has.
    constexpr size_t bytes = Block::code_bytes + Block::record_bytes / Block::per_record;
    VecF acc[N];
    for (uint32_t c = 0; c < N; ++c) acc[c] = zero();
    for (uint32_t b = 0; b < n_blocks; ++b) {
        if constexpr (N == 1) {
            const uint8_t* ahead = panel + b * bytes + 4096;
            for (uint32_t j = 0; j < bytes; j += 64) prefetch(ahead + j);
        }
        const Block weights(panel, n_blocks, b);
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) acc[c] = weights.add_to(acc[c], rows[size_t(c) * n_blocks + b]);
    }
    for (uint32_t c = 0; c < N; ++c) result[c] = acc[c];
}

struct F32Row {
    using Element = float;
    static VecF load_row(const float* p) { return load(p); }
};
struct F16Row {
    using Element = uint16_t;
    static VecF load_row(const uint16_t* p) { return load_f16(p); }
};
struct Bf16Row {
    using Element = uint16_t;
    static VecF load_row(const uint16_t* p) { return load_bf16(p); }
};

// One panel times N tokens: acc[c] = fma(w, a, acc[c]), k after k.
template <typename Row, uint32_t N>
void float_tile(const uint8_t* panel, uint32_t inner, const float* activations, size_t stride, VecF* result) {
    const auto* w = (const typename Row::Element*)panel;
    VecF acc[N];
    for (uint32_t c = 0; c < N; ++c) acc[c] = zero();
    for (uint32_t k = 0; k < inner; ++k) {
        const VecF row = Row::load_row(w + size_t(k) * lanes);
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) acc[c] = fma(row, set1(activations[c * stride + k]), acc[c]);
    }
    for (uint32_t c = 0; c < N; ++c) result[c] = acc[c];
}

// P panels times one token, the same chains as float_tile: one chain alone would wait for its own latency, not for
// memory.
template <typename Row, uint32_t P>
void float_column(const uint8_t* panels, size_t stride, uint32_t inner, const float* activations, VecF* result) {
    VecF acc[P];
    for (uint32_t p = 0; p < P; ++p) acc[p] = zero();
    for (uint32_t k = 0; k < inner; ++k) {
        const VecF a = set1(activations[k]);
#pragma GCC unroll 4
        for (uint32_t p = 0; p < P; ++p) {
            const auto* w = (const typename Row::Element*)(panels + p * stride) + size_t(k) * lanes;
            prefetch((const uint8_t*)w + 2048);
            acc[p] = fma(Row::load_row(w), a, acc[p]);
        }
    }
    for (uint32_t p = 0; p < P; ++p) result[p] = acc[p];
}

// Bias, residual, store.
void finish(const MatmulArgs& args, uint32_t token, uint32_t row, VecF value) {
    const uint32_t valid = args.n_rows - row < lanes ? args.n_rows - row : lanes;
    float* out = args.out + token * args.out_stride + row;
    if (args.bias) value = add(value, load(args.bias + row));
    if (args.accumulate) value = add(load_first(out, valid), value);
    if (valid == lanes)
        store(out, value);
    else
        store_first(out, value, valid);
}

// Panels outside, tokens inside: a panel stays in the first-level cache while all tokens pass it.
// Tile: (panel, first token, result[N]) for N = Columns or 1.
template <uint32_t Columns, typename Wide, typename Narrow>
void for_each_tile(const MatmulArgs& args, Wide wide, Narrow narrow) {
    const uint8_t* panel = (const uint8_t*)args.panels;
    for (uint32_t row = 0; row < args.n_rows; row += lanes, panel += args.panel_stride) {
        uint32_t token = 0;
        for (; token + Columns <= args.n_tokens; token += Columns) {
            VecF result[Columns];
            wide(panel, token, result);
            for (uint32_t c = 0; c < Columns; ++c) finish(args, token + c, row, result[c]);
        }
        for (; token < args.n_tokens; ++token) {
            VecF result;
            narrow(panel, token, &result);
            finish(args, token, row, result);
        }
    }
}

#ifdef FIXMIN_AMX
#include "kernels/amx.inl"
#endif

template <WeightType Type>
void quantized_matmul(MatmulArgs args) {
    const uint32_t n_blocks = args.inner / block;
#ifdef FIXMIN_AMX
    const uint32_t done = tile_matmul<Type>(args);
    args.quantized += size_t(done) * n_blocks;
    args.out += done * args.out_stride;
    args.n_tokens -= done;
#endif
    for_each_tile<matmul_columns>(
        args,
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            quantized_tile<Type, matmul_columns>(panel, n_blocks, args.quantized + size_t(token) * n_blocks, result);
        },
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            quantized_tile<Type, 1>(panel, n_blocks, args.quantized + size_t(token) * n_blocks, result);
        });
}

template <typename Row>
void float_matmul(MatmulArgs args) {
    const size_t stride = args.activation_stride;
    constexpr uint32_t together = 4;
    while (args.n_tokens == 1 && args.n_rows >= together * lanes) {
        VecF result[together];
        float_column<Row, together>((const uint8_t*)args.panels, args.panel_stride, args.inner, args.activations,
                                    result);
        for (uint32_t p = 0; p < together; ++p) finish(args, 0, p * lanes, result[p]);
        args.panels += together * args.panel_stride;
        args.n_rows -= together * lanes;
        args.bias = args.bias ? args.bias + together * lanes : nullptr;
        args.out += together * lanes;
    }
    for_each_tile<matmul_columns_float>(
        args,
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            float_tile<Row, matmul_columns_float>(panel, args.inner, args.activations + token * stride, stride, result);
        },
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            float_tile<Row, 1>(panel, args.inner, args.activations + token * stride, stride, result);
        });
}

void matmul(const MatmulArgs& args) {
    switch (args.type) {
        case WeightType::f32: return float_matmul<F32Row>(args);
        case WeightType::f16: return float_matmul<F16Row>(args);
        case WeightType::bf16: return float_matmul<Bf16Row>(args);
        case WeightType::q8_0: return quantized_matmul<WeightType::q8_0>(args);
        case WeightType::q4_0: return quantized_matmul<WeightType::q4_0>(args);
        case WeightType::q4_1: return quantized_matmul<WeightType::q4_1>(args);
        case WeightType::q5_0: return quantized_matmul<WeightType::q5_0>(args);
        case WeightType::q5_1: return quantized_matmul<WeightType::q5_1>(args);
        case WeightType::q2_k: return quantized_matmul<WeightType::q2_k>(args);
        case WeightType::q3_k: return quantized_matmul<WeightType::q3_k>(args);
        case WeightType::q4_k: return quantized_matmul<WeightType::q4_k>(args);
        case WeightType::q5_k: return quantized_matmul<WeightType::q5_k>(args);
        case WeightType::q6_k: return quantized_matmul<WeightType::q6_k>(args);
        case WeightType::iq4_nl: return quantized_matmul<WeightType::iq4_nl>(args);
        case WeightType::iq4_xs: return quantized_matmul<WeightType::iq4_xs>(args);
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

#include "kernels/attention.inl"

// ---- softmax over the vocabulary ------------------------------------------------------------------------------------

void softmax_stats(const float* x, uint32_t n, float* out_max, float* out_sum) {
    float highest = x[0];
    VecF top = set1(x[0]);
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) top = max(top, load(x + i));
    highest = reduce_max(top);
    for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
    const VecF m = set1(highest);
    *out_max = highest;
    *out_sum = sum_of(x, n, [=](VecF acc, VecF v) { return add(acc, exp(sub(v, m))); });
}

void exp_minus(const float* x, uint32_t n, float highest, float* y) {
    const VecF m = set1(highest);
    for (uint32_t i = 0; i < n; i += lanes) {
        const uint32_t left = n - i < lanes ? n - i : lanes;
        store_first(y + i, exp(sub(load_first(x + i, left), m)), left);
    }
}

}  // namespace

#include "kernels/ceilings.inl"

namespace {

constexpr Kernels table = {FIXMIN_ISA_NAME, quantize_activations,
                           matmul,          layer_norm,
                           rms_norm,        rope,
                           scale,           gelu_erf,
                           gelu_tanh,       silu_mul,
                           kv_store,        attention,
                           softmax_stats,   exp_minus,
                           ceilings};

}  // namespace
