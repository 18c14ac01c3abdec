// Devices by name.
#pragma once
#include <functional>
#include <memory>

#include "gguf/gguf_file.h"
#include "model/backend.h"

namespace fixmin::engine {

/// Loads a model onto options.device: "cpu", "cuda" (the first GPU), "cuda:N", or "auto": a GPU if one is usable; empty:
/// what the environment variable FIXMIN_DEVICE says, else "cpu".
/// Throws ArgumentError for another name, UnsupportedError, which says why, for a GPU that cannot be used, and what
/// loading throws.
std::unique_ptr<model::Backend> open_backend(gguf::GgufFile file, const model::BackendOptions& options,
                                             const std::function<void(double)>& progress);

}  // namespace fixmin::engine
