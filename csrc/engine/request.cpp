#include "engine/request.h"

#include <unistd.h>

#include <algorithm>

#include "error.h"

namespace fixmin::engine {

Clock::time_point after(Clock::time_point start, double timeout_s) {
    constexpr double longest = 1e8;
    if (!(timeout_s < longest)) return Clock::time_point::max();
    return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::max(timeout_s, 0.0)));
}

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
        if (options.n_logprobs >= 0) logprobs_.push_back(std::move(logprobs));
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number);
}

void Request::end_prompt(std::vector<sampling::TopLogprobs> logprobs, bool read) {
    if (prompt_over()) return;
    prompt_logprobs_ = std::move(logprobs);
    prompt_ = read ? Prompt::read : Prompt::given_up;
}

void Request::end(RequestResult result) {
    {
        const std::lock_guard lock(mutex_);
        result_ = std::move(result);
        ended_ = true;
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number);
}

}  // namespace fixmin::engine
