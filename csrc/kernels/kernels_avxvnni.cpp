#include "kernels/kernels.h"

#define FIXMIN_VNNI
#define FIXMIN_ISA_NAME "avxvnni"
#include "kernels/vec_avx2.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_avxvnni;
const Kernels kernels_avxvnni = table;
}  // namespace fixmin::kernels
