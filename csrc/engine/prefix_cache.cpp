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
    match.blocks.reserve(ids.size() / kv_block_tokens);
    Tokens tokens;
    tokens.reserve(kv_block_tokens);
    // From here on nothing is allocated: every user that is added is one of the match's.
    Node* node = &root_;
    while (ids.size() >= kv_block_tokens) {
        tokens.assign(ids.begin(), ids.begin() + kv_block_tokens);
        const auto next = node->children.find(tokens);
        if (next == node->children.end()) break;
        node = next->second.get();
        pool_.add_user(node->block);
        match.blocks.push_back(node->block);
        ids = ids.subspan(kv_block_tokens);
    }
    // Of the children that begin like the rest, neighbours of its place in the order have the longest common part.
    if (!ids.empty() && !node->children.empty()) {
        tokens.assign(ids.begin(), ids.begin() + std::min<size_t>(ids.size(), kv_block_tokens));
        const auto next = node->children.lower_bound(tokens);
        Node* best = nullptr;
        const auto consider = [&](Node& candidate) {
            const uint32_t n = common_length(tokens, *candidate.tokens);
            if (n <= match.n_more) return;
            best = &candidate;
            match.n_more = n;
            match.more = candidate.block;
        };
        if (next != node->children.end()) consider(*next->second);
        if (next != node->children.begin()) consider(*std::prev(next)->second);
        if (best) {
            pool_.add_user(match.more);
            node = best;
        }
    }
    touch_path(node);
    return match;
}

void PrefixCache::insert(std::span<const uint32_t> ids, std::span<const uint32_t> blocks) noexcept try {
    Node* node = &root_;
    for (const uint32_t block : blocks) {
        if (ids.empty()) break;
        Tokens tokens(ids.begin(), ids.begin() + std::min<size_t>(ids.size(), kv_block_tokens));
        ids = ids.subspan(tokens.size());
        const auto next = node->children.lower_bound(tokens);
        if (next != node->children.end() && common_length(tokens, next->first) == tokens.size()) {
            // The same tokens, or a node that begins with these, the last of a sequence.
            node = next->second.get();
        } else {
            Node* shorter = nullptr;  // the same sequence when it was shorter
            if (next != node->children.begin()) {
                Node& before = *std::prev(next)->second;
                if (common_length(tokens, *before.tokens) == before.tokens->size()) shorter = &before;
            }
            Node& longer = add_child(*node, std::move(tokens), block);
            if (shorter) remove(*shorter);
            node = &longer;
        }
    }
    touch_path(node);
} catch (const std::bad_alloc&) {
}

PrefixCache::Node& PrefixCache::add_child(Node& parent, Tokens tokens, uint32_t block) {
    auto made = std::make_unique<Node>();
    Node& node = *made;
    node.parent = &parent;
    node.block = block;
    const auto place = order_.insert(parent.parent ? parent.place : order_.end(), &node);
    node.place = place;
    try {
        node.tokens = &parent.children.try_emplace(std::move(tokens), std::move(made)).first->first;
    } catch (...) {
        order_.erase(place);
        throw;
    }
    pool_.add_user(block);
    ++n_nodes_;
    return node;
}

// Parents after their children: in this order a node stands before the one above it.
void PrefixCache::touch_path(Node* node) {
    for (; node->parent; node = node->parent) order_.splice(order_.end(), order_, node->place);
}

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
    auto& siblings = node.parent->children;
    siblings.erase(siblings.find(*node.tokens));
}

}  // namespace fixmin::engine
