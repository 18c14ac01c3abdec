// A model file from its bytes to the first tokens. The input says how a small model of any kind is made and how its
// file is then spoiled: values of keys, shapes, types, names, data, and bytes anywhere. What the loader takes has to
// run: the same logits token by token as all at once, on two instruction sets and with two caches side by side.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "cpu/cpu_backend.h"
#include "error.h"
#include "gguf/gguf_file.h"
#include "input.h"
#include "model_recipe.h"

namespace {

using namespace fixmin;
using fuzz::Input;
using fuzz::Key;
using fuzz::raw;
using fuzz::Recipe;
using fuzz::require;
using fuzz::Tensor;
using fuzz::text;
using gguf::ValueType;

uint64_t odd_count(Input& input) {
    static constexpr uint64_t counts[] = {0,
                                          1,
                                          2,
                                          3,
                                          31,
                                          32,
                                          33,
                                          256,
                                          1u << 16,
                                          1u << 20,
                                          (1u << 20) + 1,
                                          1u << 28,
                                          1u << 31,
                                          ~0u,
                                          1ull << 32,
                                          1ull << 61,
                                          1ull << 62,
                                          1ull << 63,
                                          ~0ull,
                                          133'000,
                                          133'120};
    return input.flag() ? input.byte() : counts[input.below(uint32_t(std::size(counts)))];
}

void spoil(Recipe& recipe, Input& input) {
    auto& keys = recipe.keys;
    auto& tensors = recipe.tensors;
    const auto key = [&]() -> Key& { return keys[input.byte() % keys.size()]; };
    const auto tensor = [&]() -> Tensor& { return tensors[input.byte() % tensors.size()]; };
    for (uint32_t changes = input.below(4); changes-- > 0 && !keys.empty() && !tensors.empty();) {
        switch (input.below(16)) {
            case 0: key().value = raw(uint32_t(odd_count(input))); break;
            case 1: key() = {key().name, ValueType::u64, raw(odd_count(input))}; break;
            case 2: key() = {key().name, ValueType::f32, raw(input.real())}; break;
            case 3: {
                Key& changed = key();
                const std::vector<uint8_t> word = input.bytes(input.below(20));
                changed = {changed.name, ValueType::string, text(std::string(word.begin(), word.end()))};
                break;
            }
            case 4: keys.erase(keys.begin() + input.byte() % ptrdiff_t(keys.size())); break;
            case 5: keys.push_back(key()); break;
            case 6: {
                Tensor& t = tensor();
                t.ne[input.byte() % t.ne.size()] = odd_count(input);
                break;
            }
            case 7: tensor().type = input.below(45); break;
            case 8: tensors.erase(tensors.begin() + input.byte() % ptrdiff_t(tensors.size())); break;
            case 9: std::swap(tensor().name, tensor().name); break;
            case 10: tensor().ne.push_back(1 + input.below(3)); break;
            case 11: {
                Tensor& t = tensor();
                const std::vector<uint8_t> patch = input.bytes(1 + input.below(8));
                if (t.data.empty()) break;
                const size_t at = input.number<uint16_t>() % t.data.size();
                std::memcpy(&t.data[at], patch.data(), std::min(patch.size(), t.data.size() - at));
                break;
            }
            case 12: std::swap(tensor().ne, tensor().ne); break;
            case 13: std::swap(key().value, key().value); break;
            case 14: {
                Tensor& t = tensor();
                for (char& c : t.data) c = char(input.byte());
                break;
            }
            default: {
                Key& changed = key();
                if (!changed.value.empty())
                    changed.value[input.number<uint16_t>() % changed.value.size()] ^= char(input.byte());
            }
        }
    }
}

// [T][V] logits of a batch, or of one token after the other; nothing if the model's numbers overflow.
std::vector<float> logits(cpu::CpuBackend& backend, const std::vector<uint32_t>& ids, bool at_once) {
    const uint32_t n = uint32_t(ids.size()), v = backend.weights().hyperparams.vocab_size;
    const std::vector<uint32_t> blocks{0, 1, 2};
    std::vector<float> out(size_t(n) * v);
    std::vector<uint32_t> rows(n);
    for (uint32_t i = 0; i < n; ++i) rows[i] = at_once ? i : 0;
    const uint32_t step = at_once ? n : 1;
    for (uint32_t p = 0; p < n; p += step) {
        const model::Chunk chunk{0, step, p, blocks.data()};
        require(backend.forward(
                    {std::span(ids).subspan(p, step), {&chunk, 1}, std::span(rows).first(step), &out[p * size_t(v)]}),
                "nobody stopped it");
    }
    return out;
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
    // Where numbers overflow, a NaN is as good as another.
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    Recipe recipe(input);
    spoil(recipe, input);
    std::string file = written(recipe);
    if (input.below(8) == 7) file.resize(file.size() - std::min<size_t>(file.size(), input.number<uint16_t>()));
    for (uint32_t changes = input.below(8) == 7 ? input.below(8) : 0; changes > 0 && !file.empty(); --changes)
        file[input.number<uint32_t>() % std::min<size_t>(file.size(), 4096)] = char(input.byte());
    const std::unique_ptr<std::byte[]> exact(new std::byte[file.size()]);
    std::memcpy(exact.get(), file.data(), file.size());
    const std::span<const std::byte> bytes(exact.get(), file.size());

    std::vector<float> first;
    try {
        model::BackendOptions options;
        options.kv_type = quant::all_kv_types[input.below(3)];
        options.n_threads = 1;
        options.n_batch = 8;
        const auto open = [&](const char* isa) {
            gguf::GgufFile parsed = gguf::GgufFile::parse(bytes);
            options.n_ctx = std::min(model::read_hyperparams(parsed).context_length, 96u);
            options.n_kv = 96;
            options.isa = isa;
            return std::make_unique<cpu::CpuBackend>(std::move(parsed), options, [](double) {});
        };
        const auto backend = open("");
        std::vector<uint32_t> ids;
        const uint32_t n_ids = std::min(options.n_ctx, 6 - input.below(6));
        while (ids.size() < n_ids) ids.push_back(input.number<uint32_t>() % backend->weights().hyperparams.vocab_size);
        first = logits(*backend, ids, true);
        require(equal(first, logits(*backend, ids, false)), "token by token gives the same logits");
        if (input.flag())
            require(equal(first, logits(*open("scalar"), ids, true)), "instruction sets give the same logits");
    } catch (const GgufError& error) {
        require(*error.what() != '\0', "an error has a message");
        return 0;
    } catch (const UnsupportedError&) {
        return 0;
    } catch (const ArgumentError&) {
        return 0;
    } catch (const std::bad_alloc&) {
        require(false, "a small file asks for little memory");
    }
    return 0;
}
