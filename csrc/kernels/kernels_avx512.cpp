#include "kernels/kernels.h"

#define FIXMIN_ISA_NAME "avx512"
#include "kernels/vec_avx512.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = table;
}  // namespace fixmin::kernels
