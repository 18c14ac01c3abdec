#include "cuda/repeated_step.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>

#include "error.h"

namespace fixmin::cuda {
namespace {

// Whether run_step can make these launches.
bool all_take_part(const Launches& launches) {
    return std::ranges::all_of(launches, [](const Launch& launch) {
        if (launch.grid.threads != step_threads) return false;
        switch (launch.kernel) {
#define FIXMIN_CASE(name, Args) case Kernel::name:
            FIXMIN_STEP_KERNELS(FIXMIN_CASE)
#undef FIXMIN_CASE
            case Kernel::few_q8_0:
            case Kernel::few_q4_0: return true;
            default: return false;
        }
    });
}

// Machine code for 8.0, 9.0 and 10.0 has it, and so the PTX that later ones compile. 8.6 and what else is of generation
// 8 run code for 8.6 or 8.9.
bool has_run_step(const DeviceInfo& info) {
    if (info.compute_major == 8) return info.compute_minor < 6;
    return info.compute_major > 8 && info.compute_major != 12;
}

}  // namespace

StepKind step_kind() {
    const char* name = std::getenv("FIXMIN_CUDA_STEP");
    if (!name || std::string_view(name) == "graph") return StepKind::graph;
    if (std::string_view(name) == "persistent") return StepKind::persistent;
    throw ArgumentError("FIXMIN_CUDA_STEP is '" + std::string(name) + "'; it must be graph or persistent");
}

RepeatedStep::RepeatedStep(Device& device, const Launches& launches, StepKind kind) : device_(device) {
    if (kind == StepKind::graph || !make_persistent(launches)) graph_ = device_.prepare(launches);
}

void RepeatedStep::run() {
    if (graph_)
        device_.run(*graph_);
    else
        device_.launch(Kernel::run_step, grid_, args_);
}

bool RepeatedStep::make_persistent(const Launches& launches) {
    if (!has_run_step(device_.info()) || !all_take_part(launches)) return false;
    std::vector<Phase> phases;
    std::vector<std::byte> args;
    for (const Launch& one : launches) {
        phases.push_back({one.kernel, one.grid.x, one.grid.y, uint32_t(args.size())});
        args.insert(args.end(), one.args.begin(), one.args.end());
        args.resize((args.size() + alignof(std::max_align_t) - 1) / alignof(std::max_align_t) *
                    alignof(std::max_align_t));
        grid_.shared_bytes = std::max(grid_.shared_bytes, one.grid.shared_bytes);
    }
    const uint32_t blocks = std::min(device_.blocks_at_once(Kernel::run_step, step_threads, grid_.shared_bytes),
                                     device_.info().multiprocessors);
    if (blocks == 0) return false;
    grid_ = {blocks, 1, step_threads, grid_.shared_bytes, true};
    // [args][phases][count]
    const size_t phase_bytes = phases.size() * sizeof(Phase);
    program_ = std::make_unique<DeviceBuffer>(device_, "a step", args.size() + phase_bytes + sizeof(unsigned));
    std::byte* at = program_->data();
    device_.upload(at, args.data(), args.size());
    device_.upload(at + args.size(), phases.data(), phase_bytes);
    args_ = {reinterpret_cast<const Phase*>(at + args.size()), uint32_t(phases.size()), at,
             reinterpret_cast<unsigned*>(at + args.size() + phase_bytes)};
    return true;
}

}  // namespace fixmin::cuda
