// Engine and what is measured in it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstring>
#include <optional>

#include "bindings/engine_handle.h"
#include "cpu/team_size.h"
#include "threads/machine.h"

namespace fixmin::bindings {
namespace {

using engine::Engine;

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
    d["rope_style"] = std::string(model::name(hp.rope_style));
    d["activation"] = std::string(model::name(hp.activation));
    d["code_kind"] = std::string(model::name(hp.code_kind));
    d["code_width"] = hp.code_width;
    d["output_type"] = std::string(quant::name(weights.output.type));
    d["device"] = description.device;
    d["device_name"] = description.name;
    d["device_memory"] = description.memory_bytes;
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
    const pid_t begun_in = getpid();
    compute([&](const Engine::Stop& stop) {
        while (!request->wait_end(0.02)) {
            const bool give_up = stop();
            if (getpid() != begun_in) {  // forked by a signal handler: nobody unlocks here what threads had locked
                new std::shared_ptr(request);
                throw Error(engine::stays_in_parent);
            }
            if (give_up) request->cancel();
        }
    });
    if (request->result().error) std::rethrow_exception(request->result().error);
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
            if (!values.empty()) d[py::str(name + ".weight")] = py::make_tuple(array(values), tokens);
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

/// What measure(backend, stop) finds while no request is running.
template <typename F>
std::vector<double> ceiling(const EngineHandle& handle, F measure) {
    const auto engine = handle.get();
    std::vector<double> rates;
    const auto job = [&](model::Backend& backend, const Engine::Stop& stop) { rates = measure(backend, stop); };
    compute([&](const Engine::Stop& stop) { engine->exclusively(job, stop); });
    return rates;
}

std::vector<double> read_ceiling(const EngineHandle& handle, size_t n_bytes, uint32_t passes) {
    return ceiling(handle,
                   [=](auto& backend, const auto& stop) { return backend.read_ceiling(n_bytes, passes, stop); });
}

std::vector<double> int8_ceiling(const EngineHandle& handle, uint32_t passes) {
    return ceiling(handle, [=](auto& backend, const auto& stop) { return backend.int8_ceiling(passes, stop); });
}

std::vector<double> tile_ceiling(const EngineHandle& handle, uint32_t passes) {
    return ceiling(handle, [=](auto& backend, const auto& stop) { return backend.tile_ceiling(passes, stop); });
}

std::vector<double> launch_ceiling(const EngineHandle& handle, uint32_t passes) {
    return ceiling(handle, [=](auto& backend, const auto& stop) { return backend.launch_ceiling(passes, stop); });
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
    d["n_extracts"] = s.n_extracts;
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
    py::class_<EngineHandle> engine(m, "Engine", "A loaded model and its worker threads.");
    bind_request(m, engine);
    engine
        .def(
            "__init__",
            [](py::detail::value_and_holder& object, const std::string& path, uint32_t n_threads, uint32_t n_ctx,
               const std::string& kv_type, uint32_t n_batch, const std::optional<std::string>& isa, uint32_t n_kv,
               std::optional<uint32_t> kv_contexts, std::optional<double> kv_memory_share, uint32_t n_parallel,
               const std::optional<std::string>& device, const py::object& progress) {
                if (n_batch == 0) throw ArgumentError("n_batch must be at least 1");
                if (n_threads > 1024) throw ArgumentError("n_threads must be at most 1024");
                if (n_parallel == 0) throw ArgumentError("n_parallel must be at least 1");
                if (kv_contexts == 0u) throw ArgumentError("kv_contexts must be at least 1");
                if (kv_memory_share && !(*kv_memory_share > 0 && *kv_memory_share <= 1))
                    throw ArgumentError("kv_memory_share must be above 0 and at most 1");
                engine::EngineOptions options;
                options.n_parallel = n_parallel;
                model::BackendOptions& backend = options.backend;
                backend.n_ctx = n_ctx;
                backend.n_batch = n_batch;
                backend.kv_type = parse_kv_type(kv_type);
                backend.n_kv = n_kv;
                // A share that is asked for is a size of its own.
                if (kv_contexts || kv_memory_share) backend.kv_contexts = kv_contexts.value_or(UINT32_MAX);
                if (kv_memory_share) backend.kv_memory_share = *kv_memory_share;
                backend.device = device.value_or("");
                backend.n_threads = n_threads;
                backend.isa = isa.value_or("");
                construct(object, std::make_unique<EngineHandle>()).open(path, options, progress);
            },
            py::detail::is_new_style_constructor(), py::arg("path"), py::kw_only(), py::arg("n_threads") = 0,
            py::arg("n_ctx") = 0, py::arg("kv_type") = "f16", py::arg("n_batch") = 512, py::arg("isa") = py::none(),
            py::arg("n_kv") = 0, py::arg("kv_contexts") = py::none(), py::arg("kv_memory_share") = py::none(),
            py::arg("n_parallel") = 256, py::arg("device") = py::none(), py::arg("progress") = py::none())
        .def_property_readonly("info", &info)
        .def("codes", &codes, py::arg("ids"), "uint8 [T, K]")
        .def("logits", &logits, py::arg("ids"), py::arg("last") = false, py::arg("prefix_cache") = true,
             py::arg("rows") = py::none(), "float32 [T, V], [V] of the last row, or [n, V] of rising rows")
        .def("hidden_states", &hidden_states, py::arg("ids"), py::arg("layer"), "float32 [T, D]")
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
        .def("tile_ceiling", &tile_ceiling, py::arg("passes") = 3, "Likewise of AMX tiles; empty where there are none.")
        .def("launch_ceiling", &launch_ceiling, py::arg("passes") = 3,
             "Seconds from one part of a step to the next if neither has any work, in each pass.")
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
                    const WithoutGil released;
                    source->read(offset, std::as_writable_bytes(std::span(bytes)));
                }
                return py::bytes(bytes);
            },
            py::arg("offset"), py::arg("n"), "Bytes of the file that was loaded, fewer than n at its end.")
        .def("lease", &EngineHandle::lease, "The same engine for one call: close() ends what it runs, not its memory.")
        .def("close", &EngineHandle::close, "Ends all requests; frees the model once running calls have returned.");

    py::class_<cpu::TeamSize> team_size(m, "TeamSize",
                                        "How many threads take a step; see csrc/cpu/team_size.h. For tests.");
    def_init(
        team_size, [](uint32_t most) { return cpu::TeamSize(most); }, py::arg("most"))
        .def("choose", &cpu::TeamSize::choose, py::arg("n_tokens"), py::arg("work_ns"))
        .def("record", &cpu::TeamSize::record, py::arg("elapsed_ns"));

    py::class_<InputSquares> squares(m, "InputSquares",
                                     "Sums of squared inputs of every matrix product: an importance matrix.");
    def_init(
        squares, [](const EngineHandle& engine) { return InputSquares(engine); }, py::arg("engine"))
        .def("add", &InputSquares::add, py::arg("engine"), py::arg("ids"),
             "Runs ids [T] from an empty context; returns float32 [T-1], log-probabilities of ids[1:]")
        .def_property_readonly("sums", &InputSquares::sums, "tensor name -> (float64 [inputs], tokens)");

    py::module_::import("atexit").attr("register")(py::cpp_function(&EngineHandle::close_all));
    m.def(
        "cgroup_limits",
        [](const std::string& root) {
            const threads::CgroupLimits limits = threads::cgroup_limits(root);
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
