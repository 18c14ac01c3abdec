// Sampling parameters, logits and masks of every kind: what is drawn keeps its promises, on two instruction sets and
// from the extract of a row as from the row.
#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>

#include "error.h"
#include "input.h"
#include "kernels/isa.h"
#include "sampling/logprobs.h"
#include "sampling/sampler.h"

namespace {

using namespace fixmin;
using namespace fixmin::sampling;
using fuzz::Input;
using fuzz::require;

constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<uint32_t> ids(Input& input, uint32_t vocab_size) {
    std::vector<uint32_t> out(input.below(12) < 6 ? 0 : input.below(6));
    for (uint32_t& id : out) id = input.below(std::min(vocab_size + 1, 256u));  // now and then one outside
    return out;
}

SamplingParams params(Input& input, uint32_t vocab_size) {
    SamplingParams p;
    // Which fields differ from their defaults: an input has few of them at a time.
    const uint32_t fields = input.number<uint32_t>();
    auto has = [&, n = 0]() mutable { return fields >> n++ & 1; };
    if (has()) p.temperature = input.real();
    if (has()) p.top_k = input.flag() ? input.byte() : input.number<uint32_t>();
    if (has()) p.top_p = input.real();
    if (has()) p.min_p = input.real();
    if (has()) p.typical_p = input.real();
    if (has()) p.top_n_sigma = input.real();
    if (has()) p.xtc_probability = input.real(), p.xtc_threshold = input.real();
    if (has()) p.min_keep = input.byte();
    if (has()) p.mirostat = input.below(4);
    if (has()) p.mirostat_tau = input.real(), p.mirostat_eta = input.real();
    if (has()) p.dynatemp_range = input.real(), p.dynatemp_exponent = input.real();
    if (has()) p.repeat_penalty = input.real();
    if (has()) p.frequency_penalty = input.real(), p.presence_penalty = input.real();
    if (has()) p.repeat_last_n = input.flag() ? int32_t(input.below(20)) - 2 : input.number<int32_t>();
    if (has()) p.openai_penalties = true;
    if (has()) p.dry_multiplier = input.real(), p.dry_base = input.real();
    if (has()) p.dry_allowed_length = input.byte(), p.dry_penalty_last_n = int32_t(input.below(40)) - 2;
    if (has()) {
        p.dry_sequence_breakers.resize(input.below(4));
        for (auto& breaker : p.dry_sequence_breakers) breaker = ids(input, vocab_size);
    }
    if (has()) p.allowed_ids = ids(input, vocab_size);
    if (has()) p.banned_ids = ids(input, vocab_size);
    if (has()) p.min_new_tokens = input.below(6), p.stop_ids = ids(input, vocab_size);
    if (has()) {
        for (const uint32_t id : ids(input, vocab_size)) p.logit_bias[id] = input.real();
    }
    if (has()) p.seed = input.number<uint64_t>();
    return p;
}

// What a device answers, from its definition.
struct Answer {
    numerics::Extract extract{};
    std::vector<numerics::Logit> largest;
};

Answer answer(const numerics::ExtractQuery& query, const std::vector<float>& row) {
    Answer a;
    a.extract.finite = std::ranges::all_of(row, [](float x) { return x < infinity; });
    std::vector<numerics::Logit> left;
    for (uint32_t id = 0; id < row.size(); ++id) {
        if (row[id] > -infinity && (!query.allowed || query.allowed[id / 32] >> id % 32 & 1))
            left.push_back({row[id], id});
    }
    a.extract.highest = -infinity;
    for (const auto& l : left) {
        if (l.logit > a.extract.highest) a.extract.highest = l.logit, a.extract.best = l.id;
    }
    auto sorted = left;
    std::ranges::stable_sort(sorted, std::greater<>(), &numerics::Logit::logit);
    const size_t n = std::min<size_t>(query.n_largest, sorted.size());
    if (n) {
        a.extract.floor = sorted[n - 1].logit;
        for (const auto& l : left) {
            if (l.logit >= a.extract.floor) a.largest.push_back(l);
        }
        a.extract.complete = a.largest.size() == left.size();
        a.extract.largest = a.largest;
    }
    return a;
}

enum class Outcome { token, refused, error };

struct Drawn {
    Outcome outcome = Outcome::token;
    uint32_t id = 0;
    bool operator==(const Drawn&) const = default;
};

Drawn draw(Sampler& sampler, const std::vector<float>& row, uint64_t step, const uint32_t* mask) {
    try {
        return {Outcome::token, sampler.sample(row, step, mask)};
    } catch (const ArgumentError&) {
        return {Outcome::refused};
    } catch (const Error&) {
        return {Outcome::error};
    }
}

void check_extract(Sampler& sampler, const std::vector<float>& row, uint64_t step, const uint32_t* mask,
                   const Drawn& drawn) {
    std::optional<numerics::ExtractQuery> query;
    try {
        query = sampler.query(row.size(), step, mask);
    } catch (const ArgumentError&) {
        require(drawn.outcome == Outcome::refused, "a query is refused when a draw is");
        return;
    }
    // The draw by a sum of weights has a test of its own, with the sum that a GPU makes (tests/cuda/test_extracts.py).
    if (!query || query->temperature > 0) return;
    const Answer a = answer(*query, row);
    const auto id = sampler.sample(a.extract, row.size(), step);
    if (id) require(drawn == Drawn{Outcome::token, *id}, "an extract gives the token of its row");
    if (drawn.outcome != Outcome::token) require(!id, "an extract gives no token where the row gives none");
}

void check_distribution(Sampler& sampler, const std::vector<float>& row, uint64_t step, const uint32_t* mask,
                        const SamplingParams& p, uint32_t id) {
    const Sampler::Distribution all = sampler.probabilities(row, step, mask);
    require(!all.ids.empty() && all.ids.size() == all.probabilities.size(), "something may be drawn");
    double total = 0;
    std::vector<uint8_t> seen(row.size());
    for (size_t i = 0; i < all.ids.size(); ++i) {
        const uint32_t candidate = all.ids[i];
        require(candidate < row.size() && !seen[candidate]++, "each token stands there once");
        require(all.probabilities[i] >= 0 && all.probabilities[i] <= 1 + 1e-6, "probabilities lie in 0 .. 1");
        require(!mask || mask[candidate / 32] >> candidate % 32 & 1, "a mask's tokens only");
        require(p.allowed_ids.empty() || std::ranges::count(p.allowed_ids, candidate), "allowed tokens only");
        require(!std::ranges::count(p.banned_ids, candidate), "no banned token");
        require(step >= p.min_new_tokens || !std::ranges::count(p.stop_ids, candidate), "no early end");
        require(row[candidate] > -infinity, "nothing of probability 0");
        if (candidate == id) require(all.probabilities[i] > 0, "what was drawn was possible");
        total += all.probabilities[i];
    }
    require(std::abs(total - 1) < 1e-4, "probabilities add up to 1");
    require(seen[id], "what was drawn is among what is left");
    if (p.temperature > 0 && !p.mirostat && p.top_k > 0 && p.top_n_sigma <= 0)
        require(all.ids.size() <= p.top_k, "top_k leaves k");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    const uint32_t vocab_size = input.below(8) == 7 ? 300 + input.byte() * 4 : 1 + input.below(70);
    const auto shared = std::make_shared<SamplingParams>(params(input, vocab_size));
    const SamplingParams& p = *shared;
    const std::vector<uint32_t> prompt = ids(input, vocab_size);
    std::optional<Sampler> plain, fast;
    try {
        plain.emplace(shared, std::nullopt, prompt, kernels::select("scalar"));
        fast.emplace(shared, std::nullopt, prompt, kernels::select());
    } catch (const ArgumentError&) {
        require(!fast && !plain, "all instruction sets refuse the same");
        return -1;  // most such inputs need not be kept
    }
    const bool odd = input.below(8) == 7;  // NaN, infinities
    for (uint64_t step = 0; step < 12 && (step < 3 || !input.ended()); ++step) {
        std::vector<float> row(vocab_size);
        const uint8_t scale = input.byte(), pattern = input.byte();
        for (uint32_t i = 0; i < vocab_size; ++i) {
            // A few from the input, the rest from a formula with many ties.
            row[i] = i < 24 ? input.real() : float(int32_t(i * (pattern | 1) % 61) - 30) * float(scale) / 64;
            if (!odd && !(row[i] < infinity)) row[i] = 0;
            if (!odd) row[i] = std::max(row[i], -1e6f);
        }
        std::vector<uint32_t> bits;
        if (input.below(4) == 3) {
            bits.resize((vocab_size + 31) / 32);
            for (uint32_t& word : bits) word = input.number<uint32_t>();
        }
        const uint32_t* mask = bits.empty() ? nullptr : bits.data();
        const Drawn drawn = draw(*plain, row, step, mask);
        require(draw(*plain, row, step, mask) == drawn, "drawing changes nothing");
        require(draw(*fast, row, step, mask) == drawn, "instruction sets draw the same");
        check_extract(*fast, row, step, mask, drawn);
        const bool finite = std::ranges::all_of(row, [](float x) { return x < infinity; });
        if (!finite) require(drawn.outcome != Outcome::token, "nothing is drawn of logits that are not finite");
        if (drawn.outcome != Outcome::token) continue;
        require(drawn.id < vocab_size, "the token exists");
        check_distribution(*plain, row, step, mask, p, drawn.id);
        const TopLogprobs top = top_logprobs(row, input.below(20), drawn.id, kernels::select());
        require(top.chosen.id == drawn.id && top.rank >= 1 && top.rank <= vocab_size, "the rank is one");
        require(std::ranges::is_sorted(top.top, std::greater<>(), &TokenLogprob::logprob), "log-probabilities fall");
        require(top.chosen.logprob <= 1e-4f, "a probability is 1 at most");
        plain->accept(drawn.id);
        fast->accept(drawn.id);
        require(std::bit_cast<uint32_t>(plain->mirostat_mu()) == std::bit_cast<uint32_t>(fast->mirostat_mu()),
                "mirostat learns the same");
    }
    return 0;
}
