#include "engine/drafter.h"

#include <algorithm>

namespace fixmin::engine {
namespace {

// Shorter endings are found everywhere and predict little, longer ones are found where three are found.
constexpr uint32_t longest_ending = 3, shortest_ending = 2;
constexpr uint32_t longest_pause = 64;

// Where the last earlier occurrence of the ending of n tokens ends, or 0.
size_t last_occurrence(std::span<const uint32_t> ids, uint32_t n) {
    if (ids.size() <= n) return 0;
    const auto ending = ids.last(n);
    for (size_t end = ids.size() - 1; end >= n; --end) {
        if (std::equal(ending.begin(), ending.end(), ids.begin() + ptrdiff_t(end - n))) return end;
    }
    return 0;
}

}  // namespace

std::vector<uint32_t> Drafter::draft(std::span<const uint32_t> ids, uint32_t room) {
    if (most_ == 0 || room == 0) return {};
    if (pause_ > 0) {
        --pause_;
        return {};
    }
    for (uint32_t n = longest_ending; n >= shortest_ending; --n) {
        const size_t end = last_occurrence(ids, n);
        if (end == 0) continue;
        // A period that is shorter than the draft goes on repeating itself.
        std::vector<uint32_t> tokens;
        const size_t period = ids.size() - end;
        for (uint32_t i = 0; i < std::min(length_, room); ++i) tokens.push_back(ids[end + i % period]);
        return tokens;
    }
    return {};
}

void Drafter::report(uint32_t n, uint32_t n_right) {
    if (n == 0) return;
    if (n_right == n) {
        length_ = std::min(most_, 2 * length_);
        next_pause_ = 2;
    } else if (2 * n_right >= n) {
        next_pause_ = 2;
    } else {
        length_ = std::max(length_ / 2, 1u);
        if (n_right == 0) {
            pause_ = next_pause_;
            next_pause_ = std::min(2 * next_pause_, longest_pause);
        }
    }
}

}  // namespace fixmin::engine
