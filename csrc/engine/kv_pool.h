// The memory of all keys and values: blocks that sequences and the prefix cache share.
#pragma once
#include <cstdint>
#include <vector>

#include "model/decoder.h"

namespace fixmin::engine {

/// A fixed number of blocks of kv_block_tokens positions, all layers in each. A block is free or has users, who are
/// counted. Not synchronised: used by one thread at a time.
class KvPool {
  public:
    /// Of keys and values of all layers.
    static size_t block_bytes(const model::Hyperparams& hp, kernels::KvType type);

    /// The memory is reserved; it becomes resident as blocks are written. Throws OutOfMemory.
    KvPool(const model::Hyperparams& hp, kernels::KvType type, uint32_t n_blocks);

    uint32_t n_blocks() const { return uint32_t(users_.size()); }
    uint32_t n_free() const { return uint32_t(free_.size()); }
    size_t block_bytes() const { return block_bytes_; }
    size_t reserved_bytes() const { return pages_.size(); }
    /// Bytes of all layers that a later token reads of one cached token.
    size_t bytes_per_position() const { return block_bytes_ / kernels::kv_block_tokens; }
    model::KvLayout layout() const { return layout_; }

    std::byte* data(uint32_t block) const { return pages_.data() + block * block_bytes_; }
    uint32_t users(uint32_t block) const { return users_[block]; }
    /// Blocks with several users.
    uint32_t n_shared() const { return n_shared_; }

    /// A free block, with one user; n_free() > 0. The block that was freed last comes first.
    uint32_t take();
    void add_user(uint32_t block) { n_shared_ += ++users_[block] == 2; }
    void remove_user(uint32_t block);

    /// All blocks are free, whoever used them.
    void clear();

  private:
    const model::KvLayout layout_;
    const size_t block_bytes_;
    const model::Pages pages_;
    std::vector<uint32_t> users_;  // [n_blocks]
    std::vector<uint32_t> free_;
    uint32_t n_shared_ = 0;
};

}  // namespace fixmin::engine
