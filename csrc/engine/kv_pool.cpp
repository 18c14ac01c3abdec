#include "engine/kv_pool.h"

namespace fixmin::engine {

size_t KvPool::block_bytes(const model::Hyperparams& hp, kernels::KvType type) {
    return size_t(hp.block_count) * hp.head_count_kv * kernels::kv_head_bytes(type, hp.head_dim);
}

KvPool::KvPool(const model::Hyperparams& hp, kernels::KvType type, uint32_t n_blocks)
    : layout_{type, hp.head_count_kv * kernels::kv_head_bytes(type, hp.head_dim)},
      block_bytes_(block_bytes(hp, type)),
      pages_(n_blocks * block_bytes_, "the KV cache (n_kv, n_ctx and kv_type make it smaller)"),
      users_(n_blocks) {
    clear();
}

void KvPool::clear() {
    users_.assign(users_.size(), 0);
    free_.clear();
    n_shared_ = 0;
    for (uint32_t block = n_blocks(); block-- > 0;) free_.push_back(block);
}

uint32_t KvPool::take() {
    const uint32_t block = free_.back();
    free_.pop_back();
    users_[block] = 1;
    return block;
}

void KvPool::remove_user(uint32_t block) {
    const uint32_t left = --users_[block];
    n_shared_ -= left == 1;
    if (left == 0) free_.push_back(block);
}

}  // namespace fixmin::engine
