// What a device says of a row of logits, so that the row itself need not leave its memory (docs/cuda.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace fixmin::numerics {

/// Most that ExtractQuery::n_largest may be.
inline constexpr uint32_t most_largest = 256;

/// What is asked about one row.
struct ExtractQuery {
    uint32_t row;                       // of the last projection
    const uint32_t* allowed = nullptr;  // bit id % 32 of word id / 32: else the logit counts as -infinity; null: all
    uint32_t n_largest = 0;             // so many of the largest logits, if there are so many above -infinity
    float temperature = 0;              // above 0: the sum of the weights exp((x - highest) / temperature)
    double uniform = -1;                // in [0, 1), with a temperature and no n_largest: the token it stands for
};

struct Logit {
    float logit;
    uint32_t id;
};

/// The answer. Orders of sums and of equal logits are those of csrc/sampling.
struct Extract {
    bool finite;    // no logit is NaN or +infinity, allowed or not; else nothing below is valid
    uint32_t best;  // the first place of the largest
    float highest;  // its logit; -infinity: none may be drawn, and nothing below is valid
    double total;
    uint32_t drawn;
    std::span<const Logit> largest;  // all of at least `floor`, in the order of ids; empty: these are too many
    float floor;                     // what at least n_largest of them reach
    bool complete;                   // `largest` are all that are above -infinity
};

}  // namespace fixmin::numerics
