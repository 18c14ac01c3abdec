// Angles of rotary positions.
#pragma once
#include <cstdint>
#include <vector>

#include "model/hyperparams.h"

namespace fixmin::model {

/// Of the positions begin <= p < end: cos and sin of p * base^(-2i / rope_dim), [positions][rope_dim / 2], computed in
/// double and rounded once (docs/numerics.md).
struct Rotations {
    Rotations(const Hyperparams& hp, uint32_t begin, uint32_t end);

    std::vector<float> cos, sin;
};

}  // namespace fixmin::model
