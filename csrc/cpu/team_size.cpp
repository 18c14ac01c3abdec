#include "cpu/team_size.h"

#include <algorithm>
#include <bit>

namespace fixmin::cpu {
namespace {

constexpr double ms = 1e6;

// A kind of step begins with a thread for each of these. A thread that another process keeps from running stays away
// for a time slice, 3 ms and more: shorter steps begin alone.
constexpr double work_per_thread_ns = 1 * ms;

// Long enough that a wake of the threads (0.05 ms) says nothing, short enough to be spared.
constexpr double round_ns = 5 * ms;

// Between trials: doubled whenever the usual size has proved the best, so that what changes later is found within
// seconds.
constexpr double first_interval_ns = 100 * ms, longest_interval_ns = 4000 * ms;

// What trying may cost: at once, and as a part of the time computed.
constexpr double first_credit_ns = 30 * ms, credit_share = 0.03;

// Another size must be so much faster, else noise would change it all the time; a round so much slower ends a trial,
// and one that is so much slower than usual calls for one.
constexpr double faster = 0.95, slower = 1.05, disturbed = 1.5;

// 1, 2, 3, 4, 6, 8, 12, ..., and one and two less than all: the best where as many CPUs are taken.
std::vector<uint32_t> steps_to(uint32_t most) {
    std::vector<uint32_t> sizes;
    for (uint32_t power = 1; power < most; power *= 2) {
        sizes.push_back(power);
        if (power >= 2 && power / 2 * 3 < most) sizes.push_back(power / 2 * 3);
    }
    for (const uint32_t busy : {2u, 1u, 0u}) {
        if (most > busy && (sizes.empty() || sizes.back() < most - busy)) sizes.push_back(most - busy);
    }
    return sizes;
}

}  // namespace

TeamSize::TeamSize(uint32_t most, bool fixed) : sizes_(steps_to(std::max(most, 1u))), fixed_(fixed) {}

uint32_t TeamSize::choose(uint32_t n_tokens, double work_ns) {
    if (fixed_ || sizes_.size() == 1) return sizes_.back();
    Kind& kind = kinds_[std::bit_width(n_tokens)];
    if (!kind.used) begin(kind, work_ns);
    last_ = &kind;
    last_work_ns_ = work_ns;
    const bool trying = kind.stage == Stage::first_try || kind.stage == Stage::second_try;
    return sizes_[trying ? kind.candidate : kind.size];
}

// By the guess, but no fewer than the steps with less work have found best, and no more than those with more.
void TeamSize::begin(Kind& kind, double work_ns) {
    size_t size = 0;
    while (size + 1 < sizes_.size() && sizes_[size + 1] * work_per_thread_ns <= work_ns) ++size;
    for (Kind& other : kinds_) {
        if (!other.tried) continue;
        size = &other < &kind ? std::max(size, other.size) : std::min(size, other.size);
    }
    kind.used = true;
    kind.size = size;
    kind.interval_ns = first_interval_ns;
    kind.credit_ns = first_credit_ns;
}

void TeamSize::record(double elapsed_ns) {
    if (!last_) return;
    Kind& kind = *last_;
    last_ = nullptr;
    kind.credit_ns += credit_share * elapsed_ns;
    kind.round.ns += elapsed_ns;
    kind.round.work += last_work_ns_;
    if (kind.round.ns < round_ns) return;
    const Round round = kind.round;
    kind.round = {};
    end_round(kind, round.rate(), round.ns);
}

void TeamSize::end_round(Kind& kind, double rate, double ns) {
    const auto lose = [&] { kind.loss_ns += ns * (1 - kind.before / rate); };
    switch (kind.stage) {
        case Stage::usual:
            kind.since_trial_ns += ns;
            if (kind.usual_rate > 0 && rate > disturbed * kind.usual_rate) kind.since_trial_ns = kind.interval_ns;
            kind.usual_rate = kind.usual_rate > 0 ? 0.75 * kind.usual_rate + 0.25 * rate : rate;
            if (!may_try(kind, ns, ns / rate)) return;
            kind.before = rate;
            kind.loss_ns = 0;
            kind.stage = Stage::first_try;
            return;
        case Stage::first_try:
            lose();
            kind.first = rate;
            if (rate > slower * kind.before) return end_trial(kind, false, kind.before);
            kind.stage = Stage::usual_again;
            return;
        case Stage::usual_again:
            kind.after = rate;
            kind.stage = Stage::second_try;
            return;
        case Stage::second_try: {
            lose();
            bool better = kind.first + rate < faster * (kind.before + kind.after);
            // One disturbed round of the usual size does not make a case for more threads.
            if (kind.candidate > kind.size)
                better = better && std::min(kind.first, rate) < std::min(kind.before, kind.after);
            return end_trial(kind, better, better ? (kind.first + rate) / 2 : (kind.before + kind.after) / 2);
        }
    }
}

// Whether the next round is one of another size, and of which.
bool TeamSize::may_try(Kind& kind, double round_ns, double work_ns) {
    if (kind.since_trial_ns < kind.interval_ns) return false;
    const bool larger = kind.size == 0 || (kind.larger_next && kind.size + 1 < sizes_.size());
    kind.candidate = larger ? kind.size + 1 : kind.size - 1;
    const double fewer = larger ? 0.5 : double(sizes_[kind.size]) / sizes_[kind.candidate] - 1;
    // Where steps take far longer than the guess, a smaller team has little to lose.
    const double cost = std::max(std::min(round_ns, 3 * work_ns) * fewer, kind.loss_before_ns[larger]);
    kind.credit_ns = std::min(kind.credit_ns, std::max(first_credit_ns, 2 * cost));
    return kind.credit_ns >= cost;
}

void TeamSize::end_trial(Kind& kind, bool better, double rate) {
    const bool larger = kind.candidate > kind.size;
    kind.loss_before_ns[larger] = std::max(kind.loss_ns, 0.0);
    kind.credit_ns -= std::max(kind.loss_ns, 0.0);
    kind.stage = Stage::usual;
    kind.since_trial_ns = 0;
    kind.tried = true;
    kind.usual_rate = rate;
    kind.larger_next = better == larger;
    if (better) {
        kind.size = kind.candidate;
        kind.interval_ns = first_interval_ns;
        kind.loss_before_ns[0] = kind.loss_before_ns[1] = 0;
    } else {
        kind.interval_ns = std::min(2 * kind.interval_ns, longest_interval_ns);
    }
}

double guessed_ns(const model::Weights& weights, const model::Batch& batch) {
    // 8-bit weights, AVX-512 VNNI: 0.013 ns for a product in a batch; reading a weight costs as much as five of them.
    constexpr double product_ns = 0.013, reading = 5, attention_ns = 0.03;
    const model::Hyperparams& hp = weights.hyperparams;
    double products = double(weights.block_product_weights()) * (double(batch.ids.size()) + reading);
    if (const size_t n = batch.rows.size())
        products += double(hp.vocab_size) * hp.embedding_length * (double(n) + reading);
    double pairs = 0;
    for (const model::Chunk& chunk : batch.chunks) pairs += chunk.n_tokens * (chunk.position + chunk.n_tokens / 2.0);
    return product_ns * products + attention_ns * 2 * pairs * hp.q_length() * hp.block_count;
}

}  // namespace fixmin::cpu
