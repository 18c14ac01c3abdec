#include "kernels/kernels.h"

#define FIXMIN_DOTPROD
#define FIXMIN_ISA_NAME "neon_dotprod"
#include "kernels/vec_neon.h"
// kernels.inl needs the vector class above it.
#include "kernels/kernels.inl"

namespace fixmin::kernels {
extern const Kernels kernels_neon_dotprod;
const Kernels kernels_neon_dotprod = table;
}  // namespace fixmin::kernels
