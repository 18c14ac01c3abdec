// Which elements of a head rotary positions pair: i with i + dim/2, or 2i with 2i + 1.
#pragma once
#include <cstdint>

namespace fixmin::numerics {

enum class RopeStyle : uint8_t { half, interleaved };

}  // namespace fixmin::numerics
