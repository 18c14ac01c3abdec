// All kernels, for nvcc.
#include "cuda/attention.cuh"
#include "cuda/ceilings.cuh"
#include "cuda/extracts.cuh"
#include "cuda/persistent.cuh"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"
#include "cuda/scaled_rows.cuh"
