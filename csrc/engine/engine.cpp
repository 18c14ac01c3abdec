#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "error.h"
#include "kernels/isa.h"

namespace fixmin::engine {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Rows of logits that exist at a time while scoring: 16 MiB for 65,536 tokens.
constexpr uint32_t score_rows = 64;

uint32_t checked_n_ctx(uint32_t wanted, const model::Hyperparams& hp) {
    if (wanted > hp.context_length) {
        throw ArgumentError("n_ctx is " + std::to_string(wanted) + " but the model was made for a context of " +
                            std::to_string(hp.context_length) + " tokens");
    }
    return wanted ? wanted : hp.context_length;
}

}  // namespace

Engine::Engine(gguf::GgufFile file, const EngineOptions& options, const std::function<void(double)>& progress)
    : kernels_(options.isa.empty() ? kernels::default_kernels() : kernels::select(options.isa)),
      pool_(options.n_threads ? options.n_threads : default_threads()),
      weights_(model::load_weights(
          std::move(file), [this](uint32_t n, const auto& body) { pool_.parallel_for(n, body); }, progress)),
      n_ctx_(checked_n_ctx(options.n_ctx, weights_.hyperparams)),
      n_batch_(std::clamp(options.n_batch, 1u, n_ctx_)),
      decoder_(weights_, kernels_, n_batch_, n_ctx_, pool_.size()),
      kv_(weights_.hyperparams, options.kv_type, n_ctx_) {}

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

bool Engine::run_chunk(const model::Pass& pass) {
    decoder_.prepare_positions(pass.position + uint32_t(pass.ids.size()));
    std::atomic<bool> done = true;
    pool_.run([&](model::Team& team) {
        if (!decoder_.forward(pass, team)) done = false;
    });
    return done;
}

// The whole sequence from position 0 in chunks; after_chunk(first, n) sees each chunk while its rows are in the
// decoder.
bool Engine::run_all(std::span<const uint32_t> ids, uint32_t hidden_layer, float* hidden, const Stop& stop,
                     const AfterChunk& after_chunk, model::InputSquares* squares) {
    for (uint32_t first = 0; first < ids.size(); first += n_batch_) {
        const uint32_t n = std::min(n_batch_, uint32_t(ids.size()) - first);
        float* rows = hidden ? hidden + size_t(first) * hyperparams().embedding_length : nullptr;
        if (!run_chunk({ids.subspan(first, n), first, kv_.view(), hidden_layer, rows, stop ? &stop : nullptr, squares}))
            return false;
        if (after_chunk) after_chunk(first, n);
    }
    return true;
}

void Engine::project(uint32_t first, uint32_t n, float* logits, model::InputSquares* squares) {
    pool_.run([&](model::Team& team) { decoder_.project(first, n, logits, team, squares); });
}

void Engine::logits(std::span<const uint32_t> ids, bool last_only, float* out, const Stop& stop) {
    check_ids(ids);
    const std::lock_guard lock(mutex_);
    const size_t v = hyperparams().vocab_size;
    const bool done = run_all(ids, 0, nullptr, stop, [&](uint32_t first, uint32_t n) {
        if (!last_only)
            project(0, n, out + first * v);
        else if (first + n == ids.size())
            project(n - 1, 1, out);
    });
    if (!done) throw Cancelled();
}

void Engine::hidden_states(std::span<const uint32_t> ids, uint32_t layer, float* out, const Stop& stop) {
    check_ids(ids);
    if (layer > hyperparams().block_count) {
        throw ArgumentError("layer is " + std::to_string(layer) + "; it must lie in 0.." +
                            std::to_string(hyperparams().block_count));
    }
    const std::lock_guard lock(mutex_);
    if (!run_all(ids, layer, out, stop, {})) throw Cancelled();
}

void Engine::score(std::span<const uint32_t> ids, float* out, const Stop& stop, model::InputSquares* squares) {
    check_ids(ids);
    const std::lock_guard lock(mutex_);
    const size_t v = hyperparams().vocab_size;
    std::vector<float> logits(std::min<size_t>(score_rows, n_batch_) * v);
    const bool done = run_all(
        ids, 0, nullptr, stop,
        [&](uint32_t first, uint32_t n) {
            const uint32_t wanted =
                std::min(n, uint32_t(ids.size()) - 1 - first);  // the last token predicts nothing known
            for (uint32_t row = 0; row < wanted; row += score_rows) {
                const uint32_t rows = std::min(score_rows, wanted - row);
                project(row, rows, logits.data(), squares);
                pool_.parallel_for(rows, [&](uint32_t begin, uint32_t end) {
                    for (uint32_t r = begin; r < end; ++r) {
                        float highest, sum;
                        kernels_.softmax_stats(logits.data() + r * v, uint32_t(v), &highest, &sum);
                        const float target = logits[r * v + ids[first + row + r + 1]];
                        out[first + row + r] = float(double(target) - highest - std::log(double(sum)));
                    }
                });
            }
        },
        squares);
    if (!done) throw Cancelled();
    if (squares) {
        squares->block_tokens += ids.size();
        squares->output_tokens += ids.size() - 1;
    }
}

Generation Engine::generate(std::span<const uint32_t> prompt, const SamplingParams& params,
                            const std::function<bool(uint32_t)>& on_token, const Stop& stop) {
    check_ids(prompt);
    if (prompt.size() >= n_ctx_) {
        throw ContextLengthError("the prompt's " + std::to_string(prompt.size()) +
                                 " tokens leave no room for a new one in the context of " + std::to_string(n_ctx_));
    }
    const std::lock_guard lock(mutex_);
    Generation result;
    std::vector<float> logits(hyperparams().vocab_size);
    Sampler sampler(params, prompt, kernels_);
    const uint32_t room = std::min(params.max_new_tokens, n_ctx_ - uint32_t(prompt.size()));

    Clock::time_point start = Clock::now();
    const bool filled = run_all(prompt, 0, nullptr, stop, [&](uint32_t first, uint32_t n) {
        if (first + n == prompt.size()) project(n - 1, 1, logits.data());
    });
    result.prefill_seconds = seconds_since(start);
    if (!filled) {
        result.reason = FinishReason::cancelled;
        return result;
    }

    start = Clock::now();
    const auto finish = [&](FinishReason reason) {
        result.reason = reason;
        result.decode_seconds = seconds_since(start);
        return result;
    };
    for (uint32_t step = 0; step < room; ++step) {
        if (stop && stop()) return finish(FinishReason::cancelled);
        const uint32_t id = sampler.sample(logits, step);
        sampler.accept(id);
        if (std::find(params.stop_ids.begin(), params.stop_ids.end(), id) != params.stop_ids.end()) {
            return finish(FinishReason::eos);
        }
        result.ids.push_back(id);
        if (on_token && !on_token(id)) return finish(FinishReason::stop);
        if (step + 1 == room) break;
        const uint32_t position = uint32_t(prompt.size()) + step;
        const model::Pass pass{{&id, 1}, position, kv_.view(), 0, nullptr, stop ? &stop : nullptr, nullptr};
        decoder_.prepare_positions(position + 1);
        std::atomic<bool> done = true;
        pool_.run([&](model::Team& team) {
            if (decoder_.forward(pass, team))
                decoder_.project(0, 1, logits.data(), team);
            else
                done = false;
        });
        if (!done) return finish(FinishReason::cancelled);
    }
    return finish(FinishReason::length);
}

}  // namespace fixmin::engine
