#include "model/weights.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>
#include <unordered_set>

#include "error.h"
#include "quant/panels.h"

namespace fixmin::model {

using quant::WeightType;

InBytes read_by(const Linear& w) {
    if (!quant::is_quantized(w.type)) return InBytes::none;
    return quant::scales_rows(w.type) ? InBytes::rows : InBytes::blocks;
}

void Weights::embed(uint32_t id, float* x) const {
    const uint32_t d = hyperparams.embedding_length;
    if (hyperparams.code_kind != CodeKind::learned) return hyperparams.lift.apply(code_map.code(id), x);
    const size_t row = quant::row_bytes(embedding_type, d);
    thread_local std::vector<std::byte> stored;
    try {
        stored.resize(row);
        file->read(embedding.subspan(id * row, row), stored.data());
        quant::dequantize_row(embedding_type, stored.data(), d, x);
    } catch (...) {  // the threads of a team wait for each other
        std::fill_n(x, d, 0.0f);
        *unreadable = true;
    }
}

void Weights::check_readable() const {
    if (!file || !file->source()) return;
    if (unreadable->exchange(false) || file->source()->changed()) {
        throw GgufError(file->source()->path() +
                        ": the file was cut or written to while the model was in use, which reads its embedding there");
    }
}

WeightBytes Weights::bytes() const {
    WeightBytes total;
    const auto add_floats = [&](size_t& role, size_t bytes) {
        role += bytes;
        if (bytes) total.types["F32"] += bytes;
    };
    const auto add = [&](size_t& role, const Linear& w) {
        role += w.matrix_bytes();
        if (w.rows) total.types[quant::name(w.type)] += w.matrix_bytes();
        add_floats(role, w.bias_bytes());
    };
    for (const Layer& layer : layers) {
        for (const Linear* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output}) add(total.attention, *w);
        for (const Linear* w : {&layer.gate, &layer.up, &layer.down}) add(total.mlp, *w);
        add_floats(total.norms, layer.attn_norm.bytes() + layer.ffn_norm.bytes());
    }
    add(total.output, output);
    add_floats(total.norms, output_norm.bytes());
    add_floats(total.codes, fold.bytes());
    total.codes += code_map.bytes();
    if (code_map.bytes()) total.types["I32"] += code_map.bytes();
    return total;
}

size_t Weights::bytes_per_token() const {
    size_t total = output.bytes() + output_norm.bytes();
    if (hyperparams.folds_layer_0()) {
        total += size_t(hyperparams.code_width + 2) * hyperparams.qkv_length() * sizeof(float);
    } else {
        total += quant::row_bytes(embedding_type, hyperparams.embedding_length);
    }
    for (const Layer& layer : layers) {
        total += layer.attn_norm.bytes() + layer.ffn_norm.bytes();
        for (const Linear* w : layer.products()) total += w->bytes();
    }
    return total;
}

uint64_t Weights::block_product_weights() const {
    uint64_t total = 0;
    for (const Layer& layer : layers) {
        for (const Linear* w : layer.products()) total += uint64_t(w->rows) * w->inner;
    }
    return total;
}

namespace {

// A type that the kernels know; GgufFile has checked that a row is a whole number of its blocks.
WeightType weight_type(const gguf::TensorInfo& tensor) {
    const std::string_view type_name = gguf::type_traits(tensor.type).name;
    std::string known;
    for (const WeightType type : quant::all_weight_types) {
        if (quant::name(type) == type_name) return type;
        known += (known.empty() ? "" : ", ") + std::string(quant::name(type));
    }
    throw UnsupportedError("tensor '" + tensor.name + "' has type " + std::string(type_name) + "; this version runs " +
                           known);
}

std::string shape_text(std::span<const uint64_t> ne) {
    std::string text = "[";
    for (const uint64_t n : ne) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
    return text + "]";
}

// Takes tensors out of the file by name, checks them, and packs the matrices in one go at the end.
class Loader {
  public:
    Loader(const gguf::GgufFile& file, const Packing& packing) : file_(file), packing_(packing) {}

    const gguf::TensorInfo* find(const std::string& name, uint64_t ne0, uint64_t ne1) {
        const gguf::TensorInfo* tensor = file_.find_tensor(name);
        if (!tensor) return nullptr;
        if (tensor->ne[0] != ne0 || tensor->ne[1] != ne1 || tensor->ne[2] != 1 || tensor->ne[3] != 1) {
            const uint64_t expected[] = {ne0, ne1};
            throw GgufError("tensor '" + name + "' has shape " + shape_text({tensor->ne.data(), tensor->n_dims}) +
                            "; expected " + shape_text(expected));
        }
        used_.insert(tensor->name);
        return tensor;
    }

    const gguf::TensorInfo& get(const std::string& name, uint64_t ne0, uint64_t ne1) {
        const gguf::TensorInfo* tensor = find(name, ne0, ne1);
        if (!tensor) throw GgufError("tensor '" + name + "' is missing");
        return *tensor;
    }

    // [n] floats padded with zeros to a multiple of `padding`; empty if there is no such tensor.
    std::vector<float> vector(const std::string& name, uint32_t n, uint32_t padding = 1) {
        const gguf::TensorInfo* tensor = find(name, n, 1);
        if (!tensor) return {};
        std::vector<float> out((size_t(n) + padding - 1) / padding * padding);
        const WeightType type = weight_type(*tensor);
        std::vector<std::byte> stored(tensor->data.size());
        file_.read(tensor->data, stored.data());
        if (!quant::dequantize_row(type, stored.data(), n, out.data())) not_finite(*tensor);
        return out;
    }

    Norm norm(const std::string& name, uint32_t n, bool rms) {
        Norm norm{vector(name + ".weight", n), vector(name + ".bias", n)};
        if (norm.weight.empty()) throw GgufError("tensor '" + name + ".weight' is missing");
        if (rms && !norm.bias.empty()) throw GgufError("tensor '" + name + ".bias': an RMS norm has no bias");
        return norm;
    }

    void linear(Linear& w, const std::string& name, uint32_t rows, uint32_t inner) {
        const gguf::TensorInfo& tensor = get(name + ".weight", inner, rows);
        const gguf::TensorInfo* scales = scales_of(tensor);
        w.type = scales ? WeightType::w8a8 : weight_type(tensor);
        w.rows = rows;
        w.inner = inner;
        w.n_panels = (rows + packing_.panel_rows - 1) / packing_.panel_rows;
        w.panel_stride = packing_.panel_bytes(w.type, inner);
        w.bias = vector(name + ".bias", rows, packing_.panel_rows);
        jobs_.push_back({&tensor, scales, &w, total_bytes_});
        total_bytes_ += w.matrix_bytes();
    }

    Pages pack(const ParallelFor& parallel_for, const std::function<void(double)>& progress) {
        Pages pages(total_bytes_, "the weights");
        for (const Job& job : jobs_) {
            job.weight->panels = pages.data() + job.offset;
            pack_matrix(job, pages.data() + job.offset, parallel_for);
            progress(double(job.offset + job.weight->matrix_bytes()) / double(total_bytes_));
        }
        return pages;
    }

    codes::FoldedProjection fold(const Hyperparams& hp, const ParallelFor& parallel_for) {
        const Norm n = norm("blk.0.attn_norm", hp.embedding_length, hp.rms_norm);
        const auto rows_of = [&](const std::string& part) { return part == "attn_q" ? hp.q_length() : hp.kv_length(); };
        // All three are found before memory for their fold is taken: lengths are only a claim of the file.
        std::vector<std::pair<const gguf::TensorInfo*, std::vector<float>>> parts;
        for (const std::string part : {"attn_q", "attn_k", "attn_v"}) {
            const gguf::TensorInfo& tensor = get("blk.0." + part + ".weight", hp.embedding_length, rows_of(part));
            parts.emplace_back(&tensor, vector("blk.0." + part + ".bias", rows_of(part)));
        }
        codes::FoldBuilder builder(hp.qkv_length(), {n.weight, n.bias, hp.norm_eps, hp.rms_norm}, hp.lift);
        uint32_t first = 0;
        for (const auto& [tensor, bias] : parts) {
            fold_matrix(builder, first, *tensor, bias, parallel_for);
            first += uint32_t(tensor->ne[1]);
        }
        return builder.finish();
    }

    void refuse_leftovers() const {
        for (const gguf::TensorInfo& tensor : file_.tensors()) {
            if (!used_.contains(tensor.name)) {
                throw GgufError("tensor '" + tensor.name + "' " + shape_text({tensor.ne.data(), tensor.n_dims}) +
                                " has no place in this model; the file may describe another one");
            }
        }
    }

  private:
    struct Job {
        const gguf::TensorInfo *tensor, *scales;  // the scales of rows, or null
        Linear* weight;
        size_t offset;
    };

    // Of a file: what a thread has mapped at a time.
    static constexpr size_t portion_bytes = size_t(2) << 20;

    [[noreturn]] static void not_finite(const gguf::TensorInfo& tensor) {
        throw GgufError("tensor '" + tensor.name + "' at offset " + std::to_string(tensor.offset) +
                        " holds a value or scale that is NaN or infinite");
    }

    // Of W8A8: a file must say by which rules its scales are meant.
    void check_rules() const {
        constexpr const char* key = "fixmin.w8a8.version";
        if (const uint32_t version = file_.get_u32(key); version != 1) {
            throw UnsupportedError(std::string(key) + " is " + std::to_string(version) + "; this version runs 1");
        }
    }

    [[noreturn]] void not_usable(const gguf::TensorInfo& tensor, const gguf::TensorInfo* scales) const {
        if (!scales) not_finite(tensor);
        std::vector<float> values(scales->data.size() / sizeof(float));
        file_.read(scales->data, reinterpret_cast<std::byte*>(values.data()));
        for (size_t row = 0; row < values.size(); ++row) {
            if (quant::is_row_scale(values[row])) continue;
            char value[32];
            std::snprintf(value, sizeof value, "%g", double(values[row]));
            throw GgufError("tensor '" + scales->name + "' at offset " + std::to_string(scales->offset) + " has " +
                            value + " for row " + std::to_string(row) +
                            ": scales are not negative, and 127 times them is finite");
        }
        throw GgufError("tensor '" + tensor.name + "' at offset " + std::to_string(tensor.offset) +
                        " holds a code of -128");
    }

    // Of a matrix of signed bytes, the scales of its rows; null for other types.
    const gguf::TensorInfo* scales_of(const gguf::TensorInfo& tensor) {
        if (tensor.type != gguf::GgmlType::I8) return nullptr;
        check_rules();
        const gguf::TensorInfo& scales = get(tensor.name + "_scale", tensor.ne[1], 1);
        if (const std::string_view type = gguf::type_traits(scales.type).name; type != "F32") {
            throw GgufError("tensor '" + scales.name + "' has type " + std::string(type) +
                            "; scales of rows must be F32");
        }
        const uint64_t inner = tensor.ne[0];
        if (inner % quant::block_size || inner > quant::max_scaled_row) {
            throw UnsupportedError("tensor '" + tensor.name + "' has rows of " + std::to_string(inner) +
                                   " bytes; W8A8 needs a multiple of 32, at most " +
                                   std::to_string(quant::max_scaled_row));
        }
        return &scales;
    }

    // Rows first <= r < last, each as quant::row_bytes says.
    void read_rows(const gguf::TensorInfo& tensor, const gguf::TensorInfo* scales, uint32_t first, uint32_t last,
                   size_t row, std::vector<std::byte>& stored) {
        stored.resize((last - first) * row);
        if (!scales) return file_.read(tensor.data.subspan(first * row, stored.size()), stored.data());
        // Read at once, for each read maps a part of the file; then each scale goes behind its codes.
        constexpr size_t scale = sizeof(float);
        const size_t n = last - first, codes = row - scale;
        std::vector<std::byte> apart(n * row);
        std::byte* const all_scales = apart.data() + n * codes;
        file_.read(tensor.data.subspan(first * codes, n * codes), apart.data());
        file_.read(scales->data.subspan(first * scale, n * scale), all_scales);
        for (size_t r = 0; r < n; ++r) {
            std::byte* to = stored.data() + r * row;
            std::copy_n(apart.data() + r * codes, codes, to);
            std::copy_n(all_scales + r * scale, scale, to + codes);
        }
    }

    void pack_matrix(const Job& job, std::byte* panels, const ParallelFor& parallel_for) {
        const Linear& w = *job.weight;
        const size_t row = quant::row_bytes(w.type, w.inner);
        std::atomic<bool> finite = true;
        const uint32_t panel_rows = packing_.panel_rows;
        parallel_for(w.n_panels, [&](uint32_t begin, uint32_t end) {
            const uint32_t portion = uint32_t(std::max<size_t>(1, portion_bytes / (panel_rows * row)));
            std::vector<std::byte> stored;
            for (uint32_t p = begin; p < end; p += portion) {
                const uint32_t first = p * panel_rows;
                const uint32_t last = std::min(std::min(p + portion, end) * panel_rows, w.rows);
                read_rows(*job.tensor, job.scales, first, last, row, stored);
                for (uint32_t r = first; r < last; r += panel_rows) {
                    const uint32_t n = std::min(panel_rows, last - r);
                    std::byte* panel = panels + r / panel_rows * w.panel_stride;
                    const std::byte* from = stored.data() + (r - first) * row;
                    if (!packing_.pack_panel(w.type, from, n, w.inner, panel)) finite = false;
                }
            }
        });
        if (!finite) not_usable(*job.tensor, job.scales);
    }

    void fold_matrix(codes::FoldBuilder& builder, uint32_t first, const gguf::TensorInfo& tensor,
                     const std::vector<float>& bias, const ParallelFor& parallel_for) {
        const gguf::TensorInfo* scales = scales_of(tensor);
        const WeightType type = scales ? WeightType::w8a8 : weight_type(tensor);
        const uint32_t inner = uint32_t(tensor.ne[0]);
        const size_t row = quant::row_bytes(type, inner);
        std::atomic<bool> finite = true;
        parallel_for(uint32_t(tensor.ne[1]), [&](uint32_t begin, uint32_t end) {
            std::vector<float> weights(inner);
            std::vector<std::byte> stored;
            for (uint32_t r = begin; r < end; ++r) {
                read_rows(tensor, scales, r, r + 1, row, stored);
                if (!quant::dequantize_row(type, stored.data(), inner, weights.data())) finite = false;
                builder.add_rows(first + r, 1, weights.data(), bias.empty() ? nullptr : &bias[r]);
            }
        });
        if (!finite) not_usable(tensor, scales);
    }

    const gguf::GgufFile& file_;
    const Packing& packing_;
    std::unordered_set<std::string_view> used_;
    std::vector<Job> jobs_;
    size_t total_bytes_ = 0;
};

codes::CodeMap read_code_map(const gguf::GgufFile& file, Loader& loader, const Hyperparams& hp) {
    try {
        if (hp.code_kind == CodeKind::affine) {
            return codes::CodeMap::affine(hp.vocab_size, hp.code_width, file.get_u8_array("fixmin.code.affine_matrix"),
                                          file.get_u8_array("fixmin.code.affine_shift"));
        }
        const gguf::TensorInfo& rows =
            loader.get("token_code.weight", codes::packed_row_bytes(hp.code_width), hp.vocab_size);
        if (rows.type != gguf::GgmlType::I8) throw GgufError("tensor 'token_code.weight' must have type I8");
        std::vector<std::byte> stored(rows.data.size());
        file.read(rows.data, stored.data());
        return codes::CodeMap::table(hp.vocab_size, hp.code_width,
                                     {reinterpret_cast<const uint8_t*>(stored.data()), stored.size()});
    } catch (const ArgumentError& error) {
        throw GgufError(std::string("fixmin.code.*: ") + error.what());
    }
}

void read_layer(Loader& loader, const Hyperparams& hp, uint32_t index, Layer& layer) {
    const std::string prefix = "blk." + std::to_string(index) + ".";
    const uint32_t d = hp.embedding_length, f = hp.feed_forward_length;
    if (index > 0 || !hp.folds_layer_0()) {
        layer.attn_norm = loader.norm(prefix + "attn_norm", d, hp.rms_norm);
        loader.linear(layer.q, prefix + "attn_q", hp.q_length(), d);
        loader.linear(layer.k, prefix + "attn_k", hp.kv_length(), d);
        loader.linear(layer.v, prefix + "attn_v", hp.kv_length(), d);
    }
    loader.linear(layer.attn_output, prefix + "attn_output", d, hp.q_length());
    layer.ffn_norm = loader.norm(prefix + "ffn_norm", d, hp.rms_norm);
    if (hp.activation == Activation::swiglu) loader.linear(layer.gate, prefix + "ffn_gate", f, d);
    loader.linear(layer.up, prefix + "ffn_up", f, d);
    loader.linear(layer.down, prefix + "ffn_down", d, f);
}

}  // namespace

Weights load_weights(gguf::GgufFile file, const Packing& packing, const ParallelFor& parallel_for,
                     const std::function<void(double)>& progress) {
    Weights weights;
    const Hyperparams hp = weights.hyperparams = read_hyperparams(file);
    weights.file_bytes = file.bytes().size();
    Loader loader(file, packing);

    if (hp.code_kind == CodeKind::learned) {
        const gguf::TensorInfo& embedding = loader.get("token_embd.weight", hp.embedding_length, hp.vocab_size);
        weights.embedding_type = weight_type(embedding);
        weights.embedding = embedding.data;
    } else {
        weights.code_map = read_code_map(file, loader, hp);
        weights.fold = loader.fold(hp, parallel_for);
    }
    // Missing blocks are found before memory for them is taken: block_count is only a claim of the file.
    if (!file.find_tensor("blk." + std::to_string(hp.block_count - 1) + ".attn_output.weight")) {
        throw GgufError("fixmin.block_count is " + std::to_string(hp.block_count) + " but there is no block " +
                        std::to_string(hp.block_count - 1));
    }
    weights.layers.resize(hp.block_count);
    for (uint32_t i = 0; i < hp.block_count; ++i) read_layer(loader, hp, i, weights.layers[i]);
    weights.output_norm = loader.norm("output_norm", hp.embedding_length, hp.rms_norm);
    loader.linear(weights.output, "output", hp.vocab_size, hp.embedding_length);
    loader.refuse_leftovers();
    weights.panels = loader.pack(parallel_for, progress);
    if (hp.code_kind == CodeKind::learned) weights.file.emplace(std::move(file));
    return weights;
}

}  // namespace fixmin::model
