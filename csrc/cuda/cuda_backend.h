// A model on a GPU.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/extracts.h"
#include "cuda/repeated_step.h"
#include "gguf/gguf_file.h"
#include "model/backend.h"
#include "threads/thread_pool.h"

namespace fixmin::cuda {

/// The forward pass is that of docs/design.md, in the same order and with the same bits as on the CPU; a kernel begins
/// when the one before has ended. Memory is taken once, when a model is loaded.
class CudaBackend final : public model::Backend {
  public:
    /// Throws what model::load_weights does, OutOfMemory of the device, DeviceError.
    CudaBackend(std::unique_ptr<Device> device, gguf::GgufFile file, const model::BackendOptions& options,
                const std::function<void(double)>& progress);

    bool forward(const model::Batch& batch) override;
    void project(std::span<const uint32_t> rows, float* logits) override;
    bool extracts() const override { return extracts_.possible(); }
    void extract(std::span<const numerics::ExtractQuery> queries, numerics::Extract* extracts) override {
        extracts_.take(*device_, logits_.as<float>(), queries, extracts);
    }
    void read_logits(uint32_t first, uint32_t n, float* logits) override;
    void copy_block(uint32_t from, uint32_t to) override;
    void read_block(uint32_t block, std::byte* out) const override;
    void write_block(uint32_t block, const std::byte* in) override;
    void parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body) override {
        pool_.parallel_for(n, body);
    }
    void collect_squares(model::InputSquares* squares) override { squares_ = squares; }
    std::vector<double> read_ceiling(size_t n_bytes, uint32_t passes, const model::Stop& stop) override;
    std::vector<double> int8_ceiling(uint32_t passes, const model::Stop& stop) override;
    std::vector<double> launch_ceiling(uint32_t passes, const model::Stop& stop) override;
    const model::Weights& weights() const override { return weights_; }
    quant::KvType kv_type() const override { return kv_type_; }
    uint32_t n_blocks() const override { return n_blocks_; }
    model::Description description() const override;
    model::MemoryUse memory() const override;

  private:
    // What a product reads.
    struct Rows {
        const float* values;      // [T][length]
        QuantizedRows quantized;  // codes are null where no product needs them
        model::InBytes in_bytes;
    };

    void take_memory();
    void upload_weights();
    void keep_constants();
    void keep(const float* values, size_t n);
    const float* on_device(const std::vector<float>& values) const;
    std::byte* block(uint32_t number) const { return cache_.data() + number * block_bytes_; }

    void place(const model::Batch& batch);
    void prepare_positions(uint32_t end);
    void upload_embeddings(std::span<const uint32_t> ids);
    bool repeats(const model::Batch& batch) const;
    void run_step(uint32_t n_tokens);
    bool run_layers(const model::Batch& batch);
    void run_layer(uint32_t layer, uint32_t n_tokens);
    void lift(uint32_t n_tokens);
    void project_qkv(uint32_t layer, uint32_t n_tokens);
    Rows attend(uint32_t layer, uint32_t n_tokens);
    void make_tiles(const model::Batch& batch);
    uint32_t tile_shape(uint32_t n_queries) const;
    AttentionSpace attention_space(uint32_t shape) const;
    void feed_forward(uint32_t layer, uint32_t n_tokens);
    Rows normalized(const model::Norm& norm, uint32_t n_tokens, model::InBytes in_bytes,
                    const uint32_t* rows = nullptr);
    Rows activated(ActivateArgs::Function function, float* values, uint32_t length, uint32_t n_tokens,
                   model::InBytes in_bytes);
    Rows with_row_scales(const float* values, uint32_t length, uint32_t n_tokens);
    Rows for_product(const Rows& rows, const model::Linear& w, uint32_t n_tokens);
    struct Product {
        const model::Linear& w;
        float* out;
    };
    void multiply(std::span<const Product> products, Rows rows, uint32_t n_tokens, uint32_t out_stride,
                  bool accumulate = false);
    void multiply(const model::Linear& w, const Rows& rows, uint32_t n_tokens, float* out, uint32_t out_stride,
                  bool accumulate = false) {
        multiply(std::array{Product{w, out}}, rows, n_tokens, out_stride, accumulate);
    }
    void launch_product(quant::WeightType type, ProductArgs args);
    void project_on_device(const uint32_t* rows, uint32_t n);
    void capture_hidden(uint32_t layer, const model::Batch& batch);
    void add_squares(std::vector<double>& sums, const Rows& rows, uint32_t n_tokens);
    QuantizedRows quantized_rows(bool wanted) const;
    CodeMapArgs code_map() const;
    CacheArgs cache_of(uint32_t layer) const;

    threads::ThreadPool pool_;  // of the host: loading, sampling
    const std::unique_ptr<Device> device_;
    model::Weights weights_;
    const model::Hyperparams& hp_;
    const quant::KvType kv_type_;
    const uint32_t n_ctx_, n_batch_, n_blocks_;
    const size_t block_bytes_;

    Arena arena_;
    Part matrices_, constants_, codes_, cache_;
    std::unordered_map<const float*, size_t> constant_offsets_;  // of vectors of weights_, in constants_
    std::vector<float> constants_to_upload_;

    Part x_, normed_, qkv_, attended_, gate_, up_;  // [T][...], as in the CPU's decoder
    Part row_codes_, row_factors_;                  // rows in 8 bits
    Part rows_, logits_;                            // of a projection
    Extracts extracts_;                             // of logits_
    Part cos_, sin_;                                // [n_ctx][rope_dim / 2]
    uint32_t n_turns_ = 0;                          // positions that cos_ and sin_ have

    Part words_;  // of a batch: ids [T], positions [T], tables [T], tiles, blocks
    std::vector<uint32_t> words_to_upload_;
    const uint32_t *ids_ = nullptr, *positions_ = nullptr, *tables_ = nullptr, *blocks_ = nullptr;  // in words_
    const Tile* tiles_on_device_ = nullptr;
    std::vector<Tile> tiles_;                        // of attention, by shape
    uint32_t n_tiles_[std::size(tile_shapes)] = {};  // of each
    bool tiles_are_chunks_ = false;                  // each is a whole one

    model::InputSquares* squares_ = nullptr;

    struct Step {
        bool met = false;
        std::unique_ptr<RepeatedStep> prepared;  // once it has been met before
    };
    const StepKind step_kind_;
    std::vector<Step> steps_;  // of n tokens
};

}  // namespace fixmin::cuda
