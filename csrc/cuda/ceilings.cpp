// What the GPU could do at best: the denominators of `fixmin bench`.
#include <chrono>

#include "cuda/cuda_backend.h"
#include "error.h"

namespace fixmin::cuda {
namespace {

// Of `pass`, and of everything that it has launched.
double seconds(Device& device, const auto& pass) {
    device.wait();
    const auto start = std::chrono::steady_clock::now();
    pass();
    device.wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::vector<double> CudaBackend::read_ceiling(size_t n_bytes, uint32_t passes, const model::Stop& stop) {
    n_bytes = n_bytes / 16 * 16;
    if (n_bytes == 0) throw ArgumentError("a read of fewer than 16 bytes says nothing");
    const DeviceBuffer buffer(*device_, "what is read", n_bytes), sink(*device_, "what is read", sizeof(int));
    const uint32_t blocks = device_->info().multiprocessors * 8;
    const auto run = [&](uint32_t rounds) {
        return seconds(*device_, [&] {
            for (uint32_t i = 0; i < rounds; ++i) {
                device_->launch(Kernel::read_all, {blocks, 1, ceiling_threads},
                                ReadArgs{buffer.data(), n_bytes, sink.as<int>()});
            }
        });
    };
    // A small buffer is read again and again: one launch must not be what is measured.
    uint32_t rounds = 1;
    while (run(rounds) < 0.002) rounds *= 2;
    std::vector<double> rates;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        if (stop()) throw model::Cancelled();
        rates.push_back(double(rounds) * double(n_bytes) / run(rounds));
    }
    return rates;
}

std::vector<double> CudaBackend::int8_ceiling(uint32_t passes, const model::Stop& stop) {
    const DeviceBuffer sink(*device_, "what is multiplied", sizeof(int));
    const uint32_t blocks = device_->info().multiprocessors * 4;
    const auto run = [&](uint32_t rounds) {
        return seconds(*device_, [&] {
            device_->launch(Kernel::multiply_all, {blocks, 1, ceiling_threads}, MultiplyArgs{rounds, sink.as<int>()});
        });
    };
    uint32_t rounds = 1;
    while (run(rounds) < 0.025 && rounds < 1u << 30) rounds *= 2;
    constexpr double operations = 2.0 * 16 * 8 * 32 * ceiling_chains * ceiling_threads / 32;  // of a block and round
    std::vector<double> rates;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        if (stop()) throw model::Cancelled();
        rates.push_back(operations * blocks * rounds / run(rounds));
    }
    return rates;
}

std::vector<double> CudaBackend::launch_ceiling(uint32_t passes, const model::Stop& stop) {
    constexpr uint32_t parts = 250;  // eight a layer
    const DeviceBuffer sink(*device_, "what is read", sizeof(int));
    const auto recording = device_->prepare(device_->record([&] {
        for (uint32_t i = 0; i < parts; ++i)
            device_->launch(Kernel::read_all, {device_->info().multiprocessors, 1, ceiling_threads},
                            ReadArgs{sink.data(), 0, sink.as<int>()});
    }));
    device_->run(*recording);
    std::vector<double> times;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        if (stop()) throw model::Cancelled();
        times.push_back(seconds(*device_, [&] { device_->run(*recording); }) / parts);
    }
    return times;
}

}  // namespace fixmin::cuda
