#include "kernels/kernels.h"

#define FIXMIN_ISA_NAME "avx2"
#include "kernels/vec_avx2.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = table;
}  // namespace fixmin::kernels
