// Persistent worker threads that run one function together, with barriers inside it.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "threads/team.h"

namespace fixmin::threads {

/// The calling thread is member 0 of the team; size - 1 workers wait for it between calls.
class ThreadPool {
  public:
    /// Throws Error if the system refuses a thread; run() in a forked child does so too.
    explicit ThreadPool(uint32_t size);
    ~ThreadPool();

    uint32_t size() const { return size_; }

    static constexpr uint32_t all = UINT32_MAX;

    /// Runs job(team) once on each of n threads (at least 1, at most size()) and returns when all have finished; one
    /// call at a time. The other threads sleep on: with n = 1 nothing is woken and no barrier waits. The floating-point
    /// environment is the default one inside. In a forked child the workers are made anew. An exception of the job ends
    /// up here; a job that uses team.barrier() must not throw.
    void run(const std::function<void(Team&)>& job, uint32_t n = all);

    /// body(begin, end) on contiguous shares of 0..n, one for each of n_threads.
    void parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body, uint32_t n_threads = all);

  private:
    struct Shared;
    void start();
    void stop();

    const uint32_t size_;
    pid_t owner_ = 0;  // the process that the workers live in
    std::unique_ptr<Shared> shared_;
    std::vector<std::thread> workers_;
};

/// CPUs this process may run on: the smallest of its affinity mask and its cgroup's quota, at least 1.
uint32_t usable_cpus();

/// usable_cpus(), but no more than the physical cores in the affinity mask.
uint32_t default_threads();

}  // namespace fixmin::threads
