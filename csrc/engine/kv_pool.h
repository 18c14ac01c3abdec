// Which blocks of keys and values are in use.
#pragma once
#include <cstdint>
#include <vector>

namespace fixmin::engine {

/// Counts the blocks that a device has memory for, and owns none of it. A block is free or has users: sequences and the
/// prefix cache, which share it. Not synchronised: used by one thread at a time.
class KvPool {
  public:
    explicit KvPool(uint32_t n_blocks) : users_(n_blocks) { clear(); }

    uint32_t n_blocks() const { return uint32_t(users_.size()); }
    uint32_t n_free() const { return uint32_t(free_.size()); }
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
    std::vector<uint32_t> users_;  // [n_blocks]
    std::vector<uint32_t> free_;
    uint32_t n_shared_ = 0;
};

}  // namespace fixmin::engine
