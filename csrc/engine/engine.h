// A loaded model, the threads that run it, and the requests that they serve.
#pragma once
#include <sys/types.h>

#include <condition_variable>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "engine/kv_pool.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "gguf/gguf_file.h"
#include "model/backend.h"

namespace fixmin::engine {

struct EngineOptions {
    model::BackendOptions backend;
    uint32_t n_parallel = 256;  // most requests in a step
};

/// Serves requests with a thread of its own. Ids must be below V: ArgumentError. More tokens than n_ctx:
/// ContextLengthError. In a forked child the thread is made anew when something is asked for; requests of the parent do
/// not exist there.
class Engine {
  public:
    using Stop = model::Stop;

    /// Takes the file apart; throws GgufError, UnsupportedError, ArgumentError, std::bad_alloc.
    Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress);

    /// As stop(), and frees the memory.
    ~Engine();

    /// Ends the engine's thread within a layer: requests that run or wait end as cancelled, and so do later ones at
    /// once; exclusive jobs throw. Returns when that is done, also to a second caller. Not to be called by a mask.
    void stop();

    /// In a forked child: makes the thread anew. The callers of the others take turns with this one.
    void start_thread();

    /// What the model runs on, for its description and figures.
    const model::Backend& backend() const { return *backend_; }
    const model::Hyperparams& hyperparams() const { return backend_->weights().hyperparams; }
    uint32_t n_ctx() const { return options_.backend.n_ctx; }
    size_t block_bytes() const { return model::kv_block_bytes(hyperparams(), backend_->kv_type()); }
    EngineStats stats() const;

    /// Queues a request; news of it go to the mailbox too, if there is one.
    std::shared_ptr<Request> submit(std::span<const uint32_t> prompt, RequestOptions options,
                                    std::shared_ptr<Mailbox> mailbox = nullptr);

    /// Runs job(backend, stop) in the engine's thread while no request is running, and returns when it has ended; what
    /// it throws comes here. `stop` is asked in the calling thread meanwhile; once it said so, the job's own says so
    /// too.
    void exclusively(const std::function<void(model::Backend&, const Stop&)>& job, const Stop& stop);

    /// Forgets what earlier requests have computed.
    void clear_prefix_cache(const Stop& stop);

    /// Keys and values of the tokens of `ids`, as far as the prefix cache has them in whole blocks: [n][block_bytes()].
    std::vector<std::byte> export_prefix(std::span<const uint32_t> ids, const Stop& stop);

    /// Puts what export_prefix gave into the prefix cache: ids are the tokens of the blocks, all of them. Throws
    /// ArgumentError if the sizes do not match or there is no room.
    void import_prefix(std::span<const uint32_t> ids, std::span<const std::byte> blocks, const Stop& stop);

    /// As RequestOptions::n_prompt_logprobs = 0 of one request with nothing beside it, and `squares` gets the inputs of
    /// every product added: T tokens for the blocks, T-1 for the output. An exception leaves a part of them there.
    void collect_squares(std::span<const uint32_t> ids, float* logprobs, const Stop& stop,
                         model::InputSquares& squares);

  private:
    // What callers and the engine's thread share.
    struct Job {
        std::function<void()> run;
        std::promise<void> ended;
    };
    struct Shared {
        std::mutex mutex;
        std::condition_variable changed;
        Sequences arrived;
        std::list<std::shared_ptr<Job>> jobs;
        EngineStats stats;
        bool quit = false;
    };

    void check_ids(std::span<const uint32_t> ids) const;
    void serve();
    void end_everything();
    void tell_ended();
    bool step(bool admit);
    void compute(const Scheduler::Step& step);
    uint32_t hand_out(std::span<const Scheduler::Handout> handouts);
    std::vector<const Scheduler::Handout*> hand_out_extracts(std::span<const Scheduler::Handout> handouts);
    void on_threads(size_t n, const std::function<void(size_t)>& body);

    const EngineOptions options_;      // complete
    const kernels::Kernels& kernels_;  // for sampling
    const std::unique_ptr<model::Backend> backend_;
    KvPool kv_;
    std::unique_ptr<Scheduler> scheduler_;
    std::atomic<uint64_t> n_requests_ = 0;
    std::vector<float> logits_;  // [rows][V]
    std::unique_ptr<Shared> shared_;
    std::thread thread_;
    std::mutex stopping_;
    std::atomic<bool> stopped_ = false;  // asked by whatever the engine's thread does
    pid_t owner_ = 0;                    // the process that the thread lives in
};

}  // namespace fixmin::engine
