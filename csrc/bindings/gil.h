// Letting go of the GIL, and taking it again in a process that ends.
//
// CPython up to 3.13 ends a thread that asks for the GIL while the interpreter is taken down, by pthread_exit, whose
// unwinding a noexcept function or a catch (...) on its way turns into an abort of the process. A daemon thread in the
// middle of a call is such a thread. It waits for the end of the process here instead, as it does in CPython from 3.14.
#pragma once
#include <pybind11/pybind11.h>

#include <mutex>
#include <new>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace fixmin::bindings {

/// For the end of the process.
inline void wait_for_ever() {
#if defined(__unix__) || defined(__APPLE__)
    for (;;) pause();
#endif
}

/// Around what asks for the GIL: where that does not return, neither does this.
class Asking {
  public:
    Asking() = default;
    Asking(const Asking&) = delete;
    void answered() { waiting_ = false; }
    ~Asking() {
        if (waiting_) wait_for_ever();
    }

  private:
    bool waiting_ = true;
};

/// Another thread may run Python as long as this exists.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    ~WithoutGil() noexcept(false) {  // the unwinding has to come as far as Asking
        Asking asking;
        PyEval_RestoreThread(state_);
        asking.answered();
    }

  private:
    PyThreadState* const state_;
};

// CPython enters a new thread state in its list under a lock of its own, without the GIL. Up to 3.11 a child that is
// forked at that moment waits for that lock for ever, inside of os.fork: this one is held meanwhile, and across fork().
// From 3.13 os.fork takes CPython's lock itself and before this one, which would be a deadlock.
#if PY_VERSION_HEX < 0x030C0000 && (defined(__unix__) || defined(__APPLE__))
#define FIXMIN_FORKS_WAIT_FOR_THREAD_STATES
inline std::mutex making_thread_states;
#endif

/// Whose objects this module's are: mod_wsgi and others load it in one that is not the main one.
inline PyInterpreterState* interpreter = nullptr;

/// Once, when the module is loaded.
inline void prepare_thread_states() {
    interpreter = PyInterpreterState_Get();
#ifdef FIXMIN_FORKS_WAIT_FOR_THREAD_STATES
    static std::once_flag prepared;  // the file may be loaded under a second name
    std::call_once(prepared, [] {
        pthread_atfork([] { making_thread_states.lock(); }, [] { making_thread_states.unlock(); },
                       [] { making_thread_states.unlock(); });
    });
#endif
}

/// Python may be called as long as this exists, from any thread.
class WithGil {
  public:
    WithGil() {
        state_ = PyGILState_GetThisThreadState();
        if (state_ == nullptr) {  // not one of Python's threads
#ifdef FIXMIN_FORKS_WAIT_FOR_THREAD_STATES
            const std::lock_guard lock(making_thread_states);
#endif
            state_ = PyThreadState_New(interpreter);
            if (state_ == nullptr) throw std::bad_alloc();
            own_ = true;
        } else if (state_ == pybind11::detail::get_thread_state_unchecked()) {
            return;  // PyGILState_Check() is no way to ask: with a second interpreter it always says yes
        }
        Asking asking;
        PyEval_RestoreThread(state_);
        asking.answered();
        taken_ = true;
    }
    WithGil(const WithGil&) = delete;
    ~WithGil() {
        if (!taken_) return;
        // Python called in between, which had let other threads run, was not given the GIL again.
        if (state_ != pybind11::detail::get_thread_state_unchecked()) wait_for_ever();
        if (own_) {
            PyThreadState_Clear(state_);
            PyThreadState_DeleteCurrent();
        } else {
            PyEval_SaveThread();
        }
    }

  private:
    PyThreadState* state_ = nullptr;
    bool own_ = false;
    bool taken_ = false;
};

}  // namespace fixmin::bindings
