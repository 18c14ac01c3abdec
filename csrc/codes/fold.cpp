// Compiled with -ffp-contract=off, like everything here: a product is fused only where std::fma says so.
#include "codes/fold.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "codes/code_map.h"
#include "error.h"

namespace fixmin::codes {
namespace {

void check_length(const char* what, size_t got, size_t expected) {
    if (got != expected) {
        throw ArgumentError(std::string("fold: ") + what + " must have " + std::to_string(expected) +
                            " elements, got " + std::to_string(got));
    }
}

}  // namespace

FoldBuilder::FoldBuilder(uint32_t rows, const FoldNorm& norm, const Lift& lift)
    : norm_weight_(norm.weight.begin(), norm.weight.end()),
      norm_bias_(norm.bias.begin(), norm.bias.end()),
      row_added_(rows, 0) {
    if (rows == 0) throw ArgumentError("fold: a projection needs at least one row");
    check_length("norm weight", norm.weight.size(), lift.embedding_length);
    if (!norm.bias.empty()) check_length("norm bias", norm.bias.size(), lift.embedding_length);
    if (norm.rms && !norm.bias.empty()) throw ArgumentError("fold: rmsnorm has no bias");
    if (!std::isfinite(norm.eps) || norm.eps < 0.0f) {
        throw ArgumentError("fold: eps must be finite and not negative, got " + std::to_string(norm.eps));
    }
    fold_.lift_ = lift;
    fold_.eps_ = norm.eps;
    fold_.rms_ = norm.rms;
    fold_.rows_ = rows;
    fold_.columns_.resize(size_t{lift.width} * rows);
    fold_.sum_.resize(rows);
    fold_.constant_.resize(rows);
}

void FoldBuilder::add_rows(uint32_t row_begin, uint32_t n_rows, const float* weights, const float* bias) {
    const uint32_t rows = fold_.rows_;
    if (row_begin > rows || n_rows > rows - row_begin) {
        throw ArgumentError("fold: rows " + std::to_string(row_begin) + " + " + std::to_string(n_rows) +
                            " lie outside the " + std::to_string(rows) + " rows of the projection");
    }
    // All of them or, if one is refused, none.
    const auto begin = row_added_.begin() + row_begin, end = begin + n_rows;
    if (const auto twice = std::find(begin, end, uint8_t{1}); twice != end)
        throw ArgumentError("fold: row " + std::to_string(twice - row_added_.begin()) + " was added twice");
    std::fill(begin, end, uint8_t{1});
    for (uint32_t r = 0; r < n_rows; ++r) {
        const uint32_t row = row_begin + r;
        fold_row(row, weights + size_t{r} * fold_.lift_.embedding_length, bias ? bias[r] : 0.0);
    }
}

void FoldBuilder::fold_row(uint32_t row, const float* weights, double bias) {
    const Lift& lift = fold_.lift_;
    const uint32_t width = lift.width, length = lift.embedding_length;
    const double* gamma = norm_weight_.data();

    std::array<double, max_width> bins{};  // F_j of this row; the products are exact in double
    if (lift.kind == LiftKind::tile) {
        for (uint32_t n = 0; n < length; n += width) {
            const uint32_t count = std::min(width, length - n);
            for (uint32_t j = 0; j < count; ++j) bins[j] += double{weights[n + j]} * gamma[n + j];
        }
    } else {
        const uint32_t repeats = length / width;
        for (uint32_t j = 0; j < width; ++j) {
            for (uint32_t n = j * repeats; n < (j + 1) * repeats; ++n) bins[j] += double{weights[n]} * gamma[n];
        }
    }

    const double step = double{lift.v1} - double{lift.v0};
    double sum = 0.0;
    for (uint32_t j = 0; j < width; ++j) {
        sum += bins[j];
        fold_.columns_[size_t{j} * fold_.rows_ + row] = static_cast<float>(step * bins[j]);
    }
    fold_.sum_[row] = static_cast<float>(sum);

    double constant = bias;
    for (size_t n = 0; n < norm_bias_.size(); ++n) constant += double{weights[n]} * norm_bias_[n];
    fold_.constant_[row] = static_cast<float>(constant);
}

FoldedProjection FoldBuilder::finish() {
    const auto missing = std::find(row_added_.begin(), row_added_.end(), uint8_t{0});
    if (missing != row_added_.end()) {
        throw ArgumentError("fold: row " + std::to_string(missing - row_added_.begin()) + " was never added");
    }
    return std::exchange(fold_, FoldedProjection{});
}

FoldScales FoldedProjection::scales(uint32_t code) const {
    uint64_t ones = 0;  // elements of x that are v1
    for (uint32_t j = 0; j < lift_.width; ++j) {
        if (code >> j & 1u) ones += lift_.count(j);
    }
    const uint64_t zeros = lift_.embedding_length - ones;
    const double length = lift_.embedding_length;
    const double v0 = lift_.v0, v1 = lift_.v1;

    double shift, mean_square;  // of the norm's centred input
    if (rms_) {
        shift = v0;
        mean_square = (double(zeros) * v0 * v0 + double(ones) * v1 * v1) / length;
    } else {
        // v0 − μ and σ² from differences only: exact also where |v0| is large against v1 − v0.
        shift = -(v1 - v0) * (double(ones) / length);
        mean_square = (v1 - v0) * (v1 - v0) * (double(ones) * double(zeros)) / (length * length);
    }
    const double rstd = mean_square == 0.0 ? 0.0 : 1.0 / std::sqrt(mean_square + double{eps_});
    return {static_cast<float>(shift), static_cast<float>(rstd)};
}

void FoldedProjection::apply(uint32_t code, float* y) const {
    const auto [shift, rstd] = scales(code);
    for (uint32_t m = 0; m < rows_; ++m) y[m] = shift * sum_[m];
    for (uint32_t j = 0; j < lift_.width; ++j) {
        if (!(code >> j & 1u)) continue;
        const float* f = column(j);
        for (uint32_t m = 0; m < rows_; ++m) y[m] += f[m];
    }
    for (uint32_t m = 0; m < rows_; ++m) y[m] = std::fma(y[m], rstd, constant_[m]);
}

}  // namespace fixmin::codes
