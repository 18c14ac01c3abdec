// One sequence of tokens that somebody wants continued, scored or looked into.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/drafter.h"
#include "sampling/logprobs.h"
#include "sampling/sampler.h"

namespace fixmin::engine {

using Clock = std::chrono::steady_clock;

enum class FinishReason { length, stop, cancelled, timeout };  // stop: one of SamplingParams::stop_ids

/// Which tokens may come next, as a grammar says it. Called from a thread of the engine, one call at a time; what it
/// throws ends the request.
class TokenMask {
  public:
    virtual ~TokenMask() = default;
    /// [V] bits, bit id % 32 of word id / 32; valid until accept.
    virtual const uint32_t* allowed() = 0;
    virtual void accept(uint32_t id) = 0;
    /// Nothing may follow any more.
    virtual bool finished() = 0;
};

struct RequestOptions {
    std::shared_ptr<const sampling::SamplingParams> sampling = std::make_shared<sampling::SamplingParams>();
    std::optional<uint64_t> seed;  // if given: in place of that of `sampling`
    bool generate = true;          // false: only what follows is wanted
    std::shared_ptr<TokenMask> mask;
    int32_t n_logprobs = -1;         // of generated tokens: -1 none, else how many of the most probable besides
    int32_t n_prompt_logprobs = -1;  // of the prompt's tokens but the first: the same
    bool prefix_cache = true;        // look for a known prefix, and be found
    uint32_t n_draft = 0;            // most tokens guessed from the text so far and verified at once
    double timeout_s = std::numeric_limits<double>::infinity();
    std::shared_ptr<class Request> after;  // starts once the prompt of this one has been read: to share it

    uint32_t first_row = 0;        // of the prompt, for scores and `hidden`; the row of a token says what follows it
    std::optional<uint32_t> next;  // follows the prompt: scored like its tokens, but not read

    // Rows of the prompt to copy out, to memory that outlives the request or its cancelling: see Request::wait_end.
    std::vector<uint32_t> logit_rows;  // rising
    float* logits = nullptr;           // [logit_rows][V]
    uint32_t hidden_layer = 0;
    float* hidden = nullptr;  // [T - first_row][D]
};

/// Counted while a request runs.
struct RequestCounters {
    uint32_t n_prompt = 0;
    uint32_t n_cached = 0;    // tokens of the prompt whose keys and values were known
    uint32_t n_drafted = 0;   // tokens guessed
    uint32_t n_accepted = 0;  // of these, right
    uint32_t n_preempted = 0;
    double queued_s = 0;   // until the first step
    double prefill_s = 0;  // first step to the logits of the prompt's last token
    double decode_s = 0;   // the rest
};

/// Told of new tokens and of the end of requests: one reader can wait for many. In a forked child nobody posts, and
/// its lock may be held by a thread that is not there: wait() throws, the rest does nothing.
class Mailbox {
  public:
    Mailbox();
    ~Mailbox();
    Mailbox(const Mailbox&) = delete;
    void post(uint64_t request);
    /// Numbers of requests with news since the last call; waits for the first until the timeout. Empty once closed.
    std::vector<uint64_t> wait(double timeout_s);
    void close();

  private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        std::set<uint64_t> news;
        bool closed = false;
    };
    const pid_t owner_;
    std::unique_ptr<State> state_;
};

inline constexpr const char* stays_in_parent =
    "this generation was begun before the process was forked: it goes on in the parent, not here";

/// Made by Engine::submit. The reading half may be used from any thread.
class Request {
  public:
    Request(uint64_t number, std::span<const uint32_t> prompt, RequestOptions options, const kernels::Kernels& kernels,
            std::shared_ptr<Mailbox> mailbox);

    const uint64_t number;  // of this request in its engine

    /// Ends it within a layer of a step that it has to itself, else with the step.
    void cancel() { cancelled_ = true; }

    /// Waits until more than n_seen tokens are there or it has ended; false after timeout_s.
    bool wait(size_t n_seen, double timeout_s);
    bool wait_end(double timeout_s) { return wait(SIZE_MAX, timeout_s); }

    struct News {
        std::vector<uint32_t> ids;                    // generated, from the place asked for on
        std::vector<sampling::TopLogprobs> logprobs;  // the same, if wanted
        bool ended = false;
    };
    News read(size_t from) const;

    // Once it has ended.
    FinishReason reason() const { return reason_; }
    std::exception_ptr error() const { return error_; }  // null unless it failed
    /// Of the tokens behind first_row, `next` included; fewer if it ended before they were read.
    const std::vector<sampling::TopLogprobs>& prompt_logprobs() const { return prompt_logprobs_; }
    /// Whether prompt_logprobs() is complete, and may be read before the end.
    bool prompt_scored() const { return prompt_scored_; }
    /// The stop id that ended it, if there was one; no probabilities if n_logprobs asks for none.
    const std::optional<sampling::TopLogprobs>& last() const { return last_; }
    const RequestCounters& counters() const { return counters_; }

  private:
    friend class Scheduler;

    /// Cancelled or out of time: asked by the engine at any moment of a step.
    bool given_up() const { return cancelled_ || Clock::now() >= deadline_; }
    void end(FinishReason reason, std::exception_ptr error);
    void tell_end();
    /// Called by several threads of a step.
    void fail(std::exception_ptr error) {
        const std::lock_guard lock(mutex_);
        failure_ = std::move(error);
    }
    void push(uint32_t id, sampling::TopLogprobs logprobs);
    bool scores(uint32_t row) const {
        return options_.n_prompt_logprobs >= 0 && row >= options_.first_row &&
               row + 1 < counters_.n_prompt + options_.next.has_value();
    }
    uint32_t token_after(uint32_t row) const {
        return row + 1 < counters_.n_prompt ? ids_[row + 1] : options_.next.value();
    }

    const RequestOptions options_;
    const std::shared_ptr<Mailbox> mailbox_;
    const Clock::time_point submitted_;
    const Clock::time_point deadline_;
    std::atomic<bool> cancelled_ = false;
    std::atomic<bool> prompt_read_ = false;
    std::atomic<bool> prompt_scored_ = false;  // all of it: nothing changes prompt_logprobs_ any more

    mutable std::mutex mutex_;  // of the part that both sides use
    std::condition_variable changed_;
    std::vector<uint32_t> generated_;
    std::vector<sampling::TopLogprobs> logprobs_;
    bool ended_ = false;
    FinishReason reason_ = FinishReason::cancelled;
    std::exception_ptr error_;

    // Of the engine's thread alone, and of one thread of its team while rows are handed out.
    bool running_ = false;  // has blocks
    bool over_ = false;
    std::vector<uint32_t> ids_;  // prompt and generated
    sampling::Sampler sampler_;
    uint32_t n_generated_ = 0;
    uint32_t n_counted_ = 0;   // of these, in the statistics
    uint32_t n_computed_ = 0;  // tokens whose keys and values are in the blocks
    uint32_t n_handed_ = 0;    // rows of the prompt that have been scored or copied
    std::vector<uint32_t> blocks_;
    uint32_t n_kept_ = 0;                        // blocks that the prefix cache has been given
    bool done_ = false;                          // no further token is wanted
    std::optional<sampling::TopLogprobs> last_;  // the stop id that was drawn
    FinishReason done_reason_ = FinishReason::length;
    std::exception_ptr failure_;
    Drafter drafter_;
    std::vector<uint32_t> drafts_;  // of the present step
    Clock::time_point first_step_{}, prompt_done_{};
    std::vector<sampling::TopLogprobs> prompt_logprobs_;  // of row first_row on, if wanted
    RequestCounters counters_;
};

}  // namespace fixmin::engine
