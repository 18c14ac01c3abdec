// The number formats of cached keys and values.
//
// Functions in this header are static: kernel translation units include it (tests/kernels/test_isolation.py).
#pragma once
#include <cstddef>
#include <cstdint>

#include "quant/panels.h"

namespace fixmin::quant {

enum class KvType : uint8_t { f32, f16, q8_0 };

inline constexpr KvType all_kv_types[] = {KvType::f32, KvType::f16, KvType::q8_0};

static constexpr const char* name(KvType type) {
    switch (type) {
        case KvType::f32: return "f32";
        case KvType::f16: return "f16";
        case KvType::q8_0: return "q8_0";
    }
    return "?";
}

inline constexpr uint32_t kv_block_tokens = 32;  // positions of a block of the cache, a multiple of 16

/// Length of a value in the cache: head_dim rounded up to 16.
static constexpr uint32_t kv_value_dim(uint32_t head_dim) { return (head_dim + 15) / 16 * 16; }

/// Scales of a key or a value in 8 bits: one for 32 values.
static constexpr uint32_t kv_scales(uint32_t head_dim) { return (head_dim + block_size - 1) / block_size; }

/// Keys and values of one head in one block, laid out as kernels/attention.inl says.
static constexpr size_t kv_head_bytes(KvType type, uint32_t head_dim) {
    const size_t padded = kv_value_dim(head_dim);
    switch (type) {
        case KvType::f32: return kv_block_tokens * (head_dim + padded) * 4;
        case KvType::f16: return kv_block_tokens * (head_dim + padded) * 2;
        case KvType::q8_0: return kv_block_tokens * 2 * (padded + 2 * kv_scales(head_dim));
    }
    return 0;
}

}  // namespace fixmin::quant
