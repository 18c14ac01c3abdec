// How matrices lie in a GPU's memory.
#pragma once
#include "model/weights.h"

namespace fixmin::cuda {

/// Panels as on the CPU (quant/panels.h), but that the words of 8- and 4-bit codes stand in the order of the lanes that
/// multiply them (products.cuh): of a block, lane g * 4 + t has the rows g and g + 8 of vector t, and of 8 bits then
/// those of vector t + 4. Codes of types that is_centred() and of W8A8 are signed: the highest bit of each that has an
/// offset is turned over. Where blocks of 32 are odd in number a block of zeros follows.
model::Packing packing();

}  // namespace fixmin::cuda
