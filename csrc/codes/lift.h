// K-bit code -> model width: x[n] = v[c̃[index(n)]] (docs/design.md).
#pragma once
#include <cstdint>
#include <string_view>

namespace fixmin::codes {

enum class LiftKind {
    tile,        ///< index(n) = n mod K: the whole code, repeated; the last repetition may be cut short
    interleave,  ///< index(n) = n / (D/K): every bit repeated D/K times; needs D % K == 0
};

/// "tile" or "interleave".  Throws ArgumentError for anything else.
LiftKind parse_lift_kind(std::string_view name);

/// How a code becomes the input of layer 0.  Made by make(), which checks; the fields are then never changed.
struct Lift {
    LiftKind kind = LiftKind::tile;
    uint32_t width = 0;             // K
    uint32_t embedding_length = 0;  // D
    float v0 = 0.0f;                // value of a 0 bit
    float v1 = 1.0f;                // value of a 1 bit

    /// Throws ArgumentError unless 1 <= K <= 32, K <= D, v0 and v1 are finite, and (interleave) D % K == 0.
    static Lift make(LiftKind kind, uint32_t width, uint32_t embedding_length, float v0, float v1);

    /// Bit that element n of x shows; n < D.
    uint32_t index(uint32_t n) const { return kind == LiftKind::tile ? n % width : n / (embedding_length / width); }

    /// Number of elements of x that show bit j; j < K.  They differ by one in tile when D % K != 0.
    uint32_t count(uint32_t j) const { return embedding_length / width + (j < embedding_length % width); }

    /// x: [D] float32, overwritten.
    void apply(uint32_t code, float* x) const;
};

}  // namespace fixmin::codes
