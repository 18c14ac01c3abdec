#include "engine/request.h"

#include <unistd.h>

#include <algorithm>

#include "error.h"

namespace fixmin::engine {
namespace {

double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

// Durations beyond what a clock holds mean: for ever.
Clock::time_point after(Clock::time_point start, double timeout_s) {
    constexpr double longest = 1e8;
    if (!(timeout_s < longest)) return Clock::time_point::max();
    return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::max(timeout_s, 0.0)));
}

}  // namespace

Mailbox::Mailbox() : owner_(getpid()), state_(std::make_unique<State>()) {}

Mailbox::~Mailbox() {
    // Destroying a condition waits for those that wait for it.
    if (owner_ != getpid()) state_.release();
}

void Mailbox::post(uint64_t request) {
    const std::lock_guard lock(state_->mutex);
    state_->news.insert(request);
    state_->changed.notify_one();
}

std::vector<uint64_t> Mailbox::wait(double timeout_s) {
    if (owner_ != getpid()) throw Error(stays_in_parent);
    std::unique_lock lock(state_->mutex);
    state_->changed.wait_until(lock, after(Clock::now(), std::min(timeout_s, 1e6)),
                               [&] { return state_->closed || !state_->news.empty(); });
    const std::vector<uint64_t> news(state_->news.begin(), state_->news.end());
    state_->news.clear();
    return news;
}

void Mailbox::close() {
    if (owner_ != getpid()) return;
    const std::lock_guard lock(state_->mutex);
    state_->closed = true;
    state_->changed.notify_all();
}

Request::Request(uint64_t number, std::span<const uint32_t> prompt, RequestOptions options,
                 const kernels::Kernels& kernels, std::shared_ptr<Mailbox> mailbox)
    : number(number),
      options_(std::move(options)),
      mailbox_(std::move(mailbox)),
      submitted_(Clock::now()),
      deadline_(after(submitted_, options_.timeout_s)),
      ids_(prompt.begin(), prompt.end()),
      sampler_(options_.sampling, options_.seed, prompt, kernels),
      drafter_(options_.n_draft) {
    counters_.n_prompt = uint32_t(prompt.size());
    if (options_.n_prompt_logprobs >= 0)
        prompt_logprobs_.resize(prompt.size() - 1 + options_.next.has_value() - options_.first_row);
}

bool Request::wait(size_t n_seen, double timeout_s) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, after(Clock::now(), std::min(timeout_s, 1e6)),
                               [&] { return ended_ || generated_.size() > n_seen; });
}

Request::News Request::read(size_t from) const {
    const std::lock_guard lock(mutex_);
    News news;
    from = std::min(from, generated_.size());
    news.ids.assign(generated_.begin() + ptrdiff_t(from), generated_.end());
    if (!logprobs_.empty()) news.logprobs.assign(logprobs_.begin() + ptrdiff_t(from), logprobs_.end());
    news.ended = ended_;
    return news;
}

void Request::push(uint32_t id, sampling::TopLogprobs logprobs) {
    {
        const std::lock_guard lock(mutex_);
        generated_.push_back(id);
        if (options_.n_logprobs >= 0) logprobs_.push_back(std::move(logprobs));
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number);
}

void Request::end(FinishReason reason, std::exception_ptr error) {
    const Clock::time_point now = Clock::now();
    const Clock::time_point first = first_step_ == Clock::time_point{} ? now : first_step_;
    const Clock::time_point read = prompt_done_ == Clock::time_point{} ? now : prompt_done_;
    counters_.queued_s = seconds(first - submitted_);
    counters_.prefill_s = seconds(read - first);
    counters_.decode_s = seconds(now - read);
    prompt_logprobs_.resize(
        std::min<size_t>(prompt_logprobs_.size(), n_handed_ - std::min(n_handed_, options_.first_row)));
    running_ = false;
    over_ = true;
    const std::lock_guard lock(mutex_);
    reason_ = reason;
    error_ = std::move(error);
}

void Request::tell_end() {
    {
        const std::lock_guard lock(mutex_);
        ended_ = true;
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number);
}

}  // namespace fixmin::engine
