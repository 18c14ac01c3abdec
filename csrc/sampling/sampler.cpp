#include "sampling/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "error.h"
#include "kernels/isa.h"

namespace fixmin::sampling {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Bits; weights are 0 beyond a surprise of 127, so larger ones mean the same. Stays finite whatever tau and eta are.
float limited_mu(double mu) { return float(std::clamp(mu, -1000.0, 1000.0)); }

// Every step has eight random numbers of its own.
enum class Use : uint64_t { draw, xtc };

// A number of the SplitMix64 sequence that starts at `seed`, as a double in [0, 1).
double uniform(uint64_t seed, uint64_t step, Use use) {
    const uint64_t index = step * 8 + uint64_t(use);
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void expect(bool condition, const std::string& name, float value, const char* range) {
    if (!condition) throw ArgumentError(name + " is " + std::to_string(value) + "; it must be " + range);
}

// Bans what `allowed` has no bit for. Without a branch for each bit, which would cost more than the rest of a step.
void mask(std::span<float> row, const uint32_t* allowed) {
    constexpr uint32_t banned = std::bit_cast<uint32_t>(-infinity);
    for (size_t begin = 0; begin < row.size(); begin += 32) {
        const uint32_t word = allowed[begin / 32];
        if (word == UINT32_MAX) continue;
        const size_t n = std::min<size_t>(row.size() - begin, 32);
        for (size_t i = 0; i < n; ++i) {
            const uint32_t keep = 0u - (word >> i & 1);
            const uint32_t x = std::bit_cast<uint32_t>(row[begin + i]);
            row[begin + i] = std::bit_cast<float>((x & keep) | (banned & ~keep));
        }
    }
}

}  // namespace

void check(const SamplingParams& p) {
    // Comparisons with NaN are false.
    const auto not_negative = [](const char* name, float value) {
        expect(value >= 0 && value < infinity, name, value, "0 or more, and finite");
    };
    const auto above_zero = [](const char* name, float value) {
        expect(value > 0 && value < infinity, name, value, "above 0 and finite");
    };
    const auto finite = [](const char* name, float value) { expect(std::isfinite(value), name, value, "finite"); };
    const auto share = [](const char* name, float value, bool zero) {
        expect(value <= 1 && (value > 0 || (zero && value == 0)), name, value, zero ? "in [0, 1]" : "in (0, 1]");
    };
    not_negative("temperature", p.temperature);
    not_negative("dynatemp_range", p.dynatemp_range);
    not_negative("dynatemp_exponent", p.dynatemp_exponent);
    finite("top_n_sigma", p.top_n_sigma);
    share("typical_p", p.typical_p, false);
    share("top_p", p.top_p, false);
    share("min_p", p.min_p, true);
    share("xtc_probability", p.xtc_probability, true);
    share("xtc_threshold", p.xtc_threshold, true);
    expect(p.mirostat <= 2, "mirostat", float(p.mirostat), "0, 1 or 2");
    not_negative("mirostat_tau", p.mirostat_tau);
    not_negative("mirostat_eta", p.mirostat_eta);
    above_zero("repeat_penalty", p.repeat_penalty);
    finite("frequency_penalty", p.frequency_penalty);
    finite("presence_penalty", p.presence_penalty);
    not_negative("dry_multiplier", p.dry_multiplier);
    expect(p.dry_base >= 1 && p.dry_base < infinity, "dry_base", p.dry_base, "1 or more, and finite");
    for (const auto& [id, bias] : p.logit_bias) {
        expect(bias < infinity, "logit_bias of token " + std::to_string(id), bias, "finite or -infinity");
    }
}

const kernels::Kernels& kernels_of(std::string_view isa) {
    return isa.empty() ? kernels::default_kernels() : kernels::select(isa);
}

Sampler::Sampler(std::shared_ptr<const SamplingParams> params, std::optional<uint64_t> seed,
                 std::span<const uint32_t> prompt_ids, const kernels::Kernels& kernels)
    : shared_params_(std::move(params)),
      params_(*shared_params_),
      seed_(seed.value_or(params_.seed)),
      kernels_(kernels),
      repetition_(params_, prompt_ids),
      candidates_(kernels),
      mirostat_mu_(limited_mu(2.0 * params_.mirostat_tau)) {
    check(params_);
}

uint32_t Sampler::sample(std::span<const float> logits, uint64_t step, const uint32_t* allowed) {
    const std::span<const float> row = adjust(logits, step, allowed);
    const uint32_t best = most_probable(row);
    if (params_.temperature == 0) return best;
    candidates_.reset(row, row[best]);
    const double total = narrow(step);
    const Candidate drawn = candidates_.draw(uniform(seed_, step, Use::draw));
    if (params_.mirostat) draw_ = {drawn.id, std::log2(total / drawn.weight)};
    return drawn.id;
}

// The first truncation decides: what comes behind it sees few candidates, and they are here.
std::optional<numerics::ExtractQuery> Sampler::query(size_t vocab_size, uint64_t step, const uint32_t* allowed) {
    const SamplingParams& p = params_;
    if (vocab_size != checked_size_) check_ids(vocab_size);
    if (bans_stops(step) || repetition_.active() || !p.logit_bias.empty()) return {};
    numerics::ExtractQuery query{.row = 0, .allowed = bans() ? mask_of_bans(vocab_size, allowed) : allowed};
    if (p.temperature == 0) return query;
    if (p.mirostat || p.top_n_sigma > 0) return {};
    if (p.top_k > 0) {
        query.n_largest = p.top_k;
    } else if (p.typical_p < 1) {
        return {};
    } else if (p.top_p < 1 || p.min_p > 0) {
        query.n_largest = numerics::most_largest;  // as many as may be: how many it takes, the logits tell
        query.temperature = p.top_p < 1 ? 1 : 0;
        if (p.min_keep > numerics::most_largest) return {};
    } else if (p.xtc_probability > 0 || p.dynatemp_range > 0) {
        return {};
    } else {
        query.temperature = p.temperature;
        query.uniform = uniform(seed_, step, Use::draw);
    }
    if (query.n_largest > numerics::most_largest) return {};
    return query;
}

std::optional<uint32_t> Sampler::sample(const numerics::Extract& extract, size_t vocab_size, uint64_t step) {
    if (vocab_size != checked_size_) check_ids(vocab_size);
    if (!extract.finite || extract.highest == -infinity) return {};
    const SamplingParams& p = params_;
    if (p.temperature == 0) return extract.best;
    if (p.top_k == 0 && p.top_p == 1 && p.min_p == 0) return extract.drawn;
    if (extract.largest.empty()) return {};
    candidates_.reset(extract);
    narrow(step);
    if (candidates_.lacking()) return {};
    return candidates_.draw(uniform(seed_, step, Use::draw)).id;
}

void Sampler::accept(uint32_t id) {
    repetition_.accept(id);
    if (draw_ && draw_->id == id) {
        mirostat_mu_ = limited_mu(mirostat_mu_ - params_.mirostat_eta * (draw_->surprise - params_.mirostat_tau));
    }
    draw_.reset();
}

Sampler::Distribution Sampler::probabilities(std::span<const float> logits, uint64_t step, const uint32_t* allowed) {
    const std::span<const float> row = adjust(logits, step, allowed);
    const uint32_t best = most_probable(row);
    if (params_.temperature == 0) return {{best}, {1.0}};
    candidates_.reset(row, row[best]);
    const double total = narrow(step);
    Distribution result;
    for (const Candidate& c : candidates_.list()) {
        result.ids.push_back(c.id);
        result.probabilities.push_back(c.weight / total);
    }
    return result;
}

// The logits with everything that does not depend on the other tokens: bans, biases, penalties.
std::span<const float> Sampler::adjust(std::span<const float> logits, uint64_t step, const uint32_t* allowed) {
    if (logits.empty() || logits.size() != checked_size_) check_ids(logits.size());
    const SamplingParams& p = params_;
    if (!allowed && !bans() && !bans_stops(step) && !repetition_.active() && p.logit_bias.empty()) return logits;
    check_finite(logits);  // before a ban hides what is not
    if (p.allowed_ids.empty()) {
        row_.assign(logits.begin(), logits.end());
    } else {
        row_.assign(logits.size(), -infinity);
        for (const uint32_t id : p.allowed_ids) row_[id] = logits[id];
    }
    if (allowed) mask(row_, allowed);
    for (const uint32_t id : p.banned_ids) row_[id] = -infinity;
    if (bans_stops(step)) {
        for (const uint32_t id : p.stop_ids) row_[id] = -infinity;
    }
    for (const auto& [id, bias] : p.logit_bias) row_[id] += bias;
    repetition_.penalize(row_);
    return row_;
}

const uint32_t* Sampler::mask_of_bans(size_t vocab_size, const uint32_t* allowed) {
    const size_t words = (vocab_size + 31) / 32;
    if (bans_.size() != words) {
        bans_.assign(words, params_.allowed_ids.empty() ? UINT32_MAX : 0);
        for (const uint32_t id : params_.allowed_ids) bans_[id / 32] |= 1u << id % 32;
        for (const uint32_t id : params_.banned_ids) bans_[id / 32] &= ~(1u << id % 32);
    }
    if (!allowed) return bans_.data();
    mask_.resize(words);
    for (size_t i = 0; i < words; ++i) mask_[i] = bans_[i] & allowed[i];
    return mask_.data();
}

uint32_t Sampler::check_finite(std::span<const float> logits) const {
    uint32_t best;
    if (kernels_.argmax(logits.data(), uint32_t(logits.size()), &best)) return best;
    throw Error(logits.data() == row_.data()
                    ? "the logits are not finite after logit_bias and penalties: these are too large"
                    : "the model's logits are not finite: the weights overflow on this input");
}

uint32_t Sampler::most_probable(std::span<const float> row) const {
    const uint32_t best = check_finite(row);
    if (row[best] == -infinity) {
        throw Error(
            "no token is left to draw: banned_ids, allowed_ids, logit_bias, min_new_tokens or a grammar rule out "
            "every one");
    }
    return best;
}

// Leaves of candidates_ what is drawn from; returns the sum of the weights.
double Sampler::narrow(uint64_t step) {
    const SamplingParams& p = params_;
    if (p.mirostat == 1) {
        candidates_.mirostat_1(mirostat_mu_, p.temperature);
    } else if (p.mirostat == 2) {
        candidates_.mirostat_2(mirostat_mu_, p.temperature);
    } else {
        truncate(step);
        if (p.dynatemp_range > 0) {
            return candidates_.weigh(
                candidates_.dynamic_temperature(p.temperature, p.dynatemp_range, p.dynatemp_exponent));
        }
    }
    return candidates_.weigh(p.temperature);
}

void Sampler::truncate(uint64_t step) {
    const SamplingParams& p = params_;
    if (p.top_n_sigma > 0) candidates_.top_n_sigma(p.top_n_sigma);
    if (p.top_k > 0) candidates_.top_k(p.top_k);
    if (p.typical_p < 1) candidates_.typical(p.typical_p, p.min_keep);
    if (p.top_p < 1) candidates_.top_p(p.top_p, p.min_keep);
    if (p.min_p > 0) candidates_.min_p(p.min_p, p.min_keep);
    // More than half of the probability is with one token at most, of which XTC never removes the last.
    if (p.xtc_probability > 0 && p.xtc_threshold <= 0.5f && uniform(seed_, step, Use::xtc) < p.xtc_probability) {
        candidates_.xtc(p.xtc_threshold, p.min_keep);
    }
}

// All ids of the parameters have to be below V, which only the logits tell.
void Sampler::check_ids(size_t vocab_size) {
    if (vocab_size == 0) throw ArgumentError("there are no logits");
    const auto in_vocabulary = [=](const char* name, uint32_t id) {
        if (id < vocab_size) return;
        throw ArgumentError(std::string(name) + " has token id " + std::to_string(id) +
                            ", which is not below the vocabulary size " + std::to_string(vocab_size));
    };
    for (const uint32_t id : params_.banned_ids) in_vocabulary("banned_ids", id);
    for (const uint32_t id : params_.allowed_ids) in_vocabulary("allowed_ids", id);
    for (const uint32_t id : params_.stop_ids) in_vocabulary("stop_ids", id);
    for (const auto& entry : params_.logit_bias) in_vocabulary("logit_bias", entry.first);
    checked_size_ = vocab_size;
}

}  // namespace fixmin::sampling
