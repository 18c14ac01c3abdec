// What the engine makes of a request: tokens to run through the model, and what to do with the logits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/drafter.h"
#include "engine/request.h"
#include "sampling/sampler.h"

namespace fixmin::engine {

/// Made by the thread that submits; from then on the engine's thread has it to itself, but for given_up() and
/// hand_out().
class Sequence {
  public:
    enum class State {
        waiting,  // for a place: has no blocks. Next: running, done
        running,  // has blocks, and rows in steps. Next: done, or waiting when its blocks are taken
        done,     // its result is known. Next: ended
        ended     // its blocks are given back, and the request can be told
    };

    Sequence(std::shared_ptr<Request> request, std::span<const uint32_t> prompt, uint32_t n_ctx,
             const kernels::Kernels& kernels);

    State state() const { return state_; }
    const RequestOptions& options() const { return request_->options; }
    const RequestCounters& counters() const { return result_.counters; }
    std::span<const uint32_t> ids() const { return ids_; }        // prompt and generated
    std::span<const uint32_t> drafts() const { return drafts_; }  // guessed to follow them, in the present step
    uint32_t n_prompt() const { return counters().n_prompt; }
    uint32_t n_computed() const { return n_computed_; }  // tokens whose keys and values are in the blocks
    uint32_t n_unknown() const { return uint32_t(ids_.size()) - n_computed_; }

    /// Cancelled or out of time. Asked by any thread.
    bool given_up() const { return request_->cancelled() || Clock::now() >= deadline_; }

    /// Tokens from the start whose rows nobody wants: their keys and values may come from the cache.
    uint32_t n_reusable() const;
    /// Whether the logits of a row of the prompt are wanted, for a score or a copy, and have not been there yet.
    bool wants_row(uint32_t position) const;

    std::vector<uint32_t> blocks;  // numbers
    uint32_t n_kept = 0;           // of these, how many the prefix cache has been given

    /// waiting -> running, with n_known tokens computed. Returns whether it is the first time.
    bool start(uint32_t n_known);
    /// running -> waiting: its blocks were taken. What comes is computed again, with the same result.
    void send_back();

    /// Begins a step, in which drafts of at most so many tokens may come behind the known ones.
    void begin_step(uint32_t n_drafts);
    void limit_drafts(uint32_t n) { drafts_.resize(std::min<size_t>(drafts_.size(), n)); }

    /// Logits [n][V] of rows of the step: of the prompt's row at `position`, or, to sample from, of the last known
    /// token and of the drafts. Called by several threads, each with other rows; one of them samples.
    void hand_out(uint32_t position, bool sample, std::span<const float> logits);

    /// What to extract of the rows [vocab_size] to sample from, [n]; false if they are to be handed out themselves.
    bool ask(std::span<numerics::ExtractQuery> queries, size_t vocab_size);
    /// The answers [n], of rows [vocab_size]; false if the rows are needed nevertheless, and are to be handed out.
    bool hand_out(std::span<const numerics::Extract> extracts, size_t vocab_size);

    /// The step with so many tokens of this one, drafts included, has been computed and handed out. Returns how many
    /// tokens that gave.
    uint32_t finish_step(uint32_t n_tokens);

    /// -> done; the last call counts.
    void stop(FinishReason reason, std::exception_ptr error = nullptr);
    void give_up() { stop(request_->cancelled() ? FinishReason::cancelled : FinishReason::timeout); }
    /// done -> ended
    void end();
    void tell_end() { request_->end(std::move(result_)); }

  private:
    void sample(std::span<const float> logits);
    template <typename Draw, typename Row>
    bool sample(Draw draw, Row row);
    const uint32_t* allowed();
    void fail();
    void score(uint32_t position, std::span<const float> logits);
    bool scores(uint32_t position) const;
    bool take(uint32_t id, std::span<const float> row);
    sampling::TopLogprobs logprobs(std::span<const float> row, uint32_t id) const;
    uint32_t n_generated() const { return uint32_t(ids_.size()) - n_prompt(); }

    const std::shared_ptr<Request> request_;
    const Clock::time_point submitted_ = Clock::now();
    const Clock::time_point deadline_;
    const uint32_t n_ctx_;
    const kernels::Kernels& kernels_;
    State state_ = State::waiting;
    std::vector<uint32_t> ids_;
    sampling::Sampler sampler_;
    Drafter drafter_;
    std::vector<uint32_t> drafts_;
    uint32_t n_drawn_ = 0;               // in the present step: the known end and the drafts that were right
    uint32_t n_right_ = 0;               // of these drafts
    const uint32_t* allowed_ = nullptr;  // by the mask, in the present step, once it was asked
    uint32_t n_computed_ = 0;
    uint32_t n_handed_ = 0;  // rows of the prompt that have been scored or copied
    Clock::time_point first_step_{}, prompt_done_{};
    std::vector<sampling::TopLogprobs> prompt_logprobs_;  // of row first_row on, if wanted
    std::mutex failing_;
    std::exception_ptr failure_;
    RequestResult result_;
};

/// Nodes change lists without an allocation, and what they hold keeps its place.
using Sequences = std::list<Sequence>;

}  // namespace fixmin::engine
