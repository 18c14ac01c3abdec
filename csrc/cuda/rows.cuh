// Kernels on rows of activations: codes, norms, activations, 8 bits.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"

namespace fixmin::cuda {

FIXMIN_DEVICE uint32_t code_of(const CodeMapArgs& map, uint32_t id) {
    if (map.table) return map.table[id];
    uint32_t code = map.shift;
#pragma unroll 4
    for (uint32_t j = 0; j < map.width; ++j) code ^= (id >> j & 1u) ? map.columns[j] : 0u;
    return code;
}

FIXMIN_KERNEL(lift, LiftArgs, row_threads) {
    after_previous();
    const uint32_t token = block.x, code = code_of(args.map, args.ids[token]), width = args.map.width;
    const uint32_t repeats = args.length / width;
    float* x = args.x + size_t(token) * args.length;
    for (uint32_t n = threadIdx.x; n < args.length; n += blockDim.x) {
        const uint32_t bit = args.interleave ? n / repeats : n % width;
        x[n] = code >> bit & 1u ? args.v1 : args.v0;
    }
}

// The order of operations of FoldedProjection::scales and apply.
FIXMIN_KERNEL(fold, FoldArgs, row_threads) {
    after_previous();
    const uint32_t token = block.y, row = block.x * blockDim.x + threadIdx.x, width = args.map.width;
    const uint32_t code = code_of(args.map, args.ids[token]);
    uint32_t ones = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < width; ++j) {
        if (code >> j & 1u) ones += args.length / width + (j < args.length % width);
    }
    const double zeros = args.length - ones, n_ones = ones, length = args.length, v0 = args.v0, v1 = args.v1;
    double shift, mean_square;
    if (args.rms) {
        shift = v0;
        mean_square = (zeros * v0 * v0 + n_ones * v1 * v1) / length;
    } else {
        shift = -(v1 - v0) * (n_ones / length);
        mean_square = (v1 - v0) * (v1 - v0) * (n_ones * zeros) / (length * length);
    }
    const float rstd = float(mean_square == 0.0 ? 0.0 : 1.0 / __dsqrt_rn(mean_square + double(args.eps)));
    if (row >= args.n_rows) return;
    float y = float(shift) * args.sum[row];
#pragma unroll 4
    for (uint32_t j = 0; j < width; ++j) {
        if (code >> j & 1u) y += args.columns[size_t(j) * args.n_rows + row];
    }
    args.out[size_t(token) * args.n_rows + row] = __fmaf_rn(y, rstd, args.constant[row]);
}

/// Of a whole warp: lane i has value i of a block of 32.
FIXMIN_DEVICE void store_bytes(const QuantizedRows& rows, uint32_t token, uint32_t block, uint32_t n_blocks,
                               const Quantized& q) {
    const uint32_t i = threadIdx.x % 32, tile = token / tile_tokens, column = token % tile_tokens;
    const size_t at = size_t(tile) * ((n_blocks + 1) / 2) + block / 2;
    const uint32_t word = join_bytes(q.code);
    if (i % 4 == 0) rows.codes[((at * 32 + column * 4 + i / 4 % 4) * 2 + block % 2) * 2 + i / 16] = word;
    int half_sum = q.code;
    for (int by = 8; by; by /= 2) half_sum += __shfl_xor_sync(whole_warp, half_sum, by);
    const int first = __shfl_sync(whole_warp, half_sum, 0), second = __shfl_sync(whole_warp, half_sum, 16);
    if (i >= factor_planes) return;
    const float factor = i == 0   ? q.scale
                         : i == 1 ? q.scale * float(first + second)
                         : i == 2 ? float(first)
                                  : float(second);
    float* const to = rows.factors + i * rows.plane + (at * tile_tokens + column) * 2 + block % 2;
    *to = factor;
    if (block % 2 == 0 && block + 1 == n_blocks) to[1] = 0;
}
FIXMIN_DEVICE void store_quantized(const QuantizedRows& rows, uint32_t token, uint32_t block, uint32_t n_blocks,
                                   float value) {
    store_bytes(rows, token, block, n_blocks, quantize(value));
}

/// Of a block of threads: a row in 8 bits with one scale, as kernels.inl's quantize_row. shared: [row_scale_floats].
FIXMIN_DEVICE void quantize_row(const float* x, uint32_t n, const QuantizedRows& to, uint32_t token, float* shared) {
    constexpr uint32_t warps = row_threads / 32;
    static_assert(2 * warps <= row_scale_floats);
    float* const tops = shared;             // [warps]
    float* const poisons = shared + warps;  // 0, or NaN
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32;
    float top = 0, poison = 0;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
        top = lane::max({lane::abs({x[i]}).v}, {top}).v;
        poison += x[i] - x[i];
    }
    top = max_of_warp(top);
    for (int by = 16; by; by /= 2) poison += __shfl_xor_sync(whole_warp, poison, by);
    if (lane == 0) tops[warp] = top, poisons[warp] = poison;
    __syncthreads();
    for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
        top = tops[w] > top ? tops[w] : top;
        poison += poisons[w];
    }
    const bool empty = poison != poison || top < 1e-30f;
    const float inverse = empty ? 0.0f : 127.0f / top, scale = empty ? poison : top / 127.0f;
    for (uint32_t first = warp * 32; first < n; first += blockDim.x)
        store_bytes(to, token, first / 32, n / 32, {empty ? 0 : __float2int_rn(x[first + lane] * inverse), scale});
}

FIXMIN_KERNEL(norm_rows, NormArgs, row_threads) {
    after_previous();
    FIXMIN_SHARED(shared);
    float* const row = reinterpret_cast<float*>(shared);  // [length]
    float* const stats = row + args.length;               // mean, reciprocal deviation; then of quantize_row
    const uint32_t token = block.x, n = args.length;
    const float* x = args.x + size_t(args.rows ? args.rows[token] : token) * n;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) row[i] = x[i];
    __syncthreads();
    if (warp_of_block() == 0) {
        float mean = 0, squares;
        if (args.rms) {
            squares = sum_of(row, n, [](float sum, float v) { return lane::add_square({sum}, {v}).v; });
        } else {
            mean = sum_of(row, n, [](float sum, float v) { return sum + v; }) / float(n);
            squares = sum_of(row, n, [=](float sum, float v) { return lane::add_square_from({sum}, {v}, {mean}).v; });
        }
        if (threadIdx.x == 0) {
            stats[0] = mean;
            stats[1] = lane::reciprocal_deviation(squares, n, args.eps);
        }
    }
    __syncthreads();
    const float mean = stats[0], rstd = stats[1];
    for (uint32_t first = warp_of_block() * 32; first < n; first += blockDim.x) {  // whole warps
        const uint32_t i = first + threadIdx.x % 32;
        float y = 0;
        if (i < n) {
            y = args.bias ? lane::normalized({row[i]}, {mean}, {rstd}, {args.weight[i]}, {args.bias[i]}).v
                          : lane::normalized({row[i]}, {mean}, {rstd}, {args.weight[i]}).v;
            args.out[size_t(token) * n + i] = row[i] = y;
        }
        if (args.quantized.codes && !args.scales_rows) store_quantized(args.quantized, token, first / 32, n / 32, y);
    }
    if (!args.quantized.codes || !args.scales_rows) return;
    __syncthreads();  // all have read stats
    quantize_row(row, n, args.quantized, token, stats);
}

FIXMIN_DEVICE float activated(ActivateArgs::Function function, float x, float gate) {
    switch (function) {
        case ActivateArgs::Function::none: return x;
        case ActivateArgs::Function::gelu: return lane::gelu({x}).v;
        case ActivateArgs::Function::gelu_tanh: return lane::gelu_by_tanh({x}).v;
        case ActivateArgs::Function::swiglu: return lane::silu({gate}).v * x;
    }
    return x;
}

// A warp has a block of 32 values of a token.
FIXMIN_KERNEL(activate, ActivateArgs, row_threads) {
    after_previous();
    const uint32_t token = block.y * tile_tokens + warp_of_block(), i = block.x * 32 + threadIdx.x % 32;
    if (token >= args.n_tokens) return;  // a whole warp
    float y = 0;
    if (i < args.length) {
        const size_t at = size_t(token) * args.length + i;
        y = activated(args.function, args.values[at], args.gate ? args.gate[at] : 0.0f);
        if (args.function != ActivateArgs::Function::none) args.values[at] = y;
    }
    if (args.quantized.codes) store_quantized(args.quantized, token, block.x, args.length / 32, y);
}

}  // namespace fixmin::cuda
