#include "kernels/kernels.h"

#define FIXMIN_ISA_NAME "neon"
#include "kernels/vec_neon.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_neon;
const Kernels kernels_neon = table;
}  // namespace fixmin::kernels
