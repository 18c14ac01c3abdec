#include "engine/kv_cache.h"

namespace fixmin::engine {

KvCache::KvCache(const model::Hyperparams& hp, kernels::KvType type, uint32_t n_ctx) : type_(type) {
    const size_t n_blocks = (n_ctx + kernels::kv_block_tokens - 1) / kernels::kv_block_tokens;
    const size_t block_bytes = hp.head_count_kv * kernels::kv_head_bytes(type, hp.head_dim);
    bytes_per_position_ = hp.block_count * block_bytes / kernels::kv_block_tokens;
    pages_ = model::Pages(hp.block_count * n_blocks * block_bytes);
    for (size_t i = 0; i < hp.block_count * n_blocks; ++i) blocks_.push_back(pages_.data() + i * block_bytes);
    for (size_t l = 0; l < hp.block_count; ++l) layers_.push_back(blocks_.data() + l * n_blocks);
}

}  // namespace fixmin::engine
