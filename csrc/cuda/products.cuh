// Matrix products. The weights lie in panels of 16 rows as on the CPU (quant/panels.h), but that words of 8- and 4-bit
// codes stand in the order of the lanes that multiply them (pack_panel in packing.cpp).
//
// Each output is the chain of docs/numerics.md over blocks of 32: an exact dot product, made by the tensor cores, and
// one or two fused products with the scales.
#pragma once
#include <type_traits>

#include "cuda/args.h"
#include "cuda/lane.cuh"
#include "quant/panels.h"

namespace fixmin::cuda {

using quant::WeightType;

/// iq4_values[nibble] of each byte.
FIXMIN_DEVICE int look_up(unsigned nibbles) {
    constexpr auto four = [](int first) {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) word |= unsigned(uint8_t(quant::iq4_values[first + i])) << 8 * i;
        return word;
    };
    constexpr unsigned table[4] = {four(0), four(4), four(8), four(12)};
    unsigned select = nibbles & 0x07070707u;
    select |= select >> 4;
    select = (select & 0xffu) | (select >> 8 & 0xff00u);
    const unsigned low = __byte_perm(table[0], table[1], select), high = __byte_perm(table[2], table[3], select);
    const unsigned upper = (nibbles >> 3 & 0x01010101u) * 255u;
    return int((low & ~upper) | (high & upper));
}

// Weights are never written by a kernel, activations in shared memory are.
struct FromGlobal {
    template <typename T>
    static FIXMIN_DEVICE T load(const std::byte* base, uint32_t n) {
        return load_weights(reinterpret_cast<const T*>(base) + n);
    }
};
struct FromShared {
    template <typename T>
    static FIXMIN_DEVICE T load(const std::byte* base, uint32_t n) {
        return reinterpret_cast<const T*>(base)[n];
    }
};

/// A weight type: what a lane multiplies of a block of 32 weights of 16 rows (rows g and g + 8), and the factors.
template <WeightType Type>
struct WeightBlock {
    static constexpr quant::BlockFormat format = quant::block_format(Type);
    static constexpr quant::PanelLayout layout = quant::panel_layout(Type);
    static constexpr bool halves = format.scale_values == 16, has_min = format.has_min;
    static constexpr bool four = format.bits % 8 >= 4, two = format.bits % 4 >= 2, one = format.bits % 2;

    // Signed codes stand in the highest bits of their bytes, which makes them as many times too large. The start of the
    // sums takes that back.
    static constexpr int up = is_centred(Type) ? 8 - format.bits : 0;
    static_assert(is_centred(Type) || format.bits == 8 || format.zero == 0);

    // A sum of products starts at 1.5 * 2^23 as the bits of a float: read as a float it is then 1.5 * 2^23 + sum, or,
    // with the exponent less by `up`, 1.5 * 2^(23 - up) + sum / 2^up. That is exact while |sum| < 2^22, and no type has
    // more than 128 * 127 * 32 < 2^19. One addition instead of a conversion, which GPUs do at a quarter of the rate.
    static constexpr int start = ((127 + 23 - up) << 23) | 0x400000;
    static FIXMIN_DEVICE float dot_of(int sum) { return __int_as_float(sum) - 12582912.0f / float(1 << up); }

    /// A lane's codes as they lie in the panel.
    struct Codes {
        int4 bytes;               // 8 bits
        int2 nibbles;             // 4 bits
        unsigned pairs[2], bits;  // 2 bits of rows g and g + 8, 1 bit
        unsigned bits_further;
    };
    template <typename From>
    static FIXMIN_DEVICE Codes load_codes(const std::byte* p) {
        const unsigned i = threadIdx.x % 32, g = i / 4, t = i % 4;
        Codes c;
        if constexpr (format.bits == 8) c.bytes = From::template load<int4>(p, i);
        if constexpr (four) c.nibbles = From::template load<int2>(p, i), p += 256;
        if constexpr (two) {
            for (unsigned n = 0; n < 2; ++n) c.pairs[n] = From::template load<unsigned>(p, t % 2 * 16 + g + n * 8);
            p += 128;
        }
        if constexpr (one) {
            c.bits = From::template load<unsigned>(p, g);
            c.bits_further = From::template load<unsigned>(p, g + 8);
        }
        return c;
    }

    /// As signed bytes: row g, k = 4t.., row g + 8, and both 16 further.
    static FIXMIN_DEVICE int4 weights(const Codes& c) {
        if constexpr (format.bits == 8) return c.bytes;
        const unsigned t = threadIdx.x % 4;
        unsigned w[4] = {};
        for (unsigned n = 0; n < 4; ++n) {
            if constexpr (four) w[n] = unsigned(n % 2 ? c.nibbles.y : c.nibbles.x) >> n / 2 * 4 & 0x0f0f0f0fu;
            if constexpr (two) w[n] |= (c.pairs[n % 2] >> (t / 2 * 2 + n / 2 * 4) & 0x03030303u) << (four ? 4 : 0);
            if constexpr (one)
                w[n] |= ((n % 2 ? c.bits_further : c.bits) >> (t + n / 2 * 4) & 0x01010101u) << (four ? 4 : 2);
            if constexpr (format.table) w[n] = unsigned(look_up(w[n]));
            w[n] <<= up;
        }
        int4 result;
        result.x = int(w[0]), result.y = int(w[1]), result.z = int(w[2]), result.w = int(w[3]);
        return result;
    }

    /// The factors of a row as they lie in the panel.
    struct RawFactors {
        uint16_t d, m;
        int8_t scale[2], min[2];
    };
    static FIXMIN_DEVICE RawFactors load_factors(const std::byte* record, uint32_t in_record, uint32_t r) {
        const std::byte* p = record;
        RawFactors raw{};
        raw.d = FromGlobal::load<uint16_t>(p, r);
        if constexpr (has_min) raw.m = FromGlobal::load<uint16_t>(p, 16 + r);
        p += (has_min ? 4 : 2) * 16;
        const auto byte = [&](uint32_t n) { return FromGlobal::load<int8_t>(p, n * 16 + r); };
        if constexpr (halves) {
            for (uint32_t h = 0; h < 2; ++h) raw.scale[h] = byte(in_record * 2 + h);
        } else if constexpr (layout.record_blocks > 1) {
            raw.scale[0] = byte(in_record);
            if constexpr (has_min) raw.min[0] = byte(in_record + 256 / format.scale_values);
        }
        return raw;
    }

    /// As floats. One block: d * s; with a minimum m * n too; with halves d, s of both, and d, m, s, s, n, n.
    static constexpr uint32_t n_factors = halves ? (has_min ? 6 : 3) : has_min ? 2 : 1;
    struct Factors {
        float f[n_factors];
    };
    static FIXMIN_DEVICE Factors factors(const RawFactors& raw) {
        Factors out;
        float* const f = out.f;
        f[0] = half_to_float(raw.d);
        if constexpr (has_min) f[1] = half_to_float(raw.m);
        if constexpr (Type == WeightType::q2_k) {
            for (uint32_t h = 0; h < 2; ++h) {
                f[2 + h] = float(raw.scale[h] & 15);
                f[4 + h] = float(raw.scale[h] >> 4 & 15);
            }
        } else if constexpr (halves) {
            for (uint32_t h = 0; h < 2; ++h) f[1 + h] = float(raw.scale[h]);
        } else if constexpr (layout.record_blocks > 1) {
            f[0] *= float(raw.scale[0]);  // exact
            if constexpr (has_min) f[1] *= float(raw.min[0]);
        }
        return out;
    }

    /// Planes of QuantizedRows::factors that it needs.
    static constexpr uint32_t n_token_factors = has_min ? (halves ? 3 : 2) : 1;
    static FIXMIN_DEVICE uint32_t token_plane(uint32_t n) { return n && halves ? n + 1 : n; }
    struct TokenFactors {
        float f[n_token_factors];
    };

    /// The dot products of two rows and two tokens, of a whole warp, where halves have scales of their own: of each.
    struct Dots {
        int all[4];
        int upper[halves ? 4 : 1];
    };
    static FIXMIN_DEVICE Dots multiply(int4 w, int2 a) {
        Dots dots;
        if constexpr (halves) {
            multiply_half_tile(dots.all, make_int2(w.x, w.y), a.x, start);
            multiply_half_tile(dots.upper, make_int2(w.z, w.w), a.y, start);
        } else {
            multiply_tile(dots.all, w, a, start);
        }
        return dots;
    }

    /// What one block adds to a chain: acc = fma(dot, scale, acc), and with a minimum fma(offset, sum, acc).
    struct alignas(8) OneTerm {
        float dot, scale;
    };
    struct alignas(16) TwoTerms {
        float dot, scale, offset, sum;
    };
    using Terms = std::conditional_t<has_min, TwoTerms, OneTerm>;
    static FIXMIN_DEVICE Terms terms(const Dots& dots, uint32_t i, const Factors& w, const TokenFactors& a) {
        Terms term;
        term.scale = w.f[0] * a.f[0];
        if constexpr (halves) {
            // Exact, as in kernels.inl.
            constexpr uint32_t s = has_min ? 2 : 1;
            term.dot = __fmaf_rn(w.f[s + 1], dot_of(dots.upper[i]), w.f[s] * dot_of(dots.all[i]));
            if constexpr (has_min) {
                term.sum = __fmaf_rn(w.f[5], a.f[2], w.f[4] * a.f[1]);
                term.offset = w.f[1] * a.f[0];
            }
        } else {
            term.dot = dot_of(dots.all[i]);
            if constexpr (has_min) term.offset = w.f[1], term.sum = a.f[1];
        }
        return term;
    }
    static FIXMIN_DEVICE float add(float acc, const Terms& term) {
        acc = __fmaf_rn(term.dot, term.scale, acc);
        if constexpr (has_min) acc = __fmaf_rn(term.offset, term.sum, acc);
        return acc;
    }
};

/// The matrix that this block works on; block: among those of that matrix, of `rows` rows each.
FIXMIN_DEVICE ProductPart part_of(const ProductArgs& args, uint32_t rows, uint32_t& block) {
    ProductPart part = args.parts[0];
    for (uint32_t p = 1; p < args.n_parts; ++p) {
        const uint32_t blocks = (part.n_rows + rows - 1) / rows;
        if (block < blocks) break;
        block -= blocks;
        part = args.parts[p];
    }
    return part;
}

FIXMIN_DEVICE void finish(const ProductArgs& args, const ProductPart& part, uint32_t token, uint32_t row, float value) {
    if (token >= args.n_tokens || row >= part.n_rows) return;
    float* out = part.out + size_t(token) * args.out_stride + row;
    if (part.bias) value = value + part.bias[row];
    if (args.accumulate) value = *out + value;
    *out = value;
}

// ---- few tokens -----------------------------------------------------------------------------------------------------
// A block of threads has 16 rows and up to few_tokens tokens, so that weights are read once. Its warps multiply
// different blocks of the inner dimension and hand the terms over, a thread for each output runs the chain. What a warp
// multiplies first, few_depth blocks, it has in registers before the kernel before this one has ended; while it
// multiplies them it loads as many again. Terms go through two buffers in turn, so that warps may be a round ahead of
// the chains.

template <WeightType Type>
FIXMIN_DEVICE void product_of_few(const ProductArgs& args, Index block, unsigned char* shared) {
    using Block = WeightBlock<Type>;
    using Terms = typename Block::Terms;
    constexpr quant::PanelLayout layout = quant::panel_layout(Type);
    constexpr uint32_t most_tokens = few_tokens(Block::has_min), tiles = most_tokens / tile_tokens,
                       warps = few_threads / 32;
    constexpr uint32_t stride = few_stride(Block::has_min);
    static_assert(sizeof(Terms) == few_term_bytes(Block::has_min));
    const uint32_t n_blocks = args.inner / quant::block_size, pairs = (n_blocks + 1) / 2;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const ProductPart part = part_of(args, 16, block.x);
    const std::byte* panel = part.panels + size_t(block.x) * args.panel_stride;

    struct Loaded {
        typename Block::Codes codes;
        typename Block::RawFactors factors[2];
    } now[few_depth], next[few_depth];
    const auto load = [&](uint32_t first) {
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) {
            const uint32_t b = first + u * warps + warp;
            if (b >= n_blocks) break;
            next[u].codes = Block::template load_codes<FromGlobal>(panel + quant::codes_at(layout, b));
            const std::byte* const record = panel + quant::scales_at(layout, b);
            for (uint32_t r = 0; r < 2; ++r)
                next[u].factors[r] = Block::load_factors(record, b % layout.record_blocks, g + r * 8);
        }
    };
    // What is not loaded at once is on its way to the second-level cache.
#pragma unroll 1
    for (size_t at = quant::codes_at(layout, warps * few_depth) + threadIdx.x * 128; at < args.panel_stride;
         at += few_threads * 128)
        prefetch_weights(panel + at);

    const uint32_t first_token = block.y * most_tokens;
    const uint32_t n = args.n_tokens - first_token < most_tokens ? args.n_tokens - first_token : most_tokens;
    const uint32_t turns = few_turns(Block::has_min, args.n_tokens);  // blocks of a warp between hand-overs
    Terms* const buffers = reinterpret_cast<Terms*>(shared);          // [2][turns * warps][n][16 rows of stride]
    const uint32_t tile = first_token / tile_tokens, buffer_terms = turns * warps * n * stride;
    // What this thread reads of the activations, counted up.
    static_assert(warps % 2 == 0);  // blocks lie in pairs
    const int2* next_codes[tiles];
    const float* next_factors[tiles][Block::n_token_factors];
#pragma unroll
    for (uint32_t i = 0; i < tiles; ++i) {
        const size_t at = size_t(tile + i) * pairs + warp / 2;
        next_codes[i] = reinterpret_cast<const int2*>(args.quantized.codes) + (at * 32 + lane) * 2 + warp % 2;
        for (uint32_t f = 0; f < Block::n_token_factors; ++f)
            next_factors[i][f] = args.quantized.factors + Block::token_plane(f) * args.quantized.plane +
                                 (at * tile_tokens + 2 * t) * 2 + warp % 2;
    }
    uint32_t buffer = 0;
    float acc = 0;
    for (uint32_t begin = 0; begin < n_blocks + few_depth * warps; begin += few_depth * warps) {
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) now[u] = next[u];
        load(begin);
        if (begin == 0) {
            after_previous();
            continue;
        }
        const uint32_t first = begin - few_depth * warps;
        int2 a[few_depth][tiles];
        typename Block::TokenFactors token[few_depth][tiles][2];
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) {
            const uint32_t b = first + u * warps + warp;
            for (uint32_t i = 0; i < tiles; ++i) {
                a[u][i] = make_int2(0, 0);
                if (b < n_blocks && i * tile_tokens + g < n) a[u][i] = next_codes[i][u * warps / 2 * 32 * 2];
                for (uint32_t c = 0; c < 2; ++c) {
                    for (uint32_t f = 0; f < Block::n_token_factors; ++f) {
                        token[u][i][c].f[f] = 0;
                        if (b >= n_blocks || i * tile_tokens + 2 * t + c >= n) continue;
                        token[u][i][c].f[f] = next_factors[i][f][(u * warps / 2 * tile_tokens + c) * 2];
                    }
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < tiles; ++i) {
            next_codes[i] += few_depth * warps / 2 * 32 * 2;
            for (const float*& p : next_factors[i]) p += few_depth * warps / 2 * tile_tokens * 2;
        }
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) {
            const uint32_t b = first + u * warps + warp, in_round = (u & (turns - 1)) * warps + warp;
            if (b < n_blocks) {  // a whole warp
                const int4 w = Block::weights(now[u].codes);
                for (uint32_t i = 0; i < tiles; ++i) {
                    if (i * tile_tokens >= n) break;
                    const auto dots = Block::multiply(w, a[u][i]);
                    for (uint32_t k = 0; k < 4; ++k) {
                        const uint32_t column = i * tile_tokens + 2 * t + k % 2;
                        if (column >= n) continue;
                        buffers[buffer + (in_round * n + column) * stride + g + k / 2 * 8] =
                            Block::terms(dots, k, Block::factors(now[u].factors[k / 2]), token[u][i][k % 2]);
                    }
                }
            }
            if ((u + 1) & (turns - 1)) continue;
            __syncthreads();
            const uint32_t done = first + (u + 1 - turns) * warps;
            if (threadIdx.x < n * 16 && done < n_blocks) {
                const uint32_t count = n_blocks - done < turns * warps ? n_blocks - done : turns * warps;
                const Terms* p = buffers + buffer + threadIdx.x / 16 * stride + threadIdx.x % 16;
#pragma unroll 8
                for (uint32_t j = 0; j < count; ++j, p += n * stride) acc = Block::add(acc, *p);
            }
            buffer ^= buffer_terms;
        }
    }
    if (threadIdx.x < n * 16) finish(args, part, first_token + threadIdx.x / 16, block.x * 16 + threadIdx.x % 16, acc);
}

// ---- many tokens ----------------------------------------------------------------------------------------------------
// A block of threads has 8 warps, 4 along the rows and 2 along the tokens; each has M * 16 rows and N * 8 tokens in
// registers from the first block of 32 to the last. Two blocks of 32, a stage, come into shared memory at a time, by
// copies that run while earlier stages are multiplied. Factors of weights become floats on the way, so that the loop
// needs no more than wide loads of them.

template <WeightType Type, uint32_t M, uint32_t N, uint32_t Stages>
FIXMIN_DEVICE void product_of_many(const ProductArgs& args, Index block, unsigned char* shared) {
    using Block = WeightBlock<Type>;
    constexpr quant::PanelLayout layout = quant::panel_layout(Type);
    constexpr uint32_t panels = 4 * M, tiles = 2 * N, warps = many_threads / 32, chunks = layout.codes_bytes / 16;
    // In such an order that what thread i copies is piece i, or a fixed number further.
    struct alignas(16) Stage {
        std::byte codes[2][panels][layout.codes_bytes];
        int4 tokens[tiles][32];                                  // both blocks
        float4 token_factors[tiles][Block::n_token_factors][4];  // [t]: tokens 2t, 2t, 2t + 1, 2t + 1
        float factors[Block::n_factors][panels][8][2][2];        // [g][block][row g, g + 8]
    };
    static_assert(Stages * sizeof(Stage) <= many_bytes);
    Stage* const stages = reinterpret_cast<Stage*>(shared);

    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t pairs = (args.inner / quant::block_size + 1) / 2;
    const ProductPart part = part_of(args, panels * 16, block.x);
    // Behind the last panel and tile there is nothing: those are computed again, and not written.
    const uint32_t first_panel = block.x * panels, last_panel = (part.n_rows - 1) / 16;
    const uint32_t first_tile = block.y * tiles, last_tile = (args.n_tokens - 1) / tile_tokens;
    const auto panel = [&](uint32_t i) {
        const uint32_t n = first_panel + i < last_panel ? first_panel + i : last_panel;
        return part.panels + size_t(n) * args.panel_stride;
    };
    const auto tile = [&](uint32_t i) {
        const uint32_t n = first_tile + i < last_tile ? first_tile + i : last_tile;
        return size_t(n) * pairs;
    };

    // Where a thread copies from next: addresses that are counted up cost less than those that are computed. Of a pair
    // the second block has its codes and scales so many bytes behind the first.
    constexpr uint32_t parcel_blocks = layout.parcel_blocks, record_blocks = layout.record_blocks;
    constexpr size_t records_bytes = layout.parcel_records * layout.record_bytes;
    constexpr size_t codes_apart = parcel_blocks == 1 ? layout.parcel_bytes : layout.codes_bytes;
    constexpr size_t scales_apart = parcel_blocks == 1   ? layout.parcel_bytes
                                    : record_blocks == 1 ? layout.record_bytes
                                                         : 0;
    // Each warp has the scales of one panel.
    const bool has_panel = panels == warps || warp < panels;
    const uint32_t second = lane / 2 % 2, row = lane / 4 + lane % 2 * 8;
    constexpr bool only_d = record_blocks == 1;  // and m, of two bytes: the row can be in the address
    const std::byte* next_record = panel(warp) + second * scales_apart + (only_d ? row * 2 : 0);

    constexpr uint32_t pieces = 2 * panels * chunks, pieces_of_thread = (pieces + many_threads - 1) / many_threads;
    const std::byte* next_codes[pieces_of_thread];
#pragma unroll
    for (uint32_t i = 0; i < pieces_of_thread; ++i) {
        const uint32_t piece = threadIdx.x + i * many_threads;
        next_codes[i] = panel(piece / chunks % panels) + records_bytes + piece % chunks * 16;
        if (piece >= panels * chunks) next_codes[i] += codes_apart;
    }
    constexpr uint32_t tiles_of_warp = tiles / warps;
    const uint32_t* next_tokens = args.quantized.codes + (tile(warp) * 32 + lane) * 4;
    uint32_t further[tiles_of_warp];
    for (uint32_t i = 0; i < tiles_of_warp; ++i) further[i] = uint32_t(tile(warp + i * warps) - tile(warp)) * 32 * 4;
    constexpr uint32_t factor_pieces = tiles * Block::n_token_factors * 4;
    static_assert(factor_pieces <= many_threads && panels <= warps && tiles % warps == 0);
    const float* next_factors = args.quantized.factors +
                                Block::token_plane(threadIdx.x / 4 % Block::n_token_factors) * args.quantized.plane +
                                (tile(threadIdx.x / (4 * Block::n_token_factors)) * tile_tokens + lane % 4 * 2) * 2;

    typename Block::RawFactors raw{};
    const auto copy_weights = [&](Stage& to, uint32_t pair) {
#pragma unroll
        for (uint32_t i = 0; i < pieces_of_thread; ++i) {
            const uint32_t piece = threadIdx.x + i * many_threads;
            if (pieces % many_threads == 0 || piece < pieces) copy_async(to.codes[0][0] + piece * 16, next_codes[i]);
        }
        if (has_panel) raw = Block::load_factors(next_record, (2 * pair + second) % record_blocks, only_d ? 0 : row);
        const uint32_t next = 2 * pair + 2;
        size_t step = 2 * codes_apart;
        if (next % parcel_blocks == 0 && parcel_blocks > 1) step += records_bytes;
        for (auto& p : next_codes) p += step;
        if constexpr (parcel_blocks <= 2) {
            next_record += step;
        } else {
            if (next % record_blocks == 0) next_record += layout.record_bytes;
            if (next % parcel_blocks == 0) next_record += layout.parcel_bytes - records_bytes;
        }
    };
    const auto store_factors = [&](Stage& to) {
        if (!has_panel) return;
        const auto values = Block::factors(raw);
        for (uint32_t f = 0; f < Block::n_factors; ++f) *(to.factors[f][0][0][0] + threadIdx.x) = values.f[f];
    };
    const auto copy_tokens = [&](Stage& to) {
#pragma unroll
        for (uint32_t i = 0; i < tiles_of_warp; ++i)
            copy_async(to.tokens[i * warps] + threadIdx.x, next_tokens + further[i]);
        if (threadIdx.x < factor_pieces) copy_async(to.token_factors[0][0] + threadIdx.x, next_factors);
        next_tokens += 32 * 4;
        next_factors += tile_tokens * 2;
    };

    constexpr uint32_t ahead = Stages - 1;  // pairs
#pragma unroll 1
    for (uint32_t s = 0; s < (ahead == 1 ? 1 : ahead < pairs ? ahead : pairs); ++s) {
        copy_weights(stages[s], s);
        store_factors(stages[s]);
    }
    after_previous();
#pragma unroll 1
    for (uint32_t s = 0; s < ahead; ++s) {
        if (ahead == 1 || s < pairs) copy_tokens(stages[s]);
        end_copies();
    }

    const uint32_t panel_of_warp = warp % 4, tile_of_warp = warp / 4;  // the first; others follow by 4 and 2
    float acc[M][N][4] = {};
    // So that a load can add which stage: an instruction less than an address of each stage.
    const std::byte* const own_tokens = reinterpret_cast<const std::byte*>(&stages->tokens[tile_of_warp][lane]);
    uint32_t now = 0, free = (Stages - 1) * sizeof(Stage);  // which stages, in bytes
    const auto stage_at = [&](uint32_t at) -> Stage& { return *reinterpret_cast<Stage*>(shared + at); };
    for (uint32_t pair = 0; pair < pairs; ++pair) {
        wait_for_copies<Stages - 2>();
        __syncthreads();
        if (pair + ahead < pairs) {
            copy_weights(stage_at(free), pair + ahead);
            copy_tokens(stage_at(free));
        }
        end_copies();

        const Stage& stage = stage_at(now);
        int4 w[M][2];
        typename Block::Factors factors[M][2][2];  // [..][block][row g, g + 8]
#pragma unroll
        for (uint32_t m = 0; m < M; ++m) {
            for (uint32_t k = 0; k < 2; ++k)
                w[m][k] = Block::weights(Block::template load_codes<FromShared>(stage.codes[k][panel_of_warp + m * 4]));
            for (uint32_t f = 0; f < Block::n_factors; ++f) {
                const float4 all = *reinterpret_cast<const float4*>(stage.factors[f][panel_of_warp + m * 4][g]);
                factors[m][0][0].f[f] = all.x, factors[m][0][1].f[f] = all.y;
                factors[m][1][0].f[f] = all.z, factors[m][1][1].f[f] = all.w;
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < N; ++n) {
            const int4 a = *reinterpret_cast<const int4*>(own_tokens + now + sizeof(stages->tokens[0]) * 2 * n);
            typename Block::TokenFactors token[2][2];  // [block][token 2t, 2t + 1]
            for (uint32_t f = 0; f < Block::n_token_factors; ++f) {
                const float4 all = stage.token_factors[tile_of_warp + n * 2][f][t];
                token[0][0].f[f] = all.x, token[1][0].f[f] = all.y;
                token[0][1].f[f] = all.z, token[1][1].f[f] = all.w;
            }
            for (uint32_t k = 0; k < 2; ++k) {
                for (uint32_t m = 0; m < M; ++m) {
                    const auto dots = Block::multiply(w[m][k], k ? make_int2(a.z, a.w) : make_int2(a.x, a.y));
                    for (uint32_t i = 0; i < 4; ++i)
                        acc[m][n][i] =
                            Block::add(acc[m][n][i], Block::terms(dots, i, factors[m][k][i / 2], token[k][i % 2]));
                }
            }
        }
        store_factors(stage_at(free));
        free = now;
        if constexpr (Stages == 2)
            now = sizeof(Stage) - now;
        else
            now = now + sizeof(Stage) == Stages * sizeof(Stage) ? 0 : now + sizeof(Stage);
    }
    const uint32_t first_row = (first_panel + panel_of_warp) * 16 + g;
    const uint32_t first_token = (first_tile + tile_of_warp) * tile_tokens + 2 * t;
    const uint32_t rows_left = part.n_rows > first_row ? part.n_rows - first_row : 0;
    const uint32_t tokens_left = args.n_tokens > first_token ? args.n_tokens - first_token : 0;
    float* out = part.out + size_t(first_token) * args.out_stride + first_row;
    float bias[2 * M] = {};
    const auto row_of = [](uint32_t i) { return i / 2 * 64 + i % 2 * 8; };
#pragma unroll
    for (uint32_t i = 0; i < 2 * M; ++i) {
        if (part.bias && row_of(i) < rows_left) bias[i] = part.bias[first_row + row_of(i)];
    }
#pragma unroll
    for (uint32_t n = 0; n < N; ++n) {
        for (uint32_t c = 0; c < 2; ++c) {
            for (uint32_t i = 0; i < 2 * M; ++i) {
                const bool is_there = n * 2 * tile_tokens + c < tokens_left && row_of(i) < rows_left;
                const float before = is_there && args.accumulate ? out[row_of(i)] : 0.0f;
                const float sum = acc[i / 2][n][i % 2 * 2 + c], value = part.bias ? sum + bias[i] : sum;
                if (is_there) out[row_of(i)] = args.accumulate ? before + value : value;
            }
            out += size_t(args.out_stride) * (c ? 2 * tile_tokens - 1 : 1);
        }
    }
}

// Of small matrices there are enough blocks for all multiprocessors only if the blocks are small.
template <WeightType Type>
FIXMIN_DEVICE void product_of_many(const ProductArgs& args, Index block, unsigned char* shared) {
    if constexpr (has_wide_tiles(Type)) {
        if (args.wide) return product_of_many<Type, wide_rows / 64, wide_tokens / 16, 2>(args, block, shared);
    }
    product_of_many<Type, narrow_rows / 64, narrow_tokens / 16, 4>(args, block, shared);
}

// ---- float weights --------------------------------------------------------------------------------------------------
// A thread has the outputs of a row for 4 tokens, a chain for each: these are slow on a GPU (docs/cuda.md). Weights and
// values of float_step positions go through shared memory, those of the next while the chains run.

template <WeightType Type>
FIXMIN_DEVICE float float_weight(const std::byte* weights, uint32_t i) {
    if constexpr (Type == WeightType::f32) return reinterpret_cast<const float*>(weights)[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(weights)[i];
    if constexpr (Type == WeightType::f16) return half_to_float(half);
    return __int_as_float(int(unsigned(half) << 16));
}

template <WeightType Type>
FIXMIN_DEVICE void product_of_floats(const ProductArgs& args, Index block, unsigned char* shared) {
    constexpr uint32_t each = float_thread_tokens, tokens = float_tokens, element = Type == WeightType::f32 ? 4 : 2;
    constexpr uint32_t step_bytes = float_step * 16 * element, words = step_bytes / 16;
    constexpr uint32_t value_stride = float_step + 4;  // other banks for the next token
    static_assert(words <= float_threads);
    struct alignas(16) Stage {
        std::byte weights[step_bytes];  // [float_step][16 rows]
        float values[tokens][value_stride];
    };
    static_assert(2 * sizeof(Stage) <= float_bytes);
    Stage* const stages = reinterpret_cast<Stage*>(shared);
    const uint32_t r = threadIdx.x % 16, group = threadIdx.x / 16, first_token = block.y * tokens;
    const ProductPart part = part_of(args, 16, block.x);
    const std::byte* panel = part.panels + size_t(block.x) * args.panel_stride;
    const uint32_t n_words = args.inner * element;  // of 16 bytes, in the panel
    const uint32_t n_tokens = args.n_tokens - first_token < tokens ? args.n_tokens - first_token : tokens;

    int4 weights{};
    const auto load = [&](uint32_t first) {
        const uint32_t at = first * element + threadIdx.x;
        if (threadIdx.x < words && at < n_words) weights = load_weights(reinterpret_cast<const int4*>(panel) + at);
    };
    load(0);
    after_previous();
    float acc[each] = {};
    uint32_t turn = 0;
    for (uint32_t first = 0; first < args.inner; first += float_step, turn ^= 1) {
        Stage& stage = stages[turn];
        if (threadIdx.x < words) reinterpret_cast<int4*>(stage.weights)[threadIdx.x] = weights;
        for (uint32_t i = threadIdx.x; i < n_tokens * float_step; i += float_threads) {
            const uint32_t token = first_token + i / float_step, k = first + i % float_step;
            if (k < args.inner)
                stage.values[i / float_step][i % float_step] = args.values[size_t(token) * args.inner + k];
        }
        __syncthreads();
        load(first + float_step);
        const uint32_t count = args.inner - first < float_step ? args.inner - first : float_step;
        if (group * each >= n_tokens) continue;
#pragma unroll 4
        for (uint32_t k = 0; k < count; ++k) {
            const float w = float_weight<Type>(stage.weights, k * 16 + r);
            for (uint32_t i = 0; i < each; ++i) acc[i] = __fmaf_rn(w, stage.values[group * each + i][k], acc[i]);
        }
    }
    for (uint32_t i = 0; i < each; ++i) finish(args, part, first_token + group * each + i, block.x * 16 + r, acc[i]);
}

#define FIXMIN_QUANTIZED(name)                                  \
    FIXMIN_KERNEL(few_##name, ProductArgs, few_threads) {       \
        FIXMIN_SHARED(shared);                                  \
        product_of_few<WeightType::name>(args, block, shared);  \
    }                                                           \
    FIXMIN_KERNEL(many_##name, ProductArgs, many_threads) {     \
        FIXMIN_SHARED(shared);                                  \
        product_of_many<WeightType::name>(args, block, shared); \
    }
#define FIXMIN_FLOATS(name)                                       \
    FIXMIN_KERNEL(floats_##name, ProductArgs, float_threads) {    \
        FIXMIN_SHARED(shared);                                    \
        product_of_floats<WeightType::name>(args, block, shared); \
    }

FIXMIN_QUANTIZED(q8_0)
FIXMIN_QUANTIZED(q4_0)
FIXMIN_QUANTIZED(q4_1)
FIXMIN_QUANTIZED(q5_0)
FIXMIN_QUANTIZED(q5_1)
FIXMIN_QUANTIZED(q2_k)
FIXMIN_QUANTIZED(q3_k)
FIXMIN_QUANTIZED(q4_k)
FIXMIN_QUANTIZED(q5_k)
FIXMIN_QUANTIZED(q6_k)
FIXMIN_QUANTIZED(iq4_nl)
FIXMIN_QUANTIZED(iq4_xs)
FIXMIN_FLOATS(f32)
FIXMIN_FLOATS(f16)
FIXMIN_FLOATS(bf16)

}  // namespace fixmin::cuda
