#include "model/backend.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace fixmin::model {

size_t kv_block_bytes(const Hyperparams& hp, quant::KvType type) {
    return size_t(hp.block_count) * hp.head_count_kv * quant::kv_head_bytes(type, hp.head_dim);
}

void Backend::extract(std::span<const numerics::ExtractQuery>, numerics::Extract*) {
    throw UnsupportedError("this device makes no extracts of logits");
}

void Backend::read_logits(uint32_t, uint32_t, float*) { throw UnsupportedError("this device keeps no logits"); }

// The memory becomes resident as it is used.
uint32_t n_kv_blocks(const BackendOptions& options, const Hyperparams& hp, double memory_bytes) {
    const uint32_t n_ctx = options.n_ctx;
    const auto blocks = [](uint64_t positions) {
        return (positions + quant::kv_block_tokens - 1) / quant::kv_block_tokens;
    };
    if (options.n_kv == 0) {
        constexpr uint64_t countable = uint64_t(INT32_MAX) / quant::kv_block_tokens;  // positions are numbered
        const double affordable = memory_bytes * options.kv_memory_share / double(kv_block_bytes(hp, options.kv_type));
        const uint64_t most = uint64_t(std::min(affordable, double(countable)));
        return uint32_t(std::max(blocks(n_ctx), std::min(blocks(uint64_t(n_ctx) * options.kv_contexts), most)));
    }
    if (options.n_kv < n_ctx) {
        throw ArgumentError("n_kv is " + std::to_string(options.n_kv) +
                            ": the cache must hold at least one context of " + std::to_string(n_ctx) + " tokens");
    }
    // Of the host it would be taken page by page as it is used, and end the process when there is no more.
    const double bytes = double(blocks(options.n_kv)) * double(kv_block_bytes(hp, options.kv_type));
    if (bytes > memory_bytes) {
        const auto shown = [](double n) { return std::to_string(uint64_t(n)); };
        throw OutOfMemory("n_kv is " + shown(options.n_kv) + ": such a cache takes " + shown(bytes) +
                          " bytes, more than all the memory, " + shown(memory_bytes));
    }
    return uint32_t(blocks(options.n_kv));
}

}  // namespace fixmin::model
