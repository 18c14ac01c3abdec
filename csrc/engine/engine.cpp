#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "engine/machine.h"
#include "error.h"
#include "kernels/isa.h"

namespace fixmin::engine {
namespace {

// Rows of logits that exist at a time: 16 MiB for 65,536 tokens.
constexpr uint32_t rows_at_a_time = 64;

// A draft and the token before it are handed out together.
constexpr uint32_t max_draft = 31;

constexpr const char* closed = "the model was closed";

uint32_t checked_n_ctx(uint32_t wanted, const model::Hyperparams& hp) {
    if (wanted > hp.context_length) {
        throw ArgumentError("n_ctx is " + std::to_string(wanted) + " but the model was made for a context of " +
                            std::to_string(hp.context_length) + " tokens");
    }
    return wanted ? wanted : hp.context_length;
}

// Of the machine, or of the control group if that has less.
double memory_bytes() {
    const double bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
    return std::min(bytes, cgroup_limits().memory_bytes);
}

// The memory becomes resident as it is used.
uint32_t n_kv_blocks(const EngineOptions& options, uint32_t n_ctx, const model::Hyperparams& hp) {
    const size_t block_bytes = KvPool::block_bytes(hp, options.kv_type);
    const auto blocks = [](uint64_t positions) {
        return (positions + kernels::kv_block_tokens - 1) / kernels::kv_block_tokens;
    };
    if (options.n_kv == 0) {
        constexpr uint64_t countable = uint64_t(INT32_MAX) / kernels::kv_block_tokens;  // positions are numbered
        const double affordable = memory_bytes() * options.kv_memory_share / double(block_bytes);
        const uint64_t most = uint64_t(std::min(affordable, double(countable)));
        return uint32_t(std::max(blocks(n_ctx), std::min(blocks(uint64_t(n_ctx) * options.kv_contexts), most)));
    }
    if (options.n_kv < n_ctx) {
        throw ArgumentError("n_kv is " + std::to_string(options.n_kv) +
                            ": the cache must hold at least one context of " + std::to_string(n_ctx) + " tokens");
    }
    return uint32_t(blocks(options.n_kv));
}

// No more threads than there are CPUs for them, unless the environment wants them all: more are never faster.
TeamSize team_size(uint32_t n_threads) {
    const char* team = std::getenv("FIXMIN_TEAM");
    const std::string wanted = team && *team ? team : "auto";
    if (wanted == "fixed") return TeamSize(n_threads, true);
    if (wanted == "auto") return TeamSize(std::min(n_threads, usable_cpus()));
    throw ArgumentError("FIXMIN_TEAM is '" + wanted + "'; known: auto, fixed");
}

// A small file is packed faster than a thread is awaited that another process keeps from running.
model::Weights load(gguf::GgufFile file, ThreadPool& pool, const std::function<void(double)>& progress) {
    constexpr size_t alone = size_t(32) << 20;
    const uint32_t n_threads = file.bytes().size() < alone ? 1 : ThreadPool::all;
    const auto parallel_for = [&](uint32_t n, const auto& body) { pool.parallel_for(n, body, n_threads); };
    return model::load_weights(std::move(file), parallel_for, progress);
}

}  // namespace

Engine::Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress)
    : kernels_(options.isa.empty() ? kernels::default_kernels() : kernels::select(options.isa)),
      pool_(options.n_threads ? options.n_threads : default_threads()),
      team_size_(team_size(pool_.size())),
      weights_(load(std::move(file), pool_, progress)),
      n_ctx_(checked_n_ctx(options.n_ctx, weights_.hyperparams)),
      n_batch_(std::max(options.n_batch, 1u)),
      decoder_(weights_, kernels_, n_batch_, n_ctx_, pool_.size()),
      kv_(weights_.hyperparams, options.kv_type, n_kv_blocks(options, n_ctx_, weights_.hyperparams)),
      n_parallel_(std::clamp(options.n_parallel, 1u, n_batch_)) {
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
    scheduler_ =
        std::make_unique<Scheduler>(kv_, SchedulerLimits{n_ctx_, n_batch_, n_parallel_}, hyperparams(), kernels_);
    try {
        thread_ = std::thread([this] { serve(); });
    } catch (const std::system_error& error) {
        throw Error(std::string("the system starts no thread for the engine: ") + error.what());
    }
    owner_ = getpid();
}

void Engine::check_ids(std::span<const uint32_t> ids) const {
    if (ids.empty()) throw ArgumentError("there are no token ids");
    if (ids.size() > n_ctx_) {
        throw ContextLengthError(std::to_string(ids.size()) + " tokens do not fit the context of " +
                                 std::to_string(n_ctx_));
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
    if (options.generate && prompt.size() >= n_ctx_) {
        throw ContextLengthError("the prompt's " + std::to_string(prompt.size()) +
                                 " tokens leave no room for a new one in the context of " + std::to_string(n_ctx_));
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
    auto request = std::make_shared<Request>(n_requests_++, prompt, std::move(options), kernels_, std::move(mailbox));
    if (!stopped_) {
        const std::lock_guard lock(shared_->mutex);
        if (!shared_->quit) {
            shared_->arrived.push_back(request);
            shared_->changed.notify_all();
            return request;
        }
    }
    Scheduler::refuse(*request);
    return request;
}

void Engine::exclusively(const std::function<void(const Stop&)>& job, const Stop& stop) {
    start_thread();
    std::atomic<bool> stopped = false;
    const auto queued = std::make_shared<Job>();
    // The engine's own end is asked too: the calling thread may be the one that waits for it, in a signal handler.
    queued->run = [&] { job([&] { return stopped || stopped_; }); };
    std::future<void> ended = queued->ended.get_future();
    {
        if (stopped_) throw Error(closed);
        const std::lock_guard lock(shared_->mutex);
        if (shared_->quit) throw Error(closed);
        shared_->jobs.push_back(queued);
        shared_->changed.notify_all();
    }
    while (ended.wait_for(std::chrono::milliseconds(20)) != std::future_status::ready) {
        if (!stop || !stop()) continue;
        stopped = true;
        const std::lock_guard lock(shared_->mutex);
        if (std::erase(shared_->jobs, queued)) {
            shared_->changed.notify_all();
            throw Cancelled();  // it need not wait for its turn
        }
    }
    ended.get();
}

void Engine::clear_prefix_cache(const Stop& stop) {
    exclusively([this](const Stop&) { scheduler_->clear_prefix_cache(); }, stop);
}

EngineStats Engine::stats() const {
    const std::lock_guard lock(shared_->mutex);
    return shared_->stats;
}

// The engine's thread.
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
            for (auto& request : shared.arrived) scheduler_->add(std::move(request));
            shared.arrived.clear();
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
    std::deque<std::shared_ptr<Request>> arrived;
    std::deque<std::shared_ptr<Job>> jobs;
    {
        const std::lock_guard lock(shared_->mutex);
        arrived.swap(shared_->arrived);
        jobs.swap(shared_->jobs);
    }
    for (auto& request : arrived) scheduler_->add(std::move(request));
    scheduler_->end_all(FinishReason::cancelled);
    tell_ended();
    for (const auto& job : jobs) job->ended.set_exception(std::make_exception_ptr(Error(closed)));
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
    } catch (...) {
        // Nobody knows whose fault that was, and the next plan would be the same.
        scheduler_->end_all(FinishReason::cancelled, std::current_exception());
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
    decoder_.prepare_positions(step.end_position);
    const Stop given_up = [this] { return stopped_ || scheduler_->given_up(); };
    const model::Batch batch{step.ids, step.chunks, kv_.layout(), &given_up, nullptr};
    const size_t v = hyperparams().vocab_size;

    // Whole units, as many as there are logits for.
    struct Group {
        size_t begin, end;               // units
        std::span<const uint32_t> rows;  // of the batch
    };
    const auto group_from = [&](size_t begin) {
        size_t end = begin;
        uint32_t n_rows = 0;
        while (end < step.units.size() && (n_rows == 0 || n_rows + step.units[end].n <= rows_at_a_time))
            n_rows += step.units[end++].n;
        const size_t first = begin < step.units.size() ? step.units[begin].first : 0;
        if (logits_.size() < n_rows * v) logits_.resize(n_rows * v);
        return Group{begin, end, std::span(step.rows).subspan(first, n_rows)};
    };
    Group group = group_from(0);
    const double work = guessed_ns(weights_, batch, group.rows.size());
    const uint32_t n_threads = team_size_.choose(uint32_t(step.ids.size()), work);
    const auto hand_out = [&](const Group& group) {
        const auto some = [&](uint32_t begin, uint32_t end) {
            for (size_t i = group.begin + begin; i < group.begin + end; ++i) {
                const Scheduler::Unit& unit = step.units[i];
                scheduler_->hand_out(unit, logits_.data() + (unit.first - step.units[group.begin].first) * v);
            }
        };
        const uint32_t n = uint32_t(group.end - group.begin);
        if (n == 1)
            some(0, 1);
        else if (n > 1)
            pool_.parallel_for(n, some, n_threads);
    };

    if (!forward(batch, group.rows, n_threads)) return scheduler_->abandon(nullptr);
    weights_.check_readable();
    hand_out(group);
    while (group.end < step.units.size()) {
        group = group_from(group.end);
        pool_.run([&](model::Team& team) { decoder_.project(group.rows, logits_.data(), team); }, n_threads);
        hand_out(group);
    }
    scheduler_->finish();
}

// Logits of `rows` too, if there are any. False if the batch's should_stop said so.
bool Engine::forward(const model::Batch& batch, std::span<const uint32_t> rows, uint32_t n_threads) {
    std::atomic<bool> done = true;
    const auto start = std::chrono::steady_clock::now();
    pool_.run(
        [&](model::Team& team) {
            if (!decoder_.forward(batch, team))
                done = false;
            else if (!rows.empty())
                decoder_.project(rows, logits_.data(), team);
        },
        n_threads);
    if (done)
        team_size_.record(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
    return done;
}

std::vector<std::byte> Engine::export_prefix(std::span<const uint32_t> ids, const Stop& stop) {
    std::vector<std::byte> bytes;
    exclusively(
        [&](const Stop&) {
            // Whole blocks only: the rest of another would be what somebody else left there.
            const PrefixCache::Match known = scheduler_->prefix_cache().find(ids);
            const size_t size = kv_.block_bytes();
            bytes.reserve(known.blocks.size() * size);
            for (const uint32_t block : known.blocks) {
                bytes.insert(bytes.end(), kv_.data(block), kv_.data(block) + size);
                kv_.remove_user(block);
            }
            if (known.n_more) kv_.remove_user(known.more);
        },
        stop);
    return bytes;
}

void Engine::import_prefix(std::span<const uint32_t> ids, std::span<const std::byte> blocks, const Stop& stop) {
    const size_t size = kv_.block_bytes(), n = blocks.size() / size;
    if (blocks.size() != n * size || ids.size() != n * kernels::kv_block_tokens)
        throw ArgumentError("the keys and values do not belong to as many tokens, or not to this model and cache type");
    if (ids.empty()) return;
    check_ids(ids);
    exclusively(
        [&](const Stop&) {
            PrefixCache& cache = scheduler_->prefix_cache();
            if (!cache.evict(uint32_t(n))) throw ArgumentError("the cache has no room for these keys and values");
            std::vector<uint32_t> taken;
            for (size_t i = 0; i < n; ++i) {
                taken.push_back(kv_.take());
                std::memcpy(kv_.data(taken.back()), blocks.data() + i * size, size);
            }
            cache.insert(ids, taken);
            for (const uint32_t block : taken) kv_.remove_user(block);
        },
        stop);
}

void Engine::collect_squares(std::span<const uint32_t> ids, float* logprobs, const Stop& stop,
                             model::InputSquares& squares) {
    check_ids(ids);
    const size_t v = hyperparams().vocab_size;
    exclusively(
        [&](const Stop& stopped) {
            // A sequence of its own, which nobody will look for.
            scheduler_->clear_prefix_cache();
            std::vector<std::byte*> blocks;
            for (size_t i = 0; i * kernels::kv_block_tokens < ids.size(); ++i) blocks.push_back(kv_.data(uint32_t(i)));
            decoder_.prepare_positions(uint32_t(ids.size()));
            logits_.resize(std::max(logits_.size(), rows_at_a_time * v));
            for (uint32_t first = 0; first < ids.size(); first += n_batch_) {
                const uint32_t n = std::min(n_batch_, uint32_t(ids.size()) - first);
                const model::Chunk chunk{0, n, first, blocks.data()};
                const model::Batch batch{ids.subspan(first, n), {&chunk, 1}, kv_.layout(), &stopped, &squares};
                const uint32_t n_threads = team_size_.choose(n, guessed_ns(weights_, batch, 0));
                if (!forward(batch, {}, n_threads)) throw Cancelled();
                weights_.check_readable();
                // The last token predicts nothing known.
                const uint32_t wanted = std::min(n, uint32_t(ids.size()) - 1 - first);
                for (uint32_t row = 0; row < wanted; row += rows_at_a_time) {
                    std::vector<uint32_t> rows(std::min(rows_at_a_time, wanted - row));
                    std::iota(rows.begin(), rows.end(), row);
                    pool_.run([&](model::Team& team) { decoder_.project(rows, logits_.data(), team, &squares); },
                              n_threads);
                    const auto score = [&](uint32_t begin, uint32_t end) {
                        for (uint32_t r = begin; r < end; ++r) {
                            logprobs[first + row + r] =
                                top_logprobs({logits_.data() + r * v, v}, 0, ids[first + row + r + 1], kernels_)
                                    .chosen.logprob;
                        }
                    };
                    pool_.parallel_for(uint32_t(rows.size()), score, n_threads);
                }
            }
        },
        stop);
    squares.block_tokens += ids.size();
    squares.output_tokens += ids.size() - 1;
}

}  // namespace fixmin::engine
