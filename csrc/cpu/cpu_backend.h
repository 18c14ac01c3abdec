// The CPU behind the boundary of devices: a decoder, its threads and its memory.
#pragma once
#include <cstring>
#include <functional>
#include <span>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/kv_memory.h"
#include "cpu/team_size.h"
#include "gguf/gguf_file.h"
#include "model/backend.h"
#include "threads/thread_pool.h"

namespace fixmin::cpu {

/// In a forked child its threads are made anew.
class CpuBackend final : public model::Backend {
  public:
    /// Takes the file apart; options.n_ctx is given. Throws GgufError, UnsupportedError, ArgumentError, OutOfMemory.
    /// `progress` gets the fraction done, 0 to 1.
    CpuBackend(gguf::GgufFile file, const model::BackendOptions& options, const std::function<void(double)>& progress);

    bool forward(const model::Batch& batch) override;
    void project(std::span<const uint32_t> rows, float* logits) override;
    void copy_block(uint32_t from, uint32_t to) override { write_block(to, kv_.block(from)); }
    void read_block(uint32_t block, std::byte* out) const override {
        std::memcpy(out, kv_.block(block), kv_.block_bytes);
    }
    void write_block(uint32_t block, const std::byte* in) override {
        std::memcpy(kv_.block(block), in, kv_.block_bytes);
    }
    void parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body) override;
    void collect_squares(model::InputSquares* squares) override { squares_ = squares; }
    std::vector<double> read_ceiling(size_t n_bytes, uint32_t passes, const model::Stop& stop) override;
    std::vector<double> int8_ceiling(uint32_t passes, const model::Stop& stop) override;
    std::vector<double> tile_ceiling(uint32_t passes, const model::Stop& stop) override;
    std::vector<double> launch_ceiling(uint32_t passes, const model::Stop& stop) override;
    const model::Weights& weights() const override { return weights_; }
    quant::KvType kv_type() const override { return kv_.type; }
    uint32_t n_blocks() const override { return kv_.n_blocks; }
    model::Description description() const override;
    model::MemoryUse memory() const override { return {weights_.panels.size(), kv_.bytes(), decoder_.buffer_bytes()}; }

  private:
    std::vector<double> multiply_ceiling(void (*multiply)(uint64_t), uint32_t operations, uint32_t passes,
                                         const model::Stop& stop);

    const kernels::Kernels& kernels_;
    threads::ThreadPool pool_;
    TeamSize team_size_;
    const model::Weights weights_;
    const KvMemory kv_;
    Decoder decoder_;
    uint32_t n_threads_ = 1;  // of the last step
    model::InputSquares* squares_ = nullptr;
};

}  // namespace fixmin::cpu
