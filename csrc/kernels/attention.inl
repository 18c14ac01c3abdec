// Attention over cached keys and values. Included by kernels.inl.
//
// A class per type of the cache stores a token and reads what it stored: Queries gives the scores of 16 keys, Values
// the values of a block with their weights. The order of operations is written once, below them.

// Always inlined, like everything that only prefetches (see Stream).
[[gnu::always_inline]] inline void prefetch_bytes(const void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) prefetch((const uint8_t*)p + i);
}

std::byte* kv_block(const KvHead& kv, uint32_t token) {
    return kv.memory + kv.blocks[token / kv_block_tokens] * kv.block_bytes;
}

// ---- float32 and binary16 -------------------------------------------------------------------------------------------
// In a block: keys [kv_block_tokens/16][head_dim][16], values [kv_block_tokens][value_dim].

struct KvF32 {
    using Element = float;
    static VecF load_row(const float* p) { return load(p); }
    static void store_row(float* p, VecF x) { ::store(p, x); }
};
struct KvF16 {
    using Element = uint16_t;
    static VecF load_row(const uint16_t* p) { return load_f16(p); }
    static void store_row(uint16_t* p, VecF x) { store_f16(p, x); }
};

template <typename Row>
struct FloatKv {
    using Element = typename Row::Element;

    static Element* block_of(const KvHead& kv, uint32_t token) { return (Element*)kv_block(kv, token); }
    static Element* keys(const KvHead& kv, uint32_t token) {  // of 16 tokens, the first of which is given
        return block_of(kv, token) + size_t(token % kv_block_tokens) * kv.head_dim;
    }
    static Element* values(const KvHead& kv, uint32_t token) {
        return block_of(kv, token) + size_t(kv_block_tokens) * kv.head_dim +
               size_t(token % kv_block_tokens) * kv_value_dim(kv.head_dim);
    }

    // 16 keys or values, from `token` on.
    [[gnu::always_inline]] static void prefetch_keys(const KvHead& kv, uint32_t token) {
        prefetch_bytes(keys(kv, token), lanes * kv.head_dim * sizeof(Element));
    }
    [[gnu::always_inline]] static void prefetch_values(const KvHead& kv, uint32_t token) {
        prefetch_bytes(values(kv, token), lanes * kv_value_dim(kv.head_dim) * sizeof(Element));
    }

    static void store(const KvHead& kv, uint32_t position, const float* key, const float* value) {
        Element row[lanes];
        Element* to_keys = keys(kv, position / lanes * lanes) + position % lanes;
        Element* to_values = values(kv, position);
        for (uint32_t i = 0; i < kv.head_dim; i += lanes) {
            const uint32_t left = kv.head_dim - i < lanes ? kv.head_dim - i : lanes;
            Row::store_row(row, load_first(key + i, left));
            for (uint32_t d = 0; d < left; ++d) to_keys[size_t(i + d) * lanes] = row[d];
            Row::store_row(to_values + i, load_first(value + i, left));
        }
    }

    template <uint32_t N>
    struct Queries {
        const float* q;
        size_t stride;

        Queries(const AttentionArgs& args, uint32_t first, float*)
            : q(args.queries + first * args.query_stride), stride(args.query_stride) {}

        // Of 16 * G keys of one block, from `token` on. result: [G][N].
        template <uint32_t G>
        void scores(const KvHead& kv, uint32_t token, VecF* result) const {
            const Element* k = keys(kv, token);
            const size_t key_panel = size_t(kv.head_dim) * lanes;
            VecF acc[G * N];
#pragma GCC unroll 16
            for (uint32_t i = 0; i < G * N; ++i) acc[i] = zero();
            for (uint32_t d = 0; d < kv.head_dim; ++d) {
                VecF row[G];
#pragma GCC unroll 4
                for (uint32_t g = 0; g < G; ++g) row[g] = Row::load_row(k + g * key_panel + size_t(d) * lanes);
#pragma GCC unroll 8
                for (uint32_t c = 0; c < N; ++c) {
                    const VecF a = set1(q[c * stride + d]);
#pragma GCC unroll 4
                    for (uint32_t g = 0; g < G; ++g) acc[g * N + c] = fma(a, row[g], acc[g * N + c]);
                }
            }
#pragma GCC unroll 16
            for (uint32_t i = 0; i < G * N; ++i) result[i] = acc[i];
        }
    };

    // Tokens of one block, 16 * V dimensions from `dim` on, N queries.
    template <uint32_t N, uint32_t V>
    struct Values {
        const Element* rows;
        size_t row_length;
        const float* weights;
        size_t stride;

        Values(const KvHead& kv, uint32_t dim, uint32_t first, uint32_t, const float* weights, size_t stride)
            : rows(values(kv, first) + dim),
              row_length(kv_value_dim(kv.head_dim)),
              weights(weights + first),
              stride(stride) {}
        VecF value(uint32_t token, uint32_t v) const { return Row::load_row(rows + token * row_length + v * lanes); }
        VecF weight(uint32_t token, uint32_t, uint32_t c) const { return set1(weights[c * stride + token]); }
    };
};

// ---- q8_0 -----------------------------------------------------------------------------------------------------------
// 32 values of a key or a value in 8 bits: x ~ scale * q. In a block, with padded = value_dim and n = padded / 32
// rounded up:
// - codes of keys [kv_block_tokens/16][padded/4][16][4]: q + 128, as weights have them
// - scales of keys [kv_block_tokens/16][n][16]
// - codes of values [kv_block_tokens][padded]: q
// - scales of values [n][kv_block_tokens]
// Scales are bfloat16: binary16 would overflow or lose its precision where float32 does not. That it has 8 bits costs
// nothing, because codes are made with the rounded scale: amax / scale <= 127 * (1 + 2^-8) < 127.5, so they fit.

float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// Nearest, ties to even; a NaN stays one.
uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// The first n values of x, n <= 32, and zeros behind them. Returns the scale, NaN if a value is not finite.
uint16_t quantize_kv(const float* x, uint32_t n, int8_t* codes) {
    const VecF lo = load_first(x, n < lanes ? n : lanes);
    const VecF hi = n > lanes ? load_first(x + lanes, n - lanes) : zero();
    const float poison = reduce_add(add(sub(lo, lo), sub(hi, hi)));
    const float amax = reduce_max(max(abs(lo), abs(hi)));
    const bool empty = amax < 1e-30f;  // as for activations
    const uint16_t scale = empty ? to_bf16(poison) : to_bf16(amax / 127.0f + poison);
    const VecF inverse = set1(empty ? 0.0f : 1.0f / float_of(uint32_t(scale) << 16));
    store_int8(codes, round_to_int(mul(lo, inverse)));
    store_int8(codes + lanes, round_to_int(mul(hi, inverse)));
    return scale;
}

struct Q8Kv {
    using Element = int8_t;

    static uint8_t* block_of(const KvHead& kv, uint32_t token) { return (uint8_t*)kv_block(kv, token); }
    static uint8_t* keys(const KvHead& kv, uint32_t token) {  // of 16 tokens, the first of which is given
        return block_of(kv, token) + size_t(token % kv_block_tokens) * kv_value_dim(kv.head_dim);
    }
    static uint16_t* key_scales(const KvHead& kv, uint32_t token) {
        const uint32_t n = kv_scales(kv.head_dim);
        return (uint16_t*)(block_of(kv, token) + size_t(kv_block_tokens) * kv_value_dim(kv.head_dim)) +
               size_t(token % kv_block_tokens) * n;
    }
    static int8_t* values(const KvHead& kv, uint32_t token) {
        const size_t padded = kv_value_dim(kv.head_dim);
        return (int8_t*)block_of(kv, token) + kv_head_bytes(KvType::q8_0, kv.head_dim) / 2 +
               token % kv_block_tokens * padded;
    }
    static uint16_t* value_scales(const KvHead& kv, uint32_t token) {
        const size_t padded = kv_value_dim(kv.head_dim);
        return (uint16_t*)(block_of(kv, token) + kv_head_bytes(KvType::q8_0, kv.head_dim) / 2 +
                           kv_block_tokens * padded) +
               token % kv_block_tokens;
    }

    [[gnu::always_inline]] static void prefetch_keys(const KvHead& kv, uint32_t token) {
        prefetch_bytes(keys(kv, token), lanes * kv_value_dim(kv.head_dim));
        prefetch_bytes(key_scales(kv, token), kv_scales(kv.head_dim) * lanes * sizeof(uint16_t));
    }
    [[gnu::always_inline]] static void prefetch_values(const KvHead& kv, uint32_t token) {
        prefetch_bytes(values(kv, token), lanes * kv_value_dim(kv.head_dim));
        for (uint32_t b = 0; b < kv_scales(kv.head_dim); ++b) prefetch(value_scales(kv, token) + b * kv_block_tokens);
    }

    static void store(const KvHead& kv, uint32_t position, const float* key, const float* value) {
        const uint32_t padded = kv_value_dim(kv.head_dim), key_panel = position / lanes * lanes,
                       lane = position % lanes;
        uint8_t* to_keys = keys(kv, key_panel) + lane * 4;
        int8_t* to_values = values(kv, position);
        for (uint32_t b = 0; b * block < kv.head_dim; ++b) {
            const uint32_t first = b * block, left = kv.head_dim - first < block ? kv.head_dim - first : block;
            const uint32_t stored = padded - first < block ? padded - first : block;
            int8_t codes[block];
            key_scales(kv, key_panel)[b * lanes + lane] = quantize_kv(key + first, left, codes);
            for (uint32_t i = 0; i < stored; i += 4) {
                const uint32_t four = uint32_t(read_int32(codes + i)) ^ 0x80808080u;  // q + 128
                __builtin_memcpy(to_keys + (first + i) * lanes, &four, 4);
            }
            value_scales(kv, position)[b * kv_block_tokens] = quantize_kv(value + first, left, codes);
            __builtin_memcpy(to_values + first, codes, stored);
        }
    }

    template <uint32_t N>
    struct Queries {
        const ActivationBlock* q;  // [N][n]
        uint32_t n;

        Queries(const AttentionArgs& args, uint32_t first, float* space)
            : q((const ActivationBlock*)space), n(kv_scales(args.kv.head_dim)) {
            const uint32_t d = args.kv.head_dim, whole = d / block * block;
            auto* to = (ActivationBlock*)space;
            for (uint32_t c = 0; c < N; ++c, to += n) {
                const float* from = args.queries + (first + c) * args.query_stride;
                quantize_activations(from, whole, to);
                if (whole == d) continue;
                float rest[block] = {};
                __builtin_memcpy(rest, from + whole, (d - whole) * sizeof(float));
                quantize_activations(rest, block, to + whole / block);
            }
        }

        // Vectors of four dimensions outside, queries inside: a vector is made ready for dot_q8 once.
        template <uint32_t G, uint32_t Vectors>
        void dot(const uint8_t* k, size_t key_panel, uint32_t b, VecI* sums) const {
#pragma GCC unroll 8
            for (uint32_t j = 0; j < Vectors; ++j) {
                Q8Bytes key[G];
#pragma GCC unroll 4
                for (uint32_t g = 0; g < G; ++g) key[g] = prepare_q8(load_bytes(k + g * key_panel + j * 64));
#pragma GCC unroll 8
                for (uint32_t c = 0; c < N; ++c) {
                    const int32_t a = read_int32(q[c * n + b].q + 4 * j);
#pragma GCC unroll 4
                    for (uint32_t g = 0; g < G; ++g) sums[g * N + c] = dot_q8(sums[g * N + c], key[g], a);
                }
            }
        }

        // Of 16 * G keys of one block, from `token` on. result: [G][N].
        template <uint32_t G>
        void scores(const KvHead& kv, uint32_t token, VecF* result) const {
            const uint32_t padded = kv_value_dim(kv.head_dim);
            const size_t key_panel = size_t(padded) * lanes;
            const uint8_t* k = keys(kv, token);
            const uint16_t* scales = key_scales(kv, token);
            VecF acc[G * N];
#pragma GCC unroll 16
            for (uint32_t i = 0; i < G * N; ++i) acc[i] = zero();
            for (uint32_t b = 0; b < n; ++b, k += block * lanes, scales += lanes) {
                VecI sums[G * N];
#pragma GCC unroll 16
                for (uint32_t i = 0; i < G * N; ++i) sums[i] = q8_start(q[i % N * n + b].sum);
                if ((b + 1) * block <= padded)
                    dot<G, 8>(k, key_panel, b, sums);
                else
                    dot<G, 4>(k, key_panel, b, sums);
#pragma GCC unroll 4
                for (uint32_t g = 0; g < G; ++g) {
                    const VecF scale = load_bf16(scales + g * n * lanes);
#pragma GCC unroll 8
                    for (uint32_t c = 0; c < N; ++c) {
                        VecF& to = acc[g * N + c];
                        to = fma(to_float(sums[g * N + c]), mul(scale, set1(q[c * n + b].scale)), to);
                    }
                }
            }
#pragma GCC unroll 16
            for (uint32_t i = 0; i < G * N; ++i) result[i] = acc[i];
        }

        // The same on tiles, of the keys of a block: 16 * n_panels of them, from `token` on. out: [N][stride].
        void tile_scores(const AttentionArgs& args, uint32_t token, uint32_t n_panels, float* out,
                         size_t stride) const {
            args.tile_scores({q, n, keys(args.kv, token), key_scales(args.kv, token), n_panels, out, stride});
        }
    };

    // Tokens of one block, 16 * V dimensions from `dim` on, N queries.
    template <uint32_t N, uint32_t V>
    struct Values {
        static_assert(V == 1 || V % 2 == 0);
        static constexpr uint32_t blocks = (V + 1) / 2;
        const int8_t* rows;
        size_t row_length;
        float scaled[N][blocks][kv_block_tokens];  // weight * scale

        Values(const KvHead& kv, uint32_t dim, uint32_t first, uint32_t n_tokens, const float* weights, size_t stride)
            : rows(values(kv, first) + dim), row_length(kv_value_dim(kv.head_dim)) {
            for (uint32_t b = 0; b < blocks; ++b) {
                const uint16_t* scales = value_scales(kv, first) + (dim / block + b) * kv_block_tokens;
                for (uint32_t t = 0; t < n_tokens; t += lanes) {
                    const VecF scale = load_bf16(scales + t);
                    for (uint32_t c = 0; c < N; ++c)
                        ::store(scaled[c][b] + t, mul(load(weights + c * stride + first + t), scale));
                }
            }
        }
        VecF value(uint32_t token, uint32_t v) const { return load_int8(rows + token * row_length + v * lanes); }
        VecF weight(uint32_t token, uint32_t v, uint32_t c) const { return set1(scaled[c][v / 2][token]); }
    };
};

void kv_store(const KvHead& kv, uint32_t position, const float* key, const float* value) {
    switch (kv.type) {
        case KvType::f32: return FloatKv<KvF32>::store(kv, position, key, value);
        case KvType::f16: return FloatKv<KvF16>::store(kv, position, key, value);
        case KvType::q8_0: return Q8Kv::store(kv, position, key, value);
    }
}

// How far ahead of its use a single query's cache is prefetched: a decoded token is the first to touch it since the one
// before, between them all weights went through the cache.
constexpr uint32_t kv_ahead_bytes = 8192;

template <typename Kv>
uint32_t kv_ahead_tokens(uint32_t head_dim) {
    const uint32_t row_bytes = lanes * kv_value_dim(head_dim) * sizeof(typename Kv::Element);
    return (kv_ahead_bytes + row_bytes - 1) / row_bytes * lanes;
}

template <typename Kv>
[[gnu::always_inline]] inline void kv_prefetch_as(const KvHead& kv, uint32_t position) {
    const uint32_t ahead = kv_ahead_tokens<Kv>(kv.head_dim), own = position / lanes * lanes;
    for (uint32_t token = 0; token < ahead && token < own; token += lanes) Kv::prefetch_keys(kv, token);
    Kv::prefetch_keys(kv, own);
    Kv::prefetch_values(kv, own);
}

void kv_prefetch(const KvHead& kv, uint32_t position) {
    switch (kv.type) {
        case KvType::f32: return kv_prefetch_as<FloatKv<KvF32>>(kv, position);
        case KvType::f16: return kv_prefetch_as<FloatKv<KvF16>>(kv, position);
        case KvType::q8_0: return kv_prefetch_as<Q8Kv>(kv, position);
    }
}

// ---- the computation ------------------------------------------------------------------------------------------------

// What a single query reads: all keys, then all values. Each step prefetches what comes `ahead` tokens later.
template <typename Kv>
struct KvStream {
    const KvHead& kv;
    const uint32_t n_keys;  // rounded up to 16
    const uint32_t ahead;

    [[gnu::always_inline]] inline void at_key(uint32_t token) const {
        const uint32_t t = token + ahead;
        if (t < n_keys)
            Kv::prefetch_keys(kv, t);
        else if (t - n_keys < n_keys)
            Kv::prefetch_values(kv, t - n_keys);
    }
    [[gnu::always_inline]] inline void at_value(uint32_t token) const {
        if (token + ahead < n_keys) Kv::prefetch_values(kv, token + ahead);
    }
};

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

// The value of a token, times the weights of all queries. sums: [N][V][parities].
template <uint32_t N, uint32_t V, uint32_t parities, typename Values>
[[gnu::always_inline]] inline void add_token(const Values& block, uint32_t t, VecF* sums) {
#pragma GCC unroll 4
    for (uint32_t v = 0; v < V; ++v) {
        const VecF value = block.value(t, v);
#pragma GCC unroll 8
        for (uint32_t c = 0; c < N; ++c) {
            VecF& sum = sums[(c * V + v) * parities];
            sum = fma(block.weight(t, v, c), value, sum);
        }
    }
}

// Adds the weighted values of keys [begin, end), begin even, to the chains of N queries and 16 * V dimensions from
// `dim` on: acc[query * V + vector][parity]. Even and odd keys have chains of their own, of which `parities` are kept
// in registers at a time.
template <typename Kv, uint32_t N, uint32_t V, uint32_t parities>
void add_values(const KvHead& kv, uint32_t dim, uint32_t begin, uint32_t end, const float* weights, size_t stride,
                const KvStream<Kv>* stream, VecF (*acc)[2]) {
    VecF sums[N * V * parities];
    while (begin < end) {
        const uint32_t first = begin / kv_block_tokens * kv_block_tokens;
        const uint32_t n = end - first < kv_block_tokens ? end - first : kv_block_tokens;
        const typename Kv::template Values<N, V> block(kv, dim, first, n, weights, stride);
#pragma GCC unroll 2
        for (uint32_t parity = 0; parity < 2; parity += parities) {
#pragma GCC unroll 16
            for (uint32_t i = 0; i < N * V * parities; ++i) sums[i] = acc[i / parities][parity + i % parities];
            uint32_t t = begin - first + parity;
            for (; t + parities <= n; t += 2) {
                if (N == 1 && stream && t % lanes == 0) stream->at_value(first + t);
                add_token<N, V, parities>(block, t, sums);
                if constexpr (parities == 2) add_token<N, V, parities>(block, t + 1, sums + 1);
            }
            if (parities == 2 && t < n) add_token<N, V, parities>(block, t, sums);
#pragma GCC unroll 16
            for (uint32_t i = 0; i < N * V * parities; ++i) acc[i / parities][parity + i % parities] = sums[i];
        }
        begin = first + n;
    }
}

// 16 * V dimensions from `dim` on of the results of N consecutive queries, of which the first sees `common` keys.
template <typename Kv, uint32_t N, uint32_t V, uint32_t parities>
void mix_values(const AttentionArgs& args, uint32_t first_query, uint32_t dim, uint32_t common, const float* weights,
                size_t stride, const float* inverse, const KvStream<Kv>* stream) {
    VecF acc[N * V][2];
    for (uint32_t i = 0; i < N * V; ++i) acc[i][0] = acc[i][1] = zero();
    const uint32_t paired = common / 2 * 2;
    add_values<Kv, N, V, parities>(args.kv, dim, 0, paired, weights, stride, stream, acc);
    for (uint32_t c = 0; c < N; ++c) {
        add_values<Kv, 1, V, 2>(args.kv, dim, paired, common + c, weights + c * stride, stride, nullptr, acc + c * V);
        float* out = args.out + (first_query + c) * args.out_stride + dim;
        for (uint32_t v = 0; v < V; ++v) {
            const uint32_t begin = dim + v * lanes, left = args.kv.head_dim - begin;
            const VecF result = mul(add(acc[c * V + v][0], acc[c * V + v][1]), set1(inverse[c]));
            store_first(out + v * lanes, result, left < lanes ? left : lanes);
        }
    }
}

// N consecutive queries of one head. Each query's operations do not depend on N.
template <typename Kv, uint32_t N>
void attention_tile_of(const AttentionArgs& args, uint32_t first_query) {
    const KvHead& kv = args.kv;
    const uint32_t common = args.position + first_query + 1;  // keys that every query of the tile sees
    const uint32_t n_keys = common + N - 1;
    const size_t stride = size_t(n_keys + lanes - 1) / lanes * lanes;
    float* const weights = args.scratch;
    const typename Kv::template Queries<N> queries(args, first_query, args.scratch + N * stride);
    const KvStream<Kv> stream{kv, uint32_t(stride), kv_ahead_tokens<Kv>(kv.head_dim)};
    const auto score = [&]<uint32_t G>(uint32_t token, Count<G>) {
        if (N == 1) {
            for (uint32_t g = 0; g < G; ++g) stream.at_key(token + g * lanes);
        }
        VecF scores[G * N];
        queries.template scores<G>(kv, token, scores);
        for (uint32_t i = 0; i < G * N; ++i) store(weights + i % N * stride + token + i / N * lanes, scores[i]);
    };
    constexpr uint32_t groups = N == 1 ? attention_lone_groups : attention_groups;
    static_assert(kv_block_tokens % (groups * lanes) == 0);
    uint32_t token = 0;
    if constexpr (N == attention_queries && requires { &Kv::template Queries<N>::tile_scores; }) {
        for (; args.tile_scores && token < stride; token += kv_block_tokens) {
            const uint32_t n_panels = stride - token < kv_block_tokens ? 1 : kv_block_tokens / lanes;
            queries.tile_scores(args, token, n_panels, weights + token, stride);
        }
    }
    for (; token + groups * lanes <= stride; token += groups * lanes) score(token, Count<groups>{});
    for (; token < stride; token += lanes) score(token, Count<1>{});
    float inverse[N];
    for (uint32_t c = 0; c < N; ++c) inverse[c] = 1.0f / softmax_weights(weights + c * stride, common + c);

    const uint32_t end = kv_value_dim(kv.head_dim);
    uint32_t dim = 0;
    const auto mix = [&]<uint32_t V>(Count<V>) {
        constexpr uint32_t parities = N == 1 ? 2 : 1;  // rows of a single query are read once
        for (; dim + V * lanes <= end; dim += V * lanes)
            mix_values<Kv, N, V, parities>(args, first_query, dim, common, weights, stride, inverse,
                                           N == 1 && dim == 0 ? &stream : nullptr);
    };
    mix(Count<(N == 1 ? attention_lone_vectors : attention_vectors)>{});
    if constexpr (N == 1) mix(Count<2>{});
    mix(Count<1>{});
}

template <typename Kv>
void attention_as(const AttentionArgs& args) {
    constexpr uint32_t tile = attention_queries;
    static_assert(tile <= attention_tile);
    uint32_t query = 0;
    for (; query + tile <= args.n_queries; query += tile) attention_tile_of<Kv, tile>(args, query);
    for (; query < args.n_queries; ++query) attention_tile_of<Kv, 1>(args, query);
}

void attention(const AttentionArgs& args) {
    switch (args.kv.type) {
        case KvType::f32: return attention_as<FloatKv<KvF32>>(args);
        case KvType::f16: return attention_as<FloatKv<KvF16>>(args);
        case KvType::q8_0: return attention_as<Q8Kv>(args);
    }
}
