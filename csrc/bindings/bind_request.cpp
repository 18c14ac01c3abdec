// Request, Mailbox, Engine.submit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "bindings/engine_handle.h"

namespace fixmin::bindings {
namespace {

const char* name(engine::FinishReason reason) {
    switch (reason) {
        case engine::FinishReason::length: return "length";
        case engine::FinishReason::stop: return "eos";
        case engine::FinishReason::cancelled: return "cancelled";
        case engine::FinishReason::timeout: return "timeout";
    }
    return "?";
}

/// What a mask raised, on its way to whoever asks for the request's result: unlike py::error_already_set it may end in
/// a thread that is not Python's, and be thrown again.
class MaskError : public std::exception {
  public:
    /// With the GIL held.
    explicit MaskError(const py::error_already_set& error) {
        const auto let_go = [](Raised* raised) {
            const WithGil gil;
            delete raised;
        };
        raised_ = {new Raised{error.type(), error.value(), error.trace()}, let_go};
    }
    const char* what() const noexcept override { return "a mask of tokens raised"; }
    [[noreturn]] void raise() const {
        PyErr_Restore(raised_->type.inc_ref().ptr(), raised_->value.inc_ref().ptr(), raised_->trace.inc_ref().ptr());
        throw py::error_already_set();
    }

  private:
    struct Raised {
        py::object type, value, trace;
    };
    std::shared_ptr<Raised> raised_;
};

/// A mask made by Python: an object with allowed() -> uint32 [V/32], accept(id) and finished() -> bool.
class PythonMask : public engine::TokenMask {
  public:
    PythonMask(py::object object, size_t n_words) : object_(std::move(object)), n_words_(n_words) {}
    ~PythonMask() override {
        // Not left to the members' destructors, which run without the GIL.
        call([&] {
            words_.release().dec_ref();
            object_.release().dec_ref();
        });
    }

    const uint32_t* allowed() override {
        call([&] { words_ = object_.attr("allowed")().cast<Words>(); });
        if (size_t(words_.size()) < n_words_) throw ArgumentError("a mask of tokens is shorter than the vocabulary");
        return words_.data();
    }
    void accept(uint32_t id) override {
        call([&] { object_.attr("accept")(id); });
    }
    bool finished() override {
        bool finished = false;
        call([&] { finished = object_.attr("finished")().cast<bool>(); });
        return finished;
    }

  private:
    template <typename F>
    static void call(F f) {
        struct Calling {
            ~Calling() { calling_a_mask = before; }
            const bool before = std::exchange(calling_a_mask, true);
        } const calling;
        const WithGil gil;  // goes first: what the mask left in the thread is collected with the thread's state
        try {
            f();
        } catch (const py::error_already_set& error) {
            throw MaskError(error);
        }
    }
    using Words = py::array_t<uint32_t, py::array::c_style>;
    py::object object_;
    Words words_;
    const size_t n_words_;
};

/// A request as Python holds it. An engine that goes away ends its requests first.
class RequestHandle {
  public:
    RequestHandle() = default;
    RequestHandle(const RequestHandle&) = delete;
    ~RequestHandle() {
        // In a forked child: its lock may be held, its condition waited for, by threads that are not there.
        if (request_ && !here()) new std::shared_ptr(std::move(request_));
    }

    void hold(std::shared_ptr<engine::Request> request) { request_ = std::move(request); }

    uint64_t number() const { return request_->number; }
    void cancel() const { request_->cancel(); }
    const std::shared_ptr<engine::Request>& request() const { return request_; }

    bool wait(size_t n_seen, double timeout_s) const {
        check_here();
        Interruption interruption;
        const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(timeout_s, 1e6));
        bool news = false;
        {
            const WithoutGil released;
            while (!(news = request_->wait(n_seen, 0.02)) && !interruption() && here() &&
                   std::chrono::steady_clock::now() < until) {
            }
        }
        interruption.rethrow();
        check_here();  // a signal handler may have forked
        return news;
    }

    py::tuple read(size_t from) const {
        check_here();
        engine::Request::News news = request_->read(from);
        py::list ids, logprobs;
        for (const uint32_t id : news.ids) ids.append(id);
        for (const auto& token : news.logprobs) logprobs.append(as_tuple(token));
        return py::make_tuple(ids, logprobs, news.ended);
    }

    py::dict result() const {
        check_here();
        if (!request_->read(SIZE_MAX).ended) throw ArgumentError("the request has not ended");
        const engine::RequestResult& result = request_->result();
        try {
            if (result.error) std::rethrow_exception(result.error);
        } catch (const MaskError& error) {
            error.raise();
        }
        const engine::RequestCounters& c = result.counters;
        py::dict d;
        d["finish_reason"] = name(result.reason);
        d["last"] = result.last ? py::object(as_tuple(*result.last)) : py::none();
        d["n_prompt"] = c.n_prompt;
        d["n_cached"] = c.n_cached;
        d["n_drafted"] = c.n_drafted;
        d["n_accepted"] = c.n_accepted;
        d["n_preempted"] = c.n_preempted;
        d["queued_s"] = c.queued_s;
        d["prefill_s"] = c.prefill_s;
        d["decode_s"] = c.decode_s;
        return d;
    }

    py::array_t<float> prompt_logprobs() const {
        return of_prompt<float>([](const sampling::TopLogprobs& token) { return token.chosen.logprob; });
    }
    py::array_t<uint32_t> prompt_ranks() const { return of_prompt<uint32_t>(&sampling::TopLogprobs::rank); }
    bool prompt_scored() const { return request_->prompt_scored(); }

    py::list prompt_top_logprobs() const {
        if (!request_->prompt_scored()) result();
        py::list list;
        for (const auto& token : request_->prompt_logprobs()) list.append(as_tuple(token));
        return list;
    }

  private:
    template <typename T, typename F>
    py::array_t<T> of_prompt(F value) const {
        result();
        const std::vector<sampling::TopLogprobs>& tokens = request_->prompt_logprobs();
        py::array_t<T> out(py::ssize_t(tokens.size()));
        std::ranges::transform(tokens, out.mutable_data(), value);
        return out;
    }

    static py::tuple as_tuple(const sampling::TopLogprobs& token) {
        py::list top;
        for (const auto& [id, logprob] : token.top) top.append(py::make_tuple(id, logprob));
        return py::make_tuple(token.chosen.id, token.chosen.logprob, token.rank, top);
    }

    bool here() const { return made_in_ == getpid(); }
    void check_here() const {
        if (!here()) throw Error(engine::stays_in_parent);
    }

    const pid_t made_in_ = getpid();
    std::shared_ptr<engine::Request> request_;
};

// Nothing in Python can change them, so that they need not be copied.
using Params = std::shared_ptr<sampling::SamplingParams>;

py::object submit(const EngineHandle& handle, const Ids& ids, const Params& params, std::optional<uint64_t> seed,
                  const py::object& mask, int32_t n_logprobs, int32_t n_prompt_logprobs, bool prefix_cache,
                  uint32_t n_draft, double timeout_s, const RequestHandle* after,
                  const std::shared_ptr<engine::Mailbox>& mailbox, uint32_t first_row, std::optional<uint32_t> next) {
    const auto engine = handle.get();
    engine::RequestOptions options;
    options.sampling = params;
    options.seed = seed;
    if (!mask.is_none())
        options.mask = std::make_shared<PythonMask>(mask, (engine->hyperparams().vocab_size + 31) / 32);
    options.n_logprobs = n_logprobs;
    options.n_prompt_logprobs = n_prompt_logprobs;
    options.prefix_cache = prefix_cache;
    options.n_draft = n_draft;
    options.timeout_s = timeout_s;
    if (after) options.after = after->request();
    if (!(timeout_s >= 0)) throw ArgumentError("timeout_s must be 0 or more");
    options.first_row = first_row;
    options.next = next;
    // Before there is a request: nobody could cancel one without a handle.
    py::object object = registered<RequestHandle>();
    object.cast<RequestHandle&>().hold(engine->submit(id_span(ids), std::move(options), mailbox));
    return object;
}

}  // namespace

void bind_request(py::module_& m, py::class_<EngineHandle>& engine) {
    py::class_<engine::Mailbox, std::shared_ptr<engine::Mailbox>>(m, "Mailbox", "Says which requests have news.")
        .def(
            "__init__",
            [](py::detail::value_and_holder& object) { construct(object, std::make_shared<engine::Mailbox>()); },
            py::detail::is_new_style_constructor())
        .def("wait", &engine::Mailbox::wait, py::arg("timeout_s"), py::call_guard<WithoutGil>(),
             "Numbers of requests with new tokens or at their end; empty after timeout_s or close().")
        .def("close", &engine::Mailbox::close);

    py::class_<RequestHandle>(m, "Request", "A queued, running or ended request; see csrc/engine/request.h.")
        .def_property_readonly("number", &RequestHandle::number)
        .def("cancel", &RequestHandle::cancel)
        .def("wait", &RequestHandle::wait, py::arg("n_seen"), py::arg("timeout_s"),
             "Until more than n_seen tokens are there or it has ended: True; False after timeout_s.")
        .def("read", &RequestHandle::read, py::arg("start"), "(ids, logprobs, ended) from token `start` on")
        .def("result", &RequestHandle::result, "Reason, counters and times, or what went wrong; only once it has ended")
        .def("prompt_logprobs", &RequestHandle::prompt_logprobs, "float32 [n], of the tokens that were scored")
        .def("prompt_ranks", &RequestHandle::prompt_ranks, "uint32 [n], the same; 1: no token was more probable")
        .def_property_readonly("prompt_scored", &RequestHandle::prompt_scored,
                               "Whether prompt_top_logprobs() may be asked for before the end.")
        .def("prompt_top_logprobs", &RequestHandle::prompt_top_logprobs, "[(id, logprob, rank, [(id, logprob)])]");

    engine.def("submit", &submit, py::arg("ids"), py::arg("params").none(false), py::kw_only(),
               py::arg("seed") = py::none(), py::arg("mask") = py::none(), py::arg("n_logprobs") = -1,
               py::arg("n_prompt_logprobs") = -1, py::arg("prefix_cache") = true, py::arg("n_draft") = 0,
               py::arg("timeout_s") = std::numeric_limits<double>::infinity(), py::arg("after") = py::none(),
               py::arg("mailbox") = py::none(), py::arg("first_row") = 0, py::arg("next") = py::none());
}

}  // namespace fixmin::bindings
