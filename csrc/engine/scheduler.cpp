#include "engine/scheduler.h"

#include <algorithm>

namespace fixmin::engine {

using quant::kv_block_tokens;

namespace {

uint32_t blocks_for(size_t n_positions) { return uint32_t((n_positions + kv_block_tokens - 1) / kv_block_tokens); }

}  // namespace

// ---- the queue ------------------------------------------------------------------------------------------------------

void Scheduler::drop_given_up(Sequences& from) {
    for (Sequence& sequence : from) {
        if (!sequence.given_up()) continue;
        sequence.give_up();
        end(sequence);
    }
    set_ended_aside(from);
}

void Scheduler::admit_waiting() {
    for (auto it = waiting_.begin(); it != waiting_.end() && running_.size() < limits_.max_running;) {
        const auto next = std::next(it);
        const auto& leader = it->options().after;
        if (!leader || leader->prompt_over()) {  // else those behind it need not wait for that
            if (!admit(*it)) return;             // nor may they overtake: a long prompt would never find room
            running_.splice(running_.end(), waiting_, it);
        }
        it = next;
    }
}

// Gives the sequence blocks for all its tokens, known ones where the prefix cache has them.
bool Scheduler::admit(Sequence& sequence) {
    const auto ids = sequence.ids();
    // Memory first: what is taken from the pool has a place then.
    sequence.blocks.reserve(blocks_for(ids.size()));
    step_.copies.reserve(step_.copies.size() + 1);
    PrefixCache::Match known = cache_.find(ids.first(sequence.n_reusable()));
    const uint32_t n_known = uint32_t(known.blocks.size());
    // One more for each that is running: else the next step might have to send this one back.
    const uint32_t needed = blocks_for(ids.size()) - n_known + uint32_t(running_.size());
    if (!cache_.evict(needed) && known.n_more) {
        // The block to copy from may be the one that is lacking: in the smallest cache there would never be room.
        pool_.remove_user(known.more);
        known.n_more = 0;
    }
    if (!cache_.evict(needed)) {
        for (const uint32_t block : known.blocks) pool_.remove_user(block);
        return false;
    }
    sequence.blocks.assign(known.blocks.begin(), known.blocks.end());
    sequence.n_kept = n_known;
    while (sequence.blocks.size() < blocks_for(ids.size())) sequence.blocks.push_back(pool_.take());
    if (known.n_more) {
        step_.copies.push_back({known.more, sequence.blocks[n_known]});
        pool_.remove_user(known.more);
    }
    if (sequence.start(n_known * kv_block_tokens + known.n_more)) {
        stats_.n_cached_prompt_tokens += sequence.n_computed();
        if (sequence.options().prefix_cache) stats_.n_prompt_tokens += ids.size();
    }
    return true;
}

// Room for n_positions of a running sequence; sends back those that started last if there is no other way, itself at
// last.
bool Scheduler::reserve(Sequence& sequence, uint32_t n_positions) {
    while (sequence.blocks.size() < blocks_for(n_positions)) {
        if (take_block(sequence)) continue;
        const bool itself = &running_.back() == &sequence;
        preempt_last();
        if (itself) return false;
    }
    return true;
}

bool Scheduler::take_block(Sequence& sequence) {
    if (!cache_.evict(1)) return false;
    sequence.blocks.push_back(0);  // its place, before it is taken
    sequence.blocks.back() = pool_.take();
    return true;
}

void Scheduler::preempt_last() {
    release(running_.back());
    running_.back().send_back();
    ++stats_.n_preempted;
    waiting_.splice(waiting_.begin(), running_, std::prev(running_.end()));
}

// What it has computed stays in the prefix cache, as long as there is room.
void Scheduler::release(Sequence& sequence) {
    if (sequence.options().prefix_cache && sequence.n_computed() > 0)
        cache_.insert(sequence.ids().first(sequence.n_computed()), sequence.blocks);
    for (const uint32_t block : sequence.blocks) pool_.remove_user(block);
    sequence.blocks.clear();
    sequence.n_kept = 0;
}

void Scheduler::end(Sequence& sequence) {
    release(sequence);
    ++stats_.n_finished;
    stats_.n_drafted += sequence.counters().n_drafted;
    stats_.n_accepted += sequence.counters().n_accepted;
    sequence.end();
}

void Scheduler::set_ended_aside(Sequences& from) {
    for (auto it = from.begin(); it != from.end();) {
        const auto next = std::next(it);
        if (it->state() == Sequence::State::ended) ended_.splice(ended_.end(), from, it);
        it = next;
    }
}

void Scheduler::tell_ended() {
    for (Sequence& sequence : ended_) sequence.tell_end();
    ended_.clear();
}

void Scheduler::end_all(std::exception_ptr error) {
    for (Sequences* const from : {&waiting_, &running_}) {
        for (Sequence& sequence : *from) {
            sequence.stop(FinishReason::cancelled, error);
            end(sequence);
        }
        ended_.splice(ended_.end(), *from);
    }
    if (error) cache_.clear();
}

// ---- a step ---------------------------------------------------------------------------------------------------------

const Scheduler::Step& Scheduler::plan(bool admit) {
    step_ = {};
    drop_given_up(waiting_);
    drop_given_up(running_);
    if (admit) admit_waiting();
    uint32_t rows_left = limits_.max_rows;
    plan_decoding(rows_left);
    plan_prompts(rows_left);
    return step_;
}

// Sequences of which one token is unknown to the cache. They are in the order of their start, so that a block that an
// older one needs is taken from a younger one before that has been planned.
void Scheduler::plan_decoding(uint32_t& rows_left) {
    for (auto it = running_.begin(); it != running_.end() && rows_left > 0; ++it) {
        if (it->n_unknown() != 1) continue;
        if (!reserve(*it, uint32_t(it->ids().size()))) break;
        draft(*it, rows_left);
        rows_left -= 1 + uint32_t(it->drafts().size());
        add_chunk(*it, 1);
    }
}

// Nobody is sent back for a guess.
void Scheduler::draft(Sequence& sequence, uint32_t rows_left) {
    const uint32_t n = uint32_t(sequence.ids().size());
    const bool copies = sequence.options().hidden && sequence.n_computed() < sequence.n_prompt();
    sequence.begin_step(copies ? 0 : std::min(limits_.n_ctx - n + 1, rows_left) - 1);
    while (sequence.blocks.size() < blocks_for(n + sequence.drafts().size()) && take_block(sequence)) {
    }
    sequence.limit_drafts(uint32_t(sequence.blocks.size()) * kv_block_tokens - n);
}

void Scheduler::plan_prompts(uint32_t rows_left) {
    std::vector<Sequence*> prompts;
    for (Sequence& sequence : running_) {
        if (sequence.n_unknown() > 1) prompts.push_back(&sequence);
    }
    // The short ones first: what they leave is shared by the others.
    std::ranges::stable_sort(prompts, {}, &Sequence::n_unknown);
    for (size_t i = 0; i < prompts.size() && rows_left > 0; ++i) {
        const uint32_t fair = (rows_left + uint32_t(prompts.size() - i) - 1) / uint32_t(prompts.size() - i);
        Sequence& sequence = *prompts[i];
        uint32_t n = std::min(sequence.n_unknown(), fair);
        const RequestOptions& options = sequence.options();
        if (options.hidden && sequence.n_computed() < sequence.n_prompt()) {
            // Rows whose hidden states are copied out have chunks of their own.
            const bool before = sequence.n_computed() < options.first_row;
            n = std::min(n, (before ? options.first_row : sequence.n_prompt()) - sequence.n_computed());
        }
        sequence.begin_step(0);
        rows_left -= n;
        add_chunk(sequence, n);
    }
}

// The next n_known tokens of a sequence, and its drafts.
void Scheduler::add_chunk(Sequence& sequence, uint32_t n_known) {
    const RequestOptions& options = sequence.options();
    const auto ids = sequence.ids(), drafts = sequence.drafts();
    const uint32_t first = uint32_t(step_.ids.size()), position = sequence.n_computed();
    const uint32_t known_end = position + n_known, n_drafts = uint32_t(drafts.size());
    step_.ids.insert(step_.ids.end(), ids.begin() + position, ids.begin() + known_end);
    step_.ids.insert(step_.ids.end(), drafts.begin(), drafts.end());
    model::Chunk chunk{first, n_known + n_drafts, position, sequence.blocks.data()};
    if (options.hidden && position >= options.first_row && position < sequence.n_prompt()) {
        chunk.hidden_layer = options.hidden_layer;
        chunk.hidden = options.hidden + size_t(position - options.first_row) * embedding_length_;
    }
    step_.chunks.push_back(chunk);
    step_.sequences.push_back(&sequence);

    const auto want = [&](uint32_t row_position, uint32_t n_rows, bool sample) {
        step_.handouts.push_back({&sequence, uint32_t(step_.rows.size()), n_rows, row_position, sample});
        for (uint32_t i = 0; i < n_rows; ++i) step_.rows.push_back(first + row_position - position + i);
    };
    for (uint32_t p = position; p < std::min(known_end, sequence.n_prompt()); ++p) {
        if (sequence.wants_row(p)) want(p, 1, false);
    }
    if (options.generate && known_end == ids.size()) want(known_end - 1, 1 + n_drafts, true);
}

bool Scheduler::given_up() const {
    return std::ranges::all_of(step_.sequences, [](const Sequence* s) { return s->given_up(); });
}

void Scheduler::finish(uint32_t n_extracts) {
    ++stats_.n_steps;
    stats_.n_extracts += n_extracts;
    stats_.n_rows += step_.ids.size();
    for (size_t i = 0; i < step_.sequences.size(); ++i) {
        Sequence& sequence = *step_.sequences[i];
        stats_.n_generated += sequence.finish_step(step_.chunks[i].n_tokens);
        const uint32_t n_full = sequence.n_computed() / kv_block_tokens;
        if (sequence.state() == Sequence::State::done) {
            end(sequence);
        } else if (sequence.options().prefix_cache && n_full > sequence.n_kept) {
            sequence.n_kept = n_full;
            cache_.insert(sequence.ids().first(n_full * kv_block_tokens), sequence.blocks);
        }
    }
    set_ended_aside(running_);
}

void Scheduler::abandon(std::exception_ptr error) {
    if (!error) return;  // drop_given_up() does the rest
    for (Sequence* const sequence : step_.sequences) {
        sequence->stop(FinishReason::cancelled, error);
        end(*sequence);
    }
    set_ended_aside(running_);
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
