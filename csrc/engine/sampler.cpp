#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "engine/request.h"
#include "error.h"

namespace fixmin::engine {
namespace {

// Larger logit first; among equals the lower id, so that the order is total.
constexpr auto before = [](const auto& a, const auto& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
};

}  // namespace

double counter_uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

uint32_t Sampler::sample(std::span<const float> logits, uint64_t step, const uint32_t*) {
    uint32_t best;
    if (!kernels_.argmax(logits.data(), uint32_t(logits.size()), &best)) {
        throw Error("the model's logits are not finite: the weights overflow on this input");
    }
    if (params_.temperature == 0) return best;

    const float highest = logits[best];
    keep_top_k(logits);
    if (params_.top_p < 1) keep_top_p();

    // Temperature: exp((l - max) / t); the maximum is never filtered out.
    std::vector<float>& p = probabilities_;
    p.resize(candidates_.size());
    for (size_t i = 0; i < p.size(); ++i) p[i] = (candidates_[i].logit - highest) / params_.temperature;
    kernels_.exp_minus(p.data(), uint32_t(p.size()), 0.0f, p.data());
    double total = 0;
    for (const float x : p) total += x;
    double rest = counter_uniform(params_.seed, step) * total;
    for (size_t i = 0; i < p.size(); ++i) {
        rest -= p[i];
        if (rest < 0) return candidates_[i].id;
    }
    return best;  // rounding left nothing for the last candidate
}

TokenLogprobs top_logprobs(std::span<const float> logits, uint32_t k, uint32_t id, const kernels::Kernels& kernels) {
    float highest, sum;
    kernels.softmax_stats(logits.data(), uint32_t(logits.size()), &highest, &sum);
    const auto logprob = [&](float logit) { return float(double(logit) - highest - std::log(double(sum))); };
    TokenLogprobs result;
    result.id = id;
    result.logprob = logprob(logits[id]);
    (void)k;
    return result;
}

void Sampler::keep_top_k(std::span<const float> logits) {
    candidates_.resize(logits.size());
    for (uint32_t i = 0; i < logits.size(); ++i) candidates_[i] = {logits[i], i};
    if (params_.top_k == 0 || params_.top_k >= candidates_.size()) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + params_.top_k, candidates_.end(), before);
    candidates_.resize(params_.top_k);
    std::sort(candidates_.begin(), candidates_.end(), before);
}

// The shortest prefix, by falling probability, whose sum reaches top_p.
void Sampler::keep_top_p() {
    const size_t n = candidates_.size();
    float highest = candidates_[0].logit;
    for (const Candidate& c : candidates_) highest = std::max(highest, c.logit);
    probabilities_.resize(n);
    for (size_t i = 0; i < n; ++i) probabilities_[i] = candidates_[i].logit;
    kernels_.exp_minus(probabilities_.data(), uint32_t(n), highest, probabilities_.data());
    double total = 0;
    for (const float x : probabilities_) total += x;

    // Sorting the whole vocabulary would cost more than the model's last layer: sort a growing head until it suffices.
    size_t sorted = 0;
    double reached = 0;
    for (size_t head = std::min<size_t>(n, 256);; head = std::min(n, head * 8)) {
        std::nth_element(candidates_.begin() + sorted, candidates_.begin() + head - 1, candidates_.end(), before);
        std::sort(candidates_.begin() + sorted, candidates_.begin() + head, before);
        for (size_t i = sorted; i < head; ++i) probabilities_[i] = candidates_[i].logit;
        kernels_.exp_minus(probabilities_.data() + sorted, uint32_t(head - sorted), highest,
                           probabilities_.data() + sorted);
        for (; sorted < head; ++sorted) {
            reached += probabilities_[sorted];
            if (reached >= double(params_.top_p) * total) {
                candidates_.resize(sorted + 1);
                return;
            }
        }
        if (head == n) return;
    }
}

}  // namespace fixmin::engine
