// Log-probabilities of the tokens that a row of logits finds most probable.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace fixmin::kernels {
struct Kernels;
}

namespace fixmin::sampling {

inline constexpr uint32_t max_top_logprobs = 1024;

struct TokenLogprob {
    uint32_t id;
    float logprob;  // natural; never -infinity, which JSON cannot hold: what is less than any float is the lowest one
};

struct TopLogprobs {
    TokenLogprob chosen;
    uint32_t rank;                  // of the chosen token; 1: nothing comes before it
    std::vector<TokenLogprob> top;  // falling, among equals the lower id first
};

/// @param logits  [V], as the model gave them
/// @param k       up to max_top_logprobs; fewer come back if fewer are above -infinity
/// Throws Error if a logit is NaN or +infinity, ArgumentError if k is too large or `chosen` is not below V.
TopLogprobs top_logprobs(std::span<const float> logits, uint32_t k, uint32_t chosen, const kernels::Kernels& kernels);

}  // namespace fixmin::sampling
