#include "codes/lift.h"

#include <cmath>
#include <string>

#include "codes/code_map.h"
#include "error.h"

namespace fixmin::codes {

LiftKind parse_lift_kind(std::string_view name) {
    if (name == "tile") return LiftKind::tile;
    if (name == "interleave") return LiftKind::interleave;
    throw ArgumentError("lift must be \"tile\" or \"interleave\", got " + quoted(name));
}

Lift Lift::make(LiftKind kind, uint32_t width, uint32_t embedding_length, float v0, float v1) {
    if (width < 1 || width > max_width) {
        throw ArgumentError("lift: code width must be 1.." + std::to_string(max_width) + ", got " +
                            std::to_string(width));
    }
    if (embedding_length < width) {
        throw ArgumentError("lift: embedding_length " + std::to_string(embedding_length) +
                            " is smaller than the code width " + std::to_string(width));
    }
    if (kind == LiftKind::interleave && embedding_length % width != 0) {
        throw ArgumentError("lift \"interleave\" needs embedding_length to be a multiple of the code width, got " +
                            std::to_string(embedding_length) + " and " + std::to_string(width));
    }
    if (!std::isfinite(v0) || !std::isfinite(v1)) {
        throw ArgumentError("lift: code values must be finite, got " + std::to_string(v0) + " and " +
                            std::to_string(v1));
    }
    return Lift{kind, width, embedding_length, v0, v1};
}

void Lift::apply(uint32_t code, float* x) const {
    for (uint32_t n = 0; n < embedding_length; ++n) x[n] = code >> index(n) & 1u ? v1 : v0;
}

}  // namespace fixmin::codes
