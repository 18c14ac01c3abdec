// A loaded model and the threads that run it.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "engine/thread_pool.h"
#include "gguf/gguf_file.h"
#include "model/decoder.h"

namespace fixmin::engine {

struct EngineOptions {
    uint32_t n_threads = 0;  // 0: default_threads()
    uint32_t n_ctx = 0;      // 0: the model's context_length
    uint32_t n_batch = 512;  // tokens of a prompt that go through the layers together
    kernels::KvType kv_type = kernels::KvType::f16;
    std::string isa;  // empty: FIXMIN_ISA, else the best of this CPU
};

enum class FinishReason { length, stop, eos, cancelled };

struct Generation {
    std::vector<uint32_t> ids;
    FinishReason reason = FinishReason::length;
    double prefill_seconds = 0;  // prompt to first logits
    double decode_seconds = 0;   // the rest
};

/// Every call takes the engine for itself until it returns; calls of several threads are served one after the other.
/// Ids must be below V: ArgumentError. More tokens than n_ctx: ContextLengthError.
/// `stop` is asked between layers; a computation that it ends throws Cancelled, except generate.
class Engine {
  public:
    using Stop = std::function<bool()>;

    /// Takes the file apart; throws GgufError, UnsupportedError, ArgumentError, std::bad_alloc.
    Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress);

    const model::Hyperparams& hyperparams() const { return weights_.hyperparams; }
    const model::Weights& weights() const { return weights_; }
    const kernels::Kernels& kernels() const { return kernels_; }
    uint32_t n_ctx() const { return n_ctx_; }
    uint32_t n_threads() const { return pool_.size(); }
    kernels::KvType kv_type() const { return kv_.view().type; }
    size_t kv_bytes() const { return kv_.reserved_bytes(); }
    size_t buffer_bytes() const { return decoder_.buffer_bytes(); }
    size_t kv_bytes_per_position() const { return kv_.bytes_per_position(); }

    /// out: [T][V], or [V] with last_only.
    void logits(std::span<const uint32_t> ids, bool last_only, float* out, const Stop& stop);

    /// out: [T][D]; layer 0 is the lifted codes, layer l the output of block l.
    void hidden_states(std::span<const uint32_t> ids, uint32_t layer, float* out, const Stop& stop);

    /// out: [T-1], natural logarithm of the probability of ids[t+1] after ids[0..t].
    /// `squares`, if given, gets the inputs of every product added: T tokens for the blocks, T-1 for the output.
    /// An exception leaves a part of them there.
    void score(std::span<const uint32_t> ids, float* out, const Stop& stop, model::InputSquares* squares = nullptr);

    /// on_token may be empty; false from it ends the generation after that token.
    Generation generate(std::span<const uint32_t> prompt, const SamplingParams& params,
                        const std::function<bool(uint32_t)>& on_token, const Stop& stop);

    /// Bytes per second that the threads read from n_bytes of memory, in each of `passes` over it.
    std::vector<double> read_ceiling(size_t n_bytes, uint32_t passes, const Stop& stop);

    /// 8-bit multiplications and additions per second of the threads, in each of `passes` of about 50 ms.
    std::vector<double> int8_ceiling(uint32_t passes, const Stop& stop);

  private:
    using AfterChunk = std::function<void(uint32_t first, uint32_t n)>;

    void check_ids(std::span<const uint32_t> ids) const;
    bool run_chunk(const model::Pass& pass);
    bool run_all(std::span<const uint32_t> ids, uint32_t hidden_layer, float* hidden, const Stop& stop,
                 const AfterChunk& after_chunk, model::InputSquares* squares = nullptr);
    void project(uint32_t first, uint32_t n, float* logits, model::InputSquares* squares = nullptr);

    const kernels::Kernels& kernels_;
    ThreadPool pool_;
    const model::Weights weights_;
    const uint32_t n_ctx_;
    const uint32_t n_batch_;
    model::Decoder decoder_;
    KvCache kv_;
    std::mutex mutex_;
};

/// Thrown when `stop` ended a computation.
class Cancelled : public std::exception {
  public:
    const char* what() const noexcept override { return "cancelled"; }
};

}  // namespace fixmin::engine
