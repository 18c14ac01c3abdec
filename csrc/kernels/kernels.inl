// The one body of kernels. Included by one translation unit per ISA after a header that defines the 16-lane classes
// VecF, VecI, Bytes, Q8Bytes and their operations. Everything here has internal linkage and uses no inline function
// from elsewhere (no std::): code compiled for one ISA must never be what the linker picks for another.
//
// The order of every floating-point operation is part of the contract (docs/numerics.md); change it here only.

namespace {

#include "kernels/weights.inl"

int32_t read_int32(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// ---- elementary functions -------------------------------------------------------------------------------------------

#include "numerics/elementary.inl"

template <typename F>
void map(float* x, uint32_t n, F f) {
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) store(x + i, f(load(x + i)));
    if (i < n) store_first(x + i, f(load_first(x + i, n - i)), n - i);
}

void gelu_erf(float* x, uint32_t n) {
    map(x, n, [](VecF v) { return gelu(v); });
}

void gelu_tanh(float* x, uint32_t n) {
    map(x, n, [](VecF v) { return gelu_by_tanh(v); });
}

void silu_mul(const float* gate, float* up, uint32_t n) {
    uint32_t i = 0;
    for (; i + lanes <= n; i += lanes) store(up + i, mul(silu(load(gate + i)), load(up + i)));
    if (i < n) {
        store_first(up + i, mul(silu(load_first(gate + i, n - i)), load_first(up + i, n - i)), n - i);
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
        const VecF v = load_first(x + i, left), w = load_first(weight + i, left);
        store_first(y + i, bias ? normalized(v, m, r, w, load_first(bias + i, left)) : normalized(v, m, r, w), left);
    }
}

void layer_norm(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y) {
    const float mean = sum_of(x, n, [](VecF acc, VecF v) { return add(acc, v); }) / float(n);
    const VecF m = set1(mean);
    const float squares = sum_of(x, n, [=](VecF acc, VecF v) { return add_square_from(acc, v, m); });
    normalize(x, n, mean, reciprocal_deviation(squares, n, eps), weight, bias, y);
}

void rms_norm(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y) {
    const float squares = sum_of(x, n, [](VecF acc, VecF v) { return add_square(acc, v); });
    normalize(x, n, 0.0f, reciprocal_deviation(squares, n, eps), weight, bias, y);
}

// ---- rotary positions -----------------------------------------------------------------------------------------------

void rope(float* x, uint32_t dim, RopeStyle style, const float* cos, const float* sin) {
    const uint32_t pairs = dim / 2;
    for (uint32_t i = 0; i < pairs; i += lanes) {
        const uint32_t left = pairs - i < lanes ? pairs - i : lanes;
        const VecF c = load_first(cos + i, left), s = load_first(sin + i, left);
        if (style == RopeStyle::half) {
            const Pair turned = rotated({load_first(x + i, left), load_first(x + pairs + i, left)}, c, s);
            store_first(x + i, turned.first, left);
            store_first(x + pairs + i, turned.second, left);
        } else {
            float first[lanes] = {}, second[lanes] = {};
            for (uint32_t j = 0; j < left; ++j) {
                first[j] = x[2 * (i + j)];
                second[j] = x[2 * (i + j) + 1];
            }
            const Pair turned = rotated({load(first), load(second)}, c, s);
            store(first, turned.first);
            store(second, turned.second);
            for (uint32_t j = 0; j < left; ++j) {
                x[2 * (i + j)] = first[j];
                x[2 * (i + j) + 1] = second[j];
            }
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

void quantize_row(const float* x, uint32_t n, std::byte* out) {
    VecF top = zero(), poison = zero();
    for (uint32_t i = 0; i < n; i += lanes) {
        const VecF v = load(x + i);
        top = max(top, abs(v));
        poison = add(poison, sub(v, v));
    }
    const float amax = reduce_max(top), nan_or_0 = reduce_add(poison);
    const bool finite = nan_or_0 == nan_or_0, empty = !finite || amax < 1e-30f;
    const VecF inverse = set1(empty ? 0.0f : 127.0f / amax);
    auto* q = (int8_t*)out;
    const size_t line_at = scaled_row_bytes(n) - 64;
    VecI sum = set1_int(0);
    if (finite) {
        for (uint32_t i = 0; i < n; i += lanes) {
            const VecI codes = round_to_int(mul(load(x + i), inverse));
            store_int8(q + i, codes);
            sum = add_int(sum, codes);
        }
    }
    const uint32_t end = finite ? n : 0;
    __builtin_memset(q + end, 0, line_at - end);
    const RowScale scale{finite ? (empty ? 0.0f : amax / 127.0f) : nan_or_0, reduce_add_int(sum)};
    __builtin_memcpy(out + line_at, &scale, sizeof scale);
}

// P panels times N tokens, block after block. A vector of codes is unpacked once and meets all tokens, a word of
// activations is loaded once and meets all panels; each pair has a chain of dot products of its own, so that none waits
// for its own latency. The first and the second 16 weights have their own where they have scales of their own; so they
// do for a lone pair, which is short of instructions when it waits for nothing else.
template <WeightType Type, uint32_t P, uint32_t N, bool FromMemory>
struct QuantizedTile {
    using Block = WeightBlock<Type>;
    static constexpr bool lone = P * N == 1;
    static constexpr uint32_t chains = Block::halves || lone ? 2 : 1;
    static constexpr bool high_nibbles = lone && Block::Reader::high_nibbles;
    static constexpr size_t bytes = Block::bytes;

    // panels: P of them, panel_stride bytes apart. rows: [N][n_blocks]. result: [P][N].
    static void multiply(const uint8_t* panels, size_t panel_stride, uint32_t n_blocks, const ActivationBlock* rows,
                         const Stream& stream, VecF* result) {
        VecF acc[P * N];
#pragma GCC unroll 16
        for (uint32_t i = 0; i < P * N; ++i) acc[i] = zero();
        Block weights[P];
        for (uint32_t b = 0; b < n_blocks; ++b) {
            // A single panel is read from front to back. Of several the next ones are fetched, front to back too: P
            // streams at a time were slower.
            Ahead ahead;
            if constexpr (FromMemory && lone)
                ahead = {stream.after(panels + b * bytes + stream_far), stream.after(panels + b * bytes + stream_near)};
            else if constexpr (FromMemory)
                ahead = {stream.after(panels + P * (panel_stride + b * bytes)), nullptr};
#pragma GCC unroll 4
            for (uint32_t p = 0; p < P; ++p) weights[p].load_from(panels + p * panel_stride, b);
            Sums sums;
            VecI* const dots = sums.dots;
#pragma GCC unroll 16
            for (uint32_t i = 0; i < P * N * chains; ++i)
                dots[i] = start(rows[b + i / chains % N * n_blocks], i % chains);
            add_products(sums, weights, rows + b, n_blocks, ahead, EachVector{});
#pragma GCC unroll 4
            for (uint32_t p = 0; p < P; ++p) {
#pragma GCC unroll 16
                for (uint32_t c = 0; c < N; ++c) {
                    const uint32_t i = p * N + c;
                    VecI* dot = dots + i * chains;
                    if constexpr (high_nibbles) dot[1] = shift_right<4>(dot[1]);
                    if constexpr (chains == 2 && !Block::halves) dot[0] = add_int(dot[0], dot[1]);
                    acc[i] = weights[p].add_dots(acc[i], dot, Block::factors_of(rows[size_t(c) * n_blocks + b]));
                }
            }
        }
#pragma GCC unroll 16
        for (uint32_t i = 0; i < P * N; ++i) result[i] = acc[i];
    }

  private:
    struct Ahead {
        const uint8_t *to_second, *to_first;  // level of cache
    };
    struct Sums {
        VecI dots[P * N * chains];
#ifdef FIXMIN_PAIRS
        Pairs pairs[P * N];
#endif
    };

    // What takes the zero off the codes of a chain.
    [[gnu::always_inline]] static VecI start(const ActivationBlock& a, uint32_t chain) {
        constexpr int32_t zero = Block::format.zero;
        if constexpr (Block::halves) return Block::Reader::start(zero, chain == 0 ? a.half_sum : a.sum - a.half_sum);
        return chain == 0 ? Block::Reader::start(zero, a.sum) : set1_int(0);
    }

    template <int... J>
    [[gnu::always_inline]] static void add_products(Sums& sums, const Block* weights, const ActivationBlock* rows,
                                                    size_t stride, const Ahead& ahead, Indices<J...>) {
        (add_product<J>(sums, weights, rows, stride, ahead), ...);
    }
    template <int J>
    [[gnu::always_inline]] static void add_product(Sums& sums, const Block* weights, const ActivationBlock* rows,
                                                   size_t stride, const Ahead& ahead) {
        constexpr uint32_t chain = chains == 2 ? J / 4 : 0;
        if constexpr (FromMemory) prefetch_part<J, P * bytes>(ahead.to_second);
        if constexpr (FromMemory && lone) prefetch_part<J, bytes, true>(ahead.to_first);
#pragma GCC unroll 4
        for (uint32_t p = 0; p < P; ++p) {
            const auto codes = codes_of<J>(weights[p]);
#pragma GCC unroll 16
            for (uint32_t c = 0; c < N; ++c) {
                VecI& dot = sums.dots[(p * N + c) * chains + chain];
                const int8_t* activations = rows[c * stride].q + 4 * J;
#ifdef FIXMIN_PAIRS
                constexpr uint32_t most = 8 / chains;
                constexpr uint32_t depth = Block::Reader::pair_depth < most ? Block::Reader::pair_depth : most;
                if constexpr (depth > 1) {
                    Pairs& pairs = sums.pairs[p * N + c];
                    const Pairs products = multiply_pairs(codes, read_int32(activations));
                    pairs = J % depth == 0 ? products : add(pairs, products);
                    if constexpr (J % depth == depth - 1) dot = add_pairs(dot, pairs);
                    continue;
                }
#endif
#ifdef FIXMIN_DOT_IN_MEMORY
                if constexpr (P == 1) {
                    dot = dot_in_memory(dot, codes, activations);
                    continue;
                }
#endif
                dot = Block::Reader::dot(dot, codes, read_int32(activations));
            }
        }
    }
    template <int J>
    [[gnu::always_inline]] static auto codes_of(const Block& weights) {
        if constexpr (high_nibbles && J >= 4)
            return weights.template high_codes<J>();
        else
            return weights.template codes<J>();
    }
};

// Of W8A8: P panels times N tokens, one exact sum each over the whole inner dimension. The order of its additions does
// not matter, so a lone pair has chains of its own, which do not wait for each other.
template <uint32_t P, uint32_t N, bool FromMemory>
struct ScaledRowsTile {
    static constexpr bool with_offset = fixmin::quant::scaled_row_offset == 128;
    static constexpr bool lone = P * N == 1;
    static constexpr uint32_t chains = lone ? 4 : 1;
    static constexpr size_t bytes = 64 * 8;  // of a block of a panel

    // panels: P of them, panel_stride bytes apart. result: [P][N].
    static void multiply(const uint8_t* panels, size_t panel_stride, uint32_t n_blocks, const ScaledRows& rows,
                         uint32_t token, const Stream& stream, VecI* result) {
        VecI sums[P * N * chains];
#pragma GCC unroll 24
        for (uint32_t i = 0; i < P * N * chains; ++i)
            sums[i] = i % chains ? set1_int(0) : q8_start(rows.scale(token + i / chains % N).sum);
        const int8_t* codes = rows.codes(token);
        for (uint32_t b = 0; b < n_blocks; ++b) {
            const uint8_t *to_second = nullptr, *to_first = nullptr;
            if constexpr (FromMemory && lone) {
                to_second = stream.after(panels + b * bytes + stream_far);
                to_first = stream.after(panels + b * bytes + stream_near);
            } else if constexpr (FromMemory) {
                to_second = stream.after(panels + P * (panel_stride + b * bytes));
            }
            add_products(sums, panels + b * bytes, panel_stride, codes + b * block, rows.stride, to_second, to_first,
                         EachVector{});
        }
#pragma GCC unroll 24
        for (uint32_t i = 0; i < P * N; ++i) {
            result[i] = sums[i * chains];
#pragma GCC unroll 4
            for (uint32_t c = 1; c < chains; ++c) result[i] = add_int(result[i], sums[i * chains + c]);
        }
    }

  private:
    template <int... J>
    [[gnu::always_inline]] static void add_products(VecI* sums, const uint8_t* weights, size_t panel_stride,
                                                    const int8_t* codes, size_t stride, const uint8_t* to_second,
                                                    const uint8_t* to_first, Indices<J...>) {
        (add_product<J>(sums, weights, panel_stride, codes, stride, to_second, to_first), ...);
    }
    template <int J>
    [[gnu::always_inline]] static void add_product(VecI* sums, const uint8_t* weights, size_t panel_stride,
                                                   const int8_t* codes, size_t stride, const uint8_t* to_second,
                                                   const uint8_t* to_first) {
        if constexpr (FromMemory) prefetch_part<J, P * bytes>(to_second);
        if constexpr (FromMemory && lone) prefetch_part<J, bytes, true>(to_first);
#pragma GCC unroll 4
        for (uint32_t p = 0; p < P; ++p) {
            const Bytes stored = load_bytes(weights + p * panel_stride + 64 * J);
            const Q8Bytes w = prepare_q8(with_offset ? stored : flip_signs(stored));
#pragma GCC unroll 16
            for (uint32_t c = 0; c < N; ++c) {
                VecI& sum = sums[(p * N + c) * chains + J % chains];
                const int8_t* activations = codes + c * stride + 4 * J;
#ifdef FIXMIN_DOT_IN_MEMORY
                if constexpr (P == 1) {
                    sum = dot_in_memory(sum, w, activations);
                    continue;
                }
#endif
                sum = dot_q8(sum, w, read_int32(activations));
            }
        }
    }
};

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

// P panels times N tokens: acc = fma(w, a, acc), k after k. result: [P][N].
template <typename Row, uint32_t P, uint32_t N, bool FromMemory>
void float_tile(const uint8_t* panels, size_t panel_stride, uint32_t inner, const float* activations, size_t stride,
                const Stream& stream, VecF* result) {
    using Element = typename Row::Element;
    constexpr size_t row_bytes = lanes * sizeof(Element);
    VecF acc[P * N];
#pragma GCC unroll 24
    for (uint32_t i = 0; i < P * N; ++i) acc[i] = zero();
    for (uint32_t k = 0; k < inner; ++k) {
        const uint8_t* row = panels + k * row_bytes;
        VecF w[P];
        if constexpr (FromMemory) {
            const uint8_t* far = stream.after(panels + P * (panel_stride + k * row_bytes));
#pragma GCC unroll 4
            for (uint32_t p = 0; p < P; ++p) {
                if (p * row_bytes % 64 == 0) prefetch_far(far + p * row_bytes);
                prefetch(row + p * panel_stride + stream_near / P);
            }
        }
#pragma GCC unroll 4
        for (uint32_t p = 0; p < P; ++p) w[p] = Row::load_row((const Element*)(row + p * panel_stride));
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) {
            const VecF a = set1(activations[c * stride + k]);
#pragma GCC unroll 4
            for (uint32_t p = 0; p < P; ++p) acc[p * N + c] = fma(w[p], a, acc[p * N + c]);
        }
    }
#pragma GCC unroll 24
    for (uint32_t i = 0; i < P * N; ++i) result[i] = acc[i];
}

// A tile of P panels and N tokens and its results. Its panels come from memory if its tokens are the first.
template <uint32_t P, uint32_t N, typename Multiply>
void tile_at(const MatmulArgs& args, const Multiply& multiply, uint32_t panel, uint32_t token) {
    VecF result[P * N];
    const uint8_t* panels = (const uint8_t*)args.panels + panel * args.panel_stride;
    if (has_prefetch && token == 0)
        multiply.template run<P, N, has_prefetch>(panels, token, result);
    else
        multiply.template run<P, N, false>(panels, token, result);
    for (uint32_t i = 0; i < P * N; ++i) finish(args, token + i % N, (panel + i / N) * lanes, result[i]);
}

// The panels times the tokens from `token` on, which are fewer than the widest tile has: as many as a tile has that is
// compiled for it.
template <typename Multiply, int... N>
void last_tile(const MatmulArgs& args, const Multiply& multiply, uint32_t first, uint32_t end, uint32_t token,
               Indices<N...>) {
    const auto run = [&]<uint32_t n>(Count<n>) {
        if (n == 0 || args.n_tokens - token != n) return;
        for (uint32_t panel = first; panel < end; ++panel) tile_at<1, n ? n : 1>(args, multiply, panel, token);
    };
    (run(Count<uint32_t(N)>{}), ...);
}

// The panels first <= i < end, which fit the second-level cache, times the tokens from `token` on.
template <typename Multiply>
void resident_tiles(const MatmulArgs& args, const Multiply& multiply, uint32_t first, uint32_t end, uint32_t token) {
    // Tokens in tiles that stay in the first-level cache while the panels pass by, so that results are written to
    // neighbouring places.
    constexpr uint32_t panels = Multiply::panels, columns = Multiply::columns;
    for (; token + columns <= args.n_tokens; token += columns) {
        uint32_t panel = first;
        for (; panel + panels <= end; panel += panels) {
            prefetch_results(args, token, columns, panel, panels);
            tile_at<panels, columns>(args, multiply, panel, token);
        }
        for (; panel < end; ++panel) {
            for (uint32_t t = token; t < token + columns; ++t) tile_at<1, 1>(args, multiply, panel, t);
        }
    }
    if constexpr (requires { typename Multiply::TakesAnyRest; }) {
        last_tile(args, multiply, first, end, token, UpTo<columns>{});
        return;
    }
    // Panels that stay in the first-level cache while the last tokens pass by.
    constexpr uint32_t few_panels = Multiply::few_panels, few = 2;
    uint32_t panel = first;
    for (; panel + few_panels <= end; panel += few_panels) {
        uint32_t t = token;
        for (; t + few <= args.n_tokens; t += few) tile_at<few_panels, few>(args, multiply, panel, t);
        for (; t < args.n_tokens; ++t) tile_at<few_panels, 1>(args, multiply, panel, t);
    }
    for (; panel < end; ++panel) {
        for (uint32_t t = token; t < args.n_tokens; ++t) tile_at<1, 1>(args, multiply, panel, t);
    }
}

template <typename Multiply>
void for_each_tile(const MatmulArgs& args, const Multiply& multiply) {
    constexpr size_t resident_bytes = size_t(1) << 18;
    const uint32_t n_panels = (args.n_rows + lanes - 1) / lanes;
    const uint32_t resident = uint32_t(resident_bytes / (2 * args.panel_stride) + 1) * 2;
    for (uint32_t first = 0, end; first < n_panels; first = end) {
        end = n_panels - first < resident ? n_panels : first + resident;
        resident_tiles(args, multiply, first, end, 0);
    }
}

template <WeightType Type>
struct QuantizedMultiply {
    // A tile has as many chains of dot products for every type.
    static constexpr uint32_t panels = WeightBlock<Type>::halves ? 1 : matmul_panels, columns = matmul_columns;
    static constexpr uint32_t few_panels = panels;

    const MatmulArgs& args;
    const Stream stream{args};

    template <uint32_t P, uint32_t N, bool FromMemory>
    void run(const uint8_t* first, uint32_t token, VecF* result) const {
        const uint32_t n_blocks = args.inner / block;
        const ActivationBlock* rows = args.quantized + size_t(token) * n_blocks;
        if constexpr (N == 1) {  // panel after panel
            for (uint32_t p = 0; p < P; ++p) {
                const uint8_t* panel = first + p * args.panel_stride;
                using One = QuantizedTile<Type, 1, 1, FromMemory>;
                One::multiply(panel, args.panel_stride, n_blocks, rows, stream, result + p);
            }
        } else {
            using Tile = QuantizedTile<Type, P, N, FromMemory>;
            Tile::multiply(first, args.panel_stride, n_blocks, rows, stream, result);
        }
    }
};

template <WeightType Type>
void quantized_matmul(const MatmulArgs& args) {
    for_each_tile(args, QuantizedMultiply<Type>{args});
}

struct ScaledRowsMultiply {
    static constexpr uint32_t panels = matmul_panels, columns = matmul_columns_rows, few_panels = panels;

    const MatmulArgs& args;
    const Stream stream{args};
    const ScaledRows rows{args};

    template <uint32_t P, uint32_t N, bool FromMemory>
    void run(const uint8_t* first, uint32_t token, VecF* result) const {
        const uint32_t n_blocks = args.inner / block;
        VecI sums[P * N];
        if constexpr (N == 1) {  // panel after panel
            for (uint32_t p = 0; p < P; ++p) {
                using One = ScaledRowsTile<1, 1, FromMemory>;
                One::multiply(first + p * args.panel_stride, args.panel_stride, n_blocks, rows, token, stream,
                              sums + p);
            }
        } else {
            ScaledRowsTile<P, N, FromMemory>::multiply(first, args.panel_stride, n_blocks, rows, token, stream, sums);
        }
#pragma GCC unroll 4
        for (uint32_t p = 0; p < P; ++p) {
            const uint8_t* panel = first + p * args.panel_stride;
            const size_t row = size_t(panel - (const uint8_t*)args.panels) / args.panel_stride * lanes;
            const RowScales scales(args, panel, uint32_t(row));
#pragma GCC unroll 16
            for (uint32_t c = 0; c < N; ++c)
                result[p * N + c] = scales.result(sums[p * N + c], rows.scale(token + c).scale);
        }
    }
};

#ifdef FIXMIN_WIDE_ROWS
// With activations as 16-bit integers, in scratch. Half a panel at a time, so that the sums of all tokens of a tile
// stay in registers.
struct WideRowsMultiply {
    static constexpr uint32_t panels = 1, columns = 6, few_panels = 1, fewest_tokens = 3;
    struct TakesAnyRest;

    const MatmulArgs& args;
    const Stream stream{args};
    const ScaledRows rows{args};
    const size_t stride = args.inner + 32;  // not always the same sets of a cache

    void widen_rows() const {
        for (uint32_t t = 0; t < args.n_tokens; ++t)
            widen(rows.codes(t), args.inner, (int16_t*)args.scratch + t * stride);
    }

    template <uint32_t P, uint32_t N, bool FromMemory>
    void run(const uint8_t* panel, uint32_t token, VecF* result) const {
        static_assert(P == 1);
        const auto* activations = (const int16_t*)args.scratch + token * stride;
        WideSums halves[2][N];
        sum<N, FromMemory>(panel, activations, panel + args.panel_stride, halves[0]);
        sum<N, false>(panel + 32, activations, nullptr, halves[1]);
        const size_t row = size_t(panel - (const uint8_t*)args.panels) / args.panel_stride * lanes;
        const RowScales scales(args, panel, uint32_t(row));
#pragma GCC unroll 6
        for (uint32_t c = 0; c < N; ++c) {
            const RowScale its = rows.scale(token + c);
            const VecI sums = without_offset(join(halves[0][c], halves[1][c]), its.sum);
            result[c] = scales.result(sums, its.scale);
        }
    }

    // Of the 8 rows whose first four bytes begin at `weights`, while the panel at `ahead` is fetched.
    template <uint32_t N, bool FromMemory>
    void sum(const uint8_t* weights, const int16_t* activations, const uint8_t* ahead, WideSums* out) const {
        WideSums sums[N];
#pragma GCC unroll 6
        for (uint32_t c = 0; c < N; ++c) sums[c] = WideSums::zero();
        for (uint32_t b = 0; b < args.inner / block; ++b, weights += block * lanes, activations += block)
            add_block<FromMemory>(sums, weights, activations,
                                  FromMemory ? stream.after(ahead + b * block * lanes) : weights, UpTo<N>{},
                                  EachVector{});
#pragma GCC unroll 6
        for (uint32_t c = 0; c < N; ++c) out[c] = sums[c];
    }

    // Unrolled by packs: of loops GCC keeps the sums in memory.
    template <bool FromMemory, int... C, int... J>
    [[gnu::always_inline]] void add_block(WideSums* sums, const uint8_t* weights, const int16_t* activations,
                                          const uint8_t* fetched, Indices<C...> tokens, Indices<J...>) const {
        (add_line<FromMemory>(sums, weights + 64 * J, activations + 4 * J, fetched + 64 * J, tokens), ...);
    }
    template <bool FromMemory, int... C>
    [[gnu::always_inline]] void add_line(WideSums* sums, const uint8_t* weights, const int16_t* activations,
                                         const uint8_t* fetched, Indices<C...>) const {
        if constexpr (FromMemory) prefetch_far(fetched);
        const auto w = WideSums::load(weights);
        (sums[C].add(w, activations + C * stride), ...);
    }
};
#endif

void scaled_rows_matmul(const MatmulArgs& args) {
    MatmulArgs others = args;
    others.bias = nullptr;  // is in the fused product
#ifdef FIXMIN_WIDE_ROWS
    if (args.n_tokens >= WideRowsMultiply::fewest_tokens) {
        const WideRowsMultiply multiply{args};
        if (!args.same_tokens) multiply.widen_rows();
        return for_each_tile(others, multiply);
    }
#endif
    for_each_tile(others, ScaledRowsMultiply{args});
}

template <typename Row>
struct FloatMultiply {
    static constexpr uint32_t panels = matmul_panels, columns = matmul_columns_float;
    // A lone panel and token is one chain, which would wait for its own latency and not for memory.
    static constexpr uint32_t few_panels = 2;

    const MatmulArgs& args;
    const Stream stream{args};

    template <uint32_t P, uint32_t N, bool FromMemory>
    void run(const uint8_t* first, uint32_t token, VecF* result) const {
        const float* rows = args.activations + token * args.activation_stride;
        float_tile<Row, P, N, FromMemory>(first, args.panel_stride, args.inner, rows, args.activation_stride, stream,
                                          result);
    }
};

template <typename Row>
void float_matmul(const MatmulArgs& args) {
    for_each_tile(args, FloatMultiply<Row>{args});
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
        case WeightType::w8a8: return scaled_rows_matmul(args);
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

bool argmax(const float* x, uint32_t n, uint32_t* index) {
    constexpr uint32_t part = 1024;  // of which only the one with the maximum is searched value by value
    constexpr float lowest = -3.402823466e+38f;
    const VecF low = set1(lowest);
    VecF poison = zero();
    float rest_poison = 0, highest = 0;
    uint32_t first = 0;
    for (uint32_t begin = 0; begin < n; begin += part) {
        const uint32_t end = n - begin < part ? n : begin + part;
        VecF top = low;
        uint32_t i = begin;
        for (; i + lanes <= end; i += lanes) {
            const VecF v = max(low, load(x + i));  // in this order a NaN stays one
            poison = add(poison, sub(v, v));
            top = max(top, v);
        }
        float most = reduce_max(top);
        for (; i < end; ++i) {
            const float v = x[i] < lowest ? lowest : x[i];
            rest_poison += v - v;
            most = v > most ? v : most;
        }
        if (begin == 0 || most > highest) {
            highest = most;
            first = begin;
        }
    }
    *index = first;
    while (*index + 1 < n && *index + 1 < first + part && x[*index] < highest) ++*index;
    return reduce_add(poison) + rest_poison == 0.0f;
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

constexpr Kernels table = {FIXMIN_NAME(FIXMIN_ISA),
                           quantize_activations,
                           quantize_row,
                           matmul,
                           layer_norm,
                           rms_norm,
                           rope,
                           scale,
                           gelu_erf,
                           gelu_tanh,
                           silu_mul,
                           kv_store,
                           kv_prefetch,
                           attention,
                           softmax_stats,
                           argmax,
                           exp_minus,
                           ceilings};

}  // namespace
