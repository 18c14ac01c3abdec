// Keys and values of earlier requests, found again by their tokens.
#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine/kv_pool.h"

namespace fixmin::engine {

/// A tree of blocks: a node holds the keys and values of kv_block_tokens tokens (the last of a sequence: of fewer) that
/// follow those of the nodes above it. Whole nodes are shared with sequences; a part of a node is copied into a block
/// of the sequence's own. Keys and values depend on nothing but the tokens up to theirs, so that a result does not
/// change. The tree is a user of its blocks; those that nobody else uses can be taken away, the least recently used
/// first.
class PrefixCache {
  public:
    explicit PrefixCache(KvPool& pool) : pool_(pool) {}
    ~PrefixCache() { clear(); }

    struct Match {
        std::vector<uint32_t> blocks;  // whole ones
        uint32_t n_more = 0;           // tokens that follow them, at the start of the block `more`
        uint32_t more = 0;
    };
    /// The longest part of `ids` from their start that is here. The caller has become a user of all blocks returned, or
    /// of none if there is no memory for the answer: std::bad_alloc.
    Match find(std::span<const uint32_t> ids);

    /// Keeps the blocks of a sequence whose keys and values of `ids` have been computed. What is known already is not
    /// taken twice. Without memory for the nodes fewer are kept: nobody depends on it.
    void insert(std::span<const uint32_t> ids, std::span<const uint32_t> blocks) noexcept;

    /// Frees blocks until the pool has n_free free ones. False if nothing is left that can be freed before.
    bool evict(uint32_t n_free);

    uint32_t n_blocks() const { return n_nodes_; }
    void clear();

  private:
    using Tokens = std::vector<uint32_t>;
    struct Node {
        Node* parent = nullptr;
        const Tokens* tokens = nullptr;  // its key: kv_block_tokens of them, or fewer: then it has no children
        uint32_t block = 0;
        std::map<Tokens, std::unique_ptr<Node>> children;
        std::list<Node*>::iterator place;  // in order_
    };

    void touch_path(Node* node);
    Node& add_child(Node& parent, Tokens tokens, uint32_t block);
    void remove(Node& node);

    KvPool& pool_;
    Node root_;
    uint32_t n_nodes_ = 0;
    std::list<Node*> order_;  // least recently used first; a node before its parent
};

}  // namespace fixmin::engine
