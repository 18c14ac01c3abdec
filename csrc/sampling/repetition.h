// What makes tokens less likely that have come up before: the penalties of a window, and DRY.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "sampling/sampling_params.h"

namespace fixmin::sampling {

/// The tokens of a request so far, as far as the parameters ask for them.
class Repetition {
  public:
    /// `params` has to outlive it.
    Repetition(const SamplingParams& params, std::span<const uint32_t> prompt_ids);

    /// Whether penalize() changes anything.
    bool active() const { return counts_ || dry_ || generated_only_; }

    void accept(uint32_t id);

    /// Changes logits [V] in place.
    void penalize(std::span<float> logits);

  private:
    void remember(uint32_t id);
    void penalize_window(std::span<float> logits) const;
    void penalize_generated(std::span<float> logits) const;
    void penalize_continuations(std::span<float> logits);
    size_t tokens_since_breaker(std::span<const uint32_t> reversed) const;
    bool breaks_alone(uint32_t id) const;

    const SamplingParams& params_;
    const size_t window_, dry_window_;  // tokens
    const bool generated_only_;         // frequency and presence: all that was generated, in place of the window
    const bool counts_, dry_;           // whether they are in use

    std::vector<uint32_t> history_;                     // prompt and accepted tokens
    std::unordered_map<uint32_t, uint32_t> counted_;    // how often a token is in the window
    std::unordered_map<uint32_t, uint32_t> generated_;  // how often a token was generated
    // What follows the first token of the sequence breakers.
    std::unordered_map<uint32_t, std::vector<std::vector<uint32_t>>> breakers_;
    std::vector<uint32_t> reversed_, matches_;
};

}  // namespace fixmin::sampling
