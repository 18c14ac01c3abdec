// A loaded model, the threads that run it, and the requests that they serve.
#pragma once
#include <sys/types.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/kv_pool.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/team_size.h"
#include "engine/thread_pool.h"
#include "gguf/gguf_file.h"
#include "model/decoder.h"

namespace fixmin::engine {

struct EngineOptions {
    uint32_t n_threads = 0;  // at most, see TeamSize; 0: default_threads()
    uint32_t n_ctx = 0;      // of one request; 0: the model's context_length
    uint32_t n_batch = 512;  // tokens in a step
    kernels::KvType kv_type = kernels::KvType::f16;
    std::string isa;            // empty: FIXMIN_ISA, else the best of this CPU
    uint32_t n_kv = 0;          // positions of the cache, for all requests and known prefixes; 0: as the next two say
    uint32_t kv_contexts = 16;  // so many whole contexts ...
    double kv_memory_share = 0.125;  // ... or fewer, down to one, if that were more than this share of the memory
    uint32_t n_parallel = 256;       // most requests in a step
};

/// Serves requests with a thread of its own. Ids must be below V: ArgumentError. More tokens than n_ctx:
/// ContextLengthError. In a forked child the thread is made anew when something is asked for; requests of the parent do
/// not exist there.
class Engine {
  public:
    using Stop = std::function<bool()>;

    /// Takes the file apart; throws GgufError, UnsupportedError, ArgumentError, std::bad_alloc.
    Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress);

    /// As stop(), and frees the memory.
    ~Engine();

    /// Ends the engine's thread within a layer: requests that run or wait end as cancelled, and so do later ones at
    /// once; exclusive jobs throw. Returns when that is done, also to a second caller. Not to be called by a mask.
    void stop();

    /// In a forked child: makes the thread anew. The callers of the others take turns with this one.
    void start_thread();

    const model::Hyperparams& hyperparams() const { return weights_.hyperparams; }
    const model::Weights& weights() const { return weights_; }
    const kernels::Kernels& kernels() const { return kernels_; }
    uint32_t n_ctx() const { return n_ctx_; }
    uint32_t n_threads() const { return pool_.size(); }
    kernels::KvType kv_type() const { return kv_.layout().type; }
    uint32_t n_kv() const { return kv_.n_blocks() * kernels::kv_block_tokens; }
    size_t kv_bytes() const { return kv_.reserved_bytes(); }
    size_t buffer_bytes() const { return decoder_.buffer_bytes(); }
    size_t kv_bytes_per_position() const { return kv_.bytes_per_position(); }
    EngineStats stats() const;

    /// Queues a request; news of it go to the mailbox too, if there is one.
    std::shared_ptr<Request> submit(std::span<const uint32_t> prompt, RequestOptions options,
                                    std::shared_ptr<Mailbox> mailbox = nullptr);

    /// Runs job(stop) in the engine's thread while no request is running, and returns when it has ended; what it throws
    /// comes here. `stop` is asked in the calling thread meanwhile; once it said so, the job's own says so too.
    void exclusively(const std::function<void(const Stop&)>& job, const Stop& stop);

    /// Forgets what earlier requests have computed.
    void clear_prefix_cache(const Stop& stop);

    /// Keys and values of the tokens of `ids`, as far as the prefix cache has them in whole blocks: [n][block_bytes()].
    std::vector<std::byte> export_prefix(std::span<const uint32_t> ids, const Stop& stop);

    /// Puts what export_prefix gave into the prefix cache: ids are the tokens of the blocks, all of them. Throws
    /// ArgumentError if the sizes do not match or there is no room.
    void import_prefix(std::span<const uint32_t> ids, std::span<const std::byte> blocks, const Stop& stop);

    size_t block_bytes() const { return kv_.block_bytes(); }

    /// As RequestOptions::n_prompt_logprobs = 0 of one request with nothing beside it, and `squares` gets the inputs of
    /// every product added: T tokens for the blocks, T-1 for the output. An exception leaves a part of them there.
    void collect_squares(std::span<const uint32_t> ids, float* logprobs, const Stop& stop,
                         model::InputSquares& squares);

    /// Bytes per second that the threads read from n_bytes of memory, in each of `passes` over it.
    std::vector<double> read_ceiling(size_t n_bytes, uint32_t passes, const Stop& stop);

    /// 8-bit multiplications and additions per second of the threads, in each of `passes` of about 50 ms.
    std::vector<double> int8_ceiling(uint32_t passes, const Stop& stop);

  private:
    // What callers and the engine's thread share.
    struct Job {
        std::function<void()> run;
        std::promise<void> ended;
    };
    struct Shared {
        std::mutex mutex;
        std::condition_variable changed;
        std::deque<std::shared_ptr<Request>> arrived;
        std::deque<std::shared_ptr<Job>> jobs;
        EngineStats stats;
        bool quit = false;
    };

    void check_ids(std::span<const uint32_t> ids) const;
    void serve();
    void end_everything();
    void tell_ended();
    bool step(bool admit);
    void compute(const Scheduler::Step& step);
    bool forward(const model::Batch& batch, std::span<const uint32_t> rows, uint32_t n_threads);

    const kernels::Kernels& kernels_;
    ThreadPool pool_;
    TeamSize team_size_;
    const model::Weights weights_;
    const uint32_t n_ctx_;
    const uint32_t n_batch_;
    model::Decoder decoder_;
    KvPool kv_;
    std::unique_ptr<Scheduler> scheduler_;
    const uint32_t n_parallel_;
    std::atomic<uint64_t> n_requests_ = 0;
    model::Buffer<float> logits_;
    std::unique_ptr<Shared> shared_;
    std::thread thread_;
    std::mutex stopping_;
    std::atomic<bool> stopped_ = false;  // asked by whatever the engine's thread does
    pid_t owner_ = 0;                    // the process that the thread lives in
};

/// Thrown when `stop` ended a computation.
class Cancelled : public std::exception {
  public:
    const char* what() const noexcept override { return "cancelled"; }
};

}  // namespace fixmin::engine
