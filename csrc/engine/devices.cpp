#include "engine/devices.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "cpu/cpu_backend.h"
#include "error.h"
#ifdef FIXMIN_CUDA
#include "cuda/cuda_backend.h"
#endif

namespace fixmin::engine {
namespace {

// What is asked for, and by whom.
struct Wanted {
    std::string device;
    const char* said_by = "device";

    std::string words() const { return std::string(said_by) + " " + quoted(device); }
};

uint32_t gpu_number(const Wanted& wanted) {
    const std::string& device = wanted.device;
    constexpr std::string_view name = "cuda", numbered = "cuda:";
    if (device == name) return 0;
    uint32_t number = 0;
    const char* end = device.data() + device.size();
    if (device.starts_with(numbered) && device.size() > numbered.size()) {
        const auto [rest, error] = std::from_chars(device.data() + numbered.size(), end, number);
        if (error == std::errc() && rest == end) return number;
    }
    throw ArgumentError(std::string(wanted.said_by) + " is " + quoted(device) + "; known: auto, cpu, cuda, cuda:N");
}

#ifndef FIXMIN_CUDA
constexpr const char* no_cuda = "this build has no CUDA: it was made without a compiler for it";
#endif

Wanted wanted_device(const std::string& option) {
    if (!option.empty()) return {option};
    const char* environment = std::getenv("FIXMIN_DEVICE");
    return environment && *environment ? Wanted{environment, "FIXMIN_DEVICE"} : Wanted{"cpu"};
}

}  // namespace

std::unique_ptr<model::Backend> open_backend(gguf::GgufFile file, const model::BackendOptions& options,
                                             const std::function<void(double)>& progress) {
    const Wanted wanted = wanted_device(options.device);
    const std::string& device = wanted.device;
    if (device == "cpu") return std::make_unique<cpu::CpuBackend>(std::move(file), options, progress);
#ifdef FIXMIN_CUDA
    std::unique_ptr<cuda::Device> gpu;
    try {
        gpu = cuda::open_device(device == "auto" ? 0 : gpu_number(wanted));
    } catch (const UnsupportedError& error) {
        if (device != "auto") throw UnsupportedError(wanted.words() + ": " + error.what());
        return std::make_unique<cpu::CpuBackend>(std::move(file), options, progress);
    }
    return std::make_unique<cuda::CudaBackend>(std::move(gpu), std::move(file), options, progress);
#else
    if (device == "auto") return std::make_unique<cpu::CpuBackend>(std::move(file), options, progress);
    gpu_number(wanted);
    throw UnsupportedError(wanted.words() + ": " + no_cuda);
#endif
}

bool built_with_cuda() {
#ifdef FIXMIN_CUDA
    return true;
#else
    return false;
#endif
}

std::string cuda_driver() {
#ifdef FIXMIN_CUDA
    try {
        return "CUDA " + cuda::driver_version();
    } catch (const UnsupportedError& error) {
        return std::string("none: ") + error.what();
    }
#else
    return std::string("none: ") + no_cuda;
#endif
}

std::vector<Gpu> gpus() {
    std::vector<Gpu> found;
#ifdef FIXMIN_CUDA
    for (const cuda::DeviceInfo& info : cuda::devices()) {
        const std::string capability = std::to_string(info.compute_major) + std::to_string(info.compute_minor);
        found.push_back({info.name, "sm_" + capability, info.memory_bytes});
    }
#endif
    return found;
}

}  // namespace fixmin::engine
