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
        out[b].sum = reduce_add_int(add_int(q_lo, q_hi));
    }
}

struct Q8Block {
    static constexpr size_t bytes = 512;
    static constexpr uint32_t vectors = 8;
    Q8Bytes w[8];

    explicit Q8Block(const uint8_t* p) {
        for (uint32_t j = 0; j < 8; ++j) w[j] = prepare_q8(load_bytes(p + 64 * j));
    }
    static VecI start(int32_t activation_sum) { return q8_start(activation_sum); }
    VecI dot(VecI acc, uint32_t j, int32_t a) const { return dot_q8(acc, w[j], a); }
};

struct Q4Block {
    static constexpr size_t bytes = 256;
    static constexpr uint32_t vectors = 8;
    Bytes w[8];

    explicit Q4Block(const uint8_t* p) {
        for (uint32_t j = 0; j < 4; ++j) {
            const Bytes both = load_bytes(p + 64 * j);
            w[j] = low_nibbles(both);
            w[j + 4] = high_nibbles(both);
        }
    }
    static VecI start(int32_t activation_sum) { return set1_int(-8 * activation_sum); }
    VecI dot(VecI acc, uint32_t j, int32_t a) const { return dot_q4(acc, w[j], a); }
};

// One panel times N tokens: acc[c] = fma(float(dot), w_scale * a_scale, acc[c]), block after block.
template <typename Block, uint32_t N>
void quantized_tile(const uint8_t* panel, uint32_t n_blocks, const ActivationBlock* rows, VecF* result) {
    const uint16_t* scales = (const uint16_t*)(panel + size_t(n_blocks) * Block::bytes);
    VecF acc[N];
    for (uint32_t c = 0; c < N; ++c) acc[c] = zero();
    for (uint32_t b = 0; b < n_blocks; ++b) {
        const uint8_t* values = panel + b * Block::bytes;
        if constexpr (N == 1) {
            for (uint32_t j = 0; j < Block::bytes / 64; ++j) prefetch(values + 4096 + 64 * j);
        }
        const Block weights(values);
        const VecF d = load_f16(scales + b * lanes);
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) {
            const ActivationBlock& a = rows[size_t(c) * n_blocks + b];
            VecI even = Block::start(a.sum), odd = set1_int(0);  // two chains: the latency of one dot product is 4-5
#pragma GCC unroll 8
            for (uint32_t j = 0; j < Block::vectors; j += 2) {
                even = weights.dot(even, j, read_int32(a.q + 4 * j));
                odd = weights.dot(odd, j + 1, read_int32(a.q + 4 * j + 4));
            }
            acc[c] = fma(to_float(add_int(even, odd)), mul(d, set1(a.scale)), acc[c]);
        }
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

template <typename Block>
void quantized_matmul(const MatmulArgs& args) {
    const uint32_t n_blocks = args.inner / block;
    for_each_tile<matmul_columns>(
        args,
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            quantized_tile<Block, matmul_columns>(panel, n_blocks, args.quantized + size_t(token) * n_blocks, result);
        },
        [&](const uint8_t* panel, uint32_t token, VecF* result) {
            quantized_tile<Block, 1>(panel, n_blocks, args.quantized + size_t(token) * n_blocks, result);
        });
}

template <typename Row>
void float_matmul(const MatmulArgs& args) {
    const size_t stride = args.activation_stride;
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
        case WeightType::q8_0: return quantized_matmul<Q8Block>(args);
        case WeightType::q4_0: return quantized_matmul<Q4Block>(args);
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

struct KvF32 {
    using Element = float;
    static VecF load_row(const float* p) { return load(p); }
    static void store_row(float* p, VecF x) { store(p, x); }
};
struct KvF16 {
    using Element = uint16_t;
    static VecF load_row(const uint16_t* p) { return load_f16(p); }
    static void store_row(uint16_t* p, VecF x) { store_f16(p, x); }
};

// Keys of 16 consecutive tokens, [head_dim][16].
template <typename Kv>
typename Kv::Element* key_group(const KvHead& kv, uint32_t group) {
    constexpr uint32_t groups = kv_block_tokens / lanes;
    auto* head = (typename Kv::Element*)(kv.blocks[group / groups] + kv.offset);
    return head + size_t(group % groups) * kv.head_dim * lanes;
}

// Value of one token, [value_dim].
template <typename Kv>
typename Kv::Element* value_row(const KvHead& kv, uint32_t token) {
    auto* head = (typename Kv::Element*)(kv.blocks[token / kv_block_tokens] + kv.offset);
    return head + size_t(kv_block_tokens) * kv.head_dim + size_t(token % kv_block_tokens) * kv_value_dim(kv.head_dim);
}

template <typename Kv>
void kv_store_as(const KvHead& kv, uint32_t position, const float* key, const float* value) {
    typename Kv::Element row[lanes];
    auto* keys = key_group<Kv>(kv, position / lanes) + position % lanes;
    auto* values = value_row<Kv>(kv, position);
    for (uint32_t i = 0; i < kv.head_dim; i += lanes) {
        const uint32_t left = kv.head_dim - i < lanes ? kv.head_dim - i : lanes;
        Kv::store_row(row, load_first(key + i, left));
        for (uint32_t d = 0; d < left; ++d) keys[size_t(i + d) * lanes] = row[d];
        Kv::store_row(values + i, load_first(value + i, left));
    }
}

void kv_store(const KvHead& kv, uint32_t position, const float* key, const float* value) {
    if (kv.type == KvType::f16)
        kv_store_as<KvF16>(kv, position, key, value);
    else
        kv_store_as<KvF32>(kv, position, key, value);
}

// In place: scores of one query -> exp(score - max); returns their sum.
float softmax_weights(float* scores, uint32_t n_keys) {
    const uint32_t tail = n_keys % lanes, full = n_keys - tail;
    VecF top = set1(-3.402823466e+38f);
    for (uint32_t i = 0; i < full; i += lanes) top = max(top, load(scores + i));
    float highest = reduce_max(top);
    for (uint32_t i = full; i < n_keys; ++i) highest = scores[i] > highest ? scores[i] : highest;
    const VecF m = set1(highest);
    VecF acc = zero();
    for (uint32_t i = 0; i < full; i += lanes) {
        const VecF p = exp(sub(load(scores + i), m));
        acc = add(acc, p);
        store(scores + i, p);
    }
    if (tail) {
        const VecF p = keep_first(exp(sub(load(scores + full), m)), tail);
        acc = add(acc, p);
        store(scores + full, p);
    }
    return reduce_add(acc);
}

// Weighted values of keys [begin, end) for N queries and 16 value dimensions. Even and odd keys have chains of their
// own.
template <typename Kv, uint32_t N>
void add_values(const KvHead& kv, uint32_t dim, uint32_t begin, uint32_t end, const float* weights, size_t stride,
                VecF (*acc)[2]) {
    for (uint32_t key = begin; key < end; ++key) {
        const VecF value = Kv::load_row(value_row<Kv>(kv, key) + dim);
        const uint32_t parity = key % 2;
        for (uint32_t c = 0; c < N; ++c) acc[c][parity] = fma(set1(weights[c * stride + key]), value, acc[c][parity]);
    }
}

// Whole pairs of keys with the accumulators in registers; the same operations as add_values.
template <typename Kv, uint32_t N>
void add_value_pairs(const KvHead& kv, uint32_t dim, uint32_t end, const float* weights, size_t stride,
                     VecF (*acc)[2]) {
    VecF even[N], odd[N];
    for (uint32_t c = 0; c < N; ++c) even[c] = acc[c][0], odd[c] = acc[c][1];
    const size_t row = kv_value_dim(kv.head_dim);
    for (uint32_t first = 0; first < end; first += kv_block_tokens) {
        const auto* values = value_row<Kv>(kv, first) + dim;
        const uint32_t last = end - first < kv_block_tokens ? end : first + kv_block_tokens;
        for (uint32_t key = first; key < last; key += 2, values += 2 * row) {
            const VecF v0 = Kv::load_row(values), v1 = Kv::load_row(values + row);
#pragma GCC unroll 8
            for (uint32_t c = 0; c < N; ++c) {
                even[c] = fma(set1(weights[c * stride + key]), v0, even[c]);
                odd[c] = fma(set1(weights[c * stride + key + 1]), v1, odd[c]);
            }
        }
    }
    for (uint32_t c = 0; c < N; ++c) acc[c][0] = even[c], acc[c][1] = odd[c];
}

// N consecutive queries of one head. Each query's operations do not depend on N.
template <typename Kv, uint32_t N>
void attention_tile_of(const AttentionArgs& args, uint32_t first_query) {
    const KvHead& kv = args.kv;
    const uint32_t common = args.position + first_query + 1;  // keys that every query of the tile sees
    const uint32_t n_groups = (common + N - 1 + lanes - 1) / lanes;
    const size_t stride = size_t(n_groups) * lanes;
    const float* q = args.queries + first_query * args.query_stride;

    for (uint32_t g = 0; g < n_groups; ++g) {
        const auto* keys = key_group<Kv>(kv, g);
        VecF acc[N];
        for (uint32_t c = 0; c < N; ++c) acc[c] = zero();
        for (uint32_t d = 0; d < kv.head_dim; ++d) {
            const VecF k = Kv::load_row(keys + size_t(d) * lanes);
#pragma GCC unroll 8
            for (uint32_t c = 0; c < N; ++c) acc[c] = fma(set1(q[c * args.query_stride + d]), k, acc[c]);
        }
        for (uint32_t c = 0; c < N; ++c) store(args.scratch + c * stride + size_t(g) * lanes, acc[c]);
    }

    float inverse[N];
    for (uint32_t c = 0; c < N; ++c) inverse[c] = 1.0f / softmax_weights(args.scratch + c * stride, common + c);

    for (uint32_t dim = 0; dim < kv.head_dim; dim += lanes) {
        VecF acc[N][2];
        for (uint32_t c = 0; c < N; ++c) acc[c][0] = acc[c][1] = zero();
        const uint32_t paired = common / 2 * 2;
        add_value_pairs<Kv, N>(kv, dim, paired, args.scratch, stride, acc);
        const uint32_t left = kv.head_dim - dim < lanes ? kv.head_dim - dim : lanes;
        for (uint32_t c = 0; c < N; ++c) {
            add_values<Kv, 1>(kv, dim, paired, common + c, args.scratch + c * stride, stride, acc + c);
            float* out = args.out + (first_query + c) * args.out_stride + dim;
            store_first(out, mul(add(acc[c][0], acc[c][1]), set1(inverse[c])), left);
        }
    }
}

template <typename Kv>
void attention_as(const AttentionArgs& args) {
    constexpr uint32_t tile = 8;
    static_assert(tile <= attention_tile);
    uint32_t query = 0;
    for (; query + tile <= args.n_queries; query += tile) attention_tile_of<Kv, tile>(args, query);
    for (; query < args.n_queries; ++query) attention_tile_of<Kv, 1>(args, query);
}

void attention(const AttentionArgs& args) {
    if (args.kv.type == KvType::f16)
        attention_as<KvF16>(args);
    else
        attention_as<KvF32>(args);
}

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
