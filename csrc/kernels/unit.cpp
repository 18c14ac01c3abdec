// The kernels of one instruction set. CMakeLists.txt compiles this file once for each, with FIXMIN_ISA (its name),
// FIXMIN_VEC (the header of its vector class) and what that header and kernels.inl want to know besides.
#include "kernels/kernels.h"

#define FIXMIN_TEXT(x) #x
#define FIXMIN_NAME(isa) FIXMIN_TEXT(isa)
#define FIXMIN_JOIN(a, b) a##b
#define FIXMIN_TABLE(isa) FIXMIN_JOIN(kernels_, isa)

#include FIXMIN_VEC
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels FIXMIN_TABLE(FIXMIN_ISA);
const Kernels FIXMIN_TABLE(FIXMIN_ISA) = table;
}  // namespace fixmin::kernels
