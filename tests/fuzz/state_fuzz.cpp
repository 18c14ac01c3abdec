// Keys and values that come from outside, as from a saved state: whatever their bytes, sizes and tokens are, they are
// taken or refused, and the engine goes on. Those that it has given itself lead to the same logits as the text.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/engine.h"
#include "error.h"
#include "input.h"
#include "model_recipe.h"

namespace {

using namespace fixmin;
using engine::Engine;
using fuzz::Input;
using fuzz::require;

// One model for each type of cache, made once: what is tried stands in its prefix cache.
Engine& engine_of(uint32_t kv_type) {
    static Engine* engines[std::size(quant::all_kv_types)] = {};
    Engine*& engine = engines[kv_type];
    if (!engine) {
        const uint8_t choices[] = {1, 0, 1, 0, 0, 62, 0, 0, 0, 255};  // of model_recipe.h; zeros after them
        Input input(choices, sizeof choices);
        static const std::string file = written(fuzz::Recipe(input));
        gguf::GgufFile parsed = gguf::GgufFile::parse(std::as_bytes(std::span(file)));
        engine::EngineOptions options;
        options.backend.kv_type = quant::all_kv_types[kv_type];
        options.backend.n_threads = 1;
        options.backend.n_batch = 32;
        options.backend.n_kv = 160;
        engine = new Engine(std::move(parsed), options, [](double) {});
    }
    return *engine;
}

std::vector<float> last_logits(Engine& engine, const std::vector<uint32_t>& ids, bool prefix_cache) {
    std::vector<float> logits(engine.hyperparams().vocab_size);
    engine::RequestOptions options;
    options.generate = false;
    options.logit_rows = {uint32_t(ids.size() - 1)};
    options.logits = logits.data();
    options.prefix_cache = prefix_cache;
    const auto request = engine.submit(ids, std::move(options));
    require(request->wait_end(60), "a request ends");
    require(!request->result().error && request->result().reason == engine::FinishReason::length, "it ends well");
    return logits;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    Engine& engine = engine_of(input.below(3));
    const uint32_t v = engine.hyperparams().vocab_size, n_ctx = engine.n_ctx();
    engine.clear_prefix_cache({});

    std::vector<uint32_t> ids(1 + input.byte() % n_ctx);
    const uint8_t first = input.byte(), period = 1 + input.below(40);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = (first + i % period * 7) % v;
    const std::vector<float> want = last_logits(engine, ids, input.flag());
    std::vector<std::byte> blocks = engine.export_prefix(ids, {});
    require(blocks.size() % engine.block_bytes() == 0, "whole blocks are given");
    std::vector<uint32_t> named(ids.begin(),
                                ids.begin() + ptrdiff_t(blocks.size() / engine.block_bytes() * quant::kv_block_tokens));

    bool genuine = true;
    for (uint32_t changes = input.below(6); changes > 0; --changes) {
        genuine = false;
        switch (input.below(6)) {
            case 0:
                if (!blocks.empty()) blocks[input.number<uint32_t>() % blocks.size()] = std::byte(input.byte());
                break;
            case 1: blocks.resize(blocks.size() - std::min<size_t>(blocks.size(), input.number<uint16_t>())); break;
            case 2: blocks.resize(blocks.size() + (input.flag() ? engine.block_bytes() : input.byte())); break;
            case 3:
                named.resize(named.size() - std::min<size_t>(named.size(), input.flag() ? 32 : input.byte()));
                break;
            case 4: named.resize(named.size() + (input.flag() ? 32 : input.byte())); break;
            default:
                if (!named.empty())
                    named[input.byte() % named.size()] = input.flag() ? input.byte() : input.number<uint32_t>();
        }
    }
    if (input.flag()) engine.clear_prefix_cache({});
    // Exactly as many bytes as there are, so that a read of one too many shows.
    const std::unique_ptr<std::byte[]> exact(new std::byte[blocks.size()]);
    if (!blocks.empty()) std::memcpy(exact.get(), blocks.data(), blocks.size());
    try {
        engine.import_prefix(named, {exact.get(), blocks.size()}, {});
        require(blocks.size() == named.size() / quant::kv_block_tokens * engine.block_bytes() &&
                    named.size() % quant::kv_block_tokens == 0,
                "sizes that do not belong together are refused");
        require(std::ranges::all_of(named, [&](uint32_t id) { return id < v; }), "ids outside are refused");
    } catch (const Error&) {  // ContextLengthError too
        require(!genuine, "what was given is taken back");
    }
    const std::vector<float> got = last_logits(engine, ids, true);
    if (genuine) require(got == want, "a state leads to the same logits");
    require(last_logits(engine, ids, false) == want, "a state changes nothing for those that do not use it");
    const engine::EngineStats stats = engine.stats();
    require(stats.n_free_blocks + stats.n_cached_blocks == stats.n_blocks, "no block is lost");
    return 0;
}
