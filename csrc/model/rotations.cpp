#include "model/rotations.h"

#include <cmath>

namespace fixmin::model {

Rotations::Rotations(const Hyperparams& hp, uint32_t begin, uint32_t end) {
    for (uint32_t position = begin; position < end; ++position) {
        for (uint32_t i = 0; i < hp.rope_dim / 2; ++i) {
            const double angle = double(position) * std::pow(double(hp.rope_base), -2.0 * i / hp.rope_dim);
            cos.push_back(float(std::cos(angle)));
            sin.push_back(float(std::sin(angle)));
        }
    }
}

}  // namespace fixmin::model
