// Devices by name.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "model/backend.h"

namespace fixmin::engine {

/// Loads a model onto options.device: "cpu", "cuda" (the first GPU), "cuda:N", or "auto": a GPU if one is usable;
/// empty: what the environment variable FIXMIN_DEVICE says, else "cpu". Throws ArgumentError for another name,
/// UnsupportedError, which says why, for a GPU that cannot be used, and what loading throws.
std::unique_ptr<model::Backend> open_backend(gguf::GgufFile file, const model::BackendOptions& options,
                                             const std::function<void(double)>& progress);

struct Gpu {
    std::string name;
    std::string architecture;  // "sm_90"
    size_t memory_bytes;
};

/// Whether this build has kernels for GPUs.
bool built_with_cuda();

/// What the driver for GPUs supports, "CUDA 12.4", or "none: " and why no GPU can be used. Starts it, as gpus() does.
std::string cuda_driver();

/// The GPUs that the driver shows, in the order of their numbers. Starts the driver, after which a child that is forked
/// can use none.
std::vector<Gpu> gpus();

}  // namespace fixmin::engine
