#include "cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>

#include "error.h"
#include "kernels/isa.h"
#include "quant/panels.h"
#include "threads/machine.h"

namespace fixmin::cpu {
namespace {

constexpr model::Packing packing = {quant::panel_rows, quant::panel_bytes, quant::pack_panel};

// No more threads than there are CPUs for them, unless the environment wants them all: more are never faster.
TeamSize team_size(uint32_t n_threads) {
    const char* team = std::getenv("FIXMIN_TEAM");
    const std::string wanted = team && *team ? team : "auto";
    if (wanted == "fixed") return TeamSize(n_threads, true);
    if (wanted == "auto") return TeamSize(std::min(n_threads, threads::usable_cpus()));
    throw ArgumentError("FIXMIN_TEAM is '" + wanted + "'; known: auto, fixed");
}

// A small file is packed faster than a thread is awaited that another process keeps from running.
model::Weights load(gguf::GgufFile file, threads::ThreadPool& pool, const std::function<void(double)>& progress) {
    constexpr size_t alone = size_t(32) << 20;
    const uint32_t n_threads = file.bytes().size() < alone ? 1 : threads::ThreadPool::all;
    const auto parallel_for = [&](uint32_t n, const auto& body) { pool.parallel_for(n, body, n_threads); };
    return model::load_weights(std::move(file), packing, parallel_for, progress);
}

// As a batch is used they would become resident, and the process could be ended for it.
uint32_t batch_tokens(uint32_t n_batch, const model::Hyperparams& hp) {
    const double bytes = double(n_batch) * double(Decoder::bytes_per_token(hp)), memory = threads::memory_bytes();
    if (bytes <= memory) return n_batch;
    const auto shown = [](double n) { return std::to_string(uint64_t(n)); };
    throw OutOfMemory("n_batch is " + std::to_string(n_batch) + ": its buffers take " + shown(bytes) +
                      " bytes, more than all the memory, " + shown(memory));
}

}  // namespace

CpuBackend::CpuBackend(gguf::GgufFile file, const model::BackendOptions& options,
                       const std::function<void(double)>& progress)
    : kernels_(options.isa.empty() ? kernels::default_kernels() : kernels::select(options.isa)),
      pool_(options.n_threads ? options.n_threads : threads::default_threads()),
      team_size_(team_size(pool_.size())),
      weights_(load(std::move(file), pool_, progress)),
      kv_(weights_.hyperparams, options.kv_type, n_kv_blocks(options, weights_.hyperparams, threads::memory_bytes())),
      decoder_(weights_, kernels_, kv_, batch_tokens(options.n_batch, weights_.hyperparams), options.n_ctx,
               pool_.size()) {}

bool CpuBackend::forward(const model::Batch& batch) {
    uint32_t end = 0;
    for (const model::Chunk& chunk : batch.chunks) end = std::max(end, chunk.position + chunk.n_tokens);
    decoder_.prepare_positions(end);
    n_threads_ = team_size_.choose(uint32_t(batch.ids.size()), guessed_ns(weights_, batch));
    std::atomic<bool> done = true;
    const auto start = std::chrono::steady_clock::now();
    pool_.run(
        [&](Team& team) {
            if (!decoder_.forward(batch, team, squares_))
                done = false;
            else if (!batch.rows.empty())
                decoder_.project(batch.rows, batch.logits, team, squares_);
        },
        n_threads_);
    if (!done) return false;
    team_size_.record(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
    weights_.check_readable();
    return true;
}

void CpuBackend::project(std::span<const uint32_t> rows, float* logits) {
    pool_.run([&](Team& team) { decoder_.project(rows, logits, team, squares_); }, n_threads_);
}

model::Description CpuBackend::description() const {
    return {"cpu", kernels::cpu_name(), kernels_.name, pool_.size(), size_t(threads::memory_bytes())};
}

void CpuBackend::parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body) {
    pool_.parallel_for(n, body, n_threads_);
}

}  // namespace fixmin::cpu
