// csrc/cuda/simt.h on the CPU: a thread of a grid is a fiber, and the operations that its warp or block does together
// wait for the others (simt.cpp).
//
// Order of the fibers: in turn, or by the seed FIXMIN_SIMT_SEED. Shared memory begins as NaNs. A barrier that not all
// reach, or at which threads meet from different places, ends the process with a message, and so does a kernel that
// ends without having called after_previous(). -fsanitize=address checks every access; -fsanitize=thread finds missing
// barriers, for a fiber is a thread to it: FIXMIN_SIMT_LEAVE_OUT=n leaves out the n-th barrier of blocks that is met,
// to see that it does.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "quant/half.h"

struct int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

namespace fixmin::cuda {

struct Index {
    unsigned x = 0, y = 0;
};

}  // namespace fixmin::cuda

namespace fixmin::simt {

using cuda::Index;

const Index &thread_index(), &block_index(), &block_size(), &grid_size();
unsigned lane();
unsigned char* shared_memory();
void block_barrier(const void* site);
void warp_barrier(const void* site);
void grid_barrier(const void* site);
void note_after_previous();
void note_weights(const void* p);
void copy_later(void* to, const void* from);  // 16 bytes
void end_copies();
void wait_for_copies(unsigned but_last_groups);

/// Counts what load_weights() reads from now on: sectors of 32 bytes, those that a block reads twice once (a GPU has a
/// cache for each).
void count_weights();
size_t weight_bytes();

/// Puts up n <= 6 words for the other lanes of the warp; returns those of all, [lane][6].
const int (*exchange(const int* words, unsigned n, const void* site))[6];

/// Runs a grid: its blocks one after the other, or all at once, so that they can wait for each other.
void run(const std::function<void()>& kernel, Index grid, unsigned threads, size_t shared_bytes, bool at_once);

template <typename T>
T shuffle(T value, unsigned from, const void* site) {
    static_assert(sizeof(T) == sizeof(int));
    int word;
    std::memcpy(&word, &value, sizeof word);
    const int (*all)[6] = exchange(&word, 1, site);
    std::memcpy(&value, &all[from < 32 ? from : lane()][0], sizeof word);
    return value;
}

inline unsigned ballot(bool predicate, const void* site) {
    const int word = predicate;
    const int (*all)[6] = exchange(&word, 1, site);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i) bits |= unsigned(all[i][0]) << i;
    return bits;
}

inline int dot_of_bytes(int a, int b) {
    int sum = 0;
    for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
    return sum;
}

/// a: Words per row and half of k; b the same per column.
template <int Halves>
void multiply(int (&d)[4], const int* words, const void* site) {
    const int (*all)[6] = exchange(words, 3 * Halves, site);
    const int g = int(lane() / 4), t = int(lane() % 4);
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 4 * Halves; ++k) {
            const int a = all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2],
                      b = all[column * 4 + k % 4][2 * Halves + k / 4];
            d[i] += dot_of_bytes(a, b);
        }
    }
}

}  // namespace fixmin::simt

#define FIXMIN_DEVICE inline
#define FIXMIN_SHARED(name) unsigned char* const name = fixmin::simt::shared_memory()
#define FIXMIN_KERNEL(name, Args, threads)                                             \
    inline void name##_of_block(const Args& args, Index block);                        \
    inline void name(const Args& args) { name##_of_block(args, simt::block_index()); } \
    inline void name##_of_block(const Args& args, [[maybe_unused]] Index block)

#define threadIdx (fixmin::simt::thread_index())
#define blockDim (fixmin::simt::block_size())
#define gridDim (fixmin::simt::grid_size())
#define FIXMIN_SITE                 \
    ([]() -> const void* {          \
        static const char site = 0; \
        return &site;               \
    }())
#undef __syncthreads
#define __syncthreads() fixmin::simt::block_barrier(FIXMIN_SITE)
#define wait_for_grid(count) fixmin::simt::grid_barrier(FIXMIN_SITE)
#define __syncwarp() fixmin::simt::warp_barrier(FIXMIN_SITE)
#define __ballot_sync(mask, predicate) fixmin::simt::ballot(predicate, FIXMIN_SITE)
#define __shfl_sync(mask, value, from) fixmin::simt::shuffle(value, (from) % 32, FIXMIN_SITE)
#define __shfl_down_sync(mask, value, by) fixmin::simt::shuffle(value, fixmin::simt::lane() + (by), FIXMIN_SITE)
#define __shfl_xor_sync(mask, value, by) fixmin::simt::shuffle(value, fixmin::simt::lane() ^ unsigned(by), FIXMIN_SITE)

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __int_as_float(int bits) { return fixmin::quant::float_from_bits(uint32_t(bits)); }
inline int __float_as_int(float x) { return int(fixmin::quant::float_bits(x)); }
inline int __float2int_rn(float x) {
    if (x != x) return 0;
    return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : int(std::rint(x));
}
inline int __dp4a(int a, int b, int sum) { return sum + fixmin::simt::dot_of_bytes(a, b); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
    const uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (select >> 4 * i & 7u) & 255u) << 8 * i;
    return result;
}

namespace fixmin::cuda {

inline void after_previous() { simt::note_after_previous(); }
inline void prefetch_line(const void*) {}
inline float half_to_float(uint16_t half) { return quant::f16_to_f32(half); }
inline uint16_t float_to_half(float x) { return quant::f32_to_f16(x); }
inline uint32_t warp_of_block() { return threadIdx.x / 32; }
template <typename T>
T load_weights(const T* p) {
    simt::note_weights(p);
    return *p;
}
inline void prefetch_weights(const void*) {}
inline void copy_async(void* to, const void* from) { simt::copy_later(to, from); }
inline void end_copies() { simt::end_copies(); }
template <int N>
void wait_for_copies() {
    simt::wait_for_copies(N);
}
inline void multiply_half_tile(int (&d)[4], int2 a, int b, int start) {
    const int words[3] = {a.x, a.y, b};
    for (int& sum : d) sum = start;
    simt::multiply<1>(d, words, FIXMIN_SITE);
}
inline void multiply_tile(int (&d)[4], int4 a, int2 b) {
    const int words[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
    simt::multiply<2>(d, words, FIXMIN_SITE);
}
inline void multiply_tile(int (&d)[4], int4 a, int2 b, int start) {
    for (int& sum : d) sum = start;
    multiply_tile(d, a, b);
}

}  // namespace fixmin::cuda
