// What a pass over a text can leave behind for a quantiser: an importance matrix.
#pragma once
#include <cstdint>
#include <vector>

#include "model/hyperparams.h"

namespace fixmin::model {

/// Sums over tokens of the squared inputs of every matrix product, per input channel. Each sum is one chain over the
/// tokens in their order.
struct InputSquares {
    struct Block {
        std::vector<double> qkv;          // [D] of q, k and v; stays empty in a folded layer 0, which has no product
        std::vector<double> attn_output;  // [q_length]
        std::vector<double> gate_up;      // [D] of gate and up
        std::vector<double> down;         // [F]
    };
    std::vector<Block> blocks;
    std::vector<double> output;  // [D]
    uint64_t block_tokens = 0;   // tokens in the sums of the blocks
    uint64_t output_tokens = 0;

    explicit InputSquares(const Hyperparams& hp) : blocks(hp.block_count), output(hp.embedding_length) {
        for (Block& block : blocks) {
            if (&block != &blocks.front() || !hp.folds_layer_0()) block.qkv.resize(hp.embedding_length);
            block.attn_output.resize(hp.q_length());
            block.gate_up.resize(hp.embedding_length);
            block.down.resize(hp.feed_forward_length);
        }
    }
};

/// Adds the squares of the channels begin..end of rows [T][sums.size()].
inline void add_squares(std::vector<double>& sums, const float* rows, uint32_t n_tokens, uint32_t begin, uint32_t end) {
    for (uint32_t t = 0; t < n_tokens; ++t) {
        const float* row = rows + t * sums.size();
        for (uint32_t i = begin; i < end; ++i) sums[i] += double(row[i]) * double(row[i]);
    }
}

}  // namespace fixmin::model
