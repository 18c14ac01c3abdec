// The choice of the next token.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "sampling/candidates.h"
#include "sampling/repetition.h"
#include "sampling/sampling_params.h"

namespace fixmin::sampling {

/// The arithmetic of an instruction set; an empty name: FIXMIN_ISA, else the best there is. Throws ArgumentError,
/// UnsupportedError.
const kernels::Kernels& kernels_of(std::string_view isa);

/// One per request; it holds all that sampling remembers. Not for several threads at once.
///
/// The random numbers of a step depend on the seed and the step only, and nothing on what else runs: the same logits
/// and the same seed give the same tokens, in any batch and on every instruction set.
class Sampler {
  public:
    /// The parameters are shared, as the completions of one prompt have the same ones but for the seed.
    ///
    /// @param seed  if given: in place of that of the parameters
    /// Throws ArgumentError if a parameter is out of range.
    Sampler(std::shared_ptr<const SamplingParams> params, std::optional<uint64_t> seed,
            std::span<const uint32_t> prompt_ids, const kernels::Kernels& kernels);

    /// The next token; changes nothing that another call would notice: accept() does.
    ///
    /// @param logits   [V]; -infinity: never drawn
    /// @param step     how many tokens this request has generated
    /// @param allowed  bit id % 32 of word id / 32 says whether the token may be drawn; null: all may
    /// Throws Error if the logits are not finite or no token may be drawn, ArgumentError if the parameters name ids
    /// that are not below V.
    uint32_t sample(std::span<const float> logits, uint64_t step, const uint32_t* allowed = nullptr);

    /// What to ask a device about a row [vocab_size] so that the sample of step `step` can be made of the answer;
    /// nothing if it takes the row itself. Its mask is valid until the next call with another `allowed`. Throws
    /// ArgumentError as sample() does.
    std::optional<numerics::ExtractQuery> query(size_t vocab_size, uint64_t step, const uint32_t* allowed = nullptr);

    /// The same as sample() of the row [vocab_size] of which this was extracted by query(); nothing if it does not
    /// suffice, or if the row is to throw.
    std::optional<uint32_t> sample(const numerics::Extract& extract, size_t vocab_size, uint64_t step);

    /// The token that the request goes on with.
    void accept(uint32_t id);

    struct Distribution {
        std::vector<uint32_t> ids;  // in the order that a draw goes through them
        std::vector<double> probabilities;
    };

    /// What sample() with the same arguments draws from: tokens that are left, with their probabilities.
    Distribution probabilities(std::span<const float> logits, uint64_t step, const uint32_t* allowed = nullptr);

    /// Largest surprise that mirostat lets through, bits.
    float mirostat_mu() const { return mirostat_mu_; }

  private:
    std::span<const float> adjust(std::span<const float> logits, uint64_t step, const uint32_t* allowed);
    uint32_t check_finite(std::span<const float> logits) const;
    uint32_t most_probable(std::span<const float> row) const;
    bool bans() const { return !params_.banned_ids.empty() || !params_.allowed_ids.empty(); }
    bool bans_stops(uint64_t step) const { return step < params_.min_new_tokens && !params_.stop_ids.empty(); }
    const uint32_t* mask_of_bans(size_t vocab_size, const uint32_t* allowed);
    double narrow(uint64_t step);
    void truncate(uint64_t step);
    void check_ids(size_t vocab_size);

    const std::shared_ptr<const SamplingParams> shared_params_;
    const SamplingParams& params_;
    const uint64_t seed_;
    const kernels::Kernels& kernels_;
    Repetition repetition_;
    Candidates candidates_;
    std::vector<uint32_t> bans_, mask_;  // bits of what allowed_ids and banned_ids leave; and a mask besides
    std::vector<float> row_;             // logits after all changes, where there are any
    size_t checked_size_ = 0;
    float mirostat_mu_;
    struct Draw {
        uint32_t id;
        double surprise;  // bits
    };
    std::optional<Draw> draw_;  // the last one, which mirostat learns from once it is accepted
};

}  // namespace fixmin::sampling
