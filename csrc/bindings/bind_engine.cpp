// Engine, GenerationResult, CancelToken.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <thread>

#include "bindings/bindings.h"
#include "cpu/machine.h"
#include "cpu/team_size.h"
#include "cpu/thread_pool.h"
#include "engine/engine.h"
#include "error.h"

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

using engine::Engine;
using Ids = py::array_t<uint32_t, py::array::c_style>;

std::span<const uint32_t> id_span(const Ids& ids) {
    if (ids.ndim() != 1) throw ArgumentError("ids must have one dimension, not " + std::to_string(ids.ndim()));
    return {ids.data(), size_t(ids.size())};
}

/// Set from any thread; ends the computation it was given to at the next layer.
class CancelToken {
  public:
    void cancel() { cancelled_ = true; }
    bool cancelled() const { return cancelled_; }

  private:
    std::atomic<bool> cancelled_ = false;
};

/// Asked by the engine between layers, in the thread that called: has the token been cancelled, or has a signal handler
/// (Ctrl-C) raised? Python's signal handlers run only when asked, and asking takes the GIL, so that is done rarely.
class Interruption {
  public:
    explicit Interruption(const CancelToken* token) : token_(token) {}

    bool operator()() {
        if (token_ && token_->cancelled()) return true;
        const auto now = std::chrono::steady_clock::now();
        if (now - asked_ < std::chrono::milliseconds(20)) return raised_;
        asked_ = now;
        const py::gil_scoped_acquire gil;
        raised_ = raised_ || PyErr_CheckSignals() != 0;
        asked_ = std::chrono::steady_clock::now();  // a handler may take its time
        return raised_;
    }

    /// With the GIL held, after the computation: what a signal handler raised goes on to the caller.
    void rethrow() const {
        if (raised_) throw py::error_already_set();
    }

  private:
    const CancelToken* token_;
    bool raised_ = false;
    std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

/// Runs a computation without the GIL; `f` gets the function that tells whether to stop.
template <typename F>
void compute(F f) {
    Interruption interruption(nullptr);
    bool cancelled = false;
    {
        const py::gil_scoped_release release;
        try {
            f([&] { return interruption(); });
        } catch (const model::Cancelled&) {
            cancelled = true;
        }
    }
    interruption.rethrow();
    if (cancelled) throw Error("the computation was cancelled");
}

/// Waits for the end of a request without the GIL; Ctrl-C and the token cancel it. What went wrong in it is thrown.
void wait_for(engine::Request& request, const CancelToken* token) {
    Interruption interruption(token);
    {
        const py::gil_scoped_release release;
        // A short first wait: small models answer sooner than this thread would look again.
        while (!request.wait_end(0.02)) {
            if (interruption()) request.cancel();
        }
    }
    interruption.rethrow();
    if (request.result().error) std::rethrow_exception(request.result().error);
}

const char* name(engine::FinishReason reason) {
    switch (reason) {
        case engine::FinishReason::length: return "length";
        case engine::FinishReason::stop: return "eos";
        case engine::FinishReason::cancelled: return "cancelled";
        case engine::FinishReason::timeout: return "timeout";
    }
    return "?";
}

struct GenerationResult {
    py::array_t<uint32_t> token_ids;
    std::string finish_reason;
    size_t n_prompt;
    double prefill_s, decode_s;
};

/// A mask made by Python: an object with allowed() -> uint32 [V/32], accept(id) and finished() -> bool.
class PythonMask : public engine::TokenMask {
  public:
    PythonMask(py::object object, size_t n_words) : object_(std::move(object)), n_words_(n_words) {}
    ~PythonMask() override {
        // Not left to the members' destructors, which run without the GIL.
        const py::gil_scoped_acquire gil;
        const Calling inside;
        words_.release().dec_ref();
        object_.release().dec_ref();
    }

    /// Whether this thread is calling one: whatever Python runs there, a collected object's __del__ too, must not wait
    /// for the engine.
    static inline thread_local bool calling = false;

    const uint32_t* allowed() override {
        const py::gil_scoped_acquire gil;
        const Calling inside;
        words_ = object_.attr("allowed")().cast<Words>();
        if (size_t(words_.size()) < n_words_) throw ArgumentError("a mask of tokens is shorter than the vocabulary");
        return words_.data();
    }
    void accept(uint32_t id) override {
        const py::gil_scoped_acquire gil;
        const Calling inside;
        object_.attr("accept")(id);
    }
    bool finished() override {
        const py::gil_scoped_acquire gil;
        const Calling inside;
        return object_.attr("finished")().cast<bool>();
    }

  private:
    struct Calling {
        Calling() { calling = true; }
        ~Calling() { calling = before; }
        const bool before = calling;
    };
    using Words = py::array_t<uint32_t, py::array::c_style>;
    py::object object_;
    Words words_;
    const size_t n_words_;
};

/// An Engine that can be closed: calls and leases hold references of their own, so the memory outlives them.
class EngineHandle {
  public:
    EngineHandle(const std::string& path, const engine::EngineOptions& options, const py::object& progress) {
        Interruption interruption(nullptr);
        bool refused = false;
        const auto report = [&](double fraction) {
            if (interruption()) throw model::Cancelled();
            if (progress.is_none()) return;
            const py::gil_scoped_acquire gil;
            refused = progress(fraction).is(py::bool_(false));
            if (refused) throw model::Cancelled();
        };
        gguf::GgufFile file = open_gguf(path);
        source_ = file.source();
        metadata_ = metadata(file);
        {
            const py::gil_scoped_release release;
            try {
                engine_ = std::make_shared<Engine>(std::move(file), options, report);
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

    std::shared_ptr<Engine> get() const {
        check_open();
        engine_->start_thread();
        return engine_;
    }

    /// Of the file that was loaded, whatever its path names by now; empty the second time.
    py::dict take_metadata() { return std::exchange(metadata_, py::dict()); }
    std::shared_ptr<const gguf::Source> source() const {
        check_open();
        return source_;
    }

    /// The same engine; closing this one ends what the lease began, and the lease keeps the memory.
    std::unique_ptr<EngineHandle> lease() const {
        return std::unique_ptr<EngineHandle>(new EngineHandle(get(), source_));
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
    }

  private:
    EngineHandle(std::shared_ptr<Engine> engine, std::shared_ptr<const gguf::Source> source)
        : engine_(std::move(engine)), source_(std::move(source)), owner_(false) {}

    void check_open() const {
        if (closed_) throw ArgumentError("the engine is closed");
    }
    static gguf::GgufFile open_gguf(const std::string& path) {
        const py::gil_scoped_release release;
        return gguf::GgufFile::open(path);
    }
    std::string with_path(const std::string& what) const {
        return what.starts_with(source_->path()) ? what : source_->path() + ": " + what;
    }

    // A second caller waits for the first one: both return when the requests have ended.
    void let_go(bool stop) {
        std::shared_ptr<Engine> last = engine_;
        if (!last) return;
        if (PythonMask::calling) {
            engine_.reset();
            std::thread([last = std::move(last), stop]() mutable {
                if (stop) last->stop();
                last.reset();
            }).detach();
            return;
        }
        {
            const py::gil_scoped_release release;
            if (stop) last->stop();
        }
        engine_.reset();
        const py::gil_scoped_release release;
        last.reset();
    }

    // With the GIL held.
    static std::set<EngineHandle*>& open_handles() {
        static std::set<EngineHandle*> handles;
        return handles;
    }

    std::shared_ptr<Engine> engine_;
    std::shared_ptr<const gguf::Source> source_;
    py::dict metadata_;
    const bool owner_ = true;
    bool closed_ = false;
};

py::dict bytes_by_kind(const Engine& engine) {
    const model::Weights& weights = engine.backend().weights();
    const model::MemoryUse memory = engine.backend().memory();
    const model::WeightBytes bytes = weights.bytes();
    const size_t total = bytes.attention + bytes.mlp + bytes.output + bytes.norms + bytes.codes;
    py::dict roles, types, d;
    roles["attention"] = bytes.attention;
    roles["mlp"] = bytes.mlp;
    roles["output"] = bytes.output;
    roles["norms"] = bytes.norms;
    roles["codes"] = bytes.codes;
    for (const auto& [type, n] : bytes.types) types[py::str(std::string(type))] = n;
    d["weights"] = total;
    d["weights_by_role"] = roles;
    d["weights_by_type"] = types;
    d["kv_cache"] = memory.kv_cache;
    d["buffers"] = memory.buffers;
    d["memory"] = total + memory.kv_cache + memory.buffers;
    d["mapped"] = weights.embedding.size();
    d["file"] = weights.file_bytes;
    return d;
}

py::dict info(const EngineHandle& handle) {
    const auto engine = handle.get();
    const model::Hyperparams& hp = engine->hyperparams();
    const model::Backend& backend = engine->backend();
    const model::Weights& weights = backend.weights();
    const model::Description description = backend.description();
    const model::MemoryUse memory = backend.memory();
    const size_t block_bytes = engine->block_bytes();
    py::dict d;
    d["vocab_size"] = hp.vocab_size;
    d["context_length"] = hp.context_length;
    d["embedding_length"] = hp.embedding_length;
    d["block_count"] = hp.block_count;
    d["feed_forward_length"] = hp.feed_forward_length;
    d["head_count"] = hp.head_count;
    d["head_count_kv"] = hp.head_count_kv;
    d["head_dim"] = hp.head_dim;
    d["attention_scale"] = hp.attention_scale;
    d["norm"] = hp.rms_norm ? "rmsnorm" : "layernorm";
    d["norm_eps"] = hp.norm_eps;
    d["rope_dimension_count"] = hp.rope_dim;
    d["rope_freq_base"] = hp.rope_base;
    d["rope_style"] = hp.rope_style == numerics::RopeStyle::half ? "half" : "interleaved";
    d["activation"] = std::string(model::name(hp.activation));
    d["code_kind"] = std::string(model::name(hp.code_kind));
    d["code_width"] = hp.code_width;
    d["output_type"] = std::string(quant::name(weights.output.type));
    d["isa"] = description.isa;
    d["n_threads"] = description.n_threads;
    d["n_ctx"] = engine->n_ctx();
    d["weight_bytes"] = memory.weights;
    d["kv_type"] = quant::name(backend.kv_type());
    d["kv_bytes"] = memory.kv_cache;
    d["bytes"] = bytes_by_kind(*engine);
    d["bytes_per_token"] = weights.bytes_per_token();
    d["kv_bytes_per_position"] = block_bytes / quant::kv_block_tokens;
    d["n_kv"] = backend.n_blocks() * quant::kv_block_tokens;
    d["kv_block_tokens"] = quant::kv_block_tokens;
    d["kv_block_bytes"] = block_bytes;
    d["block_product_weights"] = weights.block_product_weights();
    return d;
}

py::array_t<uint8_t> codes(const EngineHandle& handle, const Ids& ids) {
    const auto engine = handle.get();
    if (engine->hyperparams().code_kind == model::CodeKind::learned) {
        throw UnsupportedError("this model has a learned embedding table and no codes");
    }
    const auto span = id_span(ids);
    const uint32_t width = engine->hyperparams().code_width;
    py::array_t<uint8_t> out({py::ssize_t(span.size()), py::ssize_t(width)});
    for (size_t t = 0; t < span.size(); ++t) {
        codes::unpack_bits(engine->backend().weights().code_map.code(span[t]),
                           {out.mutable_data(py::ssize_t(t)), width});
    }
    return out;
}

/// Runs a request that generates nothing.
void run(Engine& engine, std::span<const uint32_t> ids, engine::RequestOptions options) {
    options.generate = false;
    const auto request = engine.submit(ids, std::move(options));
    wait_for(*request, nullptr);
    if (request->result().reason != engine::FinishReason::length) throw Error("the computation was cancelled");
}

py::array_t<float> logits(const EngineHandle& handle, const Ids& ids, bool last, bool prefix_cache,
                          const std::optional<std::vector<uint32_t>>& rows) {
    const auto engine = handle.get();
    const auto span = id_span(ids);
    engine::RequestOptions options;
    if (rows) {
        options.logit_rows = *rows;
    } else {
        for (size_t p = last && !span.empty() ? span.size() - 1 : 0; p < span.size(); ++p)
            options.logit_rows.push_back(uint32_t(p));
    }
    const py::ssize_t v = engine->hyperparams().vocab_size, n = py::ssize_t(options.logit_rows.size());
    py::array_t<float> out(last && !rows ? std::vector<py::ssize_t>{v} : std::vector<py::ssize_t>{n, v});
    options.logits = out.mutable_data();
    options.prefix_cache = prefix_cache;
    run(*engine, span, std::move(options));
    return out;
}

py::array_t<float> hidden_states(const EngineHandle& handle, const Ids& ids, uint32_t layer) {
    const auto engine = handle.get();
    const auto span = id_span(ids);
    py::array_t<float> out({py::ssize_t(span.size()), py::ssize_t(engine->hyperparams().embedding_length)});
    engine::RequestOptions options;
    options.hidden = out.mutable_data();
    options.hidden_layer = layer;
    run(*engine, span, std::move(options));
    return out;
}

py::array_t<float> values(const std::vector<sampling::TopLogprobs>& logprobs) {
    py::array_t<float> out(static_cast<py::ssize_t>(logprobs.size()));
    for (size_t i = 0; i < logprobs.size(); ++i) out.mutable_at(py::ssize_t(i)) = logprobs[i].chosen.logprob;
    return out;
}

py::array_t<float> score(const EngineHandle& handle, const Ids& ids) {
    const auto engine = handle.get();
    engine::RequestOptions options;
    options.n_prompt_logprobs = 0;
    options.generate = false;
    const auto request = engine->submit(id_span(ids), std::move(options));
    wait_for(*request, nullptr);
    if (request->result().reason != engine::FinishReason::length) throw Error("the computation was cancelled");
    return values(request->prompt_logprobs());
}

py::array_t<double> doubles(const std::vector<double>& values) {
    return py::array_t<double>(py::ssize_t(values.size()), values.data());
}

/// Adds the squared inputs of every product to what the object holds; one entry per weight tensor of the file.
class InputSquares {
  public:
    explicit InputSquares(const EngineHandle& handle)
        : engine_(handle.get()), hp_(handle.get()->hyperparams()), squares_(hp_) {}

    py::array_t<float> add(const EngineHandle& handle, const Ids& ids) {
        const auto engine = handle.get();
        if (engine_.lock() != engine) throw ArgumentError("these sums belong to another engine");
        const auto span = id_span(ids);
        py::array_t<float> out(py::ssize_t(span.empty() ? 0 : span.size() - 1));
        float* data = out.mutable_data();
        compute([&](const Engine::Stop& stop) { engine->collect_squares(span, data, stop, squares_); });
        return out;
    }

    py::dict sums() const {
        py::dict d;
        const auto put = [&](const std::string& name, const std::vector<double>& values, uint64_t tokens) {
            if (!values.empty()) d[py::str(name + ".weight")] = py::make_tuple(doubles(values), tokens);
        };
        for (size_t l = 0; l < squares_.blocks.size(); ++l) {
            const model::InputSquares::Block& block = squares_.blocks[l];
            const std::string prefix = "blk." + std::to_string(l) + ".";
            for (const char* name : {"attn_q", "attn_k", "attn_v"}) put(prefix + name, block.qkv, tokens());
            put(prefix + "attn_output", block.attn_output, tokens());
            if (hp_.activation == model::Activation::swiglu) put(prefix + "ffn_gate", block.gate_up, tokens());
            put(prefix + "ffn_up", block.gate_up, tokens());
            put(prefix + "ffn_down", block.down, tokens());
        }
        put("output", squares_.output, squares_.output_tokens);
        return d;
    }

  private:
    uint64_t tokens() const { return squares_.block_tokens; }

    const std::weak_ptr<Engine> engine_;
    const model::Hyperparams hp_;
    model::InputSquares squares_;
};

std::vector<double> read_ceiling(const EngineHandle& handle, size_t n_bytes, uint32_t passes) {
    const auto engine = handle.get();
    std::vector<double> result;
    compute([&](const Engine::Stop& stop) { result = engine->read_ceiling(n_bytes, passes, stop); });
    return result;
}

std::vector<double> int8_ceiling(const EngineHandle& handle, uint32_t passes) {
    const auto engine = handle.get();
    std::vector<double> result;
    compute([&](const Engine::Stop& stop) { result = engine->int8_ceiling(passes, stop); });
    return result;
}

/// The reading half of a request. An engine that goes away ends its requests first.
class RequestHandle {
  public:
    explicit RequestHandle(std::shared_ptr<engine::Request> request) : request_(std::move(request)) {}
    RequestHandle(RequestHandle&&) = default;
    ~RequestHandle() {
        // In a forked child: its lock may be held, its condition waited for, by threads that are not there.
        if (request_ && !here()) new std::shared_ptr(std::move(request_));
    }

    uint64_t number() const { return request_->number; }
    void cancel() const { request_->cancel(); }
    const std::shared_ptr<engine::Request>& request() const { return request_; }

    bool wait(size_t n_seen, double timeout_s) const {
        check_here();
        Interruption interruption(nullptr);
        const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(timeout_s, 1e6));
        bool news = false;
        {
            const py::gil_scoped_release release;
            while (!(news = request_->wait(n_seen, 0.02)) && !interruption() &&
                   std::chrono::steady_clock::now() < until) {
            }
        }
        interruption.rethrow();
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
        if (request_->result().error) std::rethrow_exception(request_->result().error);
        const engine::RequestCounters& c = request_->result().counters;
        py::dict d;
        d["finish_reason"] = name(request_->result().reason);
        d["last"] = request_->result().last ? py::object(as_tuple(*request_->result().last)) : py::none();
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
        result();
        return values(request_->prompt_logprobs());
    }

    py::array_t<uint32_t> prompt_ranks() const {
        result();
        py::array_t<uint32_t> out(py::ssize_t(request_->prompt_logprobs().size()));
        uint32_t* rank = out.mutable_data();
        for (const auto& token : request_->prompt_logprobs()) *rank++ = token.rank;
        return out;
    }

    bool prompt_scored() const { return request_->prompt_scored(); }

    py::list prompt_top_logprobs() const {
        if (!request_->prompt_scored()) result();
        py::list list;
        for (const auto& token : request_->prompt_logprobs()) list.append(as_tuple(token));
        return list;
    }

  private:
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

RequestHandle submit(const EngineHandle& handle, const Ids& ids, const Params& params, std::optional<uint64_t> seed,
                     const py::object& mask, int32_t n_logprobs, int32_t n_prompt_logprobs, bool prefix_cache,
                     uint32_t n_draft, double timeout_s, const RequestHandle* after,
                     const std::shared_ptr<engine::Mailbox>& mailbox, uint32_t first_row,
                     std::optional<uint32_t> next) {
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
    return RequestHandle(engine->submit(id_span(ids), std::move(options), mailbox));
}

GenerationResult generate(const EngineHandle& handle, const Ids& ids, const Params& params, const py::object& on_token,
                          const CancelToken* cancel) {
    const auto engine = handle.get();
    engine::RequestOptions options;
    options.sampling = params;
    const auto request = engine->submit(id_span(ids), std::move(options));
    size_t n_seen = 0;
    bool stopped = false;
    while (!on_token.is_none() && !stopped) {
        Interruption interruption(cancel);
        {
            const py::gil_scoped_release release;
            while (!request->wait(n_seen, 0.02)) {
                if (interruption()) request->cancel();
            }
        }
        interruption.rethrow();
        const engine::Request::News news = request->read(n_seen);
        for (size_t i = 0; i < news.ids.size() && !stopped; ++i) {
            ++n_seen;
            try {
                stopped = !on_token(news.ids[i]).cast<bool>();
            } catch (...) {
                request->cancel();
                throw;
            }
            if (cancel && cancel->cancelled()) request->cancel();
        }
        if (news.ended && n_seen == request->read(0).ids.size()) break;
    }
    if (stopped) request->cancel();
    wait_for(*request, cancel);
    engine::Request::News all = request->read(0);
    if (stopped) all.ids.resize(n_seen);  // the engine does not wait for the callback
    const engine::RequestCounters& c = request->result().counters;
    return {py::array_t<uint32_t>(py::ssize_t(all.ids.size()), all.ids.data()),
            stopped ? "stop" : name(request->result().reason), c.n_prompt, c.prefill_s, c.decode_s};
}

py::array_t<uint8_t> export_prefix(const EngineHandle& handle, const Ids& ids) {
    const auto engine = handle.get();
    const auto span = id_span(ids);
    std::vector<std::byte> bytes;
    compute([&](const Engine::Stop& stop) { bytes = engine->export_prefix(span, stop); });
    py::array_t<uint8_t> out(py::ssize_t(bytes.size()));
    if (!bytes.empty()) std::memcpy(out.mutable_data(), bytes.data(), bytes.size());
    return out;
}

void import_prefix(const EngineHandle& handle, const Ids& ids, const py::array_t<uint8_t, py::array::c_style>& blocks) {
    const auto engine = handle.get();
    const auto span = id_span(ids);
    const std::span bytes(reinterpret_cast<const std::byte*>(blocks.data()), size_t(blocks.size()));
    compute([&](const Engine::Stop& stop) { engine->import_prefix(span, bytes, stop); });
}

py::dict stats(const EngineHandle& handle) {
    const engine::EngineStats s = handle.get()->stats();
    py::dict d;
    d["n_running"] = s.n_running;
    d["n_waiting"] = s.n_waiting;
    d["n_blocks"] = s.n_blocks;
    d["n_free_blocks"] = s.n_free_blocks;
    d["n_cached_blocks"] = s.n_cached_blocks;
    d["n_evictable_blocks"] = s.n_evictable_blocks;
    d["n_steps"] = s.n_steps;
    d["n_rows"] = s.n_rows;
    d["n_prompt_tokens"] = s.n_prompt_tokens;
    d["n_cached_prompt_tokens"] = s.n_cached_prompt_tokens;
    d["n_generated"] = s.n_generated;
    d["n_drafted"] = s.n_drafted;
    d["n_accepted"] = s.n_accepted;
    d["n_preempted"] = s.n_preempted;
    d["n_finished"] = s.n_finished;
    return d;
}

}  // namespace

quant::KvType parse_kv_type(const std::string& name) {
    std::string known;
    for (const quant::KvType type : quant::all_kv_types) {
        if (name == quant::name(type)) return type;
        known += (known.empty() ? "" : ", ") + std::string(quant::name(type));
    }
    throw ArgumentError("kv_type is '" + name + "'; known: " + known);
}

void bind_engine(py::module_& m) {
    py::class_<GenerationResult>(m, "GenerationResult")
        .def_readonly("token_ids", &GenerationResult::token_ids, "uint32 [n]")
        .def_readonly("finish_reason", &GenerationResult::finish_reason, "length, stop, eos or cancelled")
        .def_readonly("n_prompt", &GenerationResult::n_prompt)
        .def_readonly("prefill_s", &GenerationResult::prefill_s)
        .def_readonly("decode_s", &GenerationResult::decode_s);

    py::class_<CancelToken>(m, "CancelToken",
                            "Ends the generation it was given to at the next layer; use from any thread.")
        .def(py::init<>())
        .def("cancel", &CancelToken::cancel)
        .def_property_readonly("cancelled", &CancelToken::cancelled);

    py::class_<engine::Mailbox, std::shared_ptr<engine::Mailbox>>(m, "Mailbox", "Says which requests have news.")
        .def(py::init<>())
        .def("wait", &engine::Mailbox::wait, py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>(),
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

    py::class_<EngineHandle>(m, "Engine", "A loaded model and its worker threads.")
        .def(py::init([](const std::string& path, uint32_t n_threads, uint32_t n_ctx, const std::string& kv_type,
                         uint32_t n_batch, const std::optional<std::string>& isa, uint32_t n_kv, uint32_t kv_contexts,
                         double kv_memory_share, uint32_t n_parallel, const py::object& progress) {
                 if (n_batch == 0) throw ArgumentError("n_batch must be at least 1");
                 if (n_threads > 1024) throw ArgumentError("n_threads must be at most 1024");
                 if (n_parallel == 0) throw ArgumentError("n_parallel must be at least 1");
                 if (kv_contexts == 0) throw ArgumentError("kv_contexts must be at least 1");
                 if (!(kv_memory_share >= 0 && kv_memory_share <= 1))
                     throw ArgumentError("kv_memory_share must lie in 0..1");
                 return std::make_unique<EngineHandle>(
                     path,
                     engine::EngineOptions{{n_ctx, n_batch, parse_kv_type(kv_type), n_kv, kv_contexts, kv_memory_share,
                                            n_threads, isa.value_or("")},
                                           n_parallel},
                     progress);
             }),
             py::arg("path"), py::kw_only(), py::arg("n_threads") = 0, py::arg("n_ctx") = 0, py::arg("kv_type") = "f16",
             py::arg("n_batch") = 512, py::arg("isa") = py::none(), py::arg("n_kv") = 0, py::arg("kv_contexts") = 16,
             py::arg("kv_memory_share") = 0.125, py::arg("n_parallel") = 256, py::arg("progress") = py::none())
        .def_property_readonly("info", &info)
        .def("codes", &codes, py::arg("ids"), "uint8 [T, K]")
        .def("logits", &logits, py::arg("ids"), py::arg("last") = false, py::arg("prefix_cache") = true,
             py::arg("rows") = py::none(), "float32 [T, V], [V] of the last row, or [n, V] of rising rows")
        .def("hidden_states", &hidden_states, py::arg("ids"), py::arg("layer"), "float32 [T, D]")
        .def("score", &score, py::arg("ids"), "float32 [T-1], natural log-probabilities of ids[1:]")
        .def("generate", &generate, py::arg("ids"), py::arg("params"), py::arg("on_token") = py::none(),
             py::arg("cancel") = py::none())
        .def("submit", &submit, py::arg("ids"), py::arg("params").none(false), py::kw_only(),
             py::arg("seed") = py::none(), py::arg("mask") = py::none(), py::arg("n_logprobs") = -1,
             py::arg("n_prompt_logprobs") = -1, py::arg("prefix_cache") = true, py::arg("n_draft") = 0,
             py::arg("timeout_s") = std::numeric_limits<double>::infinity(), py::arg("after") = py::none(),
             py::arg("mailbox") = py::none(), py::arg("first_row") = 0, py::arg("next") = py::none())
        .def("stats", &stats)
        .def("export_prefix", &export_prefix, py::arg("ids"), "uint8: keys and values of whole blocks, as far as known")
        .def("import_prefix", &import_prefix, py::arg("ids"), py::arg("blocks"))
        .def("clear_prefix_cache",
             [](const EngineHandle& handle) {
                 const auto engine = handle.get();
                 compute([&](const Engine::Stop& stop) { engine->clear_prefix_cache(stop); });
             })
        .def("read_ceiling", &read_ceiling, py::arg("n_bytes"), py::arg("passes") = 3,
             "Bytes per second that the threads read of n_bytes of memory, in each pass.")
        .def("int8_ceiling", &int8_ceiling, py::arg("passes") = 3,
             "8-bit multiplications and additions per second of the threads, in each pass.")
        .def("take_metadata", &EngineHandle::take_metadata, "GgufFile.metadata of what was loaded; empty when taken")
        .def_property_readonly(
            "file_changed", [](const EngineHandle& handle) { return handle.source()->changed(); },
            "Whether the file that was loaded has been written to since.")
        .def(
            "read_file",
            [](const EngineHandle& handle, uint64_t offset, size_t n) {
                const auto source = handle.source();  // close() may come meanwhile
                const uint64_t size = source->size();
                std::string bytes(std::min<uint64_t>(n, size - std::min(offset, size)), 0);
                {
                    const py::gil_scoped_release release;
                    source->read(offset, std::as_writable_bytes(std::span(bytes)));
                }
                return py::bytes(bytes);
            },
            py::arg("offset"), py::arg("n"), "Bytes of the file that was loaded, fewer than n at its end.")
        .def("lease", &EngineHandle::lease, "The same engine for one call: close() ends what it runs, not its memory.")
        .def("close", &EngineHandle::close, "Ends all requests; frees the model once running calls have returned.");

    py::class_<cpu::TeamSize>(m, "TeamSize", "How many threads take a step; see csrc/cpu/team_size.h. For tests.")
        .def(py::init<uint32_t>(), py::arg("most"))
        .def("choose", &cpu::TeamSize::choose, py::arg("n_tokens"), py::arg("work_ns"))
        .def("record", &cpu::TeamSize::record, py::arg("elapsed_ns"));

    py::class_<InputSquares>(m, "InputSquares", "Sums of squared inputs of every matrix product: an importance matrix.")
        .def(py::init<const EngineHandle&>(), py::arg("engine"))
        .def("add", &InputSquares::add, py::arg("engine"), py::arg("ids"),
             "Runs ids [T] from an empty context; returns float32 [T-1], log-probabilities of ids[1:]")
        .def_property_readonly("sums", &InputSquares::sums, "tensor name -> (float64 [inputs], tokens)");

    py::module_::import("atexit").attr("register")(py::cpp_function(&EngineHandle::close_all));
    m.def(
        "cgroup_limits",
        [](const std::string& root) {
            const cpu::CgroupLimits limits = cpu::cgroup_limits(root);
            py::dict d;
            d["cpus"] = limits.cpus;
            d["memory_bytes"] = limits.memory_bytes;
            d["cpuset"] = limits.cpuset;
            return d;
        },
        py::arg("root") = "",
        "What the control groups of this process allow; root stands before /proc and the mounts.");
}

}  // namespace fixmin::bindings
