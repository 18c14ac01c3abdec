// The kernels of one instruction set. CMakeLists.txt compiles this file once for each, with FIXMIN_ISA (its name),
// FIXMIN_VEC (the header of its vector class) and what that header and kernels.inl want to know besides. FIXMIN_BASE:
// it only multiplies, on tiles, and everything else is done as on that instruction set.
#include "kernels/kernels.h"

#define FIXMIN_TEXT(x) #x
#define FIXMIN_NAME(isa) FIXMIN_TEXT(isa)
#define FIXMIN_JOIN(a, b) a##b
#define FIXMIN_TABLE(isa) FIXMIN_JOIN(kernels_, isa)
#define FIXMIN_TILE_TABLE(isa) FIXMIN_JOIN(tiles_, isa)

#ifdef FIXMIN_BASE

namespace fixmin::kernels {
extern const Kernels FIXMIN_TABLE(FIXMIN_BASE);
}
namespace {
const fixmin::kernels::Kernels& base = fixmin::kernels::FIXMIN_TABLE(FIXMIN_BASE);
}

#include FIXMIN_VEC
// tiles.inl needs the vector class and the base above it.
#include "kernels/tiles.inl"

namespace fixmin::kernels {
extern const TileKernels FIXMIN_TILE_TABLE(FIXMIN_ISA);
const TileKernels FIXMIN_TILE_TABLE(FIXMIN_ISA) = tile_kernels;
}  // namespace fixmin::kernels

#else

#include FIXMIN_VEC
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels FIXMIN_TABLE(FIXMIN_ISA);
const Kernels FIXMIN_TABLE(FIXMIN_ISA) = table;
}  // namespace fixmin::kernels

#endif
