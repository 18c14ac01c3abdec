// Kernels: single kernels of one instruction set, so that tests can compare them with oracles and with each other; and
// system_info, which lists the instruction sets.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "engine/devices.h"
#include "error.h"
#include "kernels/isa.h"
#include "model/pages.h"
#include "quant/panels.h"
#include "threads/thread_pool.h"

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

using kernels::ActivationBlock;
using quant::WeightType;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

WeightType parse_type(const std::string& text) {
    for (const WeightType type : quant::all_weight_types) {
        if (quant::name(type) == text) return type;
    }
    throw UnsupportedError("weight type '" + text + "' is not known here");
}

void expect(bool condition, const char* what) {
    if (!condition) throw ArgumentError(what);
}

py::ssize_t n_blocks_of(const Floats& x) {
    expect(x.ndim() == 1 && x.size() % quant::block_size == 0, "x must be [n], n a multiple of 32");
    return x.size() / quant::block_size;
}

const float* data_or_null(const std::optional<Floats>& array, py::ssize_t size, const char* what) {
    if (!array) return nullptr;
    expect(array->size() == size, what);
    return array->data();
}

const std::byte* checked_rows(const Bytes& data, WeightType type, uint32_t rows, uint32_t inner) {
    expect(inner % quant::block_format(type).values == 0, "inner must be a multiple of the block of the type");
    expect(size_t(data.size()) == rows * quant::row_bytes(type, inner), "data does not have rows * row_bytes bytes");
    return reinterpret_cast<const std::byte*>(data.data());
}

/// Bytes that the weights of rows x inner take in memory.
size_t packed_bytes(const std::string& type_name, uint32_t rows, uint32_t inner) {
    const size_t n_panels = (rows + quant::panel_rows - 1) / quant::panel_rows;
    return n_panels * quant::panel_bytes(parse_type(type_name), inner);
}

py::array_t<float> dequantize(const std::string& type_name, const Bytes& data, uint32_t rows, uint32_t inner) {
    const WeightType type = parse_type(type_name);
    const std::byte* bytes = checked_rows(data, type, rows, inner);
    py::array_t<float> out({py::ssize_t(rows), py::ssize_t(inner)});
    for (uint32_t r = 0; r < rows; ++r) {
        quant::dequantize_row(type, bytes + r * quant::row_bytes(type, inner), inner, out.mutable_data(py::ssize_t(r)));
    }
    return out;
}

class KernelTable {
  public:
    explicit KernelTable(const std::string& isa) : k_(kernels::select(isa)) {}

    py::tuple quantize_activations(const Floats& x) const {
        const py::ssize_t n_blocks = n_blocks_of(x);
        std::vector<ActivationBlock> blocks(static_cast<size_t>(n_blocks));
        k_.quantize_activations(x.data(), uint32_t(x.size()), blocks.data());
        py::array_t<int8_t> q(x.size());
        py::array_t<float> scale(n_blocks);
        py::array_t<int32_t> sum(n_blocks);
        for (py::ssize_t b = 0; b < n_blocks; ++b) {
            std::copy_n(blocks[b].q, quant::block_size, q.mutable_data() + b * quant::block_size);
            scale.mutable_at(b) = blocks[b].scale;
            sum.mutable_at(b) = blocks[b].sum;
        }
        return py::make_tuple(q, scale, sum);
    }

    py::tuple quantize_row(const Floats& x) const {
        n_blocks_of(x);
        std::vector<std::byte> row(kernels::scaled_row_bytes(size_t(x.size())));
        k_.quantize_row(x.data(), uint32_t(x.size()), row.data());
        py::array_t<int8_t> q(py::ssize_t(row.size() - 64));
        std::memcpy(q.mutable_data(), row.data(), row.size() - 64);
        kernels::RowScale scale;
        std::memcpy(&scale, row.data() + row.size() - 64, sizeof scale);
        return py::make_tuple(q, scale.scale, scale.sum);
    }

    py::array_t<float> matmul(const std::string& type_name, const Bytes& data, uint32_t rows, const Floats& x,
                              const std::optional<Floats>& bias, const std::optional<Floats>& residual,
                              uint32_t panels_per_call) const {
        expect(x.ndim() == 2, "x must be [tokens, inner]");
        const WeightType type = parse_type(type_name);
        const uint32_t tokens = uint32_t(x.shape(0)), inner = uint32_t(x.shape(1));
        const std::byte* bytes = checked_rows(data, type, rows, inner);

        const uint32_t n_panels = (rows + quant::panel_rows - 1) / quant::panel_rows;
        const size_t stride = quant::panel_bytes(type, inner);
        const model::Pages panels(n_panels * stride + 8192, "panels");
        for (uint32_t p = 0; p < n_panels; ++p) {
            const uint32_t first = p * quant::panel_rows;
            expect(quant::pack_panel(type, bytes + first * quant::row_bytes(type, inner),
                                     std::min(quant::panel_rows, rows - first), inner, panels.data() + p * stride),
                   "a weight is not finite");
        }
        std::vector<ActivationBlock> blocks;
        std::vector<std::byte> scaled_rows;
        if (quant::scales_rows(type))
            scaled_rows.resize(tokens * kernels::scaled_row_bytes(inner));
        else if (quant::is_quantized(type))
            blocks.resize(size_t(tokens) * (inner / quant::block_size));
        for (uint32_t t = 0; t < tokens; ++t) {
            const float* row = x.data() + size_t(t) * inner;
            if (!scaled_rows.empty())
                k_.quantize_row(row, inner, scaled_rows.data() + t * kernels::scaled_row_bytes(inner));
            if (!blocks.empty())
                k_.quantize_activations(row, inner, blocks.data() + size_t(t) * (inner / quant::block_size));
        }
        std::vector<float> padded_bias;
        if (const float* b = data_or_null(bias, rows, "bias must be [rows]")) {
            padded_bias.resize(size_t(n_panels) * quant::panel_rows);
            std::copy_n(b, rows, padded_bias.data());
        }
        py::array_t<float> out({py::ssize_t(tokens), py::ssize_t(rows)});
        if (const float* r = data_or_null(residual, out.size(), "residual must be [tokens, rows]")) {
            std::copy_n(r, out.size(), out.mutable_data());
        }
        std::vector<std::byte> scratch(kernels::matmul_scratch_bytes(inner, tokens));
        const uint32_t step = panels_per_call ? std::min(panels_per_call, n_panels) : n_panels;
        for (uint32_t p = 0; p < n_panels; p += step) {
            const uint32_t first = p * quant::panel_rows, n_rows = std::min(step * quant::panel_rows, rows - first);
            k_.matmul({type, panels.data() + p * stride, stride, n_rows, inner, x.data(), inner, blocks.data(),
                       scaled_rows.data(), tokens, padded_bias.empty() ? nullptr : padded_bias.data() + first,
                       out.mutable_data() + first, rows, residual.has_value(), scratch.data(), p > 0, nullptr});
        }
        return out;
    }

    py::array_t<float> norm(const Floats& x, const Floats& weight, const std::optional<Floats>& bias, float eps,
                            bool rms) const {
        expect(weight.size() == x.size(), "weight must be as long as x");
        py::array_t<float> y(x.size());
        (rms ? k_.rms_norm : k_.layer_norm)(x.data(), uint32_t(x.size()), eps, weight.data(),
                                            data_or_null(bias, x.size(), "bias must be as long as x"),
                                            y.mutable_data());
        return y;
    }

    py::array_t<float> unary(const std::string& name, const Floats& x) const {
        py::array_t<float> y(x.size());
        std::copy_n(x.data(), x.size(), y.mutable_data());
        const uint32_t n = uint32_t(x.size());
        if (name == "gelu")
            k_.gelu_erf(y.mutable_data(), n);
        else if (name == "gelu_tanh")
            k_.gelu_tanh(y.mutable_data(), n);
        else if (name == "exp")
            k_.exp_minus(x.data(), n, 0.0f, y.mutable_data());
        else
            throw ArgumentError("unary knows gelu, gelu_tanh and exp");
        return y;
    }

    py::array_t<float> silu_mul(const Floats& gate, const Floats& up) const {
        expect(gate.size() == up.size(), "gate and up must be equally long");
        py::array_t<float> y(up.size());
        std::copy_n(up.data(), up.size(), y.mutable_data());
        k_.silu_mul(gate.data(), y.mutable_data(), uint32_t(y.size()));
        return y;
    }

    py::array_t<float> rope(const Floats& x, bool interleaved, const Floats& cos, const Floats& sin) const {
        expect(cos.size() == sin.size() && 2 * cos.size() <= x.size(), "cos and sin must be [dim/2], dim <= len(x)");
        py::array_t<float> y(x.size());
        std::copy_n(x.data(), x.size(), y.mutable_data());
        k_.rope(y.mutable_data(), uint32_t(2 * cos.size()),
                interleaved ? numerics::RopeStyle::interleaved : numerics::RopeStyle::half, cos.data(), sin.data());
        return y;
    }

    /// The last n_queries of the tokens attend.
    py::array_t<float> attention(const std::string& kv_type, const Floats& queries, const Floats& keys,
                                 const Floats& values) const {
        expect(queries.ndim() == 2 && keys.ndim() == 2 && values.ndim() == 2,
               "queries, keys, values must be [tokens, d]");
        const uint32_t n = uint32_t(queries.shape(0)), tokens = uint32_t(keys.shape(0)), d = uint32_t(keys.shape(1));
        expect(queries.shape(1) == d && values.shape(1) == d && values.shape(0) == tokens && n >= 1 && n <= tokens,
               "shapes of queries, keys and values do not fit");
        const quant::KvType type = parse_kv_type(kv_type);
        const size_t block_bytes = quant::kv_head_bytes(type, d);
        const uint32_t n_blocks = (tokens + quant::kv_block_tokens - 1) / quant::kv_block_tokens;
        const model::Pages cache(n_blocks * block_bytes, "keys and values");
        std::vector<uint32_t> blocks(n_blocks);
        std::iota(blocks.rbegin(), blocks.rend(), 0u);  // in no natural order
        const kernels::KvHead kv{type, d, cache.data(), block_bytes, blocks.data()};
        for (uint32_t t = 0; t < tokens; ++t)
            k_.kv_store(kv, t, keys.data(py::ssize_t(t)), values.data(py::ssize_t(t)));
        std::vector<float> scratch(kernels::attention_scratch_floats(tokens, d));
        py::array_t<float> out({py::ssize_t(n), py::ssize_t(d)});
        k_.attention({kv, queries.data(), d, n, tokens - n, out.mutable_data(), d, scratch.data()});
        return out;
    }

    std::optional<uint32_t> argmax(const Floats& x) const {
        expect(x.size() > 0, "x is empty");
        uint32_t index;
        if (!k_.argmax(x.data(), uint32_t(x.size()), &index)) return std::nullopt;
        return index;
    }

    std::pair<float, float> softmax_stats(const Floats& x) const {
        expect(x.size() > 0, "x is empty");
        float max, sum;
        k_.softmax_stats(x.data(), uint32_t(x.size()), &max, &sum);
        return {max, sum};
    }

  private:
    const kernels::Kernels& k_;
};

py::dict system_info() {
    py::dict d;
    py::list built, usable;
    for (const kernels::Isa& isa : kernels::isas()) {
        built.append(isa.name);
        if (isa.supported) usable.append(isa.name);
    }
    d["cpu"] = kernels::cpu_name();
    d["isa"] = kernels::default_kernels().name;
    d["isas_built"] = built;
    d["isas_supported"] = usable;
    d["usable_cpus"] = threads::usable_cpus();
    d["cuda_built"] = engine::built_with_cuda();
    d["default_threads"] = threads::default_threads();
    return d;
}

}  // namespace

void bind_kernels(py::module_& m) {
    m.def("dequantize", &dequantize, py::arg("type"), py::arg("data"), py::arg("rows"), py::arg("inner"),
          "uint8 bytes in the file's layout -> float32 [rows, inner]");
    m.def("packed_bytes", &packed_bytes, py::arg("type"), py::arg("rows"), py::arg("inner"),
          "Bytes of rows x inner weights in memory");
    py::class_<KernelTable> table(m, "Kernels",
                                  "Single kernels of one instruction set, for tests; see csrc/kernels/kernels.h.");
    def_init(
        table, [](const std::string& isa) { return KernelTable(isa); }, py::arg("isa"))
        .def("quantize_activations", &KernelTable::quantize_activations, py::arg("x"))
        .def("quantize_row", &KernelTable::quantize_row, py::arg("x"))
        .def("matmul", &KernelTable::matmul, py::arg("type"), py::arg("data"), py::arg("rows"), py::arg("x"),
             py::arg("bias") = py::none(), py::arg("residual") = py::none(), py::arg("panels_per_call") = 0)
        .def("norm", &KernelTable::norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
             py::arg("rms"))
        .def("unary", &KernelTable::unary, py::arg("name"), py::arg("x"))
        .def("silu_mul", &KernelTable::silu_mul, py::arg("gate"), py::arg("up"))
        .def("rope", &KernelTable::rope, py::arg("x"), py::arg("interleaved"), py::arg("cos"), py::arg("sin"))
        .def("attention", &KernelTable::attention, py::arg("kv_type"), py::arg("queries"), py::arg("keys"),
             py::arg("values"))
        .def("argmax", &KernelTable::argmax, py::arg("x"))
        .def("softmax_stats", &KernelTable::softmax_stats, py::arg("x"));
    m.def(
        "gpus",
        [] {
            py::list found;
            for (const engine::Gpu& gpu : engine::gpus()) {
                py::dict d;
                d["name"] = gpu.name;
                d["architecture"] = gpu.architecture;
                d["memory_bytes"] = gpu.memory_bytes;
                found.append(d);
            }
            return found;
        },
        "The GPUs that the driver shows; starts the driver.");
    m.def("cuda_driver", &engine::cuda_driver, "What CUDA the driver supports, or why no GPU can be used; starts it.");
    m.def("system_info", &system_info, "What this machine offers and what was chosen.");
}

}  // namespace fixmin::bindings
