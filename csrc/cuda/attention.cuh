// Keys, values and attention. The cache lies as on the CPU (kernels/attention.inl), so that a block that one device has
// written can be read by another.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"

namespace fixmin::cuda {

using quant::block_size;
using quant::kv_block_tokens;

FIXMIN_DEVICE float bf16_to_float(uint16_t x) { return __int_as_float(int(unsigned(x) << 16)); }

/// Nearest, ties to even; a NaN stays one.
FIXMIN_DEVICE uint16_t float_to_bf16(float x) {
    const unsigned bits = unsigned(__float_as_int(x));
    return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

/// One key/value head of a token's block.
struct Head {
    std::byte* memory;
    uint32_t dim, padded, scales;  // padded: to 16

    FIXMIN_DEVICE Head(const CacheArgs& cache, const uint32_t* blocks, uint32_t position, uint32_t head, uint32_t dim)
        : memory(cache.memory + blocks[position / kv_block_tokens] * cache.block_bytes + head * cache.head_bytes),
          dim(dim),
          padded((dim + 15) / 16 * 16),
          scales((dim + 31) / 32) {}

    // Elements of the float types; n is a position in the block.
    FIXMIN_DEVICE uint32_t key(uint32_t n, uint32_t d) const { return n / 16 * 16 * dim + d * 16 + n % 16; }
    FIXMIN_DEVICE uint32_t value(uint32_t n, uint32_t d) const { return kv_block_tokens * dim + n * padded + d; }

    // Of q8_0: bytes of codes, elements of scales.
    FIXMIN_DEVICE uint32_t key_code(uint32_t n, uint32_t d) const {
        return n / 16 * 16 * padded + d / 4 * 64 + n % 16 * 4 + d % 4;
    }
    FIXMIN_DEVICE uint16_t* key_scale(uint32_t n, uint32_t b) const {
        return reinterpret_cast<uint16_t*>(memory + kv_block_tokens * padded) + n / 16 * 16 * scales + b * 16 + n % 16;
    }
    FIXMIN_DEVICE std::byte* values() const { return memory + kv_block_tokens * (padded + 2 * scales); }
    FIXMIN_DEVICE uint16_t* value_scale(uint32_t n, uint32_t b) const {
        return reinterpret_cast<uint16_t*>(values() + kv_block_tokens * padded) + b * kv_block_tokens + n;
    }
};

// 32 values, one in each lane of a warp, in 8 bits with a scale of bfloat16; the scale is NaN if one is not finite.
struct QuantizedKv {
    int code;
    uint16_t scale;
};
FIXMIN_DEVICE QuantizedKv quantize_kv(float x) {
    const float amax = max_of_warp(lane::abs({x}).v);
    float poison = x - x;  // 0, or NaN
    for (int by = 16; by; by /= 2) poison += __shfl_xor_sync(whole_warp, poison, by);
    const bool empty = amax < 1e-30f;
    const uint16_t scale = float_to_bf16(empty ? poison : amax / 127.0f + poison);
    return {__float2int_rn(x * (empty ? 0.0f : 1.0f / bf16_to_float(scale))), scale};
}

// Of a whole warp: writes the key or the value of one token.
FIXMIN_DEVICE void store_row(const Head& head, KvType type, uint32_t n, bool is_value, const float* x) {
    const uint32_t i = threadIdx.x % 32;
    for (uint32_t first = 0; first < head.padded; first += 32) {
        const uint32_t d = first + i;
        const float v = d < head.dim ? x[d] : 0.0f;
        const bool stored = d < (is_value || type == KvType::q8_0 ? head.padded : head.dim);
        if (type == KvType::q8_0) {
            const QuantizedKv q = quantize_kv(v);
            if (stored) {
                if (is_value)
                    reinterpret_cast<int8_t*>(head.values())[n * head.padded + d] = int8_t(q.code);
                else
                    reinterpret_cast<uint8_t*>(head.memory)[head.key_code(n, d)] = uint8_t(q.code + 128);
            }
            if (i == 0) *(is_value ? head.value_scale(n, first / 32) : head.key_scale(n, first / 32)) = q.scale;
        } else if (stored) {
            const uint32_t at = is_value ? head.value(n, d) : head.key(n, d);
            if (type == KvType::f32)
                reinterpret_cast<float*>(head.memory)[at] = v;
            else
                reinterpret_cast<uint16_t*>(head.memory)[at] = float_to_half(v);
        }
    }
}

FIXMIN_DEVICE void rotate(float* x, uint32_t dim, RopeStyle style, const float* cos, const float* sin) {
    const uint32_t pairs = dim / 2;
    for (uint32_t i = threadIdx.x % 32; i < pairs; i += 32) {
        float& first = x[style == RopeStyle::half ? i : 2 * i];
        float& second = x[style == RopeStyle::half ? i + pairs : 2 * i + 1];
        const lane::Pair turned = lane::rotated({{first}, {second}}, {cos[i]}, {sin[i]});
        first = turned.first.v;
        second = turned.second.v;
    }
}

FIXMIN_KERNEL(rotate_and_store, RotateArgs, 32) {
    after_previous();
    const uint32_t token = block.y, d = args.head_dim, heads = args.head_count, kv_heads = args.head_count_kv;
    const uint32_t position = args.place.positions[token];
    float* row = args.qkv + size_t(token) * (heads + 2 * kv_heads) * d;
    const size_t turn = size_t(position) * (args.rope_dim / 2);
    float* x = row + size_t(block.x) * d;  // the query heads, then the key heads
    rotate(x, args.rope_dim, args.style, args.cos + turn, args.sin + turn);
    __syncwarp();
    if (block.x < heads) {
        for (uint32_t i = threadIdx.x; i < d; i += 32) x[i] *= args.attention_scale;
        return;
    }
    const uint32_t kv_head = block.x - heads;
    const Head head(args.cache, args.place.blocks + args.place.tables[token], position, kv_head, d);
    store_row(head, args.cache.type, position % kv_block_tokens, false, x);
    store_row(head, args.cache.type, position % kv_block_tokens, true, x + size_t(kv_heads) * d);
}

FIXMIN_DEVICE float score(const Head& head, KvType type, uint32_t n, const float* q, const int8_t* q_codes,
                          const float* q_scales) {
    float acc = 0;
    if (type == KvType::q8_0) {
        for (uint32_t b = 0; b < head.scales; ++b) {
            int dot = 0;
            for (uint32_t d = b * 32; d < (b + 1) * 32 && d < head.padded; ++d) {
                const int key = int(reinterpret_cast<const uint8_t*>(head.memory)[head.key_code(n, d)]) - 128;
                dot += key * int(q_codes[d]);
            }
            acc = __fmaf_rn(float(dot), bf16_to_float(*head.key_scale(n, b)) * q_scales[b], acc);
        }
        return acc;
    }
    for (uint32_t d = 0; d < head.dim; ++d) {
        const uint32_t at = head.key(n, d);
        const float key = type == KvType::f32 ? reinterpret_cast<const float*>(head.memory)[at]
                                              : half_to_float(reinterpret_cast<const uint16_t*>(head.memory)[at]);
        acc = __fmaf_rn(q[d], key, acc);
    }
    return acc;
}

FIXMIN_DEVICE float weighted(const Head& head, KvType type, uint32_t n, uint32_t d, float weight, float acc) {
    if (type == KvType::q8_0) {
        const int code = reinterpret_cast<const int8_t*>(head.values())[n * head.padded + d];
        return __fmaf_rn(weight * bf16_to_float(*head.value_scale(n, d / 32)), float(code), acc);
    }
    const uint32_t at = head.value(n, d);
    const float value = type == KvType::f32 ? reinterpret_cast<const float*>(head.memory)[at]
                                            : half_to_float(reinterpret_cast<const uint16_t*>(head.memory)[at]);
    return __fmaf_rn(weight, value, acc);
}

// Scores of all keys; their maximum; exp and sum; even and odd values in chains of their own (docs/numerics.md).
FIXMIN_KERNEL(attention, AttentionArgs, attention_threads) {
    after_previous();
    FIXMIN_SHARED(shared);
    const uint32_t token = block.y, h = block.x, d = args.head_dim, tid = threadIdx.x;
    const uint32_t position = args.place.positions[token], n_keys = position + 1;
    const uint32_t* blocks = args.place.blocks + args.place.tables[token];
    const uint32_t kv_head = h / (args.head_count / args.head_count_kv), padded = (d + 31) / 32 * 32;
    const float* q = args.qkv + (size_t(token) * (args.head_count + 2 * args.head_count_kv) + h) * d;
    const KvType type = args.cache.type;
    float* const stats = reinterpret_cast<float*>(shared);  // [8]
    float* const q_scales = stats + 8;                      // [padded / 32]
    float* const spare = q_scales + padded / 32;            // [padded / 32]
    int8_t* const q_codes = reinterpret_cast<int8_t*>(spare + padded / 32);
    float* const scores = n_keys <= args.shared_keys
                              ? reinterpret_cast<float*>(shared + attention_bytes(d))
                              : args.scores + (size_t(token) * args.head_count + h) * args.scores_stride;
    if (type == KvType::q8_0) {
        for (uint32_t first = tid / 32 * 32; first < padded; first += attention_threads) {
            const uint32_t i = first + tid % 32;
            const Quantized one = quantize(i < d ? q[i] : 0.0f);
            q_codes[i] = int8_t(one.code);
            if (tid % 32 == 0) q_scales[first / 32] = one.scale;
        }
        __syncthreads();
    }
    float highest = -3.402823466e+38f;
    for (uint32_t k = tid; k < n_keys; k += attention_threads) {
        const Head head(args.cache, blocks, k, kv_head, d);
        scores[k] = score(head, type, k % kv_block_tokens, q, q_codes, q_scales);
        highest = scores[k] > highest ? scores[k] : highest;
    }
    highest = max_of_warp(highest);
    if (tid % 32 == 0) stats[tid / 32] = highest;
    __syncthreads();
    for (uint32_t w = 0; w < attention_threads / 32; ++w) highest = stats[w] > highest ? stats[w] : highest;
    for (uint32_t k = tid; k < n_keys; k += attention_threads) scores[k] = lane::exp({scores[k] - highest}).v;
    __syncthreads();
    if (tid < 32) {
        const float sum = sum_of(scores, n_keys, [](float acc, float v) { return acc + v; });
        if (tid == 0) stats[4] = 1.0f / sum;
    }
    __syncthreads();
    float* out = args.out + (size_t(token) * args.head_count + h) * d;
    for (uint32_t i = tid / 2; i < (d + 15) / 16 * 16; i += attention_threads / 2) {
        float acc = 0;
        if (i < d) {
            for (uint32_t k = tid % 2; k < n_keys; k += 2)
                acc = weighted(Head(args.cache, blocks, k, kv_head, d), type, k % kv_block_tokens, i, scores[k], acc);
        }
        const float other = __shfl_xor_sync(whole_warp, acc, 1);
        if (tid % 2 == 0 && i < d) out[i] = (acc + other) * stats[4];
    }
}

}  // namespace fixmin::cuda
