// Letting go of the GIL, and taking it again in a process that ends.
//
// CPython up to 3.13 ends a thread that asks for the GIL while the interpreter is taken down, by pthread_exit, whose
// unwinding a noexcept function or a catch (...) on its way turns into an abort of the process. A daemon thread in the
// middle of a call is such a thread. It waits for the end of the process here instead, as it does in CPython from 3.14.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#if defined(__unix__) || defined(__APPLE__)
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

/// Python may be called as long as this exists, from any thread.
class WithGil {
  public:
    WithGil() {
        Asking asking;
        gil_.emplace();
        asking.answered();
    }

  private:
    std::optional<pybind11::gil_scoped_acquire> gil_;
};

}  // namespace fixmin::bindings
