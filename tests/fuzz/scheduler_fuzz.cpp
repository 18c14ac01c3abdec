// The scheduler, its pool of blocks and its prefix cache, driven by a string of events, beside a model that is a sum:
// what stands in a block for a position is a number made of all tokens up to there. So a block that was shared, copied,
// kept or given away wrongly shows at once, and every answer is known beforehand.
#include <algorithm>
#include <list>
#include <memory>
#include <optional>

#include "engine/scheduler.h"
#include "error.h"
#include "input.h"
#include "kernels/isa.h"

namespace {

using namespace fixmin;
using namespace fixmin::engine;
using fuzz::Input;
using fuzz::require;
using quant::kv_block_tokens;

constexpr uint32_t vocab_size = 8;

uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 27);
}

// Of the tokens up to a position: never 0, which stands for what nobody has written.
uint64_t state_after(uint64_t before, uint32_t id) { return mixed(before * 31 + id + 0x9e3779b97f4a7c15u) | 1; }

void logits_of(uint64_t state, float* row) {
    for (uint32_t v = 0; v < vocab_size; ++v) row[v] = float(mixed(state + v * 77) % 9);  // with ties
}

// After none of the tokens, the first, ... all.
std::vector<uint64_t> states_of(std::span<const uint32_t> ids) {
    std::vector<uint64_t> states{1};
    states.reserve(ids.size() + 1);
    for (const uint32_t id : ids) states.push_back(state_after(states.back(), id));
    return states;
}

// A mask that allows every second token, by turns, and is finished after some.
class Alternating final : public TokenMask {
  public:
    explicit Alternating(uint32_t n) : left_(n) {}
    const uint32_t* allowed() override {
        bits_ = accepted_ % 2 ? 0x55 : 0xaa;
        if (accepted_ == throws_at) throw Error("the mask fails");
        return &bits_;
    }
    void accept(uint32_t) override { ++accepted_; }
    bool finished() override { return accepted_ >= left_; }

    static constexpr uint32_t throws_at = 5;

  private:
    const uint32_t left_;
    uint32_t accepted_ = 0, bits_ = 0;
};

// A request as it was asked for, and what has to come of it if nothing happens to it.
struct Asked {
    std::shared_ptr<Request> request;
    std::vector<uint32_t> prompt;
    std::vector<float> logits;  // room for its rows
    std::vector<float> hidden;
    uint32_t mask_tokens = 0;
    bool cancelled = false, timed = false, broken = false, ended = false;
};

struct World {
    explicit World(Input& input)
        : pool(1 + input.below(10)),
          limits{std::min(1 + input.below(130), pool.n_blocks() * kv_block_tokens), 1 + input.below(48),
                 1 + input.below(6)},
          memory(pool.n_blocks() * kv_block_tokens),
          scheduler(std::make_unique<Scheduler>(pool, limits, 1)) {}

    KvPool pool;
    const SchedulerLimits limits;
    std::vector<uint64_t> memory;  // [block][position]
    std::unique_ptr<Scheduler> scheduler;
    std::list<Asked> asked;
    uint64_t n_requests = 0;
    bool closed = false;

    void submit(Input& input);
    void step(Input& input);
    void compute(const Scheduler::Step& step);
    void hand_out(const Scheduler::Step& step);
    void export_import(Input& input);
    void tell();
    void check_answer(Asked& a);
    void check_counts();
    void finish();
};

void World::submit(Input& input) {
    Asked& a = asked.emplace_back();
    const uint32_t most = limits.n_ctx;
    // Prompts share beginnings: of one text, by the same pattern, with a different end now and then.
    const uint32_t n = 1 + input.byte() % most;
    const uint8_t period = 1 + input.below(7), twist = input.byte();
    for (uint32_t i = 0; i < n; ++i) a.prompt.push_back(i % period % vocab_size);
    if (twist < n) a.prompt[twist] = 7;

    RequestOptions options;
    auto sampling = std::make_shared<sampling::SamplingParams>();
    sampling->top_k = 0, sampling->top_p = 1, sampling->min_p = 0;  // what is drawn has a fuzzer of its own
    const uint8_t flags = input.byte();
    options.prefix_cache = !(flags & 1);
    options.generate = !(flags & 2);
    sampling->max_new_tokens = 1 + input.below(40);
    if (flags & 4) options.n_draft = 1 + input.below(8);
    if (flags & 8) options.n_prompt_logprobs = int32_t(input.below(3));
    if (flags & 16) options.n_logprobs = int32_t(input.below(3));
    if (flags & 32) sampling->stop_ids = {input.below(vocab_size)};
    if (flags & 64) sampling->temperature = 1, sampling->seed = input.byte();
    if (flags & 128) {
        const uint8_t more = input.byte();
        if (more & 1) options.first_row = input.byte() % n;
        if (more & 2) options.next = input.below(vocab_size);
        if (more & 4) {
            const uint32_t every = 1 + input.below(40);
            for (uint32_t p = input.byte() % n; p < n; p += every) options.logit_rows.push_back(p);
            a.logits.assign(options.logit_rows.size() * vocab_size, -1);
            options.logits = a.logits.data();
        }
        if (more & 8) {
            a.hidden.assign(n - options.first_row, -1);
            options.hidden = a.hidden.data();
        }
        if ((more & 16) && asked.size() > 1)
            options.after = std::next(asked.begin(), input.byte() % (asked.size() - 1))->request;
        if (more & 32) options.timeout_s = 0, a.timed = true;
        if ((more & 64) && options.generate) {
            a.mask_tokens = 1 + input.below(8);
            options.mask = std::make_shared<Alternating>(a.mask_tokens);
        }
    }
    if (n >= limits.n_ctx) options.generate = false;  // as Engine::submit refuses
    options.sampling = sampling;
    a.request = std::make_shared<Request>(n_requests++, std::move(options), nullptr);
    Sequences one;
    one.emplace_back(a.request, a.prompt, limits.n_ctx, kernels::select());
    scheduler->add(one);
}

void World::compute(const Scheduler::Step& step) {
    require(step.ids.size() <= limits.max_rows, "a step has no more rows than may be");
    require(step.chunks.size() == step.sequences.size() && step.chunks.size() <= limits.max_running, "one chunk each");
    uint32_t next_row = 0;
    for (size_t i = 0; i < step.chunks.size(); ++i) {
        const model::Chunk& chunk = step.chunks[i];
        const Sequence& sequence = *step.sequences[i];
        require(std::ranges::count(step.sequences, &sequence) == 1, "a sequence has one chunk in a step");
        require(chunk.first_row == next_row && chunk.n_tokens > 0, "chunks follow each other");
        next_row += chunk.n_tokens;
        require(chunk.position + chunk.n_tokens <= limits.n_ctx, "no position outside the context");
        std::vector<uint32_t> ids(sequence.ids().begin(), sequence.ids().end());
        ids.insert(ids.end(), sequence.drafts().begin(), sequence.drafts().end());
        require(chunk.position + chunk.n_tokens <= ids.size(), "tokens that are there");
        uint64_t state = 1;
        for (uint32_t p = 0; p < chunk.position + chunk.n_tokens; ++p) {
            const uint32_t block = chunk.blocks[p / kv_block_tokens];
            require(block < pool.n_blocks() && pool.users(block) > 0, "blocks are in use");
            state = state_after(state, ids[p]);
            uint64_t& place = memory[block * kv_block_tokens + p % kv_block_tokens];
            if (p < chunk.position) {
                require(place == state, "what is read is what these tokens have written");
                continue;
            }
            require(step.ids[chunk.first_row + p - chunk.position] == ids[p], "the tokens are the sequence's");
            require(pool.users(block) == 1, "nobody writes to a block of others");
            place = state;
            if (chunk.hidden && p >= chunk.position) chunk.hidden[p - chunk.position] = float(state % 1000);
        }
    }
    require(next_row == step.ids.size(), "all rows belong to a chunk");
}

void World::hand_out(const Scheduler::Step& step) {
    uint32_t next = 0;
    for (const Scheduler::Handout& handout : step.handouts) {
        require(handout.first == next, "rows are handed out in order");
        next += handout.n;
        const size_t i = size_t(std::ranges::find(step.sequences, handout.sequence) - step.sequences.begin());
        require(i < step.sequences.size(), "handouts are for sequences of the step");
        const model::Chunk& chunk = step.chunks[i];
        std::vector<float> rows(size_t(handout.n) * vocab_size);
        for (uint32_t r = 0; r < handout.n; ++r) {
            const uint32_t row = step.rows[handout.first + r], position = row - chunk.first_row + chunk.position;
            require(position == handout.position + r, "a row is that of its position");
            const uint32_t block = chunk.blocks[position / kv_block_tokens];
            logits_of(memory[block * kv_block_tokens + position % kv_block_tokens], &rows[size_t(r) * vocab_size]);
        }
        handout.sequence->hand_out(handout.position, handout.sample, rows);
    }
    require(next == step.rows.size(), "all rows are handed out");
}

void World::step(Input& input) {
    const uint8_t kind = input.byte();
    const Scheduler::Step& step = scheduler->plan(kind % 8 != 7);
    for (const auto [from, to] : step.copies) {
        std::copy_n(&memory[from * kv_block_tokens], kv_block_tokens, &memory[to * kv_block_tokens]);
    }
    if (step.ids.empty()) return;
    compute(step);
    if (kind >= 240) {  // the device fails, or was stopped within a layer: a part has been written
        const auto error = kind >= 248 ? std::make_exception_ptr(Error("the device failed")) : nullptr;
        for (Asked& a : asked) {
            for (const Sequence* s : step.sequences) a.broken |= error && &s->options() == &a.request->options;
        }
        scheduler->abandon(error);
        return;
    }
    hand_out(step);
    scheduler->finish(0);
}

// What Engine does with a state, between steps.
void World::export_import(Input& input) {
    if (!scheduler->nothing_runs() || asked.empty()) return;
    const Asked& a = *std::next(asked.begin(), input.byte() % asked.size());
    PrefixCache& cache = scheduler->prefix_cache();
    const PrefixCache::Match known = cache.find(a.prompt);
    std::vector<uint64_t> saved;
    for (const uint32_t block : known.blocks) {
        saved.insert(saved.end(), &memory[block * kv_block_tokens], &memory[block * kv_block_tokens] + kv_block_tokens);
        pool.remove_user(block);
    }
    if (known.n_more) pool.remove_user(known.more);
    if (input.flag()) cache.clear();
    const uint32_t n = uint32_t(known.blocks.size());
    if (!n || !cache.evict(n)) return;
    std::vector<uint32_t> taken;
    for (uint32_t i = 0; i < n; ++i) {
        taken.push_back(pool.take());
        std::copy_n(&saved[i * kv_block_tokens], kv_block_tokens, &memory[taken.back() * kv_block_tokens]);
    }
    cache.insert(std::span(a.prompt).first(n * kv_block_tokens), taken);
    for (const uint32_t block : taken) pool.remove_user(block);
}

// The text that the model alone would give, one token after the other.
void World::check_answer(Asked& a) {
    const RequestOptions& options = a.request->options;
    const sampling::SamplingParams& p = *options.sampling;
    const RequestResult& result = a.request->result();
    const Request::News news = a.request->read(0);
    const bool whole = result.reason == FinishReason::length || result.reason == FinishReason::stop;
    if (result.error) require(a.broken || a.mask_tokens > Alternating::throws_at, "nothing fails by itself");
    if (!whole && !result.error) require(a.cancelled || a.timed || closed, "what nobody has ended goes on to its end");
    if (result.reason == FinishReason::timeout) require(a.timed, "nobody was out of time");

    std::vector<uint32_t> ids = a.prompt;
    const std::vector<uint64_t> states = states_of(ids);
    uint64_t state = states.back();
    sampling::Sampler sampler(options.sampling, options.seed, a.prompt, kernels::select());
    std::optional<Alternating> mask;
    if (a.mask_tokens) mask.emplace(a.mask_tokens);
    FinishReason reason = FinishReason::length;
    bool mask_fails = false;
    size_t n = 0;
    for (; options.generate && n < p.max_new_tokens && ids.size() < limits.n_ctx; ++n) {
        float row[vocab_size];
        logits_of(state, row);
        const uint32_t* allowed = nullptr;
        try {
            if (mask) allowed = mask->allowed();
        } catch (const Error&) {
            mask_fails = true;
            break;
        }
        const uint32_t id = sampler.sample(row, n, allowed);
        if (std::ranges::count(p.stop_ids, id)) {
            reason = FinishReason::stop;
            break;
        }
        sampler.accept(id);
        if (n < news.ids.size()) require(news.ids[n] == id, "every token is that of the model alone");
        if (n < news.logprobs.size())
            require(news.logprobs[n].chosen.id == id, "log-probabilities belong to the token");
        ids.push_back(id);
        state = state_after(state, id);
        if (mask) {
            mask->accept(id);
            if (mask->finished()) {
                reason = FinishReason::stop;
                // The length, if it is reached by the same token, is asked for last.
                if (n + 1 == p.max_new_tokens || ids.size() == limits.n_ctx) reason = FinishReason::length;
                ++n;
                break;
            }
        }
    }
    require(news.ids.size() <= n, "no more tokens than asked for");
    if (whole) {
        require(!mask_fails, "a mask that fails ends its request");
        require(news.ids.size() == n && result.reason == reason, "an answer is whole and says why it ended");
        require(result.counters.n_prompt == a.prompt.size() &&
                    result.counters.n_cached < a.prompt.size() + !a.prompt.size(),
                "counters fit the prompt");
        if (options.n_prompt_logprobs >= 0) {
            const auto& scores = a.request->prompt_logprobs();
            require(scores.size() == a.prompt.size() - 1 + options.next.has_value() - options.first_row,
                    "every token of the prompt is scored");
            for (size_t i = 0; i < scores.size(); ++i) {
                const size_t place = options.first_row + i + 1;
                const uint32_t id = place < a.prompt.size() ? a.prompt[place] : *options.next;
                float row[vocab_size];
                logits_of(states[place], row);
                const auto want = sampling::top_logprobs(row, 0, id, kernels::select());
                require(scores[i].chosen.id == id && scores[i].chosen.logprob == want.chosen.logprob,
                        "a score is that of its token");
            }
        }
        for (size_t i = 0; i < options.logit_rows.size(); ++i) {
            float row[vocab_size];
            logits_of(states[options.logit_rows[i] + 1], row);
            require(std::equal(row, row + vocab_size, &a.logits[i * vocab_size]), "copied rows are those asked for");
        }
        for (size_t i = 0; i < a.hidden.size(); ++i) {
            require(a.hidden[i] == float(states[options.first_row + i + 1] % 1000),
                    "hidden states are those asked for");
        }
    }
}

void World::tell() {
    scheduler->tell_ended();
    for (Asked& a : asked) {
        if (a.ended || !a.request->read(0).ended) continue;
        a.ended = true;
        check_answer(a);
    }
}

void World::check_counts() {
    const EngineStats stats = scheduler->stats();
    require(stats.n_free_blocks <= stats.n_blocks && stats.n_cached_blocks <= stats.n_blocks - stats.n_free_blocks,
            "blocks are free, cached or in use");
    require(stats.n_running <= limits.max_running, "no more run than may");
    uint32_t shared = 0, used = 0;
    for (uint32_t block = 0; block < pool.n_blocks(); ++block)
        shared += pool.users(block) > 1, used += pool.users(block) > 0;
    require(shared == pool.n_shared() && used + pool.n_free() == pool.n_blocks(), "the pool counts right");
    if (stats.n_running == 0)
        require(stats.n_free_blocks + stats.n_cached_blocks == stats.n_blocks, "no block is lost");
    uint64_t open = 0;
    for (const Asked& a : asked) open += !a.ended;
    if (!closed) require(stats.n_running + stats.n_waiting == open, "every request runs, waits or has ended");
}

void World::finish() {
    Input nothing(nullptr, 0);
    for (int steps = 0; !scheduler->idle(); ++steps) {
        require(steps < 100'000, "all requests come to an end");
        step(nothing);
        tell();
    }
    tell();
    for (const Asked& a : asked) require(a.ended, "every request is told of its end");
    check_counts();
    scheduler->prefix_cache().clear();
    require(pool.n_free() == pool.n_blocks(), "no block is lost");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    World world(input);
    while (!input.ended()) {
        switch (input.below(12)) {
            case 0:
            case 1:
                if (world.asked.size() < 24) world.submit(input);
                break;
            case 2:
                if (!world.asked.empty()) {
                    Asked& a = *std::next(world.asked.begin(), input.byte() % world.asked.size());
                    a.request->cancel();
                    a.cancelled = true;
                }
                break;
            case 3:
                if (world.scheduler->nothing_runs()) world.scheduler->prefix_cache().clear();
                break;
            case 4: world.export_import(input); break;
            case 5:
                if (input.below(8) < 6) break;
                // Closed, or a plan failed: everything ends, and nothing may be lost.
                world.closed = true;
                world.scheduler->end_all(input.flag() ? std::make_exception_ptr(Error("no plan")) : nullptr);
                for (Asked& a : world.asked) a.broken = true;
                world.tell();
                world.closed = false;
                break;
            case 6:
                if (input.below(8) < 6) break;
                // A fork: the child begins with an empty pool, and the parent's requests do not exist there.
                world.scheduler.reset();
                world.pool.clear();
                world.scheduler = std::make_unique<Scheduler>(world.pool, world.limits, 1);
                world.asked.clear();
                std::ranges::fill(world.memory, 0u);
                break;
            default: world.step(input);
        }
        world.tell();
        world.check_counts();
    }
    world.finish();
    return 0;
}
