#include "threads/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <exception>
#include <fstream>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <system_error>
#include <thread>

#include "error.h"
#include "threads/machine.h"

namespace fixmin::threads {
namespace {

// About 50 microseconds of `pause`: longer than any step between two barriers of a decoded token is uneven, far shorter
// than a scheduler's time slice.
constexpr uint32_t default_spins = 2000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void wait_for_change(std::atomic<uint32_t>& value, uint32_t old, uint32_t spins) {
    for (uint32_t i = 0; i < spins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Another library may have switched on flush-to-zero or another rounding in this thread: results must not depend on it.
class DefaultFloatingPoint {
  public:
    DefaultFloatingPoint() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&saved_); }

  private:
    std::fenv_t saved_;
};

}  // namespace

void Barrier::wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_for_change(phase_, phase, spins_);
    }
}

struct ThreadPool::Shared {
    Shared(uint32_t size, uint32_t spins) : spins(spins), barrier(spins), counters(size), calls(size) {}

    // Counts the jobs of one worker: those that a smaller team leaves out sleep on.
    struct alignas(64) Calls {
        std::atomic<uint32_t> n = 0;
    };

    const uint32_t spins;
    Barrier barrier;
    Team::Counters counters;
    std::vector<Calls> calls;
    std::atomic<uint32_t> running = 0;  // workers still in the job
    std::atomic<bool> quit = false;
    uint32_t team_size = 0;
    const std::function<void(Team&)>* job = nullptr;
    std::mutex error_mutex;
    std::exception_ptr error;  // the first one of a job

    void wake(uint32_t worker) {
        calls[worker].n.fetch_add(1, std::memory_order_release);
        calls[worker].n.notify_one();
    }

    void call(uint32_t index, uint32_t size) {
        const DefaultFloatingPoint environment;
        Team team(index, size, counters, barrier);
        try {
            (*job)(team);
        } catch (...) {
            const std::lock_guard lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    }
};

ThreadPool::ThreadPool(uint32_t size) : size_(std::max(size, 1u)) { start(); }

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
    owner_ = getpid();
    // Spinning pays only if every thread has a CPU to itself.
    shared_ = std::make_unique<Shared>(size_, size_ <= usable_cpus() ? default_spins : 0);
    const auto start_worker = [this](uint32_t i) {
        workers_.emplace_back([shared = shared_.get(), i] {
            std::atomic<uint32_t>& calls = shared->calls[i].n;
            for (uint32_t seen = 0;;) {
                wait_for_change(calls, seen, shared->spins);
                seen = calls.load(std::memory_order_acquire);
                if (shared->quit) return;
                shared->call(i, shared->team_size);
                if (shared->running.fetch_sub(1, std::memory_order_acq_rel) == 1) shared->running.notify_one();
            }
        });
    };
    try {
        for (uint32_t i = 1; i < size_; ++i) start_worker(i);
    } catch (const std::system_error& error) {
        const size_t started = workers_.size() + 1;
        stop();
        owner_ = 0;  // so that the next job tries again
        throw Error("the system refuses thread " + std::to_string(started + 1) + " of " + std::to_string(size_) + " (" +
                    error.code().message() + "): use fewer threads, or raise the limit of processes");
    }
}

void ThreadPool::stop() {
    if (owner_ != getpid()) {
        // A forked child, or threads that could not be started: the threads are not here. Joining or destroying their
        // handles would end the process.
        for (std::thread& worker : workers_) new std::thread(std::move(worker));
        shared_.release();
        workers_.clear();
        return;
    }
    shared_->quit = true;
    for (uint32_t i = 1; i <= workers_.size(); ++i) shared_->wake(i);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void ThreadPool::run(const std::function<void(Team&)>& job, uint32_t n) {
    n = std::min(n, size_);
    if (owner_ != getpid()) {
        stop();
        start();
    }
    Shared& shared = *shared_;
    shared.job = &job;
    shared.error = nullptr;
    shared.counters.clear();
    shared.barrier.reset(n);
    shared.team_size = n;
    shared.running.store(n - 1, std::memory_order_relaxed);
    for (uint32_t i = 1; i < n; ++i) shared.wake(i);
    shared.call(0, n);
    for (uint32_t left; (left = shared.running.load(std::memory_order_acquire)) != 0;) {
        wait_for_change(shared.running, left, shared.spins);
    }
    if (shared.error) std::rethrow_exception(shared.error);
}

void ThreadPool::parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body, uint32_t n_threads) {
    run(
        [&](Team& team) {
            const auto [begin, end] = team.share(n);
            if (begin < end) body(begin, end);
        },
        n_threads);
}

namespace {

#if defined(__linux__)
std::vector<int> affinity_cpus() {
    std::vector<int> cpus;
    // The kernel refuses a mask smaller than its own: grow until it fits.
    for (int n = 1024; n <= 1 << 20; n *= 2) {
        cpu_set_t* set = CPU_ALLOC(n);
        if (!set) break;
        const size_t bytes = CPU_ALLOC_SIZE(n);
        CPU_ZERO_S(bytes, set);
        const bool ok = sched_getaffinity(0, bytes, set) == 0;
        for (int i = 0; ok && i < n; ++i) {
            if (CPU_ISSET_S(i, bytes, set)) cpus.push_back(i);
        }
        CPU_FREE(set);
        if (ok) break;
    }
    if (cpus.empty()) cpus.push_back(0);
    return cpus;
}
#else
// There are no affinity masks: all CPUs.
std::vector<int> affinity_cpus() {
    std::vector<int> cpus(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cpus.begin(), cpus.end(), 0);
    return cpus;
}
#endif

}  // namespace

uint32_t usable_cpus() {
    const CgroupLimits limits = cgroup_limits();
    const double n = std::min({double(affinity_cpus().size()), double(limits.cpuset), std::floor(limits.cpus)});
    return uint32_t(std::max(n, 1.0));
}

uint32_t default_threads() {
    std::set<std::string> cores;  // siblings of one core share this line
    for (const int cpu : affinity_cpus()) {
        std::string siblings = std::to_string(cpu);
        std::ifstream("/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list") >> siblings;
        cores.insert(siblings);
    }
    return std::max(1u, std::min(uint32_t(cores.size()), usable_cpus()));
}

}  // namespace fixmin::threads
