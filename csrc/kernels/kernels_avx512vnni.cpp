#include "kernels/kernels.h"

#define FIXMIN_VNNI
#define FIXMIN_ISA_NAME "avx512vnni"
#include "kernels/vec_avx512.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = table;
}  // namespace fixmin::kernels
