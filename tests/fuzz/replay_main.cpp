// A plain driver for gguf_fuzz.cpp, for machines without libFuzzer:
//   g++ -std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
//       tests/fuzz/gguf_fuzz.cpp tests/fuzz/gguf_fuzz_main.cpp csrc/gguf/gguf_file.cpp
//   ./a.out RUNS SEED FILE...
// Replays each file, all its truncations, and RUNS random mutations of it; the same arguments give the same
// cases. A case that crashes is left in crash.bin in the working directory, to be replayed with RUNS = 0.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

struct Counts {
    uint64_t accepted = 0;
    uint64_t refused = 0;
};

const Bytes* g_current = nullptr;  // the case that is running

void save_current_case() {
    if (g_current == nullptr) return;
    std::ofstream file("crash.bin", std::ios::binary);
    file.write(reinterpret_cast<const char*>(g_current->data()), static_cast<std::streamsize>(g_current->size()));
}

void on_abort(int) { save_current_case(); }

void run(const Bytes& input, Counts& counts) {
    g_current = &input;
    // Exactly `size` bytes on the heap, so that the sanitizer sees a read of one byte too many.
    const auto exact = std::make_unique<uint8_t[]>(input.size());
    if (!input.empty()) std::memcpy(exact.get(), input.data(), input.size());
    try {
        (LLVMFuzzerTestOneInput(exact.get(), input.size()) == 0 ? counts.accepted : counts.refused) += 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "escaped: %s\n", error.what());
        std::abort();
    }
    g_current = nullptr;
}

uint64_t interesting_number(Random& random) {
    static constexpr uint64_t kNumbers[] = {
        0,          1,          2,          3,          4,          5,          7,          8,          9,
        12,         13,         16,         24,         31,         32,         33,         39,         42,
        43,         64,         65,         255,        256,        65535,      65536,      1u << 20,   1u << 21,
        1u << 22,   1u << 30,   0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 40, 1ull << 60, 1ull << 61,
        1ull << 62, 1ull << 63, ~0ull >> 1, ~0ull - 7,  ~0ull - 31, ~0ull};
    return kNumbers[random() % std::size(kNumbers)];
}

/// One to eight small changes of `input`, of the kinds that break parsers: bits, bytes, numbers, lengths,
/// moved pieces.
Bytes mutate(Bytes input, Random& random) {
    const auto position = [&](size_t span) { return input.size() < span ? 0 : random() % (input.size() - span + 1); };
    for (uint64_t changes = 1 + random() % 8; changes-- > 0 && input.size() >= 16;) {
        switch (random() % 6) {
            case 0: input[position(1)] ^= static_cast<uint8_t>(1u << random() % 8); break;
            case 1: input[position(1)] = static_cast<uint8_t>(random()); break;
            case 2:
            case 3: {
                const size_t width = random() % 2 ? 8 : 4;
                const uint64_t number = interesting_number(random);
                std::memcpy(&input[position(width)], &number, width);
                break;
            }
            case 4: {  // a number made slightly larger or smaller
                const size_t at = position(8);
                uint64_t number = 0;
                std::memcpy(&number, &input[at], 8);
                number += random() % 65 - 32;
                std::memcpy(&input[at], &number, 8);
                break;
            }
            default: {  // a piece removed, or inserted once more elsewhere
                const size_t size = 1 + random() % 16;
                if (input.size() < 2 * size) break;
                const auto at = input.begin() + static_cast<std::ptrdiff_t>(position(size));
                if (random() % 2) {
                    input.erase(at, at + static_cast<std::ptrdiff_t>(size));
                } else {
                    const Bytes piece(at, at + static_cast<std::ptrdiff_t>(size));
                    input.insert(input.begin() + static_cast<std::ptrdiff_t>(position(1)), piece.begin(), piece.end());
                }
            }
        }
    }
    return input;
}

}  // namespace

// Of the sanitizers' runtime, if there is one: called before it ends the process.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s RUNS SEED FILE...\n", argv[0]);
        return 2;
    }
    const uint64_t runs = std::strtoull(argv[1], nullptr, 10);
    Random random(std::strtoull(argv[2], nullptr, 10));
    Counts counts;
    std::signal(SIGABRT, on_abort);
    if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(save_current_case);
    for (int i = 3; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "cannot read %s\n", argv[i]);
            return 2;
        }
        const Bytes seed((std::istreambuf_iterator<char>(file)), {});
        run(seed, counts);
        for (size_t size = 0; runs > 0 && size < seed.size(); ++size) {
            run(Bytes(seed.begin(), seed.begin() + static_cast<std::ptrdiff_t>(size)), counts);
        }
        for (uint64_t k = 0; k < runs; ++k) run(mutate(seed, random), counts);
    }
    std::printf("accepted %llu refused %llu\n", static_cast<unsigned long long>(counts.accepted),
                static_cast<unsigned long long>(counts.refused));
    return 0;
}
