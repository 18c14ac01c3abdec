// What the threads could do at best: the denominators of `fixmin bench`.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/cpu_backend.h"
#include "error.h"
#include "model/pages.h"

namespace fixmin::cpu {

using threads::Team;

namespace {

double seconds(const auto& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Work per second: seconds() of it in each pass.
std::vector<double> rates(double work, uint32_t passes, const model::Stop& stop, const auto& run) {
    std::vector<double> rates;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        if (stop()) throw model::Cancelled();
        rates.push_back(work / run());
    }
    return rates;
}

}  // namespace

std::vector<double> CpuBackend::read_ceiling(size_t n_bytes, uint32_t passes, const model::Stop& stop) {
    constexpr size_t page = 4096;
    const size_t n_pages = n_bytes / page;
    if (n_pages < pool_.size()) throw ArgumentError("a read of fewer than 4096 bytes for each thread says nothing");
    if (n_pages > UINT32_MAX) throw ArgumentError("the read is larger than 16 TiB");
    const model::Pages buffer(n_pages * page, "what is read");
    pool_.parallel_for(uint32_t(n_pages), [&](uint32_t begin, uint32_t end) {
        std::memset(buffer.data() + begin * page, 1, (end - begin) * page);
    });
    // A small buffer is read again and again: one wake of the threads must not be what is measured.
    const uint64_t rounds = std::max<uint64_t>(1, (size_t(256) << 20) / (n_pages * page));
    const auto read = [&](Team& team) {
        for (uint64_t r = 0; r < rounds; ++r) {
            team.for_pieces(uint32_t(n_pages), [&](uint32_t begin, uint32_t end) {
                kernels_.ceilings.read(buffer.data() + begin * page, (end - begin) * page);
            });
            team.barrier();
        }
    };
    return rates(double(rounds) * double(n_pages * page), passes, stop,
                 [&] { return seconds([&] { pool_.run(read); }); });
}

std::vector<double> CpuBackend::int8_ceiling(uint32_t passes, const model::Stop& stop) {
    return multiply_ceiling(kernels_.ceilings.multiply, kernels_.ceilings.int8_operations, passes, stop);
}

std::vector<double> CpuBackend::tile_ceiling(uint32_t passes, const model::Stop& stop) {
    if (!kernels_.ceilings.multiply_tiles) return {};
    return multiply_ceiling(kernels_.ceilings.multiply_tiles, kernels_.ceilings.tile_operations, passes, stop);
}

std::vector<double> CpuBackend::multiply_ceiling(void (*multiply)(uint64_t), uint32_t operations, uint32_t passes,
                                                 const model::Stop& stop) {
    // In pieces, as the model's work is shared: else a slow core would lower the ceiling of all.
    constexpr uint32_t pieces = 256;
    const auto run = [&](uint64_t rounds) {
        return seconds([&] {
            pool_.run([&](Team& team) {
                team.for_pieces(pieces * pool_.size(),
                                [&](uint32_t begin, uint32_t end) { multiply(rounds / pieces * (end - begin)); });
            });
        });
    };
    uint64_t rounds = pieces * 8;
    while (run(rounds) < 0.025) rounds *= 2;
    return rates(double(rounds) * operations * pool_.size(), passes, stop, [&] { return run(rounds); });
}

std::vector<double> CpuBackend::launch_ceiling(uint32_t passes, const model::Stop& stop) {
    constexpr uint32_t parts = 1000;
    std::vector<double> times;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        if (stop()) throw model::Cancelled();
        const double time = seconds([&] {
            pool_.run([&](Team& team) {
                for (uint32_t i = 0; i < parts; ++i) {
                    team.for_pieces(pool_.size(), [](uint32_t, uint32_t) {});
                    team.barrier();
                }
            });
        });
        times.push_back(time / parts);
    }
    return times;
}

}  // namespace fixmin::cpu
