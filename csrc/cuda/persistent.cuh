// A whole step as one kernel, whose blocks stay on the multiprocessors and take the work of launch after launch.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/kernel_list.h"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"

namespace fixmin::cuda {

FIXMIN_DEVICE void run_block(Kernel kernel, const std::byte* args, Index block) {
    FIXMIN_SHARED(shared);
    switch (kernel) {
#define FIXMIN_RUN(name, Args) \
    case Kernel::name: return name##_of_block(*reinterpret_cast<const Args*>(args), block);
        FIXMIN_STEP_KERNELS(FIXMIN_RUN)
#undef FIXMIN_RUN
        case Kernel::few_q8_0:
            return product_of_few<WeightType::q8_0>(*reinterpret_cast<const ProductArgs*>(args), block, shared);
        default: return product_of_few<WeightType::q4_0>(*reinterpret_cast<const ProductArgs*>(args), block, shared);
    }
}

static_assert(row_threads == step_threads && attention_threads == step_threads && few_threads == step_threads);

// A kernel has the registers that its largest part takes: of all types together there would not be enough. It is an
// eighth of all code, so that it is made for some architectures only (has_run_step in repeated_step.cpp).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
#define FIXMIN_HAS_RUN_STEP 1
#else
#define FIXMIN_HAS_RUN_STEP 0
#endif
FIXMIN_KERNEL(run_step, StepArgs, step_threads) {
#if FIXMIN_HAS_RUN_STEP
    after_previous();
    for (uint32_t n = 0; n < args.n_phases; ++n) {
        const Phase phase = args.phases[n];
        for (uint32_t i = block.x; i < phase.x * phase.y; i += gridDim.x) {
            run_block(phase.kernel, args.args + phase.args, {i % phase.x, i / phase.x});
            __syncthreads();  // before the next one writes to the shared memory
        }
        wait_for_grid(args.count);
    }
#endif
}

}  // namespace fixmin::cuda
