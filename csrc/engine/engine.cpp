#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "engine/devices.h"
#include "error.h"

namespace fixmin::engine {
namespace {

// Rows of logits that exist at a time: 16 MiB for 65,536 tokens.
constexpr uint32_t rows_at_a_time = model::most_kept_rows;

// A draft and the token before it are handed out together.
constexpr uint32_t max_draft = 31;

constexpr const char* closed = "the model was closed";

// Blocks that have a user as long as this exists.
struct Used {
    KvPool& pool;
    std::vector<uint32_t> blocks;
    ~Used() {
        for (const uint32_t block : blocks) pool.remove_user(block);
    }
};

// What was left open, from the file.
EngineOptions completed(EngineOptions options, const gguf::GgufFile& file) {
    const uint32_t context_length = model::read_hyperparams(file).context_length;
    uint32_t& n_ctx = options.backend.n_ctx;
    if (n_ctx > context_length) {
        throw ArgumentError("n_ctx is " + std::to_string(n_ctx) + " but the model was made for a context of " +
                            std::to_string(context_length) + " tokens");
    }
    if (n_ctx == 0) n_ctx = context_length;
    options.backend.n_batch = std::max(options.backend.n_batch, 1u);
    options.n_parallel = std::clamp(options.n_parallel, 1u, options.backend.n_batch);
    return options;
}

}  // namespace

Engine::Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress)
    : options_(completed(options, file)),
      kernels_(sampling::kernels_of(options.backend.isa)),
      backend_(open_backend(std::move(file), options_.backend, progress)),
      kv_(backend_->n_blocks()) {
    start_thread();
}

Engine::~Engine() {
    if (owner_ != getpid()) {
        // A forked child: the thread is not here. Joining or destroying its handle would end the process.
        new std::thread(std::move(thread_));
        shared_.release();
        scheduler_.release();
        return;
    }
    stop();
}

void Engine::stop() {
    stopped_ = true;
    if (owner_ != getpid()) return;
    {
        const std::lock_guard lock(shared_->mutex);
        shared_->quit = true;
        shared_->changed.notify_all();
    }
    const std::lock_guard lock(stopping_);
    if (thread_.joinable()) thread_.join();
}

void Engine::start_thread() {
    if (owner_ == getpid() || stopped_) return;
    if (thread_.joinable()) {
        // A forked child. The parent's requests, the thread and perhaps a lock that it held are of no use here.
        new std::thread(std::move(thread_));
        shared_.release();
        scheduler_.release();
        kv_.clear();
    }
    shared_ = std::make_unique<Shared>();
    scheduler_ = std::make_unique<Scheduler>(
        kv_, SchedulerLimits{n_ctx(), options_.backend.n_batch, options_.n_parallel}, hyperparams().embedding_length);
    try {
        thread_ = std::thread([this] { serve(); });
    } catch (const std::system_error& error) {
        throw Error(std::string("the system starts no thread for the engine: ") + error.what());
    }
    owner_ = getpid();
}

void Engine::check_ids(std::span<const uint32_t> ids) const {
    if (ids.empty()) throw ArgumentError("there are no token ids");
    if (ids.size() > n_ctx()) {
        throw ContextLengthError(std::to_string(ids.size()) + " tokens do not fit the context of " +
                                 std::to_string(n_ctx()));
    }
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] >= hyperparams().vocab_size) {
            throw ArgumentError("token id " + std::to_string(ids[i]) + " at position " + std::to_string(i) +
                                " is not below the vocabulary size " + std::to_string(hyperparams().vocab_size));
        }
    }
}

std::shared_ptr<Request> Engine::submit(std::span<const uint32_t> prompt, RequestOptions options,
                                        std::shared_ptr<Mailbox> mailbox) {
    check_ids(prompt);
    if (options.sampling->max_new_tokens == 0) options.generate = false;
    if (options.generate && prompt.size() >= n_ctx()) {
        throw ContextLengthError("the prompt's " + std::to_string(prompt.size()) +
                                 " tokens leave no room for a new one in the context of " + std::to_string(n_ctx()));
    }
    if (options.hidden_layer > hyperparams().block_count) {
        throw ArgumentError("layer is " + std::to_string(options.hidden_layer) + "; it must lie in 0.." +
                            std::to_string(hyperparams().block_count));
    }
    if (options.first_row >= prompt.size()) throw ArgumentError("first_row lies behind the prompt");
    if (options.next) check_ids({&*options.next, 1});
    const std::vector<uint32_t>& rows = options.logit_rows;
    if (rows.empty() != !options.logits || !std::is_sorted(rows.begin(), rows.end(), std::less_equal<>()) ||
        (!rows.empty() && rows.back() >= prompt.size())) {
        throw ArgumentError("rows must rise and lie within the prompt");
    }
    options.n_draft = std::min(options.n_draft, max_draft);
    start_thread();
    auto request = std::make_shared<Request>(n_requests_++, std::move(options), std::move(mailbox));
    Sequences one;
    Sequence& sequence = one.emplace_back(request, prompt, n_ctx(), kernels_);
    if (!stopped_) {
        const std::lock_guard lock(shared_->mutex);
        if (!shared_->quit) {
            shared_->arrived.splice(shared_->arrived.end(), one);
            shared_->changed.notify_all();
            return request;
        }
    }
    sequence.stop(FinishReason::cancelled);
    sequence.end();
    sequence.tell_end();
    return request;
}

void Engine::exclusively(const std::function<void(model::Backend&, const Stop&)>& job, const Stop& stop) {
    start_thread();
    std::atomic<bool> stopped = false;
    const auto queued = std::make_shared<Job>();
    // The engine's own end is asked too: the calling thread may be the one that waits for it, in a signal handler.
    queued->run = [&] { job(*backend_, [&] { return stopped || stopped_; }); };
    std::future<void> ended = queued->ended.get_future();
    {
        if (stopped_) throw Error(closed);
        const std::lock_guard lock(shared_->mutex);
        if (shared_->quit) throw Error(closed);
        shared_->jobs.push_back(queued);
        shared_->changed.notify_all();
    }
    const pid_t begun_in = getpid();
    while (ended.wait_for(std::chrono::milliseconds(20)) != std::future_status::ready) {
        const bool give_up = stop && stop();
        if (getpid() != begun_in) throw Error(stays_in_parent);  // forked by a signal handler
        if (!give_up) continue;
        stopped = true;
        const std::lock_guard lock(shared_->mutex);
        if (std::erase(shared_->jobs, queued)) {
            shared_->changed.notify_all();
            throw model::Cancelled();  // it need not wait for its turn
        }
    }
    ended.get();
}

void Engine::clear_prefix_cache(const Stop& stop) {
    exclusively([this](model::Backend&, const Stop&) { scheduler_->prefix_cache().clear(); }, stop);
}

EngineStats Engine::stats() const {
    const std::lock_guard lock(shared_->mutex);
    return shared_->stats;
}

// The engine's thread. Nothing may be thrown out of it, which would end the process: what needs memory is either inside
// a `try` or has it beforehand (tests/faults).
void Engine::serve() {
    Shared& shared = *shared_;
    for (bool idle = false;;) {
        std::shared_ptr<Job> job;
        bool admit;
        tell_ended();
        {
            std::unique_lock lock(shared.mutex);
            const auto news = [&] { return shared.quit || !shared.arrived.empty() || !shared.jobs.empty(); };
            if (scheduler_->idle())
                shared.changed.wait(lock, news);
            else if (idle)  // those that wait can still be cancelled
                shared.changed.wait_for(lock, std::chrono::milliseconds(1), news);
            if (shared.quit) break;
            scheduler_->add(shared.arrived);
            admit = shared.jobs.empty();
            if (!admit && scheduler_->nothing_runs()) {
                job = std::move(shared.jobs.front());
                shared.jobs.pop_front();
            }
        }
        if (!job) {
            idle = !step(admit);
            continue;
        }
        try {
            job->run();
            job->ended.set_value();
        } catch (...) {
            job->ended.set_exception(std::current_exception());
        }
    }
    end_everything();
}

// Nothing arrives any more.
void Engine::end_everything() {
    std::list<std::shared_ptr<Job>> jobs;
    {
        const std::lock_guard lock(shared_->mutex);
        scheduler_->add(shared_->arrived);
        jobs.swap(shared_->jobs);
    }
    scheduler_->end_all();
    tell_ended();
    for (const auto& job : jobs) {
        try {
            throw Error(closed);
        } catch (...) {  // that, or that there is no memory for it
            job->ended.set_exception(std::current_exception());
        }
    }
}

// Who hears of an end finds it in the statistics.
void Engine::tell_ended() {
    {
        const std::lock_guard lock(shared_->mutex);
        shared_->stats = scheduler_->stats();
    }
    scheduler_->tell_ended();
}

// Returns whether there was anything to compute.
bool Engine::step(bool admit) {
    const Scheduler::Step* step;
    try {
        step = &scheduler_->plan(admit);
        for (const auto [from, to] : step->copies) backend_->copy_block(from, to);
    } catch (...) {
        // Nobody knows whose fault that was, and the next plan would be the same.
        scheduler_->end_all(std::current_exception());
        return false;
    }
    if (step->ids.empty()) return false;
    tell_ended();  // those that were given up need not wait for the step
    try {
        compute(*step);
    } catch (...) {
        scheduler_->abandon(std::current_exception());
    }
    return true;
}

void Engine::compute(const Scheduler::Step& step) {
    const Stop given_up = [this] { return stopped_ || scheduler_->given_up(); };
    const size_t v = hyperparams().vocab_size;

    // Whole handouts, as many as there are logits for.
    struct Pass {
        std::span<const Scheduler::Handout> handouts;
        std::span<const uint32_t> rows;  // of the batch
    };
    const auto pass_from = [&](size_t begin) {
        size_t end = begin;
        uint32_t n_rows = 0;
        while (end < step.handouts.size() && (n_rows == 0 || n_rows + step.handouts[end].n <= rows_at_a_time))
            n_rows += step.handouts[end++].n;
        const size_t first = begin < step.handouts.size() ? step.handouts[begin].first : 0;
        if (logits_.size() < n_rows * v) logits_.resize(n_rows * v);
        return Pass{std::span(step.handouts).subspan(begin, end - begin), std::span(step.rows).subspan(first, n_rows)};
    };
    Pass pass = pass_from(0);
    float* const logits = backend_->extracts() ? nullptr : logits_.data();
    const model::Batch batch{step.ids, step.chunks, pass.rows, logits, &given_up};
    if (!backend_->forward(batch)) return scheduler_->abandon(nullptr);
    uint32_t n_extracts = hand_out(pass.handouts);
    for (size_t n = pass.handouts.size(); n < step.handouts.size(); n += pass.handouts.size()) {
        pass = pass_from(n);
        backend_->project(pass.rows, logits ? logits_.data() : nullptr);
        n_extracts += hand_out(pass.handouts);
    }
    scheduler_->finish(n_extracts);
}

void Engine::on_threads(size_t n, const std::function<void(size_t)>& body) {
    if (n == 1) return body(0);
    if (n == 0) return;
    backend_->parallel_for(uint32_t(n), [&](uint32_t begin, uint32_t end) {
        for (size_t i = begin; i < end; ++i) body(i);
    });
}

// Of the last projection. Returns of how many rows extracts were enough.
uint32_t Engine::hand_out(std::span<const Scheduler::Handout> handouts) {
    const size_t v = hyperparams().vocab_size;
    const auto row = [&](const Scheduler::Handout& handout) { return handout.first - handouts.front().first; };
    const auto by_logits = [&](const Scheduler::Handout& handout) {
        handout.sequence->hand_out(handout.position, handout.sample,
                                   {logits_.data() + row(handout) * v, handout.n * v});
    };
    if (!backend_->extracts()) {
        on_threads(handouts.size(), [&](size_t i) { by_logits(handouts[i]); });
        return 0;
    }
    const auto left = hand_out_extracts(handouts);
    uint32_t n_read = 0;
    for (size_t i = 0, end; i < left.size(); i = end) {  // neighbours at once
        const uint32_t first = row(*left[i]);
        uint32_t n = 0;
        for (end = i; end < left.size() && row(*left[end]) == first + n; ++end) n += left[end]->n;
        backend_->read_logits(first, n, logits_.data() + first * v);
        n_read += n;
    }
    on_threads(left.size(), [&](size_t i) { by_logits(*left[i]); });
    uint32_t n_rows = 0;
    for (const Scheduler::Handout& handout : handouts) n_rows += handout.n;
    return n_rows - n_read;
}

// Returns those that need the logits themselves. A single row pays too: to read 65,536 logits takes 20 us and to look
// for the largest 8, beside a step of 350 us; what the GPU does in its place takes less than 5.
std::vector<const Scheduler::Handout*> Engine::hand_out_extracts(std::span<const Scheduler::Handout> handouts) {
    std::vector<size_t> begins(handouts.size() + 1);
    for (size_t i = 0; i < handouts.size(); ++i) begins[i + 1] = begins[i] + (handouts[i].sample ? handouts[i].n : 0);
    std::vector<numerics::ExtractQuery> asked(begins.back()), queries;
    const auto of = [&](auto& all, size_t i) { return std::span(all).subspan(begins[i], begins[i + 1] - begins[i]); };
    std::vector<char> enough(handouts.size());
    // While the device computes: masks take their time.
    on_threads(handouts.size(), [&](size_t i) {
        enough[i] = handouts[i].sample && handouts[i].sequence->ask(of(asked, i), hyperparams().vocab_size);
    });
    std::vector<size_t> firsts(handouts.size());
    for (size_t i = 0; i < handouts.size(); ++i) {
        if (!enough[i]) continue;
        firsts[i] = queries.size();
        uint32_t row = handouts[i].first - handouts.front().first;
        for (numerics::ExtractQuery query : of(asked, i)) {
            query.row = row++;
            queries.push_back(query);
        }
    }
    std::vector<numerics::Extract> extracts(queries.size());
    if (!queries.empty()) backend_->extract(queries, extracts.data());
    on_threads(handouts.size(), [&](size_t i) {
        if (!enough[i]) return;
        const auto own = std::span(extracts).subspan(firsts[i], handouts[i].n);
        enough[i] = handouts[i].sequence->hand_out(own, hyperparams().vocab_size);
    });
    std::vector<const Scheduler::Handout*> left;
    for (size_t i = 0; i < handouts.size(); ++i) {
        if (!enough[i]) left.push_back(&handouts[i]);
    }
    return left;
}

std::vector<std::byte> Engine::export_prefix(std::span<const uint32_t> ids, const Stop& stop) {
    std::vector<std::byte> bytes;
    exclusively(
        [&](const model::Backend& backend, const Stop&) {
            // Whole blocks only: the rest of another would be what somebody else left there.
            PrefixCache::Match known = scheduler_->prefix_cache().find(ids);
            if (known.n_more) kv_.remove_user(known.more);
            const Used used{kv_, std::move(known.blocks)};
            const size_t size = block_bytes();
            bytes.resize(used.blocks.size() * size);
            for (size_t i = 0; i < used.blocks.size(); ++i) backend.read_block(used.blocks[i], bytes.data() + i * size);
        },
        stop);
    return bytes;
}

void Engine::import_prefix(std::span<const uint32_t> ids, std::span<const std::byte> blocks, const Stop& stop) {
    const size_t size = block_bytes(), n = blocks.size() / size;
    if (blocks.size() != n * size || ids.size() != n * quant::kv_block_tokens)
        throw ArgumentError("the keys and values do not belong to as many tokens, or not to this model and cache type");
    if (ids.empty()) return;
    check_ids(ids);
    exclusively(
        [&](model::Backend& backend, const Stop&) {
            PrefixCache& cache = scheduler_->prefix_cache();
            if (!cache.evict(uint32_t(n))) throw ArgumentError("the cache has no room for these keys and values");
            Used taken{kv_, {}};
            taken.blocks.reserve(n);
            for (size_t i = 0; i < n; ++i) {
                taken.blocks.push_back(kv_.take());
                backend.write_block(taken.blocks.back(), blocks.data() + i * size);
            }
            cache.insert(ids, taken.blocks);
        },
        stop);
}

void Engine::collect_squares(std::span<const uint32_t> ids, float* logprobs, const Stop& stop,
                             model::InputSquares& squares) {
    check_ids(ids);
    const size_t v = hyperparams().vocab_size;
    const uint32_t n_batch = options_.backend.n_batch;
    // Log-probabilities of the tokens that follow some rows of the last batch, which begins with token `first`.
    const auto score = [&](uint32_t first, uint32_t row, uint32_t n_rows) {
        std::vector<uint32_t> rows(n_rows);
        std::iota(rows.begin(), rows.end(), row);
        backend_->project(rows, logits_.data());
        backend_->parallel_for(n_rows, [&](uint32_t begin, uint32_t end) {
            for (uint32_t r = begin; r < end; ++r) {
                const uint32_t token = first + row + r;
                logprobs[token] =
                    sampling::top_logprobs({logits_.data() + r * v, v}, 0, ids[token + 1], kernels_).chosen.logprob;
            }
        });
    };
    const auto pass = [&](const Stop& stopped) {
        // A sequence of its own, which nobody will look for.
        scheduler_->prefix_cache().clear();
        std::vector<uint32_t> blocks((ids.size() + quant::kv_block_tokens - 1) / quant::kv_block_tokens);
        std::iota(blocks.begin(), blocks.end(), 0u);
        logits_.resize(std::max(logits_.size(), rows_at_a_time * v));
        for (uint32_t first = 0; first < ids.size(); first += n_batch) {
            const uint32_t n = std::min(n_batch, uint32_t(ids.size()) - first);
            const model::Chunk chunk{0, n, first, blocks.data()};
            if (!backend_->forward({ids.subspan(first, n), {&chunk, 1}, {}, nullptr, &stopped}))
                throw model::Cancelled();
            // The last token predicts nothing known.
            const uint32_t wanted = std::min(n, uint32_t(ids.size()) - 1 - first);
            for (uint32_t row = 0; row < wanted; row += rows_at_a_time)
                score(first, row, std::min(rows_at_a_time, wanted - row));
        }
    };
    exclusively(
        [&](model::Backend& backend, const Stop& stopped) {
            struct Collecting {
                ~Collecting() { backend.collect_squares(nullptr); }
                model::Backend& backend;
            } const collecting{backend};
            backend.collect_squares(&squares);
            pass(stopped);
        },
        stop);
    squares.block_tokens += ids.size();
    squares.output_tokens += ids.size() - 1;
}

}  // namespace fixmin::engine
