// The forward pass.
#pragma once
#include <atomic>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/kv_memory.h"
#include "kernels/kernels.h"
#include "model/backend.h"
#include "threads/team.h"

namespace fixmin::cpu {

using model::Batch;
using model::Chunk;
using model::InBytes;
using model::InputSquares;
using model::Linear;
using model::Norm;
using threads::Team;

class Decoder {
  public:
    /// @param max_tokens  largest batch
    /// @param n_ctx       largest number of positions of a sequence
    /// @param n_threads   size of the teams that will call
    Decoder(const model::Weights& weights, const kernels::Kernels& kernels, const KvMemory& kv, uint32_t max_tokens,
            uint32_t n_ctx, uint32_t n_threads);

    /// Of the buffers that a batch of so many tokens takes.
    static size_t bytes_per_token(const model::Hyperparams& hp);

    /// Called by one thread before forward: makes the rotation tables for positions below `end`.
    void prepare_positions(uint32_t end);

    /// As Backend::forward, without logits. Every thread of the team calls it. `squares` is added to, or null.
    bool forward(const Batch& batch, Team& team, InputSquares* squares);

    /// As Backend::project; every thread of the team calls it.
    void project(std::span<const uint32_t> rows, float* logits, Team& team, InputSquares* squares);

    /// Memory of the activations and of the rotation tables made so far.
    size_t buffer_bytes() const;

  private:
    // What a matrix product reads: rows as float32, and perhaps in 8 bits.
    struct Rows {
        const float* values;         // [T][length], or null: in bytes only
        const std::byte* quantized;  // [T], as in_bytes says
        uint32_t length;
        InBytes in_bytes;
    };

    // Some rows of a product for some tokens.
    struct Part {
        uint32_t first_row, end_row;  // first_row is a multiple of panel_rows
        uint32_t first_token, n_tokens;
        bool same_tokens;  // as in the part that this thread computed before, for the same `Rows`
    };

    // Buffers that one thread uses alone.
    struct Private {
        Buffer<float> row;            // [max(D, F)]
        Buffer<std::byte> quantized;  // the same in 8 bits
        Buffer<std::byte> scratch;    // of kernels
    };

    void quantize(const float* x, uint32_t length, InBytes in_bytes, std::byte* rows, uint32_t t) const;
    Rows normalized(const Norm& norm, uint32_t n_tokens, InBytes in_bytes, bool floats_too, Team& team,
                    const uint32_t* rows = nullptr);
    Rows as_rows(const float* values, uint32_t length, uint32_t n_tokens, InBytes in_bytes, Team& team);
    Rows for_product(const Rows& rows, const Linear& w, uint32_t n_tokens, Team& team);
    void multiply(const Linear& w, const Rows& rows, uint32_t n_tokens, float* out, size_t out_stride, bool accumulate,
                  Team& team);
    void multiply_part(const Linear& w, const Rows& rows, const Part& part, float* out, size_t out_stride,
                       bool accumulate, Team& team);
    const std::byte* next_read(const Linear& w, const Part& part, const Team& team) const;
    template <typename Body>
    void for_parts(const Linear& w, uint32_t n_tokens, Team& team, Body body);
    void normalize_row(const Norm& norm, const float* x, float* y) const;
    void lift(const Batch& batch, Team& team);
    void project_qkv(uint32_t layer, const Batch& batch, InputSquares::Block* squares, Team& team);
    void attend(uint32_t layer, const Batch& batch, Team& team);
    void store_kv(uint32_t layer, const Chunk& chunk, uint32_t kv_head);
    void attend_head(uint32_t layer, const Chunk& chunk, uint32_t head, const Team& team);
    void rotate(float* head, uint32_t position) const;
    void prefetch_kv(uint32_t layer, const Batch& batch, const Team& team) const;
    void feed_forward(const model::Layer& layer, uint32_t n_tokens, InputSquares::Block* squares, Team& team);
    void activate(uint32_t first_token, uint32_t n_tokens, uint32_t first_row, uint32_t end_row);
    void capture_hidden(uint32_t layer, const Batch& batch, Team& team) const;

    const model::Weights& weights_;
    std::unordered_map<const Linear*, const Linear*> following_;  // which matrix a decoded token reads after which
    const model::Hyperparams& hp_;
    const kernels::Kernels& kernels_;
    const KvMemory& kv_;
    Buffer<float> x_;               // [T][D] residual stream
    Buffer<float> normed_;          // [T][D]
    Buffer<std::byte> quantized_;   // [T] rows of max(D, F) in 8 bits
    Buffer<float> qkv_;             // [T][qkv_length]
    Buffer<float> attended_;        // [T][q_length]
    Buffer<float> gate_, up_;       // [T][F]
    std::vector<Private> private_;  // [n_threads]
    std::vector<float> cos_, sin_;  // [positions][rope_dim/2]
    std::atomic<bool> stopped_ = false;
};

}  // namespace fixmin::cpu
