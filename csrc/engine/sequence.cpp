#include "engine/sequence.h"

#include <algorithm>
#include <cstring>

namespace fixmin::engine {
namespace {

double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

Sequence::Sequence(std::shared_ptr<Request> request, std::span<const uint32_t> prompt, uint32_t n_ctx,
                   const kernels::Kernels& kernels)
    : request_(std::move(request)),
      deadline_(after(submitted_, options().timeout_s)),
      n_ctx_(n_ctx),
      kernels_(kernels),
      sampler_(options().sampling, options().seed, prompt, kernels),
      drafter_(options().n_draft) {
    // One thread may append a token while another one reads the prompt, so its place must not change.
    ids_.reserve(std::min<size_t>(prompt.size() + size_t(options().sampling->max_new_tokens), n_ctx));
    ids_.assign(prompt.begin(), prompt.end());
    result_.counters.n_prompt = uint32_t(prompt.size());
    if (options().n_prompt_logprobs >= 0)
        prompt_logprobs_.resize(prompt.size() - 1 + options().next.has_value() - options().first_row);
}

uint32_t Sequence::n_reusable() const {
    if (!options().prefix_cache) return 0;
    uint32_t n = uint32_t(ids_.size()) - 1;  // the last token is always computed, for its logits
    if (n_handed_ >= n_prompt()) return n;
    if (options().hidden || options().n_prompt_logprobs >= 0) n = std::min(n, options().first_row);
    if (options().logits) n = std::min(n, options().logit_rows.front());
    return n;
}

bool Sequence::wants_row(uint32_t position) const {
    const std::vector<uint32_t>& rows = options().logit_rows;
    return position >= n_handed_ && position < n_prompt() &&
           (scores(position) || std::binary_search(rows.begin(), rows.end(), position));
}

bool Sequence::scores(uint32_t position) const {
    return options().n_prompt_logprobs >= 0 && position >= options().first_row &&
           position + 1 < n_prompt() + options().next.has_value();
}

bool Sequence::start(uint32_t n_known) {
    n_computed_ = n_known;
    state_ = State::running;
    if (first_step_ != Clock::time_point{}) return false;
    first_step_ = Clock::now();
    result_.counters.n_cached = n_known;
    return true;
}

void Sequence::send_back() {
    n_computed_ = 0;
    state_ = State::waiting;
    ++result_.counters.n_preempted;
}

void Sequence::begin_step(uint32_t n_drafts) {
    n_drawn_ = n_right_ = 0;
    allowed_ = nullptr;
    drafts_.clear();
    if (n_drafts == 0 || !options().generate || options().mask) return;
    drafts_ = drafter_.draft(ids_, std::min(n_drafts, options().sampling->max_new_tokens - n_generated() - 1));
}

// ---- logits ---------------------------------------------------------------------------------------------------------

void Sequence::hand_out(uint32_t position, bool sample, std::span<const float> logits) {
    try {
        if (sample)
            this->sample(logits);
        else
            score(position, logits);
    } catch (...) {
        fail();
    }
}

bool Sequence::ask(std::span<numerics::ExtractQuery> queries, size_t vocab_size) {
    if (options().n_logprobs >= 0) return false;
    try {
        for (uint32_t i = 0; i < queries.size(); ++i) {
            const auto query = sampler_.query(vocab_size, n_generated() + i, allowed());  // with a mask of one row only
            if (!query) return false;
            queries[i] = *query;
        }
        return true;
    } catch (...) {
        return false;  // sample() asks again, where it may throw
    }
}

bool Sequence::hand_out(std::span<const numerics::Extract> extracts, size_t vocab_size) {
    try {
        return sample([&](uint32_t i) { return sampler_.sample(extracts[i], vocab_size, n_generated()); },
                      [](uint32_t) { return std::span<const float>(); });  // for log-probabilities, which nobody wants
    } catch (...) {
        fail();
        return true;
    }
}

void Sequence::fail() {
    const std::lock_guard lock(failing_);
    failure_ = std::current_exception();
}

void Sequence::score(uint32_t position, std::span<const float> logits) {
    const std::vector<uint32_t>& rows = options().logit_rows;
    const auto row = std::lower_bound(rows.begin(), rows.end(), position);
    if (row != rows.end() && *row == position)
        std::memcpy(options().logits + size_t(row - rows.begin()) * logits.size(), logits.data(), logits.size_bytes());
    if (!scores(position)) return;
    const uint32_t next = position + 1 < n_prompt() ? ids_[position + 1] : options().next.value();
    prompt_logprobs_[position - options().first_row] =
        sampling::top_logprobs(logits, uint32_t(options().n_prompt_logprobs), next, kernels_);
}

void Sequence::sample(std::span<const float> logits) {
    const size_t v = logits.size() / (1 + drafts_.size());
    const auto row = [&](uint32_t i) { return logits.subspan(i * v, v); };
    sample([&](uint32_t i) { return std::optional(sampler_.sample(row(i), n_generated(), allowed())); }, row);
}

// Draws after the last token; goes on with the next row as long as the draw is the draft that was computed there.
// Stops, to go on another time, and returns false, where draw(row) is nothing.
template <typename Draw, typename Row>
bool Sequence::sample(Draw draw, Row row) {
    const uint32_t n_drafts = uint32_t(drafts_.size());
    while (state_ == State::running) {
        const uint32_t i = n_drawn_;
        const std::optional<uint32_t> id = draw(i);
        if (!id) return false;
        ++n_drawn_;
        if (!take(*id, row(i)) || i == n_drafts || drafts_[i] != *id) break;
        ++n_right_;
    }
    drafter_.report(n_drafts, n_right_);
    result_.counters.n_drafted += n_drafts;
    result_.counters.n_accepted += n_right_;
    return true;
}

const uint32_t* Sequence::allowed() {
    if (options().mask && !allowed_) allowed_ = options().mask->allowed();
    return allowed_;
}

// Returns whether the token goes into the text: a stop id does not.
bool Sequence::take(uint32_t id, std::span<const float> row) {
    const sampling::SamplingParams& params = *options().sampling;
    if (std::ranges::find(params.stop_ids, id) != params.stop_ids.end()) {
        result_.last = options().n_logprobs >= 0 ? logprobs(row, id) : sampling::TopLogprobs{{id, 0}, 0, {}};
        stop(FinishReason::stop);
        return false;
    }
    sampler_.accept(id);
    ids_.push_back(id);
    request_->push(id, options().n_logprobs >= 0 ? logprobs(row, id) : sampling::TopLogprobs{});
    if (options().mask) {
        options().mask->accept(id);
        if (options().mask->finished()) stop(FinishReason::stop);
    }
    if (n_generated() == params.max_new_tokens || ids_.size() == n_ctx_) stop(FinishReason::length);
    return true;
}

sampling::TopLogprobs Sequence::logprobs(std::span<const float> row, uint32_t id) const {
    return sampling::top_logprobs(row, uint32_t(options().n_logprobs), id, kernels_);
}

uint32_t Sequence::finish_step(uint32_t n_tokens) {
    const uint32_t known_end = n_computed_ + n_tokens - uint32_t(drafts_.size());
    n_computed_ = known_end + (n_drawn_ > 0 ? n_drawn_ - 1 : 0);
    n_handed_ = std::max(n_handed_, std::min(known_end, n_prompt()));
    if (known_end >= n_prompt() && prompt_done_ == Clock::time_point{}) {
        prompt_done_ = Clock::now();
        request_->end_prompt(std::move(prompt_logprobs_), true);
    }
    if (failure_)
        stop(FinishReason::cancelled, failure_);
    else if (!options().generate && n_computed_ == n_prompt())
        stop(FinishReason::length);
    return n_drawn_ > 0 ? uint32_t(ids_.size()) - known_end : 0;
}

// ---- the end --------------------------------------------------------------------------------------------------------

void Sequence::stop(FinishReason reason, std::exception_ptr error) {
    state_ = State::done;
    result_.reason = reason;
    result_.error = std::move(error);
}

void Sequence::end() {
    state_ = State::ended;
    const Clock::time_point now = Clock::now();
    const Clock::time_point first = first_step_ == Clock::time_point{} ? now : first_step_;
    const Clock::time_point read = prompt_done_ == Clock::time_point{} ? now : prompt_done_;
    result_.counters.queued_s = seconds(first - submitted_);
    result_.counters.prefill_s = seconds(read - first);
    result_.counters.decode_s = seconds(now - read);
    const uint32_t n_scored = n_handed_ - std::min(n_handed_, options().first_row);
    prompt_logprobs_.resize(std::min<size_t>(prompt_logprobs_.size(), n_scored));
    request_->end_prompt(std::move(prompt_logprobs_), false);
}

}  // namespace fixmin::engine
