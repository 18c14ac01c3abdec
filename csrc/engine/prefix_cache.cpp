#include "engine/prefix_cache.h"

#include <algorithm>

#include "quant/kv_format.h"

namespace fixmin::engine {

using quant::kv_block_tokens;

namespace {

uint32_t common_length(std::span<const uint32_t> a, std::span<const uint32_t> b) {
    return uint32_t(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace

PrefixCache::Match PrefixCache::find(std::span<const uint32_t> ids) {
    Match match;
    Node* node = &root_;
    std::vector<Node*> path;
    while (ids.size() >= kv_block_tokens) {
        const auto child = node->children.find(Tokens(ids.begin(), ids.begin() + kv_block_tokens));
        if (child == node->children.end()) break;
        node = child->second.get();
        path.push_back(node);
        pool_.add_user(node->block);
        match.blocks.push_back(node->block);
        ids = ids.subspan(kv_block_tokens);
    }
    // Of the children that begin like the rest, neighbours of its place in the order have the longest common part.
    if (!ids.empty() && !node->children.empty()) {
        const Tokens rest(ids.begin(), ids.begin() + std::min<size_t>(ids.size(), kv_block_tokens));
        auto child = node->children.lower_bound(rest);
        Node* best = nullptr;
        const auto consider = [&](Node* candidate) {
            const uint32_t n = common_length(rest, candidate->tokens);
            if (n <= match.n_more) return;
            best = candidate;
            match.n_more = n;
            match.more = candidate->block;
        };
        if (child != node->children.end()) consider(child->second.get());
        if (child != node->children.begin()) consider(std::prev(child)->second.get());
        if (best) {
            pool_.add_user(match.more);
            path.push_back(best);
        }
    }
    for (size_t i = path.size(); i-- > 0;) touch(*path[i]);
    return match;
}

void PrefixCache::insert(std::span<const uint32_t> ids, std::span<const uint32_t> blocks) {
    Node* node = &root_;
    std::vector<Node*> path;
    for (const uint32_t block : blocks) {
        if (ids.empty()) break;
        Tokens tokens(ids.begin(), ids.begin() + std::min<size_t>(ids.size(), kv_block_tokens));
        ids = ids.subspan(tokens.size());
        const auto next = node->children.lower_bound(tokens);
        if (next != node->children.end() && common_length(tokens, next->first) == tokens.size()) {
            // The same tokens, or a node that begins with these, the last of a sequence.
            node = next->second.get();
            path.push_back(node);
            continue;
        }
        if (next != node->children.begin()) {  // the same sequence when it was shorter
            Node& shorter = *std::prev(next)->second;
            if (common_length(tokens, shorter.tokens) == shorter.tokens.size()) remove(shorter);
        }
        auto& child = node->children[tokens];
        child = std::make_unique<Node>();
        child->parent = node;
        child->tokens = std::move(tokens);
        child->block = block;
        child->place = order_.insert(order_.end(), child.get());
        pool_.add_user(block);
        ++n_nodes_;
        node = child.get();
        path.push_back(node);
    }
    for (size_t i = path.size(); i-- > 0;) touch(*path[i]);
}

// Parents are touched after their children: in this order a node stands before the one above it.
void PrefixCache::touch(Node& node) { order_.splice(order_.end(), order_, node.place); }

bool PrefixCache::evict(uint32_t n_free) {
    for (auto it = order_.begin(); it != order_.end() && pool_.n_free() < n_free;) {
        Node& node = **it++;
        if (pool_.users(node.block) == 1 && node.children.empty()) remove(node);
    }
    return pool_.n_free() >= n_free;
}

void PrefixCache::clear() {
    for (auto it = order_.begin(); it != order_.end();) remove(**it++);
}

void PrefixCache::remove(Node& node) {
    pool_.remove_user(node.block);
    order_.erase(node.place);
    --n_nodes_;
    node.parent->children.erase(Tokens(node.tokens));
}

}  // namespace fixmin::engine
