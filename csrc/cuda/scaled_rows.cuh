// Products of W8A8: rows have one scale, so that a sum over the whole inner dimension is one exact integer, whose order
// of additions is free (docs/numerics.md). Weights and activations lie as those of products.cuh, but that the scales
// of a panel, [16] in float32, stand at its end.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"

namespace fixmin::cuda {

FIXMIN_KERNEL(quantize_rows, RowsInBytesArgs, row_threads) {
    after_previous();
    FIXMIN_SHARED(shared);
    const float* const x = args.values + size_t(block.x) * args.length;
    quantize_row(x, args.length, args.quantized, block.x, reinterpret_cast<float*>(shared));
}

FIXMIN_DEVICE float scaled_sum(int sum, float weight_scale, float token_scale, float bias) {
    return __fmaf_rn(float(sum), weight_scale * token_scale, bias);
}

// A block of threads has 16 rows and up to 16 tokens, and its warps different blocks of the inner dimension.
FIXMIN_KERNEL(few_w8a8, ProductArgs, few_threads) {
    FIXMIN_SHARED(shared);
    constexpr uint32_t warps = few_threads / 32, tiles = few_tokens(false) / tile_tokens;
    static_assert(warps * tiles * 16 * tile_tokens * sizeof(int) <= few_sums_bytes);
    const uint32_t n_blocks = args.inner / quant::block_size, pairs = (n_blocks + 1) / 2;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const ProductPart part = part_of(args, 16, block.x);
    const std::byte* const panel = part.panels + size_t(block.x) * args.panel_stride;

    int4 next[few_depth];
    const auto load = [&](uint32_t first) {
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) {
            const uint32_t b = first + u * warps + warp;
            if (b < n_blocks) next[u] = load_weights(reinterpret_cast<const int4*>(panel) + b * 32 + lane);
        }
    };
    load(0);
#pragma unroll 1
    for (size_t at = warps * few_depth * 512 + threadIdx.x * 128; at < args.panel_stride; at += few_threads * 128)
        prefetch_weights(panel + at);
    after_previous();

    const uint32_t first_token = block.y * few_tokens(false), first_tile = first_token / tile_tokens;
    const uint32_t n =
        args.n_tokens - first_token < few_tokens(false) ? args.n_tokens - first_token : few_tokens(false);
    const int2* const codes = reinterpret_cast<const int2*>(args.quantized.codes);
    int sums[tiles][4] = {};
    for (uint32_t first = 0; first < n_blocks; first += few_depth * warps) {
        int4 now[few_depth];
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) now[u] = next[u];
        load(first + few_depth * warps);
#pragma unroll
        for (uint32_t u = 0; u < few_depth; ++u) {
            const uint32_t b = first + u * warps + warp;
            if (b >= n_blocks) break;  // a whole warp
            for (uint32_t i = 0; i < tiles; ++i) {
                if (i * tile_tokens >= n) break;
                int2 a = make_int2(0, 0);
                if (i * tile_tokens + g < n)
                    a = codes[((size_t(first_tile + i) * pairs + b / 2) * 32 + lane) * 2 + b % 2];
                multiply_tile(sums[i], now[u], a);
            }
        }
    }
    int* const all = reinterpret_cast<int*>(shared);  // [warps][tiles][16 rows][8 tokens]
#pragma unroll
    for (uint32_t i = 0; i < tiles; ++i) {
        for (uint32_t k = 0; k < 4; ++k)
            all[((warp * tiles + i) * 16 + g + k / 2 * 8) * tile_tokens + 2 * t + k % 2] = sums[i][k];
    }
    __syncthreads();
    const uint32_t token = threadIdx.x / 16, r = threadIdx.x % 16, row = block.x * 16 + r;
    if (token >= n || row >= part.n_rows) return;
    const uint32_t tile = first_tile + token / tile_tokens;
    int sum = 0;
    for (uint32_t w = 0; w < warps; ++w)
        sum += all[((w * tiles + token / tile_tokens) * 16 + r) * tile_tokens + token % tile_tokens];
    const float weight_scale = reinterpret_cast<const float*>(panel + args.panel_stride)[int(r) - 16];
    const float token_scale = args.quantized.factors[(size_t(tile) * pairs * tile_tokens + token % tile_tokens) * 2];
    float value = scaled_sum(sum, weight_scale, token_scale, part.bias ? part.bias[row] : 0.0f);
    float* const out = part.out + size_t(first_token + token) * args.out_stride + row;
    if (args.accumulate) value = *out + value;
    *out = value;
}

// As product_of_many, with nothing but products in its loop.
template <uint32_t M, uint32_t N, uint32_t Stages>
FIXMIN_DEVICE void scaled_rows_of_many(const ProductArgs& args, Index block, unsigned char* shared) {
    constexpr uint32_t panels = 4 * M, tiles = 2 * N, pair_bytes = 2 * 512;
    struct alignas(16) Stage {
        std::byte codes[panels][pair_bytes];
        int4 tokens[tiles][32];  // both blocks of a pair
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
        return part.panels + size_t(first_panel + i < last_panel ? first_panel + i : last_panel) * args.panel_stride;
    };

    constexpr uint32_t code_pieces = panels * pair_bytes / 16 / many_threads, token_pieces = tiles * 32 / many_threads;
    static_assert(code_pieces * many_threads * 16 == panels * pair_bytes && token_pieces * many_threads == tiles * 32);
    const std::byte* next_codes[code_pieces];
    const int4* next_tokens[token_pieces];
#pragma unroll
    for (uint32_t i = 0; i < code_pieces; ++i) {
        const uint32_t piece = threadIdx.x + i * many_threads;
        next_codes[i] = panel(piece * 16 / pair_bytes) + piece * 16 % pair_bytes;
    }
#pragma unroll
    for (uint32_t i = 0; i < token_pieces; ++i) {
        const uint32_t piece = threadIdx.x + i * many_threads, n = first_tile + piece / 32;
        next_tokens[i] = reinterpret_cast<const int4*>(args.quantized.codes) +
                         size_t(n < last_tile ? n : last_tile) * pairs * 32 + piece % 32;
    }
    const auto copy_weights = [&](Stage& to) {
#pragma unroll
        for (uint32_t i = 0; i < code_pieces; ++i) {
            copy_async(to.codes[0] + (threadIdx.x + i * many_threads) * 16, next_codes[i]);
            next_codes[i] += pair_bytes;
        }
    };
    const auto copy_tokens = [&](Stage& to) {
#pragma unroll
        for (uint32_t i = 0; i < token_pieces; ++i) {
            copy_async(to.tokens[0] + threadIdx.x + i * many_threads, next_tokens[i]);
            next_tokens[i] += 32;
        }
    };
    constexpr uint32_t ahead = Stages - 1;
#pragma unroll 1
    for (uint32_t s = 0; s < ahead && s < pairs; ++s) copy_weights(stages[s]);
    after_previous();
#pragma unroll 1
    for (uint32_t s = 0; s < ahead; ++s) {
        if (s < pairs) copy_tokens(stages[s]);
        end_copies();
    }

    const uint32_t panel_of_warp = warp % 4, tile_of_warp = warp / 4;  // the first; others follow by 4 and 2
    int acc[M][N][4] = {};
    uint32_t now = 0, free = ahead;
#pragma unroll 1
    for (uint32_t pair = 0; pair < pairs; ++pair) {
        wait_for_copies<Stages - 2>();
        __syncthreads();
        if (pair + ahead < pairs) {
            copy_weights(stages[free]);
            copy_tokens(stages[free]);
        }
        end_copies();
        const Stage& stage = stages[now];
        int4 w[M][2];
#pragma unroll
        for (uint32_t m = 0; m < M; ++m) {
            for (uint32_t k = 0; k < 2; ++k)
                w[m][k] = reinterpret_cast<const int4*>(stage.codes[panel_of_warp + m * 4] + k * 512)[lane];
        }
#pragma unroll
        for (uint32_t n = 0; n < N; ++n) {
            const int4 a = stage.tokens[tile_of_warp + n * 2][lane];
            for (uint32_t m = 0; m < M; ++m) {
                multiply_tile(acc[m][n], w[m][0], make_int2(a.x, a.y));
                multiply_tile(acc[m][n], w[m][1], make_int2(a.z, a.w));
            }
        }
        now = now + 1 == Stages ? 0 : now + 1;
        free = free + 1 == Stages ? 0 : free + 1;
    }

    const uint32_t first_row = (first_panel + panel_of_warp) * 16 + g;
    const uint32_t rows_left = part.n_rows > first_row ? part.n_rows - first_row : 0;
    float weight_scale[2 * M], bias[2 * M] = {};
    const auto row_of = [](uint32_t i) { return i / 2 * 64 + i % 2 * 8; };
#pragma unroll
    for (uint32_t i = 0; i < 2 * M; ++i) {
        const std::byte* const end = panel(panel_of_warp + i / 2 * 4) + args.panel_stride;
        weight_scale[i] = reinterpret_cast<const float*>(end)[int(g + i % 2 * 8) - 16];
        if (part.bias && row_of(i) < rows_left) bias[i] = part.bias[first_row + row_of(i)];
    }
    const uint32_t own_tile = first_tile + tile_of_warp, first_token = own_tile * tile_tokens + 2 * t;
    const uint32_t tokens_left = args.n_tokens > first_token ? args.n_tokens - first_token : 0;
    const float* token_scale = args.quantized.factors + (size_t(own_tile) * pairs * tile_tokens + 2 * t) * 2;
    float* out = part.out + size_t(first_token) * args.out_stride + first_row;
#pragma unroll
    for (uint32_t n = 0; n < N; ++n) {
        for (uint32_t c = 0; c < 2; ++c) {
            const bool is_there = n * 2 * tile_tokens + c < tokens_left;
            const float scale = is_there ? token_scale[c * 2] : 0.0f;
            for (uint32_t i = 0; i < 2 * M; ++i) {
                const bool is_row = is_there && row_of(i) < rows_left;
                const float before = is_row && args.accumulate ? out[row_of(i)] : 0.0f;
                const float value = scaled_sum(acc[i / 2][n][i % 2 * 2 + c], weight_scale[i], scale, bias[i]);
                if (is_row) out[row_of(i)] = args.accumulate ? before + value : value;
            }
            out += size_t(args.out_stride) * (c ? 2 * tile_tokens - 1 : 1);
        }
        token_scale += size_t(pairs) * 2 * tile_tokens * 2;
    }
}

FIXMIN_KERNEL(many_w8a8, ProductArgs, many_threads) {
    FIXMIN_SHARED(shared);
    if (args.wide)
        scaled_rows_of_many<wide_rows / 64, wide_tokens / 16, 3>(args, block, shared);
    else
        scaled_rows_of_many<narrow_rows / 64, narrow_tokens / 16, 4>(args, block, shared);
}

}  // namespace fixmin::cuda
