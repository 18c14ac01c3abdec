#include "sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "error.h"
#include "kernels/kernels.h"
#include "sampling/candidates.h"

namespace fixmin::sampling {

TopLogprobs top_logprobs(std::span<const float> logits, uint32_t k, uint32_t chosen, const kernels::Kernels& kernels) {
    const uint32_t n = uint32_t(logits.size());
    if (k > max_top_logprobs) {
        throw ArgumentError("k is " + std::to_string(k) + "; at most " + std::to_string(max_top_logprobs) +
                            " log-probabilities are given");
    }
    if (chosen >= n) {
        throw ArgumentError("chosen is " + std::to_string(chosen) + ", which is not below the vocabulary size " +
                            std::to_string(n));
    }
    uint32_t best;
    if (!kernels.argmax(logits.data(), n, &best) || std::isinf(logits[best])) {
        throw Error("the model's logits are not finite: the weights overflow on this input");
    }
    float highest, sum;
    kernels.softmax_stats(logits.data(), n, &highest, &sum);
    const double log_sum = std::log(double(sum));
    const auto logprob = [&](float logit) {
        const double exact = double(logit) - highest - log_sum;  // rounded once
        return float(std::max(exact, double(std::numeric_limits<float>::lowest())));
    };

    TopLogprobs result{{chosen, logprob(logits[chosen])}, 1, {}};
    const float own = logits[chosen];
    for (uint32_t i = 0; i < chosen; ++i) result.rank += logits[i] >= own;
    for (uint32_t i = chosen + 1; i < n; ++i) result.rank += logits[i] > own;
    if (k == 0) return result;

    Row row;
    row.set(logits);
    std::vector<Candidate> largest;
    row.largest(k, largest);
    for (const Candidate& c : largest) result.top.push_back({c.id, logprob(c.logit)});
    return result;
}

}  // namespace fixmin::sampling
