// The instructions of AMX tiles, by number of the tile. Needs AMX-INT8. tests/kernels/emulated_amx.h has the same for
// any CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace {

// Not the intrinsic: GCC 12 believes that it reads 8 bytes, and drops stores to the others.
inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }

// Nor these, which take nothing but literals.

template <int Tile>
[[gnu::always_inline]] inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
// Memory from p on is what they read or write: else the compiler would move what is stored there before. Clang takes no
// array without a size for that.
using FromHereOn = uint8_t[size_t(1) << 40];
template <int Tile>
[[gnu::always_inline]] inline void tile_load(const void* p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Tile), "m"(*(const FromHereOn*)p));
}
template <int Tile>
[[gnu::always_inline]] inline void tile_store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)" : "+m"(*(FromHereOn*)p) : "r"(p), "r"(stride), "i"(Tile));
}
/// Sums += the products of signed bytes, four at a time.
template <int Sums, int A, int B>
[[gnu::always_inline]] inline void tile_dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}
/// Likewise of signed A and unsigned B.
template <int Sums, int A, int B>
[[gnu::always_inline]] inline void tile_dot_unsigned() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}

}  // namespace
