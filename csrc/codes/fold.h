// The exact layer-0 fold (docs/design.md): norm1 followed by a projection of layer 0, collapsed into K+2 columns.
//
// x of layer 0 takes two values in a pattern given by the code, so with the sets N_j = {n : lift index of n
// is j}
//
//     F_j = Σ_{n in N_j} W[:,n]·γ[n]        S = Σ_n W[:,n]·γ[n]        C = W·β + bias
//     W·norm1(x) + bias = ((v0 − μ)·S + (v1 − v0)·Σ_{j: c̃_j = 1} F_j)·rstd + C
//
// (rmsnorm: no μ, no β).  μ and rstd follow from n1 = Σ_{j: c̃_j = 1} |N_j| alone.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "codes/lift.h"

namespace fixmin::codes {

/// The norm in front of the projection; spans are only read while a FoldBuilder is constructed.
struct FoldNorm {
    std::span<const float> weight;  // γ [D]
    std::span<const float> bias;    // β [D], or empty for none; must be empty for rmsnorm
    float eps = 1e-5f;
    bool rms = false;  // false: layernorm
};

/// Per-token factors of the fold.
struct FoldScales {
    float shift;  // v0 − μ (rmsnorm: v0)
    float rstd;   // 1/σ; 0 if norm1's centred input is identically zero, see FoldedProjection::scales
};

/// norm1 and one projection (or several, their rows stacked: q, k, v) as K+2 columns of M float32.
/// Immutable once built, so it may be read from any thread.
///
/// Contract for kernels that compute the same bits as apply(): for each row m, in float32, each operation
/// rounded,
///
///     acc  = scales.shift * sum[m]
///     acc += columns[j][m]                  for j = 0..K-1 in this order, only those with bit j of the code
///     set y[m] = fma(acc, scales.rstd, constant[m])
///
/// Rows are independent, so lanes and threads may take any rows.
class FoldedProjection {
  public:
    uint32_t rows() const { return rows_; }                                         // M
    uint32_t width() const { return lift_.width; }                                  // K
    const float* columns() const { return columns_.data(); }                        // [K][M], (v1 − v0)·F_j
    const float* column(uint32_t j) const { return &columns_[size_t{j} * rows_]; }  // [M]; j < K
    const float* sum() const { return sum_.data(); }                                // [M], S
    const float* constant() const { return constant_.data(); }                      // [M], C
    size_t bytes() const { return (columns_.size() + sum_.size() + constant_.size()) * sizeof(float); }

    /// Computed in double from the counts, rounded once.  Where the norm's centred input is identically zero
    /// (layernorm of a constant x; rmsnorm of zeros) rstd is 0 instead of 1/sqrt(eps): the result is C
    /// exactly, and the rounding of a sum that should have cancelled is not magnified by 1/sqrt(eps).
    FoldScales scales(uint32_t code) const;

    /// y: [M] float32, overwritten.  The plain form of the contract above.
    void apply(uint32_t code, float* y) const;

  private:
    friend class FoldBuilder;
    Lift lift_;
    float eps_ = 0.0f;
    bool rms_ = false;
    uint32_t rows_ = 0;
    std::vector<float> columns_, sum_, constant_;
};

/// Builds a FoldedProjection from blocks of rows, so that W never has to exist in float32 as a whole.
/// Sums are made in double and rounded once.
class FoldBuilder {
  public:
    /// Throws ArgumentError for rows == 0, lengths that are not D, eps negative or not finite, or rms with a
    /// bias.
    FoldBuilder(uint32_t rows, const FoldNorm& norm, const Lift& lift);

    uint32_t embedding_length() const { return fold_.lift_.embedding_length; }  // D

    /// Adds rows row_begin .. row_begin + n_rows - 1.
    /// @param weights  [n_rows][D] row-major
    /// @param bias     [n_rows], or nullptr for none
    /// Throws ArgumentError if the rows lie outside 0..M-1 or one was added before.
    /// Calls for disjoint rows may run on several threads.
    void add_rows(uint32_t row_begin, uint32_t n_rows, const float* weights, const float* bias = nullptr);

    /// The result; the builder is empty (M = 0) afterwards.  Throws ArgumentError naming the first row never
    /// added.
    FoldedProjection finish();

  private:
    void fold_row(uint32_t row, const float* weights, double bias);

    FoldedProjection fold_;
    std::vector<double> norm_weight_;  // [D]
    std::vector<double> norm_bias_;    // [D], or empty
    std::vector<uint8_t> row_added_;   // [M], bytes and not bits: rows may be added by several threads
};

}  // namespace fixmin::codes
