// The language of the kernels in this folder: what nvcc gives, or for tests the same on the CPU, where each thread of a
// grid is a fiber (tests/cuda/simt.cpp).
//
// What makes one source work for both: shared memory is dynamic only (FIXMIN_SHARED); blocks are whole warps and
// collective operations take all lanes of a warp; float arithmetic is as written (--fmad=false, -ffp-contract=off), a
// fused product is __fmaf_rn. A kernel takes its place in the grid as `block`, not from blockIdx, since one that stays
// (persistent.cuh) does the work of many blocks. Every thread of every kernel calls after_previous() before it touches
// what another kernel writes.
#pragma once
#include <cstdint>

#ifdef __CUDACC__

#define FIXMIN_DEVICE __device__ __forceinline__
#define FIXMIN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FIXMIN_KERNEL(name, Args, threads)                                                             \
    FIXMIN_DEVICE void name##_of_block(const Args& args, Index block);                                 \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args) { \
        name##_of_block(args, {blockIdx.x, blockIdx.y});                                               \
    }                                                                                                  \
    FIXMIN_DEVICE void name##_of_block(const Args& args, [[maybe_unused]] Index block)

namespace fixmin::cuda {

struct Index {
    unsigned x, y;
};

/// Of a grid whose blocks all run at once: waits for all threads of all blocks, and what they wrote before is there
/// after it. count: zero before the first use.
FIXMIN_DEVICE void wait_for_grid(unsigned* count) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // The highest bit turns over when the last block has come: one of them adds what is lacking to that.
        constexpr unsigned turned = 0x80000000u;
        __threadfence();
        const unsigned before = atomicAdd(count, blockIdx.x == 0 ? turned - (gridDim.x - 1) : 1u);
        while (((before ^ *reinterpret_cast<volatile unsigned*>(count)) & turned) == 0) {
        }
        __threadfence();
    }
    __syncthreads();
}

/// Waits until the kernels before this one have ended and what they wrote is there. From sm_90 on a kernel starts while
/// the one before still runs (programmatic dependent launch), so that what stands in front of this, such as reading
/// weights, costs no time.
FIXMIN_DEVICE void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Asks for a line of the second-level cache, which all multiprocessors share: it is never out of date there.
FIXMIN_DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

FIXMIN_DEVICE float half_to_float(uint16_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
FIXMIN_DEVICE uint16_t float_to_half(float x) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}

/// Of this thread, in a way that the compiler sees that it is the same for the whole warp. Where it does not know that
/// threads go the same way, it makes a second copy of each shuffle, for threads that come one after the other.
FIXMIN_DEVICE uint32_t warp_of_block() {
#if __CUDA_ARCH__ >= 800
    return __reduce_or_sync(0xffffffffu, threadIdx.x / 32);
#else
    uint32_t warp = 0;
    for (uint32_t bit = 0; bit < 5; ++bit)
        warp |= uint32_t(__any_sync(0xffffffffu, threadIdx.x / 32 >> bit & 1)) << bit;
    return warp;
#endif
}

/// Of memory that no kernel writes.
template <typename T>
FIXMIN_DEVICE T load_weights(const T* p) {
    return __ldg(p);
}
/// 128 bytes, to the second-level cache.
FIXMIN_DEVICE void prefetch_weights(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// 16 bytes into shared memory, some time before wait_for_copies(). Those of a thread up to each end_copies() are a
/// group; wait_for_copies<N> waits for all but the last N groups of this thread.
FIXMIN_DEVICE void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
#else
    *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
#endif
}
FIXMIN_DEVICE void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
FIXMIN_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/// d[16][8] = start + a[16][16] b[16][8] of a warp, signed bytes. Lane g * 4 + t has of a the rows g and g + 8 (k =
/// 4t..4t+3), of b column g, of d the rows g, g, g + 8, g + 8 and the columns 2t, 2t + 1, 2t, 2t + 1 (PTX ISA, "Matrix
/// fragments for mma.m16n8k16").
FIXMIN_DEVICE void multiply_half_tile(int (&d)[4], int2 a, int b, int start) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(b), "r"(start));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%4};"
        : "=r"(d[0]), "=r"(d[1])
        : "r"(a.x), "r"(b), "r"(start));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%4};"
        : "=r"(d[2]), "=r"(d[3])
        : "r"(a.y), "r"(b), "r"(start));
#endif
}

/// d[16][8] = start + a[16][32] b[32][8]: x and y of a and x of b are k = 4t..4t+3, the others 16 more.
FIXMIN_DEVICE void multiply_tile(int (&d)[4], int4 a, int2 b, int start) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(start));
#else
    multiply_half_tile(d, make_int2(a.x, a.y), b.x, start);
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a.z), "r"(b.y));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(d[2]), "+r"(d[3])
        : "r"(a.w), "r"(b.y));
#endif
}

/// d += a b.
FIXMIN_DEVICE void multiply_tile(int (&d)[4], int4 a, int2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#else
    int product[4];
    multiply_tile(product, a, b, 0);
    for (int i = 0; i < 4; ++i) d[i] += product[i];
#endif
}

}  // namespace fixmin::cuda

#else
#include "simt_cpu.h"  // tests/cuda
#endif
