// The threads that run one forward pass together.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fixmin::threads {

/// Sense-reversing barrier: spins for a bounded time, then sleeps in the kernel.
class Barrier {
  public:
    explicit Barrier(uint32_t spins) : spins_(spins) {}
    /// For `size` threads; while none is in wait().
    void reset(uint32_t size) { size_ = size; }
    void wait();  // thread_pool.cpp

  private:
    uint32_t size_ = 1;
    const uint32_t spins_;
    std::atomic<uint32_t> arrived_ = 0;
    std::atomic<uint32_t> phase_ = 0;
};

/// One thread's view of the team; each thread calls the same functions with its own.
class Team {
  public:
    /// Progress of up to `loops` shared loops; zero when the team is made.
    class Counters {
      public:
        static constexpr uint32_t loops = 16;
        // Entries of a thread's share that have been taken from its front (low half) and from its back (high half).
        struct alignas(64) Taken {
            std::atomic<uint64_t> both = 0;
        };

        explicit Counters(uint32_t size) : size_(size), taken_(size_t(loops) * size) {}
        std::atomic<uint64_t>& of(uint32_t loop, uint32_t thread) { return taken_[loop % loops * size_ + thread].both; }
        void clear() {
            for (Taken& taken : taken_) taken.both.store(0, std::memory_order_relaxed);
        }

      private:
        const uint32_t size_;
        std::vector<Taken> taken_;
    };

    Team(uint32_t index, uint32_t size, Counters& counters, Barrier& barrier)
        : index(index), size(size), counters_(counters), barrier_(barrier) {}

    /// Returns once every thread of the team has called it.
    void barrier() {
        if (size > 1) barrier_.wait();
    }

    struct Range {
        uint32_t begin, end;
    };
    /// This thread's contiguous share of 0..n.
    Range share(uint32_t n) const { return share_of(index, n); }

    /// body(begin, end) on pieces of 0..n until the team has taken all of them. A thread goes through its own share
    /// from the front, so that it reads one range of memory after the other, and then helps the others from the back of
    /// theirs: a thread whose core is slower or shared does less. Every thread calls it, with at most four calls
    /// between two barriers.
    template <typename Body>
    void for_pieces(uint32_t n, Body body) {
        // Nobody is eight loops away: a counter is cleared long after its last use and long before its next.
        counters_.of(loop_ + Counters::loops / 2, index).store(0, std::memory_order_relaxed);
        for (uint32_t i = 0; i < size; ++i) {
            const uint32_t owner = (index + i) % size;
            for (Range piece; take(owner, n, piece);) body(piece.begin, piece.end);
        }
        ++loop_;
    }

    const uint32_t index, size;

  private:
    Range share_of(uint32_t thread, uint32_t n) const {
        return {uint32_t(uint64_t(n) * thread / size), uint32_t(uint64_t(n) * (thread + 1) / size)};
    }

    // Large pieces first, single entries last.
    bool take(uint32_t owner, uint32_t n, Range& piece) {
        const Range all = share_of(owner, n);
        std::atomic<uint64_t>& both = counters_.of(loop_, owner);
        for (uint64_t taken = both.load(std::memory_order_relaxed);;) {
            const uint32_t front = uint32_t(taken), back = uint32_t(taken >> 32);
            const uint32_t left = all.end - all.begin - front - back;
            if (left == 0) return false;
            const bool own = owner == index;
            const uint32_t count = size == 1 ? left : std::max(left / (own ? 2 : 4), 1u);
            const uint64_t added = own ? count : uint64_t(count) << 32;
            if (!both.compare_exchange_weak(taken, taken + added, std::memory_order_relaxed)) continue;
            if (own)
                piece = {all.begin + front, all.begin + front + count};
            else
                piece = {all.end - back - count, all.end - back};
            return true;
        }
    }

    Counters& counters_;
    Barrier& barrier_;
    uint32_t loop_ = 0;
};

}  // namespace fixmin::threads
