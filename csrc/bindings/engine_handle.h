// An engine as Python holds it, and how Python waits for one.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>  // defines __GLIBC__
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings/bindings.h"
#include "engine/engine.h"
#include "error.h"

namespace fixmin::bindings {

namespace py = pybind11;

using Ids = py::array_t<uint32_t, py::array::c_style>;

inline std::span<const uint32_t> id_span(const Ids& ids) {
    if (ids.ndim() != 1) throw ArgumentError("ids must have one dimension, not " + std::to_string(ids.ndim()));
    return {ids.data(), size_t(ids.size())};
}

/// Whether this thread is calling a mask: whatever Python runs there, a collected object's __del__ too, must not wait
/// for the engine.
inline thread_local bool calling_a_mask = false;

/// Asked between layers, in the thread that called: has a signal handler (Ctrl-C) raised? Python's signal handlers run
/// only when asked, and asking takes the GIL, so that is done rarely.
class Interruption {
  public:
    bool operator()() {
        const auto now = std::chrono::steady_clock::now();
        if (now - asked_ < std::chrono::milliseconds(20)) return raised_;
        asked_ = now;
        const WithGil gil;
        raised_ = raised_ || PyErr_CheckSignals() != 0;
        asked_ = std::chrono::steady_clock::now();  // a handler may take its time
        return raised_;
    }

    /// With the GIL held, after the computation: what a signal handler raised goes on to the caller.
    void rethrow() const {
        if (raised_) throw py::error_already_set();
    }

  private:
    bool raised_ = false;
    std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

/// Runs a computation without the GIL; `f` gets the function that tells whether to stop.
template <typename F>
void compute(F f) {
    Interruption interruption;
    bool cancelled = false;
    {
        const WithoutGil released;
        try {
            f([&] { return interruption(); });
        } catch (const model::Cancelled&) {
            cancelled = true;
        }
    }
    interruption.rethrow();
    if (cancelled) throw Error("the computation was cancelled");
}

/// Frees the engine unless others have it. Then gives freed memory back to the system: a tokenizer and an engine leave
/// holes behind each other in glibc's heap, which otherwise grows with every model that is opened and closed.
inline void let_go_of(std::shared_ptr<engine::Engine>& engine) {
    [[maybe_unused]] const bool last = engine.use_count() == 1;
    engine.reset();
#ifdef __GLIBC__
    if (last) malloc_trim(0);
#endif
}

/// An engine is being ended by a thread that nobody joins.
class Ending {
  public:
    Ending() {
        const std::lock_guard lock(all().mutex);
        ++all().n;
    }
    Ending(const Ending&) = delete;
    ~Ending() {
        const std::lock_guard lock(all().mutex);
        --all().n;
        all().changed.notify_all();
    }

    /// Not for ever: one may wait for a mask that does not return.
    static void wait_for_all() {
        if (all().process != getpid()) return;  // in a forked child those threads are not
        std::unique_lock lock(all().mutex);
        all().changed.wait_for(lock, std::chrono::seconds(10), [] { return all().n == 0; });
    }

  private:
    struct All {
        std::mutex mutex;
        std::condition_variable changed;
        size_t n = 0;
        const pid_t process = getpid();
    };
    static All& all() {
        static All& all = *new All();  // threads may outlive what is destroyed at the end
        return all;
    }
};

/// An Engine that can be closed: calls and leases hold references of their own, so the memory outlives them.
class EngineHandle {
  public:
    /// To be opened: see registered().
    EngineHandle() = default;

    void open(const std::string& path, const engine::EngineOptions& options, const py::object& progress) {
        Interruption interruption;
        bool refused = false;
        const auto report = [&](double fraction) {
            if (interruption()) throw model::Cancelled();
            if (progress.is_none()) return;
            const WithGil gil;
            refused = progress(fraction).is(py::bool_(false));
            if (refused) throw model::Cancelled();
        };
        gguf::GgufFile file = open_gguf(path);
        source_ = file.source();
        metadata_ = metadata(file);
        {
            const WithoutGil released;
            try {
                held_->engine = std::make_shared<engine::Engine>(std::move(file), options, report);
            } catch (const model::Cancelled&) {
            } catch (const GgufError& error) {
                throw GgufError(with_path(error.what()));
            } catch (const UnsupportedError& error) {
                throw UnsupportedError(with_path(error.what()));
            }
        }
        interruption.rethrow();
        if (refused) throw Error("loading '" + path + "' was cancelled: progress returned False");
        open_handles().insert(this);
    }

    std::shared_ptr<engine::Engine> get() const {
        check_open();
        held_->engine->start_thread();
        return held_->engine;
    }

    /// Of the file that was loaded, whatever its path names by now; empty the second time.
    py::object take_metadata() {
        py::object taken = std::exchange(metadata_, py::object());
        return taken ? taken : py::dict();
    }
    std::shared_ptr<const gguf::Source> source() const {
        check_open();
        return source_;
    }

    /// The same engine; closing this one ends what the lease began, and the lease keeps the memory.
    py::object lease() const {
        const auto engine = get();
        py::object object = registered<EngineHandle>();
        EngineHandle& handle = object.cast<EngineHandle&>();
        handle.held_->engine = engine;
        handle.source_ = source_;
        handle.owner_ = false;
        return object;
    }

    /// Ends the requests, whose masks need the GIL while the engine's thread ends, and lets go of the file.
    void close() {
        closed_ = true;
        source_.reset();
        let_go(owner_);
    }
    ~EngineHandle() {
        open_handles().erase(this);
        let_go(owner_);
    }
    EngineHandle(const EngineHandle&) = delete;

    /// At the end of the interpreter, while masks can still be called: a thread that asks for the GIL later is ended by
    /// Python in a way that C++ must not catch.
    static void close_all() {
        const std::set<EngineHandle*> handles = open_handles();  // others may go meanwhile
        for (EngineHandle* handle : handles) {
            if (open_handles().contains(handle)) handle->close();
        }
        const WithoutGil released;
        Ending::wait_for_all();
    }

  private:
    void check_open() const {
        if (closed_ || !held_->engine) throw ArgumentError("the engine is closed");
    }
    std::string with_path(const std::string& what) const {
        return what.starts_with(source_->path()) ? what : source_->path() + ": " + what;
    }

    // A second caller waits for the first one: both return when the requests have ended. Without the GIL another thread
    // may destroy this.
    void let_go(bool stop) {
        const std::shared_ptr<Held> held = held_;
        std::shared_ptr<engine::Engine> last = held->engine;
        if (!last) return;
        if (calling_a_mask) {
            held->engine.reset();
            std::thread([ending = std::make_shared<Ending>(), last = std::move(last), stop]() mutable {
                if (stop) last->stop();
                let_go_of(last);
            }).detach();
            return;
        }
        {
            const WithoutGil released;
            if (stop) last->stop();
        }
        held->engine.reset();
        const WithoutGil released;
        let_go_of(last);
    }

    // With the GIL held.
    static std::set<EngineHandle*>& open_handles() {
        static std::set<EngineHandle*> handles;
        return handles;
    }

    struct Held {
        std::shared_ptr<engine::Engine> engine;
    };
    const std::shared_ptr<Held> held_ = std::make_shared<Held>();
    std::shared_ptr<const gguf::Source> source_;
    py::object metadata_;
    bool owner_ = true;
    bool closed_ = false;
};

/// Mailbox, Request, and the method of Engine that makes one.
void bind_request(py::module_& m, py::class_<EngineHandle>& engine);

}  // namespace fixmin::bindings
