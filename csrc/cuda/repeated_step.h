// A step that comes again and again, prepared to be run with one call.
#pragma once
#include <cstdint>
#include <memory>

#include "cuda/device.h"

namespace fixmin::cuda {

enum class StepKind {
    graph,      // a CUDA graph
    persistent  // one kernel (persistent.cuh)
};

/// That of the environment variable FIXMIN_CUDA_STEP, else graph. Throws ArgumentError.
StepKind step_kind();

class RepeatedStep {
  public:
    /// A graph where the device or the kernels do not allow the other kind. Throws OutOfMemory, DeviceError.
    RepeatedStep(Device& device, const Launches& launches, StepKind kind);

    void run();

  private:
    bool make_persistent(const Launches& launches);

    Device& device_;
    std::unique_ptr<Recording> graph_;
    std::unique_ptr<DeviceBuffer> program_;
    StepArgs args_{};
    Grid grid_{};
};

}  // namespace fixmin::cuda
