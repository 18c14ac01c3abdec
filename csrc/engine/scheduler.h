// Which tokens of which requests go through the model together.
#pragma once
#include <deque>
#include <list>
#include <memory>
#include <vector>

#include "engine/kv_pool.h"
#include "engine/prefix_cache.h"
#include "engine/request.h"
#include "model/backend.h"

namespace fixmin::engine {

struct SchedulerLimits {
    uint32_t n_ctx;        // positions of one request
    uint32_t max_rows;     // tokens in a step
    uint32_t max_running;  // requests in a step
};

/// Counted since the engine was made, but for the first six.
struct EngineStats {
    uint32_t n_running = 0, n_waiting = 0;
    uint32_t n_blocks = 0, n_free_blocks = 0, n_cached_blocks = 0;
    uint32_t n_evictable_blocks = 0;                           // of the cached ones, those that no request uses
    uint64_t n_steps = 0, n_rows = 0;                          // rows: tokens that went through the model
    uint64_t n_prompt_tokens = 0, n_cached_prompt_tokens = 0;  // of prompts looked for in the prefix cache
    uint64_t n_generated = 0, n_drafted = 0, n_accepted = 0, n_preempted = 0, n_finished = 0;
};

/// Decides; computes nothing. Continuous batching: every step takes one token of each request that is generating (more
/// with drafts) and fills up with prompts, shared evenly between those that are being read, so that short ones do not
/// wait for long ones. Requests start in the order of their arrival once the cache has room for their tokens. When it
/// is full, what nobody uses goes first, then the request that started last: it waits at the head of the queue and is
/// computed again later, with the same result. Used by one thread, except hand_out().
class Scheduler {
  public:
    Scheduler(KvPool& pool, model::Backend& backend, const SchedulerLimits& limits, const model::Hyperparams& hp,
              const kernels::Kernels& kernels);

    void add(std::shared_ptr<Request> request);
    bool idle() const { return waiting_.empty() && running_.empty(); }
    bool nothing_runs() const { return running_.empty(); }

    // Some rows of the step that one thread hands out to one request.
    struct Unit {
        Request* request;
        uint32_t first;  // in `rows`
        uint32_t n;
        uint32_t position;  // of the first row in the request's tokens
        bool sample;        // else a row of the prompt to score or copy
    };
    struct Step {
        std::vector<uint32_t> ids;
        std::vector<model::Chunk> chunks;
        std::vector<std::shared_ptr<Request>> requests;  // of the chunks
        std::vector<uint32_t> rows;                      // whose logits are wanted
        std::vector<Unit> units;
    };

    /// What to compute next; no rows if there is nothing to do. Starts waiting requests if `admit`.
    const Step& plan(bool admit);

    /// Whether all requests of the planned step have been given up. Called between layers.
    bool given_up() const;

    /// Gives the logits [n][V] of a unit to its request. Units may be handed out by several threads at a time.
    void hand_out(const Unit& unit, const float* logits);

    /// After the step has been computed and all its units handed out.
    void finish();

    /// The step was not finished; `error`, if not null, ends its requests.
    void abandon(std::exception_ptr error);

    /// Ends a request that no scheduler has been given.
    static void refuse(Request& request);

    /// Ends every request.
    void end_all(FinishReason reason, std::exception_ptr error = nullptr);
    /// Tells those that wait for requests which have ended since the last call.
    void tell_ended();

    void clear_prefix_cache() { cache_.clear(); }
    PrefixCache& prefix_cache() { return cache_; }
    EngineStats stats() const;

  private:
    using Shared = std::shared_ptr<Request>;

    void drop_given_up();
    void admit_waiting();
    bool admit(Request& request);
    bool reserve(Request& request, uint32_t n_positions);
    void append_block(Request& request, uint32_t block);
    void preempt(const Shared& request);
    void release(Request& request);
    void plan_decoding(uint32_t& rows_left);
    void plan_prompts(uint32_t rows_left);
    void add_chunk(const Shared& request, uint32_t n_known);
    void sample(Request& request, const float* logits, uint32_t n_rows);
    void end(const Shared& request, FinishReason reason, std::exception_ptr error = nullptr);

    KvPool& pool_;
    model::Backend& backend_;
    const SchedulerLimits limits_;
    const uint32_t vocab_size_;
    const uint32_t embedding_length_;
    const kernels::Kernels& kernels_;
    PrefixCache cache_;
    std::deque<Shared> waiting_;
    std::vector<Shared> running_;  // in the order in which they started
    std::vector<Shared> ended_;    // and not told yet
    Step step_;
    EngineStats stats_;
};

}  // namespace fixmin::engine
