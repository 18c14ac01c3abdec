#include "kernels/kernels.h"

#define FIXMIN_ISA_NAME "scalar"
#include "kernels/vec_scalar.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_scalar;
const Kernels kernels_scalar = table;
}  // namespace fixmin::kernels
