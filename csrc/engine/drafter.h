// Guesses of the next tokens, for texts that repeat themselves.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace fixmin::engine {

/// Prompt lookup: what followed the last time when the text ended as it ends now. The guesses are verified by the
/// model, several in one step, so they cost time when they are wrong: how many are made follows how many were right.
class Drafter {
  public:
    explicit Drafter(uint32_t most) : most_(most), length_(most < 3 ? most : 3) {}

    /// At most `room` tokens that may follow `ids`; often none.
    std::vector<uint32_t> draft(std::span<const uint32_t> ids, uint32_t room);

    /// How a draft ended: n_right of its n tokens were what the model produced.
    void report(uint32_t n, uint32_t n_right);

  private:
    uint32_t most_;
    uint32_t length_;     // to guess next time
    uint32_t pause_ = 0;  // steps to sit out
    uint32_t next_pause_ = 2;
};

}  // namespace fixmin::engine
