// Launches on grids of drawn sizes. Include it before cases.h.
#pragma once
#include <algorithm>

#include "cuda/persistent.cuh"
#include "cuda/scaled_rows.cuh"

#include "cases.h"

namespace fixmin::cases {

#define FIXMIN_OF_STEP(name, Args) , cuda::Kernel::name
inline constexpr cuda::Kernel step_kernels[] = {cuda::Kernel::few_q8_0,
                                                cuda::Kernel::few_q4_0 FIXMIN_STEP_KERNELS(FIXMIN_OF_STEP)};
#undef FIXMIN_OF_STEP

/// The kernel on its grid, or, if a step has it, in half of the cases as a phase of run_step: there some number of
/// blocks, from one to more than there is work for, take the work in turn.
template <typename Args>
void launch(void (*kernel)(const Args&), cuda::Kernel number, const Args& args, cuda::Index grid, uint32_t threads,
            size_t shared_bytes) {
    if (std::find(std::begin(step_kernels), std::end(step_kernels), number) == std::end(step_kernels) || below(2)) {
        simt::run([&] { kernel(args); }, {grid.x, grid.y}, threads, shared_bytes, false);
        return;
    }
    const uint32_t sizes[] = {1, 2, 3, std::min(grid.x * grid.y + 1, 8u)};
    const cuda::Phase phases[] = {{number, grid.x, grid.y, 0}, {number, 0, 0, 0}};
    unsigned count = 0;
    const cuda::StepArgs step{phases, 2, reinterpret_cast<const std::byte*>(&args), &count};
    simt::run([&] { cuda::run_step(step); }, {one_of(sizes), 1}, cuda::step_threads, shared_bytes, true);
}
/// launch(FIXMIN_KERNEL_NAMED(norm_rows), ...)
#define FIXMIN_KERNEL_NAMED(name) fixmin::cuda::name, fixmin::cuda::Kernel::name

}  // namespace fixmin::cases
