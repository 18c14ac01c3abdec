// What the programs here that draw cases have in common. Include it after the kernels: it takes the names of CUDA back.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/isa.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace fixmin::cases {

using Floats = std::vector<float>;

inline const kernels::Kernels& cpu = kernels::select("scalar");
inline uint64_t state;

// SplitMix64. Not a generator of the library: the emulator's own must not become code that the sanitizer looks at.
inline uint32_t below(uint32_t n) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return uint32_t((z ^ (z >> 31)) >> 32) % n;
}
template <size_t n>
uint32_t one_of(const uint32_t (&of)[n]) {
    return of[below(n)];
}
/// From -2 to 2.
inline Floats values(size_t n) {
    Floats out(n);
    for (float& x : out) x = float(int32_t(below(1 << 16)) - (1 << 15)) * 0x1p-14f;
    return out;
}

inline bool same(const void* a, const void* b, size_t n, const char* what) {
    if (std::memcmp(a, b, n) == 0) return true;
    std::printf("%s: ", what);
    return false;
}
inline bool same(const Floats& a, const Floats& b, const char* what) {
    return a.size() == b.size() && same(a.data(), b.data(), a.size() * sizeof(float), what);
}

}  // namespace fixmin::cases
