#include "engine/scheduler.h"

#include <algorithm>
#include <cstring>

namespace fixmin::engine {

using quant::kv_block_tokens;

namespace {

uint32_t blocks_for(size_t n_positions) { return uint32_t((n_positions + kv_block_tokens - 1) / kv_block_tokens); }

}  // namespace

Scheduler::Scheduler(KvPool& pool, model::Backend& backend, const SchedulerLimits& limits, const model::Hyperparams& hp,
                     const kernels::Kernels& kernels)
    : pool_(pool),
      backend_(backend),
      limits_(limits),
      vocab_size_(hp.vocab_size),
      embedding_length_(hp.embedding_length),
      kernels_(kernels),
      cache_(pool) {}

// ---- the queue ------------------------------------------------------------------------------------------------------

void Scheduler::add(Shared request) {
    // One thread may append a token while another one reads the prompt, so its place must not change.
    const size_t most = size_t(request->ids_.size()) + request->options_.sampling->max_new_tokens;
    try {
        request->ids_.reserve(std::min<size_t>(most, limits_.n_ctx));
        waiting_.push_back(request);
    } catch (const std::bad_alloc&) {
        end(request, FinishReason::cancelled, std::current_exception());
    }
}

void Scheduler::drop_given_up() {
    const auto drop = [&](auto& requests) {
        for (const Shared& request : requests) {
            if (request->given_up())
                end(request, request->cancelled_ ? FinishReason::cancelled : FinishReason::timeout);
        }
        std::erase_if(requests, [](const Shared& request) { return request->over_; });
    };
    drop(waiting_);
    drop(running_);
}

void Scheduler::admit_waiting() {
    for (auto it = waiting_.begin(); it != waiting_.end() && running_.size() < limits_.max_running;) {
        Request& request = **it;
        const Shared& leader = request.options_.after;
        if (leader && !leader->prompt_read_) {
            ++it;  // those behind it need not wait for that
            continue;
        }
        if (!admit(request)) return;  // nor may they overtake: a long prompt would never find room
        running_.push_back(std::move(*it));
        it = waiting_.erase(it);
    }
}

// Gives the request blocks for all its tokens, known ones where the prefix cache has them.
bool Scheduler::admit(Request& request) {
    const RequestOptions& options = request.options_;
    PrefixCache::Match known;
    uint32_t reusable = 0;
    if (options.prefix_cache) {
        // The last token is always computed, for its logits; so are all whose rows are wanted.
        reusable = uint32_t(request.ids_.size()) - 1;
        if (request.n_handed_ < request.counters_.n_prompt) {
            if (options.hidden || options.n_prompt_logprobs >= 0) reusable = std::min(reusable, options.first_row);
            if (options.logits) reusable = std::min(reusable, options.logit_rows.front());
        }
        known = cache_.find(std::span(request.ids_).first(reusable));
    }
    const uint32_t n_known = uint32_t(known.blocks.size());
    // One more for each that is running: else the next step might have to send this one back.
    const uint32_t needed = blocks_for(request.ids_.size()) - n_known + uint32_t(running_.size());
    if (!cache_.evict(needed) && known.n_more) {
        // The block to copy from may be the one that is lacking: in the smallest cache there would never be room.
        pool_.remove_user(known.more);
        known.n_more = 0;
    }
    if (!cache_.evict(needed)) {
        for (const uint32_t block : known.blocks) pool_.remove_user(block);
        return false;
    }
    for (const uint32_t block : known.blocks) append_block(request, block);
    request.n_computed_ = n_known * kv_block_tokens + known.n_more;
    request.n_kept_ = n_known;
    while (request.blocks_.size() < blocks_for(request.ids_.size())) append_block(request, pool_.take());
    if (known.n_more) {
        backend_.copy_block(known.more, request.blocks_[n_known]);
        pool_.remove_user(known.more);
    }
    if (request.first_step_ == Clock::time_point{}) {
        request.first_step_ = Clock::now();
        request.counters_.n_cached = request.n_computed_;
        stats_.n_cached_prompt_tokens += request.n_computed_;
        if (options.prefix_cache) stats_.n_prompt_tokens += request.ids_.size();
    }
    request.running_ = true;
    return true;
}

void Scheduler::append_block(Request& request, uint32_t block) { request.blocks_.push_back(block); }

// Room for n_positions of a running request; sends back those that started last if there is no other way, itself at
// last.
bool Scheduler::reserve(Request& request, uint32_t n_positions) {
    while (request.blocks_.size() < blocks_for(n_positions)) {
        if (cache_.evict(1)) {
            append_block(request, pool_.take());
            continue;
        }
        const Shared last = running_.back();
        preempt(last);
        if (last.get() == &request) return false;
    }
    return true;
}

void Scheduler::preempt(const Shared& request) {
    release(*request);
    request->running_ = false;
    ++request->counters_.n_preempted;
    ++stats_.n_preempted;
    waiting_.push_front(request);
    std::erase(running_, Shared(request));
}

// What it has computed stays in the prefix cache, as long as there is room.
void Scheduler::release(Request& request) {
    if (request.options_.prefix_cache && request.n_computed_ > 0)
        cache_.insert(std::span(request.ids_).first(request.n_computed_), request.blocks_);
    for (const uint32_t block : request.blocks_) pool_.remove_user(block);
    request.blocks_.clear();
    request.n_computed_ = request.n_kept_ = 0;
}

void Scheduler::end(const Shared& shared, FinishReason reason, std::exception_ptr error) {
    Request& request = *shared;
    if (request.running_) release(request);
    ++stats_.n_finished;
    stats_.n_drafted += request.counters_.n_drafted;
    stats_.n_accepted += request.counters_.n_accepted;
    request.prompt_read_ = true;  // those that wait for it need not any longer
    request.end(reason, std::move(error));
    ended_.push_back(shared);
}

void Scheduler::refuse(Request& request) {
    request.end(FinishReason::cancelled, nullptr);
    request.tell_end();
}

void Scheduler::tell_ended() {
    for (const Shared& request : ended_) request->tell_end();
    ended_.clear();
}

void Scheduler::end_all(FinishReason reason, std::exception_ptr error) {
    for (const Shared& request : waiting_) end(request, reason, error);
    for (const Shared& request : running_) end(request, reason, error);
    waiting_.clear();
    running_.clear();
}

// ---- a step ---------------------------------------------------------------------------------------------------------

const Scheduler::Step& Scheduler::plan(bool admit) {
    step_ = {};
    drop_given_up();
    if (admit) admit_waiting();
    uint32_t rows_left = limits_.max_rows;
    plan_decoding(rows_left);
    plan_prompts(rows_left);
    return step_;
}

// Requests of which one token is unknown to the cache. They are in the order of their start, so that a block that an
// older one needs is taken from a younger one before that has been planned.
void Scheduler::plan_decoding(uint32_t& rows_left) {
    for (size_t i = 0; i < running_.size() && rows_left > 0; ++i) {
        const Shared request = running_[i];
        const uint32_t n = uint32_t(request->ids_.size());
        if (n - request->n_computed_ != 1) continue;
        if (!reserve(*request, n)) break;
        request->drafts_.clear();
        if (request->options_.generate && !request->options_.mask) {
            const uint32_t wanted = request->options_.sampling->max_new_tokens - request->n_generated_;
            const uint32_t room = std::min({wanted, limits_.n_ctx - n + 1, rows_left}) - 1;
            request->drafts_ = request->drafter_.draft(request->ids_, room);
            // Nobody is sent back for a guess.
            while (request->blocks_.size() < blocks_for(n + request->drafts_.size())) {
                if (cache_.evict(1))
                    append_block(*request, pool_.take());
                else
                    request->drafts_.resize(request->blocks_.size() * kv_block_tokens - n);
            }
        }
        rows_left -= 1 + uint32_t(request->drafts_.size());
        add_chunk(request, 1);
    }
}

void Scheduler::plan_prompts(uint32_t rows_left) {
    std::vector<Shared> prompts;
    const auto unknown = [](const Shared& request) { return uint32_t(request->ids_.size()) - request->n_computed_; };
    for (const Shared& request : running_) {
        if (unknown(request) > 1) prompts.push_back(request);
    }
    // The short ones first: what they leave is shared by the others.
    std::stable_sort(prompts.begin(), prompts.end(),
                     [&](const Shared& a, const Shared& b) { return unknown(a) < unknown(b); });
    for (size_t i = 0; i < prompts.size() && rows_left > 0; ++i) {
        const uint32_t fair = (rows_left + uint32_t(prompts.size() - i) - 1) / uint32_t(prompts.size() - i);
        uint32_t n = std::min(unknown(prompts[i]), fair);
        const Request& request = *prompts[i];
        if (request.options_.hidden && request.n_computed_ < request.options_.first_row)
            n = std::min(n, request.options_.first_row - request.n_computed_);
        prompts[i]->drafts_.clear();
        rows_left -= n;
        add_chunk(prompts[i], n);
    }
}

// The next n_known tokens of a request, and its drafts.
void Scheduler::add_chunk(const Shared& shared, uint32_t n_known) {
    Request& request = *shared;
    const RequestOptions& options = request.options_;
    const uint32_t first = uint32_t(step_.ids.size()), position = request.n_computed_;
    const uint32_t n = n_known + uint32_t(request.drafts_.size());
    const uint32_t n_prompt = request.counters_.n_prompt;
    const auto known = request.ids_.begin() + position;
    step_.ids.insert(step_.ids.end(), known, known + n_known);
    step_.ids.insert(step_.ids.end(), request.drafts_.begin(), request.drafts_.end());
    model::Chunk chunk{first, n, position, request.blocks_.data()};
    if (options.hidden && position >= options.first_row && position < n_prompt) {
        chunk.hidden_layer = options.hidden_layer;
        chunk.hidden = options.hidden + size_t(position - options.first_row) * embedding_length_;
    }
    step_.chunks.push_back(chunk);
    step_.requests.push_back(shared);

    const auto want = [&](uint32_t row_position, uint32_t n_rows, bool sample) {
        step_.units.push_back({&request, uint32_t(step_.rows.size()), n_rows, row_position, sample});
        for (uint32_t i = 0; i < n_rows; ++i) step_.rows.push_back(first + row_position - position + i);
    };
    const std::vector<uint32_t>& rows = options.logit_rows;
    for (uint32_t p = std::max(position, request.n_handed_); p < std::min(position + n_known, n_prompt); ++p) {
        if (request.scores(p) || std::binary_search(rows.begin(), rows.end(), p)) want(p, 1, false);
    }
    if (options.generate && position + n_known == request.ids_.size()) {
        want(position + n_known - 1, 1 + uint32_t(request.drafts_.size()), true);
    }
}

bool Scheduler::given_up() const {
    return std::all_of(step_.requests.begin(), step_.requests.end(), [](const Shared& r) { return r->given_up(); });
}

void Scheduler::hand_out(const Unit& unit, const float* logits) {
    Request& request = *unit.request;
    const RequestOptions& options = request.options_;
    try {
        if (unit.sample) return sample(request, logits, unit.n);
        const std::vector<uint32_t>& rows = options.logit_rows;
        const auto row = std::lower_bound(rows.begin(), rows.end(), unit.position);
        if (row != rows.end() && *row == unit.position) {
            std::memcpy(options.logits + size_t(row - rows.begin()) * vocab_size_, logits, vocab_size_ * sizeof(float));
        }
        if (request.scores(unit.position)) {
            request.prompt_logprobs_[unit.position - options.first_row] =
                sampling::top_logprobs({logits, vocab_size_}, uint32_t(options.n_prompt_logprobs),
                                       request.token_after(unit.position), kernels_);
        }
    } catch (...) {
        request.fail(std::current_exception());
    }
}

// Draws after the last token; goes on with the next row as long as the draw is the draft that was computed there.
void Scheduler::sample(Request& request, const float* logits, uint32_t n_rows) {
    const RequestOptions& options = request.options_;
    const std::vector<uint32_t>& stops = options.sampling->stop_ids;
    const auto stop = [&](FinishReason reason) {
        request.done_ = true;
        request.done_reason_ = reason;
    };
    uint32_t n_right = 0;
    for (uint32_t i = 0; i < n_rows && !request.done_; ++i) {
        const std::span row(logits + size_t(i) * vocab_size_, vocab_size_);
        const uint32_t* allowed = options.mask ? options.mask->allowed() : nullptr;
        const uint32_t id = request.sampler_.sample(row, request.n_generated_, allowed);
        ++request.n_computed_;  // the token that this row belongs to
        if (std::find(stops.begin(), stops.end(), id) != stops.end()) {
            request.last_ = options.n_logprobs >= 0
                                ? sampling::top_logprobs(row, uint32_t(options.n_logprobs), id, kernels_)
                                : sampling::TopLogprobs{{id, 0}, 0, {}};
            stop(FinishReason::stop);
            break;
        }
        request.sampler_.accept(id);
        request.ids_.push_back(id);
        ++request.n_generated_;
        request.push(id, options.n_logprobs >= 0
                             ? sampling::top_logprobs(row, uint32_t(options.n_logprobs), id, kernels_)
                             : sampling::TopLogprobs{});
        if (options.mask) {
            options.mask->accept(id);
            if (options.mask->finished()) stop(FinishReason::stop);
        }
        if (request.n_generated_ == options.sampling->max_new_tokens || request.ids_.size() == limits_.n_ctx)
            stop(FinishReason::length);
        if (i == request.drafts_.size() || request.drafts_[i] != id) break;
        ++n_right;
    }
    const uint32_t n_drafts = uint32_t(request.drafts_.size());
    request.drafter_.report(n_drafts, n_right);
    request.counters_.n_drafted += n_drafts;
    request.counters_.n_accepted += n_right;
}

void Scheduler::finish() {
    ++stats_.n_steps;
    stats_.n_rows += step_.ids.size();
    for (size_t i = 0; i < step_.requests.size(); ++i) {
        Request& request = *step_.requests[i];
        const model::Chunk& chunk = step_.chunks[i];
        const uint32_t n_prompt = request.counters_.n_prompt;
        const uint32_t known_end = chunk.position + chunk.n_tokens - uint32_t(request.drafts_.size());
        stats_.n_generated += request.n_generated_ - request.n_counted_;
        request.n_counted_ = request.n_generated_;
        const bool sampled = request.options_.generate && request.n_computed_ != chunk.position;
        // sample() has counted its rows: the last known token and the drafts that were right.
        request.n_computed_ = sampled ? request.n_computed_ + known_end - chunk.position - 1 : known_end;
        request.n_handed_ = std::max(request.n_handed_, std::min(known_end, n_prompt));
        if (known_end >= n_prompt && !request.prompt_read_) {
            request.prompt_done_ = Clock::now();
            request.prompt_read_ = true;
            request.prompt_scored_ = true;
        }
        if (request.failure_) {
            end(step_.requests[i], FinishReason::cancelled, request.failure_);
        } else if (request.done_) {
            end(step_.requests[i], request.done_reason_);
        } else if (!request.options_.generate && request.n_computed_ == n_prompt) {
            end(step_.requests[i], FinishReason::length);
        } else if (request.options_.prefix_cache && request.n_computed_ / kv_block_tokens > request.n_kept_) {
            request.n_kept_ = request.n_computed_ / kv_block_tokens;
            cache_.insert(std::span(request.ids_).first(request.n_kept_ * kv_block_tokens), request.blocks_);
        }
    }
    std::erase_if(running_, [](const Shared& request) { return request->over_; });
}

void Scheduler::abandon(std::exception_ptr error) {
    if (!error) return;  // drop_given_up() does the rest
    for (const Shared& request : step_.requests) end(request, FinishReason::cancelled, error);
    std::erase_if(running_, [](const Shared& request) { return request->over_; });
}

EngineStats Scheduler::stats() const {
    EngineStats stats = stats_;
    stats.n_running = uint32_t(running_.size());
    stats.n_waiting = uint32_t(waiting_.size());
    stats.n_blocks = pool_.n_blocks();
    stats.n_free_blocks = pool_.n_free();
    stats.n_cached_blocks = cache_.n_blocks();
    // Blocks are shared through the cache only, which keeps those that a request uses.
    stats.n_evictable_blocks = cache_.n_blocks() - std::min(cache_.n_blocks(), pool_.n_shared());
    return stats;
}

}  // namespace fixmin::engine
