// Products of many tokens with quantised weights, and with keys in 8 bits, on AMX tiles: the unit of an instruction set
// that only multiplies. Where there are fewer tokens than tiles gain from, and for everything but quantised weights,
// the product is that of the base: the instruction set of vectors that a CPU with tiles has besides.
//
// Included by unit.cpp, whose rules hold here too (kernels.inl).

namespace {

// As the instruction reads it: the shapes of all tiles.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

#ifdef FIXMIN_EMULATED_TILES
#include "emulated_amx.h"
#else
#include "kernels/amx.h"
#endif

namespace {

#include "kernels/weights.inl"

// What tiles leave over: panels first .. first + n - 1, and the tokens from `token` on.
void leave_to_vectors(const MatmulArgs& args, uint32_t first, uint32_t n, uint32_t token) {
    if (token == args.n_tokens) return;
    const uint32_t row = first * lanes, left = args.n_rows - row;
    MatmulArgs some = args;
    some.panels += first * args.panel_stride;
    some.n_rows = left < n * lanes ? left : n * lanes;
    some.quantized += size_t(token) * (args.inner / block);
    some.n_tokens -= token;
    if (some.bias) some.bias += row;
    some.out += token * args.out_stride + row;
    some.next = nullptr;
    base.matmul(some);
}

// ---- weights whose blocks have scales -------------------------------------------------------------------------------
// One tile instruction gives the exact dot products of 16 tokens and 16 rows over a block of 32: the same integers as
// 16 times eight vpdpbusd, so the floats that follow are the same too. A vector loop then scales and adds them, block
// after block, in the order of every other ISA.

constexpr uint32_t tile_tokens = matmul_tile_tokens, half_tile = tile_tokens / 2;
// Fewer tokens than this that whole tiles leave over are faster on vectors (docs/kernels.md).
constexpr uint32_t fewest_left_tokens = 9;

// Tiles: results 0 and 1 (tokens x 16 rows of int32), activations 2 and 3 (tokens x `depth` bytes), weights 4 and
// 5 (depth / 4 times 4 consecutive k x 16 rows). Depth is 32, or 16 where 16 weights have a scale of their own.
void configure_blocks(uint32_t depth, uint32_t tokens) {
    TileConfig config;
    for (uint32_t i = 0; i < 6; ++i) {
        config.row_bytes[i] = uint16_t(i / 2 == 1 ? depth : 64);
        config.rows[i] = uint8_t(i / 2 == 2 ? depth / 4 : tokens);
    }
    tile_configure(config);
}

template <WeightType Type, int... J>
[[gnu::always_inline]] inline void store_codes(const WeightBlock<Type>& from, Bytes taken_off, int8_t* to,
                                               Indices<J...>) {
    (store_bytes((uint8_t*)to + 64 * J, sub_bytes(from.template codes<J>(), taken_off)), ...);
}

template <auto>
struct Constant {};

// A panel or 16 tokens, laid out for tiles.
struct TileSide {
    int8_t* values;  // panel [n_blocks][8][16][4], tokens [n_blocks][16][32]
    float* floats;   // [n_blocks][*_floats][16]
};

// Products of one type of weights.
template <WeightType Type>
struct Tiles {
    static constexpr auto format = fixmin::quant::block_format(Type);
    static constexpr bool halves = WeightBlock<Type>::halves, has_min = format.has_min;
    static constexpr uint32_t depth = halves ? 16 : 32;
    static constexpr int code_zero = format.table ? 128 : format.zero;
    // Whether panels have the layout of tiles as they are.
    static constexpr bool direct = Type == WeightType::q8_0;
    // Whether a panel that meets one tile of tokens is expanded a few blocks at a time: scales are loaded twice then.
    static constexpr bool passes = !direct && WeightBlock<Type>::per_record == 1;
    // Fewer tokens than this are faster on vectors, which expand nothing.
    static constexpr uint32_t fewest_tokens = direct ? 5 : passes ? 13 : tile_tokens;
    // Of a panel: scale, two half scales; offset, two half mins. Of tokens: WeightBlock::Factors.
    static constexpr uint32_t panel_floats = (halves ? 3 : 1) * (has_min ? 2 : 1);
    static constexpr uint32_t token_floats = has_min ? (halves ? 3 : 2) : 1;
    static_assert(panel_floats <= matmul_tile_floats && token_floats <= matmul_tile_floats);

    // A panel as signed bytes in the order of the tiles, and its scales as floats.
    static void expand_panel(const uint8_t* panel, uint32_t n_blocks, TileSide to) {
        const Bytes taken_off = set1_bytes(uint8_t(code_zero));
        WeightBlock<Type> from;
        for (uint32_t b = 0; b < n_blocks; ++b, to.values += 512, to.floats += panel_floats * lanes) {
            from.load_from(panel, b);
            store_codes<Type>(from, taken_off, to.values, EachVector{});
            store(to.floats, from.scale);
            if constexpr (halves) {
                for (uint32_t h = 0; h < 2; ++h) store(to.floats + (1 + h) * lanes, from.half_scale[h]);
            }
            if constexpr (!has_min) continue;
            float* mins = to.floats + panel_floats / 2 * lanes;
            store(mins, from.offset);
            if constexpr (halves) {
                for (uint32_t h = 0; h < 2; ++h) store(mins + (1 + h) * lanes, from.half_min[h]);
            }
        }
    }

    // The tokens of a tile. Where there are fewer, the others' places are zeros, whose products nobody looks at.
    static void pack_activations(const ActivationBlock* rows, uint32_t n_tokens, uint32_t n_blocks, TileSide to) {
        if (n_tokens < tile_tokens) {
            __builtin_memset(to.values, 0, size_t(n_blocks) * tile_tokens * block);
            __builtin_memset(to.floats, 0, size_t(n_blocks) * tile_tokens * token_floats * sizeof(float));
        }
        for (uint32_t c = 0; c < n_tokens; ++c) {
            for (uint32_t b = 0; b < n_blocks; ++b) {
                const ActivationBlock& from = rows[size_t(c) * n_blocks + b];
                int8_t* values = to.values + size_t(b) * tile_tokens * block + c * depth;
                for (uint32_t h = 0; h < block / depth; ++h)
                    __builtin_memcpy(values + h * tile_tokens * depth, from.q + h * depth, depth);
                float* floats = to.floats + size_t(b) * token_floats * lanes + c;
                const auto factors = WeightBlock<Type>::factors_of(from);
                floats[0] = factors.scale;
                for (uint32_t i = 1; i < token_floats; ++i) floats[i * lanes] = factors.sums[i - 1];
            }
        }
    }

    // Dot products over `depth` into `dots` [16 tokens][16 rows]. Two sets of tiles, so that one product runs while the
    // one before is scaled.
    template <int set>
    [[gnu::always_inline]] static void dot(const int8_t* activations, const int8_t* weights, int32_t* dots) {
        tile_zero<set>();
        tile_load<2 + set>(activations, depth);
        tile_load<4 + set>(weights, 64);
        tile_dot<set, 2 + set, 4 + set>();
        tile_store<set>(dots, 64);
    }

    // Where `columns` finds block after block of a panel: as it came from memory, if that is the layout of tiles,
    struct Direct {
        const uint8_t* panel;

        void prepare(uint32_t) {}
        const int8_t* values(uint32_t b) const {
            return (const int8_t*)panel + fixmin::quant::codes_at(WeightBlock<Type>::layout, b);
        }
        // Everything of block b but its codes.
        void load_scales(WeightBlock<Type>& to, uint32_t b) const { to.load_from(panel, b); }
    };

    // a few blocks expanded at a time, if no other tokens need them,
    struct Passing {
        const uint8_t* panel;
        WeightBlock<Type> coming;
        alignas(64) int8_t codes[4][512];

        explicit Passing(const uint8_t* panel) : panel(panel) {}
        // Two blocks before its codes are multiplied.
        void prepare(uint32_t b) {
            coming.load_from(panel, b);
            store_codes<Type>(coming, set1_bytes(uint8_t(code_zero)), codes[b % 4], EachVector{});
        }
        const int8_t* values(uint32_t b) const { return codes[b % 4]; }
        void load_scales(WeightBlock<Type>& to, uint32_t b) const { to.load_from(panel, b); }
    };

    // or what expand_panel has made of it.
    struct Expanded {
        const TileSide& panel;

        void prepare(uint32_t) {}
        const int8_t* values(uint32_t b) const { return panel.values + b * 512; }
        void load_scales(WeightBlock<Type>& to, uint32_t b) const {
            const float* p = panel.floats + size_t(b) * panel_floats * lanes;
            to.scale = load(p);
            if constexpr (has_min) to.offset = load(p + panel_floats / 2 * lanes);
            if constexpr (halves) {
                for (uint32_t h = 0; h < 2; ++h) {
                    to.half_scale[h] = load(p + (1 + h) * lanes);
                    if constexpr (has_min) to.half_min[h] = load(p + (4 + h) * lanes);
                }
            }
        }
    };

    // The products of block b with the tiles of a set, or of both.
    [[gnu::always_inline]] static void dot_block(const int8_t* weights, const TileSide& tokens, uint32_t b,
                                                 uint32_t set, int32_t* dots) {
        const int8_t* activations = tokens.values + b * 512;
        if constexpr (halves) {
            dot<0>(activations, weights, dots);
            dot<1>(activations + 256, weights + 256, dots + tile_tokens * lanes);
        } else if (set == 1) {
            dot<1>(activations, weights, dots);
        } else {
            dot<0>(activations, weights, dots);
        }
    }

    // One panel times N tokens, block after block: WeightBlock::add_dots for every token. from_memory: with the first
    // tokens, while the panel at `ahead` is fetched.
    template <uint32_t N, bool from_memory, typename Source>
    static void columns(Source source, const TileSide& tokens, uint32_t n_blocks, const Stream stream,
                        const uint8_t* ahead, VecF* result) {
        constexpr size_t bytes = WeightBlock<Type>::bytes, n_lines = (bytes + 63) / 64, lines = (n_lines + N - 1) / N;
        alignas(64) int32_t dots[2][block / depth * tile_tokens * lanes];
        VecF acc[N];
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) acc[c] = zero();
        source.prepare(0);
        if (n_blocks > 1) source.prepare(1);
        dot_block(source.values(0), tokens, 0, 0, dots[0]);
        // set: b % 2, a constant where that saves branches.
        const auto step = [&](uint32_t b, uint32_t set) __attribute__((always_inline)) {
            if (b + 2 < n_blocks) source.prepare(b + 2);
            if (b + 1 < n_blocks) dot_block(source.values(b + 1), tokens, b + 1, 1 - set, dots[1 - set]);
            const uint8_t* fetched = from_memory ? stream.after(ahead + b * bytes) : nullptr;
            const float* a = tokens.floats + size_t(b) * token_floats * lanes;
            WeightBlock<Type> weights;
            source.load_scales(weights, b);
#pragma GCC unroll 16
            for (uint32_t c = 0; c < N; ++c) {
                if constexpr (from_memory) {
#pragma GCC unroll 8
                    for (size_t i = c * lines; i < (c + 1) * lines && i < n_lines; ++i) prefetch_far(fetched + 64 * i);
                }
                VecI dot[2];
                for (uint32_t h = 0; h < block / depth; ++h)
                    dot[h] = load_int(dots[set] + (h * tile_tokens + c) * lanes);
                typename WeightBlock<Type>::Factors factors{a[c], {}};
                for (uint32_t i = 1; i < token_floats; ++i) factors.sums[i - 1] = a[i * lanes + c];
                acc[c] = weights.add_dots(acc[c], dot, factors);
            }
        };
        if constexpr (halves) {  // each block takes both sets
            for (uint32_t b = 0; b < n_blocks; ++b) step(b, b % 2);
        } else {
            for (uint32_t b = 0; b < n_blocks; b += 2) {
                step(b, 0);
                if (b + 1 < n_blocks) step(b + 1, 1);
            }
        }
#pragma GCC unroll 16
        for (uint32_t c = 0; c < N; ++c) result[c] = acc[c];
    }
};

// One panel and N tokens, of which n_tokens exist, and their results.
template <WeightType Type, uint32_t N, bool expands>
[[gnu::always_inline]] inline void tile_columns(const MatmulArgs& args, const uint8_t* panel, const TileSide& expanded,
                                                const TileSide& tokens, uint32_t token, uint32_t n_tokens, uint32_t row,
                                                const Stream& stream, const uint8_t* ahead) {
    using Tile = Tiles<Type>;
    VecF result[N];
    const auto run = [&]<bool from_memory>(auto source, Constant<from_memory>) {
        Tile::template columns<N, from_memory>(source, tokens, args.inner / block, stream, ahead, result);
    };
    if constexpr (expands) {
        if (token == 0)
            run(typename Tile::Expanded{expanded}, Constant<true>{});
        else
            run(typename Tile::Expanded{expanded}, Constant<false>{});
    } else if constexpr (!Tile::direct) {
        run(typename Tile::Passing(panel), Constant<true>{});
    } else if (token == 0) {
        run(typename Tile::Direct{panel}, Constant<true>{});
    } else {
        run(typename Tile::Direct{panel}, Constant<false>{});
    }
    for (uint32_t c = 0; c < n_tokens; ++c) finish(args, token + c, row, result[c]);
}

// Panels are taken, and expanded if need be, in as many as stay in the second-level cache. Inside, tokens outside, so
// that results are written to neighbouring places; with the first ones the next panels are fetched. The last tile may
// have fewer tokens and does the work of 16 all the same; where 8 or fewer are all there are, half of it.
template <WeightType Type, bool expands>
void tile_matmul(const MatmulArgs& args) {
    using Tile = Tiles<Type>;
    const uint32_t n_blocks = args.inner / block, rest = args.n_tokens % tile_tokens;
    const uint32_t n_tokens = args.n_tokens - (args.n_tokens >= tile_tokens && rest < fewest_left_tokens ? rest : 0);
    // Scratch: panels, then tokens by 16, each with its values and its floats.
    const size_t values = size_t(n_blocks) * lanes * block, floats = size_t(n_blocks) * lanes * sizeof(float);
    const size_t panel_bytes = values + Tile::panel_floats * floats, token_bytes = values + Tile::token_floats * floats;
    const auto side_at = [&](size_t offset) {
        int8_t* at = (int8_t*)args.scratch + offset;
        return TileSide{at, (float*)(at + values)};
    };
    const auto expanded_at = [&](uint32_t p) { return side_at(p * panel_bytes); };
    const auto tokens_at = [&](uint32_t t) {
        return side_at(matmul_tile_panels * panel_bytes + t / tile_tokens * token_bytes);
    };
    const auto tokens_of = [&](uint32_t t) { return n_tokens - t < tile_tokens ? n_tokens - t : tile_tokens; };
    for (uint32_t t = 0; t < n_tokens && !args.same_tokens; t += tile_tokens)
        Tile::pack_activations(args.quantized + size_t(t) * n_blocks, tokens_of(t), n_blocks, tokens_at(t));
    constexpr bool halved = Tile::fewest_tokens <= half_tile;
    const bool half = halved && n_tokens <= half_tile;
    configure_blocks(Tile::depth, half ? half_tile : tile_tokens);
    const Stream stream{args};
    const uint32_t n_panels = (args.n_rows + lanes - 1) / lanes;
    // Few tokens meet a panel while it is still in the first-level cache.
    const uint32_t resident = n_tokens < 64 ? 2 : matmul_tile_panels;
    for (uint32_t first = 0; first < n_panels; first += resident) {
        const uint32_t n = n_panels - first < resident ? n_panels - first : resident;
        const uint8_t* panels = (const uint8_t*)args.panels + first * args.panel_stride;
        if constexpr (expands) {
            for (uint32_t p = 0; p < n; ++p)
                Tile::expand_panel(panels + p * args.panel_stride, n_blocks, expanded_at(p));
        }
        const auto run = [&]<uint32_t N>(Constant<N>, uint32_t t, uint32_t now) {
            for (uint32_t p = 0; p < n; ++p) {
                prefetch_results(args, t, now, first + p, 1);
                const uint8_t* panel = panels + p * args.panel_stride;
                const TileSide expanded = expands ? expanded_at(p) : TileSide{};
                tile_columns<Type, N, expands>(args, panel, expanded, tokens_at(t), t, now, (first + p) * lanes, stream,
                                               panel + resident * args.panel_stride);
            }
        };
        uint32_t t = 0;
        for (; t + tile_tokens <= n_tokens; t += tile_tokens) run(Constant<tile_tokens>{}, t, tile_tokens);
        if constexpr (halved) {
            if (half) run(Constant<half_tile>{}, 0, n_tokens);
        }
        if (t < n_tokens && !half) run(Constant<tile_tokens>{}, t, n_tokens - t);
        leave_to_vectors(args, first, n, n_tokens);
    }
    tile_release();
}

template <WeightType Type>
void quantized_matmul(const MatmulArgs& args) {
    using Tile = Tiles<Type>;
    if (args.n_tokens < Tile::fewest_tokens) return base.matmul(args);
    if constexpr (Tile::direct) return tile_matmul<Type, false>(args);
    if constexpr (Tile::passes) {  // a single tile of tokens, and perhaps a few that are left over
        if (args.n_tokens < tile_tokens + fewest_left_tokens) return tile_matmul<Type, false>(args);
    }
    return tile_matmul<Type, !Tile::direct>(args);
}

// ---- W8A8: one scale for a row --------------------------------------------------------------------------------------
// A sum stays in its tile over the whole row, so that what is done once for a block of 32 above is done once for a row.

static_assert(fixmin::quant::scaled_row_offset == 128, "weights are unsigned bytes");

// Up to 2 x 2 tiles of sums and what becomes of them while the next are summed.
struct SumTiles {
    alignas(64) int32_t sums[2][2][tile_tokens][lanes];  // [panel][tile of tokens]
    uint32_t token, n_tokens = 0, panel, n_panels = 0;
    uint32_t panels_done = 0, tokens_done = 0;
};

class ScaledRowsOnTiles {
  public:
    explicit ScaledRowsOnTiles(const MatmulArgs& args)
        : args_(args), depth_(args.inner % 64 ? 32 : 64), n_steps_(args.inner / depth_) {}

    // Panels that stay in the second-level cache while the tokens pass by; few tokens meet a panel while it is in the
    // first-level cache.
    void run() {
        const uint32_t n_panels = (args_.n_rows + lanes - 1) / lanes;
        constexpr size_t resident_bytes = size_t(1) << 19;
        const uint32_t many = uint32_t(resident_bytes / (2 * args_.panel_stride) + 1) * 2;
        const uint32_t resident = args_.n_tokens < 64 ? 2 : many;
        for (uint32_t first = 0; first < n_panels; first += resident) {
            const uint32_t end = n_panels - first < resident ? n_panels : first + resident;
            for (uint32_t token = 0; token < args_.n_tokens; token += 2 * tile_tokens) {
                const uint32_t left = args_.n_tokens - token, n = left < 2 * tile_tokens ? left : 2 * tile_tokens;
                configure(n);
                for (uint32_t panel = first; panel < end; panel += 2)
                    multiply(token, n, panel, end - panel < 2 ? 1 : 2, resident);
            }
        }
        finish_vectors(UINT32_MAX);
        tile_release();
    }

  private:
    // Tiles: sums 0 and 1 of the first panel, 2 and 3 of the second; activations 4 and 5; weights 6 and 7.
    void configure(uint32_t n_tokens) {
        if (n_tokens == configured_) return;
        configured_ = n_tokens;
        TileConfig config;
        const uint32_t tokens[2] = {n_tokens < tile_tokens ? n_tokens : tile_tokens,
                                    n_tokens > tile_tokens ? n_tokens - tile_tokens : 1};
        for (uint32_t i = 0; i < 8; ++i) {
            config.row_bytes[i] = uint16_t(i / 2 == 2 ? depth_ : 64);
            config.rows[i] = uint8_t(i < 6 ? tokens[i % 2] : depth_ / 4);
        }
        tile_configure(config);
    }

    void multiply(uint32_t token, uint32_t n_tokens, uint32_t panel, uint32_t n_panels, uint32_t resident) {
        const auto* panels = (const uint8_t*)args_.panels + panel * args_.panel_stride;
        SumTiles& to = tiles_[turn_];
        for (uint32_t p = 0; p < n_panels; ++p) prefetch_results(args_, token, n_tokens, panel + p, 1);
        const uint8_t* ahead = token == 0 ? panels + resident * args_.panel_stride : nullptr;
        const bool two_tiles = n_tokens > tile_tokens;
        if (n_panels == 2)
            two_tiles ? sum<2, 2>(token, panels, ahead, to) : sum<1, 2>(token, panels, ahead, to);
        else
            two_tiles ? sum<2, 1>(token, panels, ahead, to) : sum<1, 1>(token, panels, ahead, to);
        finish_vectors(UINT32_MAX);
        to.token = token;
        to.n_tokens = n_tokens;
        to.panel = panel;
        to.n_panels = n_panels;
        to.panels_done = to.tokens_done = 0;
        turn_ ^= 1;
    }

    // T tiles of tokens times P panels into the tiles of sums, while the results of the ones before are finished and,
    // unless `ahead` is null, the panels there are fetched.
    template <uint32_t T, uint32_t P>
    void sum(uint32_t token, const uint8_t* panels, const uint8_t* ahead, SumTiles& to) {
        const size_t stride = rows_.stride, step_bytes = size_t(depth_) * lanes;
        const int8_t* tokens = rows_.codes(token);
        const SumTiles& before = tiles_[turn_ ^ 1];
        const uint32_t each = (before.n_panels * before.n_tokens + n_steps_ - 1) / n_steps_;
        tile_zero<0>();
        if constexpr (T == 2) tile_zero<1>();
        if constexpr (P == 2) tile_zero<2>();
        if constexpr (T * P == 4) tile_zero<3>();
        for (uint32_t i = 0; i < n_steps_; ++i) {
            const int8_t* a = tokens + size_t(i) * depth_;
            const uint8_t* w = panels + i * step_bytes;
            tile_load<4>(a, stride);
            tile_load<6>(w, 64);
            tile_dot_unsigned<0, 4, 6>();
            if constexpr (T == 2) {
                tile_load<5>(a + tile_tokens * stride, stride);
                tile_dot_unsigned<1, 5, 6>();
            }
            if constexpr (P == 2) {
                tile_load<7>(w + args_.panel_stride, 64);
                tile_dot_unsigned<2, 4, 7>();
            }
            if constexpr (T * P == 4) tile_dot_unsigned<3, 5, 7>();
            if (ahead) {
                const uint8_t* fetched = stream_.after(ahead + P * i * step_bytes);
                for (size_t at = 0; at < P * step_bytes; at += 64) prefetch_far(fetched + at);
            }
            finish_vectors(each);
        }
        tile_store<0>(to.sums[0][0], 64);
        if constexpr (T == 2) tile_store<1>(to.sums[0][1], 64);
        if constexpr (P == 2) tile_store<2>(to.sums[1][0], 64);
        if constexpr (T * P == 4) tile_store<3>(to.sums[1][1], 64);
    }

    // At most n more of the results that were summed before.
    void finish_vectors(uint32_t n) {
        SumTiles& from = tiles_[turn_ ^ 1];
        for (; n && from.panels_done < from.n_panels; ++from.panels_done, from.tokens_done = 0) {
            const uint32_t p = from.panels_done, panel = from.panel + p, row = panel * lanes;
            const RowScales scales(args_, (const uint8_t*)args_.panels + panel * args_.panel_stride, row);
            for (; n && from.tokens_done < from.n_tokens; --n, ++from.tokens_done) {
                const uint32_t i = from.tokens_done, token = from.token + i;
                const RowScale its = rows_.scale(token);
                const VecI sums = load_int(from.sums[p][i / tile_tokens][i % tile_tokens]);
                store_result(args_, token, row, scales.result(without_offset(sums, its.sum), its.scale));
            }
            if (from.tokens_done < from.n_tokens) return;
        }
    }

    const MatmulArgs& args_;
    const Stream stream_{args_};
    const ScaledRows rows_{args_};
    const uint32_t depth_, n_steps_;  // bytes of a row in a tile; so many make a row
    SumTiles tiles_[2];
    uint32_t turn_ = 0, configured_ = 0;
};

void scaled_rows_matmul(const MatmulArgs& args) {
    constexpr uint32_t fewest_tokens = 5;
    if (args.n_tokens < fewest_tokens) return base.matmul(args);
    ScaledRowsOnTiles(args).run();
}

// ---------------------------------------------------------------------------------------------------------------------

void matmul(const MatmulArgs& args) {
    switch (args.type) {
        case WeightType::f32:
        case WeightType::f16:
        case WeightType::bf16: return base.matmul(args);
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
// With a q8_0 cache scores are exact sums, scaled once for 32 dimensions: keys stand in the cache as tiles want them.
// Everything else of attention is the base's.

// Tiles: results 0 and 1 (queries x 16 keys), queries 2 (queries x 32 dimensions), keys 3 and 4 (8 times 4 dimensions x
// 16 keys). The products of two panels of keys do not wait for each other.
void configure_scores() {
    TileConfig config;
    for (uint32_t i = 0; i < 5; ++i) {
        config.row_bytes[i] = uint16_t(i == 2 ? block : 64);
        config.rows[i] = uint8_t(i < 3 ? attention_queries : block / 4);
    }
    tile_configure(config);
}

void tile_scores(const TileScores& args) {
    const size_t panel_bytes = size_t(args.n_scales) * block * lanes, panel_scales = size_t(args.n_scales) * lanes;
    alignas(64) int32_t dots[2][attention_queries][lanes];
    for (uint32_t b = 0; b < args.n_scales; ++b) {
        const uint8_t* keys = args.keys + b * block * lanes;
        tile_load<2>(args.queries[b].q, args.n_scales * sizeof(ActivationBlock));
        tile_zero<0>();
        tile_load<3>(keys, 64);
        tile_dot_unsigned<0, 2, 3>();
        if (args.n_panels == 2) {
            tile_zero<1>();
            tile_load<4>(keys + panel_bytes, 64);
            tile_dot_unsigned<1, 2, 4>();
        }
        tile_store<0>(dots[0][0], 64);
        if (args.n_panels == 2) tile_store<1>(dots[1][0], 64);
        for (uint32_t p = 0; p < args.n_panels; ++p) {
            const VecF scale = load_bf16(args.scales + p * panel_scales + b * lanes);
            for (uint32_t c = 0; c < attention_queries; ++c) {
                const ActivationBlock& query = args.queries[c * args.n_scales + b];
                const VecI sum = add_int(load_int(dots[p][c]), set1_int(-128 * query.sum));  // codes have 128 more
                float* out = args.out + c * args.out_stride + p * lanes;
                store(out, fma(to_float(sum), mul(scale, set1(query.scale)), b ? load(out) : zero()));
            }
        }
    }
}

void attention(const AttentionArgs& args) {
    if (args.kv.type != KvType::q8_0 || args.kv.head_dim % block || args.n_queries < attention_queries)
        return base.attention(args);
    AttentionArgs on_tiles = args;
    on_tiles.tile_scores = tile_scores;
    configure_scores();
    base.attention(on_tiles);
    tile_release();
}

// ---------------------------------------------------------------------------------------------------------------------

// Four products that share two tiles of activations and two of weights, on registers only.
void ceiling_multiply(uint64_t rounds) {
    TileConfig config;
    for (uint32_t i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    tile_configure(config);
    int8_t bytes[16 * 64];
    for (uint32_t i = 0; i < sizeof bytes; ++i) bytes[i] = int8_t(i * 37);
    tile_load<4>(bytes, 64);
    tile_load<5>(bytes, 64);
    tile_load<6>(bytes, 64);
    tile_load<7>(bytes, 64);
    for (uint64_t r = 0; r < rounds; ++r) {
        tile_dot<0, 4, 6>();
        tile_dot<1, 5, 6>();
        tile_dot<2, 4, 7>();
        tile_dot<3, 5, 7>();
    }
    tile_release();
}

constexpr TileKernels tile_kernels = {matmul, attention, ceiling_multiply, 4 * 16 * 16 * 64 * 2};

}  // namespace
