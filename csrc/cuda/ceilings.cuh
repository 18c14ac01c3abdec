// Loops without any other work in them: what a GPU could do at best.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"

namespace fixmin::cuda {

// What is read goes nowhere, but no compiler can know that.
FIXMIN_KERNEL(read_all, ReadArgs, ceiling_threads) {
    after_previous();
    const int4* p = reinterpret_cast<const int4*>(args.memory);
    const size_t step = size_t(gridDim.x) * blockDim.x;
    int all = 0;
    for (size_t i = size_t(block.x) * blockDim.x + threadIdx.x; i < args.bytes / sizeof(int4); i += step) {
        const int4 x = p[i];
        all |= x.x ^ x.y ^ x.z ^ x.w;
    }
    if (all == 0x5bd1e995) *args.sink = all;
}

FIXMIN_KERNEL(multiply_all, MultiplyArgs, ceiling_threads) {
    after_previous();
    int sums[ceiling_chains][4] = {};
    int4 a;
    a.x = a.y = a.z = a.w = int(threadIdx.x);
    const int2 b = make_int2(int(threadIdx.x), int(threadIdx.x));
    for (uint32_t round = 0; round < args.rounds; ++round) {
        for (auto& sum : sums) multiply_tile(sum, a, b);
    }
    int all = 0;
    for (auto& sum : sums) all |= sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    if (all == 0x5bd1e995) *args.sink = all;
}

}  // namespace fixmin::cuda
