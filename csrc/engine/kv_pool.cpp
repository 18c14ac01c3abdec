#include "engine/kv_pool.h"

namespace fixmin::engine {

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
