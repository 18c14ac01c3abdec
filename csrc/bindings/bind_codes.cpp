// Python view of csrc/codes.  Arrays must have the declared dtype and shape, or ArgumentError (a ValueError)
// names the argument: nothing is cast in silence.  Strided arrays are copied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "codes/code_map.h"
#include "codes/fold.h"
#include "codes/lift.h"
#include "error.h"

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

using codes::CodeMap;
using codes::FoldBuilder;
using codes::FoldedProjection;
using codes::Lift;

template <typename T>
using CArray = py::array_t<T, py::array::c_style>;

// Through a handle: to pybind11 before 3.1 str(dtype) is ambiguous.
std::string text_of(const py::dtype& dtype) { return py::str(py::handle(dtype)); }

/// `array` as a C-contiguous array of T, after its dtype and its number of dimensions have been checked.
template <typename T>
CArray<T> checked(const py::array& array, const char* name, py::ssize_t n_dims) {
    const py::dtype expected = py::dtype::of<T>();
    if (!array.dtype().equal(expected)) {
        throw ArgumentError(std::string(name) + " must have dtype " + text_of(expected) + ", got " +
                            text_of(array.dtype()));
    }
    if (array.ndim() != n_dims) {
        throw ArgumentError(std::string(name) + " must have " + std::to_string(n_dims) + " dimension" +
                            (n_dims == 1 ? "" : "s") + ", got " + std::to_string(array.ndim()));
    }
    auto contiguous = CArray<T>::ensure(array);
    if (!contiguous) throw py::error_already_set();
    return contiguous;
}

template <typename T>
std::span<const T> as_span(const CArray<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

uint32_t checked_u32(int64_t value, const char* name) {
    if (value < 0 || value > std::numeric_limits<uint32_t>::max()) {
        throw ArgumentError(std::string(name) + " must be 0..4294967295, got " + std::to_string(value));
    }
    return static_cast<uint32_t>(value);
}

void check_columns(const char* name, py::ssize_t got, uint32_t expected) {
    if (got != py::ssize_t{expected}) {
        throw ArgumentError(std::string(name) + " must have " + std::to_string(expected) + " columns, got " +
                            std::to_string(got));
    }
}

/// [T, K] of 0/1 -> T words.
std::vector<uint32_t> pack_rows(const CArray<uint8_t>& bits) {
    std::vector<uint32_t> words(static_cast<size_t>(bits.shape(0)));
    const size_t width = static_cast<size_t>(bits.shape(1));
    for (size_t t = 0; t < words.size(); ++t) {
        try {
            words[t] = codes::pack_bits({bits.data() + t * width, width});
        } catch (const ArgumentError& error) {
            throw ArgumentError("row " + std::to_string(t) + ": " + error.what());
        }
    }
    return words;
}

CodeMap make_affine(int64_t vocab_size, const py::array& matrix, const py::array& shift) {
    const auto a = checked<uint8_t>(matrix, "matrix", 2);
    const auto b = checked<uint8_t>(shift, "shift", 1);
    if (a.shape(0) != a.shape(1)) {
        throw ArgumentError("matrix must be square, got shape (" + std::to_string(a.shape(0)) + ", " +
                            std::to_string(a.shape(1)) + ")");
    }
    return CodeMap::affine(checked_u32(vocab_size, "vocab_size"), checked_u32(a.shape(0), "matrix rows"), as_span(a),
                           as_span(b));
}

CodeMap make_table(const py::array& rows) {
    const auto bits = checked<uint8_t>(rows, "rows", 2);
    const uint32_t vocab_size = checked_u32(bits.shape(0), "number of rows");
    const uint32_t width = checked_u32(bits.shape(1), "number of columns");
    const std::vector<uint32_t> words = pack_rows(bits);
    const size_t row_bytes = codes::packed_row_bytes(width);
    std::vector<uint8_t> packed(words.size() * row_bytes);
    for (size_t id = 0; id < words.size(); ++id) {
        for (size_t byte = 0; byte < row_bytes; ++byte) {
            packed[id * row_bytes + byte] = static_cast<uint8_t>(words[id] >> (8 * byte));
        }
    }
    return CodeMap::table(vocab_size, width, packed);
}

py::array_t<uint8_t> codes_of(const CodeMap& map, const py::array& ids) {
    const auto checked_ids = checked<uint32_t>(ids, "ids", 1);
    const size_t n_tokens = static_cast<size_t>(checked_ids.size());
    const size_t width = map.width();
    py::array_t<uint8_t> bits({n_tokens, width});
    uint8_t* out = bits.mutable_data();
    const WithoutGil released;
    const std::vector<uint32_t> words = map.codes(as_span(checked_ids));
    for (size_t t = 0; t < n_tokens; ++t) codes::unpack_bits(words[t], {out + t * width, width});
    return bits;
}

std::optional<uint32_t> id_of(const CodeMap& map, const py::array& code) {
    const auto bits = checked<uint8_t>(code, "code", 1);
    check_columns("code", bits.size(), map.width());
    return map.id_of(codes::pack_bits(as_span(bits)));
}

py::array_t<float> lift_codes(const py::array& code_bits, int64_t embedding_length, const std::string& kind,
                              std::pair<float, float> values) {
    const auto bits = checked<uint8_t>(code_bits, "codes", 2);
    const Lift lift = Lift::make(codes::parse_lift_kind(kind), checked_u32(bits.shape(1), "code width"),
                                 checked_u32(embedding_length, "embedding_length"), values.first, values.second);
    const std::vector<uint32_t> words = pack_rows(bits);
    py::array_t<float> x({words.size(), size_t{lift.embedding_length}});
    float* out = x.mutable_data();
    const WithoutGil released;
    for (size_t t = 0; t < words.size(); ++t) lift.apply(words[t], out + t * lift.embedding_length);
    return x;
}

/// A [n] vector, or an empty array for None.  The C++ side reads an empty span as "no bias", so an empty
/// array from Python, which is a wrong length, is refused here.
CArray<float> optional_vector(const std::optional<py::array>& array, const char* name) {
    if (!array) return {};
    auto result = checked<float>(*array, name, 1);
    if (result.size() == 0) throw ArgumentError(std::string(name) + " is empty; use None for no bias");
    return result;
}

FoldBuilder make_builder(int64_t rows, const py::array& norm_weight, const std::optional<py::array>& norm_bias,
                         float eps, bool rms, int64_t width, const std::string& kind, std::pair<float, float> values) {
    const auto gamma = checked<float>(norm_weight, "norm_weight", 1);
    const auto beta = optional_vector(norm_bias, "norm_bias");
    const Lift lift = Lift::make(codes::parse_lift_kind(kind), checked_u32(width, "width"),
                                 checked_u32(gamma.size(), "norm_weight length"), values.first, values.second);
    const codes::FoldNorm norm{as_span(gamma), as_span(beta), eps, rms};
    return FoldBuilder(checked_u32(rows, "rows"), norm, lift);
}

void add_rows(FoldBuilder& builder, int64_t row_begin, const py::array& weight, const std::optional<py::array>& bias) {
    const auto w = checked<float>(weight, "weight", 2);
    const auto b = optional_vector(bias, "bias");
    check_columns("weight", w.shape(1), builder.embedding_length());
    if (bias && b.size() != w.shape(0)) {
        throw ArgumentError("bias must have " + std::to_string(w.shape(0)) + " elements, got " +
                            std::to_string(b.size()));
    }
    builder.add_rows(checked_u32(row_begin, "row_begin"), checked_u32(w.shape(0), "weight rows"), w.data(),
                     bias ? b.data() : nullptr);
}

/// [T, K] of 0/1, as wide as the fold's codes -> T words.
std::vector<uint32_t> words_for(const FoldedProjection& fold, const py::array& code_bits) {
    const auto bits = checked<uint8_t>(code_bits, "codes", 2);
    check_columns("codes", bits.shape(1), fold.width());
    return pack_rows(bits);
}

/// [T, 2]: shift and rstd of every code.
py::array_t<float> fold_scales(const FoldedProjection& fold, const py::array& code_bits) {
    const std::vector<uint32_t> words = words_for(fold, code_bits);
    py::array_t<float> result({words.size(), size_t{2}});
    auto out = result.mutable_unchecked<2>();
    for (size_t t = 0; t < words.size(); ++t) {
        const codes::FoldScales scales = fold.scales(words[t]);
        out(t, 0) = scales.shift;
        out(t, 1) = scales.rstd;
    }
    return result;
}

/// A copy: the fold may be released before the array.
py::array_t<float> copied(const float* data, std::vector<py::ssize_t> shape) {
    return py::array_t<float>(std::move(shape), data);
}

py::array_t<float> apply_fold(const FoldedProjection& fold, const py::array& code_bits) {
    const std::vector<uint32_t> words = words_for(fold, code_bits);
    py::array_t<float> y({words.size(), size_t{fold.rows()}});
    float* out = y.mutable_data();
    const WithoutGil released;
    for (size_t t = 0; t < words.size(); ++t) fold.apply(words[t], out + t * fold.rows());
    return y;
}

}  // namespace

void bind_codes(py::module_& m) {
    py::class_<CodeMap>(m, "CodeMap", "Token id -> K-bit code.")
        .def_static("affine", &make_affine, py::arg("vocab_size"), py::arg("matrix"), py::arg("shift"))
        .def_static("table", &make_table, py::arg("rows"))
        .def_property_readonly("vocab_size", &CodeMap::vocab_size)
        .def_property_readonly("width", &CodeMap::width)
        .def("codes", &codes_of, py::arg("ids"))
        .def("id_of", &id_of, py::arg("code"));

    m.def("lift_codes", &lift_codes, py::arg("codes"), py::arg("embedding_length"), py::arg("lift"), py::arg("values"));

    py::class_<FoldedProjection>(m, "FoldedProjection", "norm1 and a projection of layer 0 as K + 2 columns.")
        .def("apply", &apply_fold, py::arg("codes"))
        .def("scales", &fold_scales, py::arg("codes"))
        .def_property_readonly("columns",
                               [](const FoldedProjection& f) { return copied(f.columns(), {f.width(), f.rows()}); })
        .def_property_readonly("sum", [](const FoldedProjection& f) { return copied(f.sum(), {f.rows()}); })
        .def_property_readonly("constant", [](const FoldedProjection& f) { return copied(f.constant(), {f.rows()}); });

    py::class_<FoldBuilder> builder(m, "FoldBuilder", "A FoldedProjection from blocks of rows.");
    def_init(builder, &make_builder, py::arg("rows"), py::arg("norm_weight"), py::arg("norm_bias").none(true),
             py::arg("eps"), py::arg("rms"), py::arg("width"), py::arg("lift"), py::arg("values"))
        .def("add_rows", &add_rows, py::arg("row_begin"), py::arg("weight"), py::arg("bias").none(true))
        .def("finish", &FoldBuilder::finish);
}

}  // namespace fixmin::bindings
