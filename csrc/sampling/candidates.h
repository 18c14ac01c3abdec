// The tokens that may still be drawn in one step, and the truncations that make them fewer.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "numerics/extract.h"

namespace fixmin::kernels {
struct Kernels;
}

namespace fixmin::sampling {

struct Candidate {
    float logit;
    uint32_t id;
    float weight;  // exp((logit - highest) / temperature) of the last Candidates::weigh
};

/// The order of falling probability; among equal logits the lower id comes first, so that it is total.
inline constexpr auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
};

/// Finds the largest values of a row in about one pass over it: the maxima of blocks tell where they are.
class Row {
  public:
    /// x: [n] without NaN or +infinity; has to outlive what is asked afterwards.
    void set(std::span<const float> x);

    std::span<const float> values() const { return x_; }

    /// Those of at least `floor`, in the order of ids; -infinity never counts.
    void collect(float floor, std::vector<Candidate>& out);

    /// The first k in the order of `before`; fewer if fewer are above -infinity.
    void largest(size_t k, std::vector<Candidate>& out);

  private:
    void index();

    std::span<const float> x_;
    std::vector<float> maxima_;  // of blocks; empty until they are needed
    std::vector<float> scratch_;
};

/// Starts with all tokens above -infinity; the definitions of the truncations are in docs/sampling.md.
class Candidates {
  public:
    explicit Candidates(const kernels::Kernels& kernels) : kernels_(kernels) {}

    /// row: [V] without NaN or +infinity, which `highest` is the largest value of.
    void reset(std::span<const float> row, float highest);

    /// A row of which this is known, with `largest` not empty; it has to outlive what follows. First comes top_k,
    /// min_p, or, if it has the total at temperature 1, top_p.
    void reset(const numerics::Extract& extract);

    /// Whether a step needed more of the row than its extract has: then what is left means nothing.
    bool lacking() const { return lacking_; }

    /// Only as the first of all.
    void top_n_sigma(float n);

    void top_k(size_t k);
    void typical(float p, size_t min_keep);
    void top_p(float p, size_t min_keep);
    void min_p(float p, size_t min_keep);
    void xtc(float threshold, size_t min_keep);

    /// Only instead of all others.
    void mirostat_1(double mu, float temperature);
    void mirostat_2(double mu, float temperature);

    /// The temperature that belongs to the entropy: temperature +- range.
    float dynamic_temperature(float temperature, float range, float exponent);

    /// Gives every candidate its weight; returns their sum. A temperature of 0 leaves one candidate.
    double weigh(float temperature);

    /// The candidate that a number of [0, 1) stands for, by the weights of the last weigh().
    Candidate draw(double uniform) const;

    /// All of them with their weights.
    std::vector<Candidate> list() const;

  private:
    bool of_extract() const { return whole_ && extract_; }
    bool lacks(bool more_than_known);
    void to_list();
    void keep_at_least(double floor, size_t min_keep);
    template <typename Key, typename Suffices>
    void keep_share(Key key, Suffices suffices);
    size_t count_at_least(float floor) const;
    double entropy(double total) const;

    const kernels::Kernels& kernels_;
    Row row_;
    const numerics::Extract* extract_ = nullptr;  // in place of row_
    bool lacking_ = false;
    float highest_ = 0;
    bool whole_ = true;               // every value of row_, of which list_ has what extract_ knows; else list_
    bool sorted_ = false;             // list_ is in the order of `before`
    std::vector<Candidate> list_;     // not empty unless whole_
    std::vector<float> weights_;      // [V] if whole_
    std::vector<double> block_sums_;  // of weights_
    double total_ = 0;
};

}  // namespace fixmin::sampling
