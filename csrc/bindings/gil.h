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

/// Around what asks for the GIL: where that does not return, neither does this.
class Asking {
  public:
    Asking() = default;
    Asking(const Asking&) = delete;
    void answered() { waiting_ = false; }
    ~Asking() {
#if defined(__unix__) || defined(__APPLE__)
        while (waiting_) pause();
#endif
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

/// Held while a thread state is made, and across fork(). CPython enters a new one in its list under a lock, without the
/// GIL; up to 3.11 a child that is forked at that moment waits for that lock for ever, inside of os.fork.
inline std::mutex making_thread_states;

/// Whose objects this module's are: mod_wsgi and others load it in one that is not the main one.
inline PyInterpreterState* interpreter = nullptr;

/// Once, when the module is loaded.
inline void prepare_thread_states() {
    interpreter = PyInterpreterState_Get();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { making_thread_states.lock(); }, [] { making_thread_states.unlock(); },
                   [] { making_thread_states.unlock(); });
#endif
}

/// Python may be called as long as this exists, from any thread.
class WithGil {
  public:
    WithGil() {
        PyThreadState* state = PyGILState_GetThisThreadState();
        if (state == nullptr) {  // not one of Python's threads
            const std::lock_guard lock(making_thread_states);
            state = own_ = PyThreadState_New(interpreter);
            if (state == nullptr) throw std::bad_alloc();
        } else if (state == pybind11::detail::get_thread_state_unchecked()) {
            return;  // PyGILState_Check() is no way to ask: with a second interpreter it always says yes
        }
        Asking asking;
        PyEval_RestoreThread(state);
        asking.answered();
        taken_ = true;
    }
    WithGil(const WithGil&) = delete;
    ~WithGil() {
        if (own_ != nullptr) {
            PyThreadState_Clear(own_);
            PyThreadState_DeleteCurrent();
        } else if (taken_) {
            PyEval_SaveThread();
        }
    }

  private:
    PyThreadState* own_ = nullptr;
    bool taken_ = false;
};

}  // namespace fixmin::bindings
