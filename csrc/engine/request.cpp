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

void Mailbox::expect() {
    if (owner_ != getpid()) return;
    const std::lock_guard lock(state_->mutex);
    State& state = *state_;
    const size_t room = state.news.size() + state.n_expected + 1;
    if (state.news.capacity() < room) state.news.reserve(2 * room);
    ++state.n_expected;
}

void Mailbox::forget() noexcept {
    if (owner_ != getpid()) return;
    const std::lock_guard lock(state_->mutex);
    --state_->n_expected;
}

void Mailbox::post(uint64_t request, bool ended) noexcept {
    const std::lock_guard lock(state_->mutex);
    State& state = *state_;
    // Few requests run at a time, and the last one to post is often one of the last before.
    if (std::find(state.news.rbegin(), state.news.rend(), request) == state.news.rend()) state.news.push_back(request);
    state.n_expected -= ended;
    state.changed.notify_one();
}

std::vector<uint64_t> Mailbox::wait(double timeout_s) {
    if (owner_ != getpid()) throw Error(stays_in_parent);
    std::unique_lock lock(state_->mutex);
    state_->changed.wait_until(lock, after(Clock::now(), std::min(timeout_s, 1e6)),
                               [&] { return state_->closed || !state_->news.empty(); });
    std::vector<uint64_t> news(state_->news);
    state_->news.clear();  // keeps its memory
    std::ranges::sort(news);
    return news;
}

void Mailbox::close() {
    if (owner_ != getpid()) return;
    const std::lock_guard lock(state_->mutex);
    state_->closed = true;
    state_->changed.notify_all();
}

Request::Request(uint64_t number, RequestOptions options, std::shared_ptr<Mailbox> mailbox)
    : number(number), options(std::move(options)), mailbox_(std::move(mailbox)) {
    if (mailbox_) mailbox_->expect();
}

Request::~Request() {
    if (mailbox_ && !ended_) mailbox_->forget();  // it was never submitted
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
        const bool logged = options.n_logprobs >= 0;
        if (logged) logprobs_.push_back(std::move(logprobs));
        try {
            generated_.push_back(id);
        } catch (...) {
            if (logged) logprobs_.pop_back();  // a reader finds one for each token
            throw;
        }
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number, false);
}

void Request::end_prompt(std::vector<sampling::TopLogprobs> logprobs, bool read) {
    if (prompt_over()) return;
    prompt_logprobs_ = std::move(logprobs);
    prompt_ = read ? Prompt::read : Prompt::given_up;
}

void Request::end(RequestResult result) noexcept {
    {
        const std::lock_guard lock(mutex_);
        result_ = std::move(result);
        ended_ = true;
        changed_.notify_all();
    }
    if (mailbox_) mailbox_->post(number, true);
}

}  // namespace fixmin::engine
