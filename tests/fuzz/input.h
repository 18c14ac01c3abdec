// Bytes of a fuzzer as decisions: what a target asks for next. An input that has ended gives zeros, so that every input
// is valid and short ones are simple.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

namespace fixmin::fuzz {

/// Ends the run, which makes the fuzzer keep the input.
inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "broken promise: %s\n", what);
    std::abort();
}

class Input {
  public:
    Input(const uint8_t* data, size_t size) : left_(data, size) {}

    bool ended() const { return left_.empty(); }
    size_t size() const { return left_.size(); }

    uint8_t byte() {
        if (left_.empty()) return 0;
        const uint8_t value = left_.front();
        left_ = left_.subspan(1);
        return value;
    }
    bool flag() { return byte() & 1; }

    /// 0 .. n-1, n <= 256: a byte that a mutation changes by one is the next choice.
    uint32_t below(uint32_t n) { return byte() % n; }

    template <class T>
    T number() {
        T value{};
        const size_t n = std::min(sizeof value, left_.size());
        if (n) std::memcpy(&value, left_.data(), n);
        left_ = left_.subspan(n);
        return value;
    }

    std::vector<uint8_t> bytes(size_t n) {
        std::vector<uint8_t> out(n);
        for (uint8_t& b : out) b = byte();
        return out;
    }

    /// Mostly a small number; now and then one that arithmetic has trouble with, or any bits at all.
    float real() {
        constexpr float infinity = std::numeric_limits<float>::infinity();
        static constexpr float special[] = {0.0f,      -0.0f, 1.0f,     -1.0f, infinity, -infinity, NAN,  1e-45f,
                                            1.17e-38f, 3e38f, -3.3e38f, 1e-6f, 1e9f,     0.5f,      2.0f, -1e-30f};
        const uint8_t kind = byte();
        if (kind < 16) return special[kind];
        if (kind < 24) return number<float>();
        return float(int8_t(byte())) / (kind < 128 ? 16.0f : 128.0f);
    }

  private:
    std::span<const uint8_t> left_;
};

}  // namespace fixmin::fuzz
