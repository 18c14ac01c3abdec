// The choice of the next token.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"

namespace fixmin::engine {

struct SamplingParams {
    float temperature = 0;  // 0: greedy
    uint32_t top_k = 0;     // 0: all
    float top_p = 1;        // 1: all
    uint64_t seed = 0;
    uint32_t max_new_tokens = 128;
    std::vector<uint32_t> stop_ids;  // generation ends at one of these; it is not part of the result
};

/// Filters in llama.cpp's order: top_k, top_p, then temperature on what is left.
/// Step n of a seed always uses the same random number, whatever else runs.
class Sampler {
  public:
    Sampler(const SamplingParams& params, std::span<const uint32_t> prompt, const kernels::Kernels& kernels)
        : params_(params), kernels_(kernels) {
        (void)prompt;
    }

    const kernels::Kernels& kernels() const { return kernels_; }

    /// @param logits  [V]
    /// @param step    how many tokens this request has generated
    /// Throws Error if the logits are not finite.
    uint32_t sample(std::span<const float> logits, uint64_t step, const uint32_t* allowed);
    void accept(uint32_t) {}

  private:
    struct Candidate {
        float logit;
        uint32_t id;
    };
    void keep_top_k(std::span<const float> logits);
    void keep_top_p();

    const SamplingParams params_;
    const kernels::Kernels& kernels_;
    std::vector<Candidate> candidates_;
    std::vector<float> probabilities_;
};

struct TokenLogprobs;
/// Of the raw logits [V]: of `id`, and of the k most probable.
TokenLogprobs top_logprobs(std::span<const float> logits, uint32_t k, uint32_t id, const kernels::Kernels& kernels);

/// Number `index` of the SplitMix64 sequence that starts at `seed`, as a double in [0, 1).
double counter_uniform(uint64_t seed, uint64_t index);

}  // namespace fixmin::engine
