// Stops a thread for good inside the native code of another extension module.
//
// A thread that comes back from such code while the interpreter ends asks for the GIL, and CPython up to 3.13 ends it
// by pthread_exit. Its unwinding does not get through frames of Rust: the process dies of SIGSEGV.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.h"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define FIXMIN_CAN_PARK 1
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <thread>
#endif

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

#ifdef FIXMIN_CAN_PARK

struct Code {
    uintptr_t begin = 0, end = 0;  // addresses
    bool has(uintptr_t address) const { return begin <= address && address < end; }
};

/// The executable segment that holds `address`; empty if there is none.
Code code_around(uintptr_t address) {
    struct Search {
        uintptr_t address;
        Code found;
    } search{address, {}};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* data) {
            Search& s = *static_cast<Search*>(data);
            for (int i = 0; i < library->dlpi_phnum; ++i) {
                const auto& segment = library->dlpi_phdr[i];
                const uintptr_t begin = library->dlpi_addr + segment.p_vaddr;
                const Code code{begin, begin + segment.p_memsz};
                if (segment.p_type != PT_LOAD || !(segment.p_flags & PF_X) || !code.has(s.address)) continue;
                s.found = code;
                return 1;
            }
            return 0;
        },
        &search);
    return search.found;
}

// What the handler reads: lock-free, so that it may, and never destroyed, as a thread may be parked at exit.
std::atomic<uintptr_t> code_begin, code_end;
std::atomic<pid_t> asked;  // the thread that is to park; minus that once it has; 0 where it has not
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<pid_t>::is_always_lock_free);

uintptr_t interrupted_at(const void* context) {
    const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    return static_cast<uintptr_t>(machine.gregs[REG_RIP]);
#else
    return machine.pc;
#endif
}

/// Within the library's own code the thread holds no lock of libc, malloc's above all, that the end of the process
/// could wait for; and not the GIL, which the thread that asks holds meanwhile.
void park_here(int, siginfo_t*, void* context) {
    pid_t me = static_cast<pid_t>(syscall(SYS_gettid));
    const bool inside = Code{code_begin, code_end}.has(interrupted_at(context));
    const bool in_time = asked.compare_exchange_strong(me, inside ? -me : 0);
    while (inside && in_time) pause();  // all signals are blocked
}

/// A real-time signal that nobody uses, with park_here as its handler; 0 if there is none. The handler stays: a signal
/// that comes too late for its question would end the process otherwise.
int parking_signal() {
    struct sigaction mine{};
    mine.sa_sigaction = &park_here;
    mine.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
    sigfillset(&mine.sa_mask);
    for (int number = SIGRTMAX; number >= SIGRTMIN; --number) {  // most take them from the other end
        struct sigaction present{};
        if (sigaction(number, nullptr, &present) != 0 || present.sa_handler != SIG_DFL) continue;
        if (sigaction(number, &mine, nullptr) == 0) return number;
    }
    return 0;
}

std::optional<bool> park_thread(pid_t thread_id, const py::type& type) {
    // Looked up before anything is parked: a thread could be so with the loader's lock, in the callback of a backtrace.
    static const Code code =
        code_around(reinterpret_cast<uintptr_t>(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_dealloc));
    static const int signal_number = code.end ? parking_signal() : 0;
    if (signal_number == 0) return std::nullopt;
    code_begin = code.begin;
    code_end = code.end;
    asked = thread_id;
    if (syscall(SYS_tgkill, getpid(), thread_id, signal_number) != 0) {
        asked = 0;
        if (errno == ESRCH) return true;
        return errno == EAGAIN ? std::optional(false) : std::nullopt;  // too many signals wait
    }
    // It answers when it next runs, which takes a while at the lowest priority. Afterwards its answer is not heeded: it
    // might come while it holds the GIL.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
    while (asked == thread_id && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    asked.compare_exchange_strong(thread_id, 0);
    return asked != 0;
}

#else

std::optional<bool> park_thread(int, const py::type&) { return std::nullopt; }

#endif

}  // namespace

void bind_park(py::module_& m) {
    // Holds the GIL throughout, so that the thread that is parked does not.
    m.def("park_thread", &park_thread, py::arg("thread_id"), py::arg("type"));
}

}  // namespace fixmin::bindings
