// What a caller asks of the engine, and where the answer is found.
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
#include <utility>
#include <vector>

#include "sampling/logprobs.h"
#include "sampling/sampling_params.h"

namespace fixmin::engine {

using Clock = std::chrono::steady_clock;

/// Durations beyond what a clock holds mean: for ever.
Clock::time_point after(Clock::time_point start, double timeout_s);

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
    /// One more request that may post, until it says that it has ended: memory for its news, so that post() needs none.
    void expect();
    void post(uint64_t request, bool ended) noexcept;
    /// One that was expected will not post.
    void forget() noexcept;
    /// Numbers of requests with news since the last call; waits for the first until the timeout. Empty once closed.
    std::vector<uint64_t> wait(double timeout_s);
    void close();

  private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        std::vector<uint64_t> news;  // each request once
        size_t n_expected = 0;       // that have not ended; there is room for all of them behind `news`
        bool closed = false;
    };
    const pid_t owner_;
    std::unique_ptr<State> state_;
};

inline constexpr const char* stays_in_parent =
    "this generation was begun before the process was forked: it goes on in the parent, not here";

/// How a request ended.
struct RequestResult {
    FinishReason reason = FinishReason::cancelled;
    std::exception_ptr error;  // null unless it failed
    /// The stop id that ended it, if there was one; no probabilities if n_logprobs asks for none.
    std::optional<sampling::TopLogprobs> last;
    RequestCounters counters;
};

/// What a caller holds: made by Engine::submit, used from any thread. The Sequence that the engine makes of it reports
/// to it.
class Request {
  public:
    Request(uint64_t number, RequestOptions options, std::shared_ptr<Mailbox> mailbox);
    ~Request();
    Request(const Request&) = delete;

    const uint64_t number;  // of this request in its engine
    const RequestOptions options;

    /// Ends it within a layer of a step that it has to itself, else with the step.
    void cancel() { cancelled_ = true; }
    bool cancelled() const { return cancelled_; }

    /// Waits until more than n_seen tokens are there or it has ended; false after timeout_s.
    bool wait(size_t n_seen, double timeout_s);
    bool wait_end(double timeout_s) { return wait(SIZE_MAX, timeout_s); }

    struct News {
        std::vector<uint32_t> ids;                    // generated, from the place asked for on
        std::vector<sampling::TopLogprobs> logprobs;  // the same, if wanted
        bool ended = false;
    };
    News read(size_t from) const;

    /// Once it has ended.
    const RequestResult& result() const { return result_; }
    /// Once it has ended or prompt_scored(): of the tokens behind first_row, `next` included; fewer if it ended before
    /// they were read.
    const std::vector<sampling::TopLogprobs>& prompt_logprobs() const { return prompt_logprobs_; }
    bool prompt_scored() const { return prompt_ == Prompt::read; }
    /// Nobody need wait for its prompt any longer: it has been read, or will not be.
    bool prompt_over() const { return prompt_ != Prompt::unread; }

    // Told by its sequence.
    void push(uint32_t id, sampling::TopLogprobs logprobs);
    /// The first call counts: all scores once the prompt has been read, or those that are there at the end.
    void end_prompt(std::vector<sampling::TopLogprobs> logprobs, bool read);
    void end(RequestResult result) noexcept;

  private:
    enum class Prompt { unread, read, given_up };

    const std::shared_ptr<Mailbox> mailbox_;
    std::atomic<bool> cancelled_ = false;
    std::atomic<Prompt> prompt_ = Prompt::unread;
    std::vector<sampling::TopLogprobs> prompt_logprobs_;  // nothing changes them once prompt_ says so

    mutable std::mutex mutex_;  // of the rest
    std::condition_variable changed_;
    std::vector<uint32_t> generated_;
    std::vector<sampling::TopLogprobs> logprobs_;
    bool ended_ = false;
    RequestResult result_;
};

}  // namespace fixmin::engine
