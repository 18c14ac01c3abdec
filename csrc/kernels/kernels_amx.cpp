#include "kernels/kernels.h"

#define FIXMIN_VNNI
#define FIXMIN_AMX
#define FIXMIN_ISA_NAME "amx"
#include "kernels/vec_avx512.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_amx;
const Kernels kernels_amx = table;
}  // namespace fixmin::kernels
