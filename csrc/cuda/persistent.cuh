// A whole step as one kernel, whose blocks stay on the multiprocessors and take the work of launch after launch.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/kernel_list.h"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"

namespace fixmin::cuda {

template <WeightType Type>
FIXMIN_DEVICE void run_block(Kernel kernel, const std::byte* args, Index block) {
    FIXMIN_SHARED(shared);
    switch (kernel) {
#define FIXMIN_RUN(name, Args) \
    case Kernel::name: return name##_of_block(*reinterpret_cast<const Args*>(args), block);
        FIXMIN_STEP_KERNELS(FIXMIN_RUN)
#undef FIXMIN_RUN
        default: return product_of_few<Type>(*reinterpret_cast<const ProductArgs*>(args), block, shared);
    }
}

template <WeightType Type>
FIXMIN_DEVICE void run_phases(const StepArgs& args, Index block) {
    after_previous();
    for (uint32_t n = 0; n < args.n_phases; ++n) {
        const Phase phase = args.phases[n];
        for (uint32_t i = block.x; i < phase.x * phase.y; i += gridDim.x) {
            if (threadIdx.x < phase.threads)
                run_block<Type>(phase.kernel, args.args + phase.args, {i % phase.x, i / phase.x});
            __syncthreads();  // before the next one writes to the shared memory
        }
        wait_for_grid(args.count);
    }
}

// One for each type of weights, since a kernel has the registers that its largest part takes: of all types together
// there would not be enough.
FIXMIN_KERNEL(run_step_q8_0, StepArgs, step_threads) { run_phases<WeightType::q8_0>(args, block); }
FIXMIN_KERNEL(run_step_q4_0, StepArgs, step_threads) { run_phases<WeightType::q4_0>(args, block); }

}  // namespace fixmin::cuda
