// The forward pass.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/kernels.h"
#include "model/buffer.h"
#include "model/team.h"
#include "model/weights.h"

namespace fixmin::model {

/// Keys and values in the blocks of a cache: [layer][key/value head], a head as kernels::KvHead says.
struct KvLayout {
    kernels::KvType type;
    size_t layer_bytes;
};

/// Sums over tokens of the squared inputs of every matrix product, per input channel: an importance matrix.
/// Each sum is one chain over the tokens in their order, whatever the number of threads.
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

    explicit InputSquares(const Hyperparams& hp);
};

/// Consecutive tokens of one sequence: some rows of a batch.
struct Chunk {
    uint32_t first_row;
    uint32_t n_tokens;
    uint32_t position;          // of the first token in its sequence; earlier positions are in the cache
    std::byte* const* blocks;   // of its sequence, one per kv_block_tokens positions, the chunk's own included
    uint32_t hidden_layer = 0;  // with hidden: 0 the lifted codes, l the output of block l
    float* hidden = nullptr;    // [n_tokens][D], or null
};

/// Tokens of any number of sequences that go through the layers together. No result depends on what else is in it.
struct Batch {
    std::span<const uint32_t> ids;  // [T], T <= max_tokens, each < V
    std::span<const Chunk> chunks;  // of different sequences; their rows follow each other
    KvLayout kv{};
    const std::function<bool()>* should_stop = nullptr;  // asked between layers by thread 0; must not throw
    InputSquares* squares = nullptr;                     // added to, or null
};

class Decoder {
  public:
    /// @param max_tokens  largest batch
    /// @param n_ctx       largest number of positions of a sequence
    /// @param n_threads   size of the teams that will call
    Decoder(const Weights& weights, const kernels::Kernels& kernels, uint32_t max_tokens, uint32_t n_ctx,
            uint32_t n_threads);

    /// Called by one thread before forward: makes the rotation tables for positions below `end`.
    void prepare_positions(uint32_t end);

    /// Runs the batch through all blocks. Every thread of the team calls it.
    /// Returns false if should_stop said so; the cache then holds part of its keys and values.
    bool forward(const Batch& batch, Team& team);

    /// Final norm and output projection of some rows of the last batch: logits [rows][V] float32.
    void project(std::span<const uint32_t> rows, float* logits, Team& team, InputSquares* squares = nullptr);

    /// Memory of the activations and of the rotation tables made so far.
    size_t buffer_bytes() const;

  private:
    // What a matrix product reads: rows as float32, in 8 bits, or both.
    struct Rows {
        const float* values;                        // [T][length]
        const kernels::ActivationBlock* quantized;  // [T][length/32]
        uint32_t length;
    };

    // Some rows of a product for some tokens.
    struct Part {
        uint32_t first_row, end_row;  // first_row is a multiple of panel_rows
        uint32_t first_token, n_tokens;
        bool same_tokens;  // as in the part that this thread computed before, for the same `Rows`
    };

    // Buffers that one thread uses alone.
    struct Private {
        Buffer<float> row;                        // [max(D, F)]
        Buffer<kernels::ActivationBlock> blocks;  // the same in 8 bits
        Buffer<std::byte> scratch;                // of kernels
    };

    Rows normalized(const Norm& norm, uint32_t n_tokens, bool quantize, Team& team, const uint32_t* rows = nullptr);
    Rows as_rows(const float* values, uint32_t length, uint32_t n_tokens, bool quantize, Team& team);
    void multiply(const Linear& w, const Rows& rows, uint32_t n_tokens, float* out, size_t out_stride, bool accumulate,
                  Team& team);
    void multiply_part(const Linear& w, const Rows& rows, const Part& part, float* out, size_t out_stride,
                       bool accumulate, Team& team);
    const std::byte* next_read(const Linear& w, const Part& part, const Team& team) const;
    template <typename Body>
    void for_parts(const Linear& w, uint32_t n_tokens, Team& team, Body body);
    void normalize_row(const Norm& norm, const float* x, float* y) const;
    void lift(const Batch& batch, Team& team);
    void project_qkv(uint32_t layer, const Batch& batch, Team& team);
    void attend(uint32_t layer, const Batch& batch, Team& team);
    void store_kv(uint32_t layer, const Batch& batch, const Chunk& chunk, uint32_t kv_head);
    void attend_head(uint32_t layer, const Batch& batch, const Chunk& chunk, uint32_t head, const Team& team);
    void rotate(float* head, uint32_t position) const;
    kernels::KvHead kv_head_of(uint32_t layer, const Batch& batch, const Chunk& chunk, uint32_t kv_head) const;
    void prefetch_kv(uint32_t layer, const Batch& batch, const Team& team) const;
    void feed_forward(const Layer& layer, uint32_t n_tokens, InputSquares::Block* squares, Team& team);
    void activate(uint32_t first_token, uint32_t n_tokens, uint32_t first_row, uint32_t end_row);
    void capture_hidden(uint32_t layer, const Batch& batch, Team& team) const;

    const Weights& weights_;
    std::unordered_map<const Linear*, const Linear*> following_;  // which matrix a decoded token reads after which
    const Hyperparams& hp_;
    const kernels::Kernels& kernels_;
    Buffer<float> x_;                             // [T][D] residual stream
    Buffer<float> normed_;                        // [T][D]
    Buffer<kernels::ActivationBlock> quantized_;  // [T][max(D, F)/32]
    Buffer<float> qkv_;                           // [T][qkv_length]
    Buffer<float> attended_;                      // [T][q_length]
    Buffer<float> gate_, up_;                     // [T][F]
    std::vector<Private> private_;                // [n_threads]
    std::vector<float> cos_, sin_;                // [positions][rope_dim/2]
    std::atomic<bool> stopped_ = false;
};

}  // namespace fixmin::model
