#include "sampling/repetition.h"

#include <algorithm>
#include <limits>

namespace fixmin::sampling {
namespace {

size_t window_of(int32_t last_n) { return last_n < 0 ? std::numeric_limits<size_t>::max() : size_t(last_n); }

// base^n, with the same roundings everywhere; infinity if it is too large.
double power(double base, size_t n) {
    double result = 1;
    for (; n; n /= 2) {
        if (n % 2) result *= base;
        base *= base;
    }
    return result;
}

// z[k]: how many of the tokens from k on are the same as those from 0 on (the Z function), for 0 < k < n.
void match_with_start(std::span<const uint32_t> x, std::vector<uint32_t>& z) {
    const uint32_t n = uint32_t(x.size());
    z.assign(n, 0);
    uint32_t begin = 0, end = 0;  // of the match known so far that reaches furthest
    for (uint32_t k = 1; k < n; ++k) {
        uint32_t length = k < end ? std::min(end - k, z[k - begin]) : 0;
        while (k + length < n && x[length] == x[k + length]) ++length;
        z[k] = length;
        if (k + length > end) begin = k, end = k + length;
    }
}

}  // namespace

Repetition::Repetition(const SamplingParams& p, std::span<const uint32_t> prompt_ids)
    : params_(p),
      window_(window_of(p.repeat_last_n)),
      dry_window_(window_of(p.dry_penalty_last_n)),
      generated_only_(p.openai_penalties && (p.frequency_penalty != 0 || p.presence_penalty != 0)),
      counts_(window_ > 0 &&
              (p.repeat_penalty != 1 || (!generated_only_ && (p.frequency_penalty != 0 || p.presence_penalty != 0)))),
      dry_(dry_window_ > 0 && p.dry_multiplier > 0) {
    for (const std::vector<uint32_t>& sequence : p.dry_sequence_breakers) {
        if (!sequence.empty()) breakers_[sequence[0]].emplace_back(sequence.begin() + 1, sequence.end());
    }
    for (const uint32_t id : prompt_ids) remember(id);
}

void Repetition::accept(uint32_t id) {
    if (generated_only_) ++generated_[id];
    remember(id);
}

void Repetition::remember(uint32_t id) {
    if (!counts_ && !dry_) return;
    history_.push_back(id);
    if (!counts_) return;
    ++counted_[id];
    if (history_.size() <= window_) return;
    const auto oldest = counted_.find(history_[history_.size() - 1 - window_]);
    if (--oldest->second == 0) counted_.erase(oldest);
}

void Repetition::penalize(std::span<float> logits) {
    if (counts_) penalize_window(logits);
    if (generated_only_) penalize_generated(logits);
    if (dry_) penalize_continuations(logits);
}

void Repetition::penalize_window(std::span<float> logits) const {
    for (const auto& [id, count] : counted_) {
        if (id >= logits.size()) continue;
        float& logit = logits[id];
        logit = logit > 0 ? logit / params_.repeat_penalty : logit * params_.repeat_penalty;
        if (!generated_only_) logit -= float(count) * params_.frequency_penalty + params_.presence_penalty;
    }
}

void Repetition::penalize_generated(std::span<float> logits) const {
    for (const auto& [id, count] : generated_) {
        if (id < logits.size()) logits[id] -= float(count) * params_.frequency_penalty + params_.presence_penalty;
    }
}

// A token that once followed the same n tokens as stand at the end now would make a repetition of n + 1.
void Repetition::penalize_continuations(std::span<float> logits) {
    const size_t n = std::min(history_.size(), dry_window_);
    reversed_.assign(history_.rbegin(), history_.rbegin() + std::ptrdiff_t(n));
    const size_t limit = tokens_since_breaker(reversed_), allowed = params_.dry_allowed_length;
    if (n <= allowed || limit < allowed) return;

    match_with_start(reversed_, matches_);
    std::unordered_map<uint32_t, size_t> longest;  // by the token that would continue it
    for (size_t k = 1; k < n; ++k) {
        const size_t length = std::min<size_t>(matches_[k], limit);
        if (length < allowed) continue;
        size_t& known = longest[reversed_[k - 1]];
        known = std::max(known, length);
    }
    for (const auto& [id, length] : longest) {
        if (id >= logits.size() || breaks_alone(id)) continue;
        const double penalty = params_.dry_multiplier * power(params_.dry_base, length - allowed);
        logits[id] -= float(std::min(penalty, double(std::numeric_limits<float>::max())));
    }
}

// How many tokens at the end stand behind the last sequence breaker. `reversed` has the last token first.
size_t Repetition::tokens_since_breaker(std::span<const uint32_t> reversed) const {
    for (size_t i = 0; i < reversed.size(); ++i) {
        const auto tails = breakers_.find(reversed[i]);
        if (tails == breakers_.end()) continue;
        size_t since = reversed.size() + 1;
        for (const std::vector<uint32_t>& tail : tails->second) {
            if (tail.size() > i) continue;
            if (std::equal(tail.begin(), tail.end(), reversed.rend() - std::ptrdiff_t(i))) {
                since = std::min(since, i - tail.size());
            }
        }
        if (since <= reversed.size()) return since;
    }
    return reversed.size();
}

bool Repetition::breaks_alone(uint32_t id) const {
    const auto tails = breakers_.find(id);
    return tails != breakers_.end() &&
           std::any_of(tails->second.begin(), tails->second.end(), [](const auto& tail) { return tail.empty(); });
}

}  // namespace fixmin::sampling
