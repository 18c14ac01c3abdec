// Which tokens of which sequences go through the model together.
#pragma once
#include <exception>
#include <vector>

#include "engine/kv_pool.h"
#include "engine/prefix_cache.h"
#include "engine/sequence.h"
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
    uint64_t n_extracts = 0;  // rows of logits of which the device's extract was enough to sample
    uint64_t n_generated = 0, n_drafted = 0, n_accepted = 0, n_preempted = 0, n_finished = 0;
};

/// Decides; computes nothing. Continuous batching: every step takes one token of each request that is generating (more
/// with drafts) and fills up with prompts, shared evenly between those that are being read, so that short ones do not
/// wait for long ones. Requests start in the order of their arrival once the cache has room for their tokens. When it
/// is full, what nobody uses goes first, then the request that started last: it waits at the head of the queue and is
/// computed again later, with the same result. Used by one thread.
class Scheduler {
  public:
    Scheduler(KvPool& pool, const SchedulerLimits& limits, uint32_t embedding_length)
        : pool_(pool), limits_(limits), embedding_length_(embedding_length), cache_(pool) {}

    /// Leaves `arrived` empty.
    void add(Sequences& arrived) noexcept { waiting_.splice(waiting_.end(), arrived); }
    bool idle() const { return waiting_.empty() && running_.empty(); }
    bool nothing_runs() const { return running_.empty(); }

    // Some rows of the step that one thread hands out to one sequence.
    struct Handout {
        Sequence* sequence;
        uint32_t first;  // in `rows`
        uint32_t n;
        uint32_t position;  // of the first row in the sequence
        bool sample;        // else a row of the prompt to score or copy
    };
    struct Copy {
        uint32_t from, to;
    };
    struct Step {
        // Of blocks, one after the other and before anything else writes to one: then a block has what the plan found
        // in it, also if the plan has given it to another sequence since.
        std::vector<Copy> copies;
        std::vector<uint32_t> ids;
        std::vector<model::Chunk> chunks;
        std::vector<Sequence*> sequences;  // of the chunks
        std::vector<uint32_t> rows;        // whose logits are wanted
        std::vector<Handout> handouts;
    };

    /// What to compute next; no tokens if there is nothing to do, but perhaps copies. Starts waiting sequences if
    /// `admit`. Throws std::bad_alloc: then end_all() has to follow.
    const Step& plan(bool admit);

    /// Whether all sequences of the planned step have been given up. Called between layers.
    bool given_up() const;

    /// After the step has been computed and all its handouts handed out, of which so many rows by extracts.
    void finish(uint32_t n_extracts);

    /// The step was not finished; `error`, if not null, ends its sequences.
    void abandon(std::exception_ptr error);

    /// Ends everything, and forgets what is known if a plan failed: blocks may not have been copied.
    void end_all(std::exception_ptr error = nullptr);
    /// Tells those that wait for sequences which have ended since the last call.
    void tell_ended();

    PrefixCache& prefix_cache() { return cache_; }
    EngineStats stats() const;

  private:
    void drop_given_up(Sequences& from);
    void admit_waiting();
    bool admit(Sequence& sequence);
    bool reserve(Sequence& sequence, uint32_t n_positions);
    bool take_block(Sequence& sequence);
    void preempt_last();
    void release(Sequence& sequence);
    void plan_decoding(uint32_t& rows_left);
    void plan_prompts(uint32_t rows_left);
    void draft(Sequence& sequence, uint32_t rows_left);
    void add_chunk(Sequence& sequence, uint32_t n_known);
    void end(Sequence& sequence);
    void set_ended_aside(Sequences& from);

    KvPool& pool_;
    const SchedulerLimits limits_;
    const uint32_t embedding_length_;
    PrefixCache cache_;
    Sequences waiting_;
    Sequences running_;  // in the order in which they started
    Sequences ended_;    // and not told yet
    Step step_;
    EngineStats stats_;
};

}  // namespace fixmin::engine
