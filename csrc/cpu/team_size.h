// How many of an engine's threads take a step together.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/backend.h"

namespace fixmin::cpu {

/// Finds the team's size for each kind of step (by the number of its tokens, in powers of two) by trying. No clock is
/// read here: times are given, so that a test can make them up.
///
/// A kind begins with a guess from its work. Now and then a few steps are taken with the next smaller or larger team,
/// in rounds that take turns with the usual size: A B A B. A size that was clearly faster becomes the usual one. What
/// trying costs is bounded by a credit that grows with the time computed: beside a busy process one step of a small
/// model with a second thread can take as long as eighty with one, since a barrier waits for a thread that is not
/// running.
class TeamSize {
  public:
    /// @param most   largest team
    /// @param fixed  always `most`: for measurements and tests
    explicit TeamSize(uint32_t most, bool fixed = false);

    /// Threads for a step of n_tokens >= 1 that would take one thread about work_ns, a rough guess that need only be
    /// right in its proportions between steps of a kind.
    uint32_t choose(uint32_t n_tokens, double work_ns);

    /// The step that choose() was last asked for took elapsed_ns. Steps that were broken off are not told.
    void record(double elapsed_ns);

  private:
    enum class Stage { usual, first_try, usual_again, second_try };

    struct Round {
        double ns = 0, work = 0;
        double rate() const { return ns / work; }
    };

    // Steps of about the same number of tokens. Rates are nanoseconds per nanosecond of guessed work.
    struct Kind {
        bool used = false, tried = false;
        size_t size = 0, candidate = 0;  // in sizes_
        Stage stage = Stage::usual;
        Round round;                    // of steps with the same size, until it is long enough
        double usual_rate = 0;          // smoothed
        double before = 0, after = 0;   // of the usual size in a trial
        double first = 0;               // of the candidate
        double since_trial_ns = 0;      // computed with the usual size
        double interval_ns = 0;         // until the next trial
        double credit_ns = 0;           // that trying may cost
        double loss_ns = 0;             // of this trial so far
        double loss_before_ns[2] = {};  // of the last trial of a smaller, a larger team
        bool larger_next = true;
    };

    void begin(Kind& kind, double work_ns);
    void end_round(Kind& kind, double rate, double ns);
    bool may_try(Kind& kind, double round_ns, double work_ns);
    void end_trial(Kind& kind, bool better, double rate);

    std::vector<uint32_t> sizes_;  // rising, from 1
    const bool fixed_;
    std::array<Kind, 33> kinds_;  // by the width of n_tokens in bits
    Kind* last_ = nullptr;
    double last_work_ns_ = 0;
};

/// Nanoseconds that one thread would take for a step, within a factor of about three: weights are read once and
/// multiplied with every token, every cached position is read by every token behind it.
double guessed_ns(const model::Weights& weights, const model::Batch& batch);

}  // namespace fixmin::cpu
