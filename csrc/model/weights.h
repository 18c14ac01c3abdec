// The weights of one model in the host's memory, its matrices in the layout of a device.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "codes/code_map.h"
#include "codes/fold.h"
#include "gguf/gguf_file.h"
#include "model/hyperparams.h"
#include "model/pages.h"
#include "quant/blocks.h"

namespace fixmin::model {

/// How a device wants a matrix in memory: panels of so many rows, one after the other.
struct Packing {
    uint32_t panel_rows;
    size_t (*panel_bytes)(quant::WeightType type, uint32_t inner);
    /// Lays out n_rows <= panel_rows rows of a file; false if a value or scale is not finite.
    bool (*pack_panel)(quant::WeightType type, const std::byte* rows, uint32_t n_rows, uint32_t inner, std::byte* out);
};

/// y = W x + bias.
struct Linear {
    quant::WeightType type = quant::WeightType::f32;
    uint32_t rows = 0;                  // outputs
    uint32_t inner = 0;                 // inputs
    uint32_t n_panels = 0;              // as Packing says
    const std::byte* panels = nullptr;  // inside Weights::panels
    size_t panel_stride = 0;            // bytes
    std::vector<float> bias;            // [rows rounded up to whole panels], or empty

    size_t matrix_bytes() const { return n_panels * panel_stride; }
    size_t bias_bytes() const { return bias.size() * sizeof(float); }
    size_t bytes() const { return matrix_bytes() + bias_bytes(); }
};

/// What a matrix is multiplied with: float32, or bytes whose blocks of 32 or whole rows share a scale.
enum class InBytes : uint8_t { none, blocks, rows };
InBytes read_by(const Linear& w);

struct Norm {
    std::vector<float> weight;  // [D]
    std::vector<float> bias;    // [D], or empty
    const float* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }
    size_t bytes() const { return (weight.size() + bias.size()) * sizeof(float); }
};

struct Layer {
    Norm attn_norm;  // empty in a folded layer 0, like q, k, v
    Linear q, k, v, attn_output;
    Norm ffn_norm;
    Linear gate, up, down;  // gate only for swiglu

    std::array<const Linear*, 7> products() const { return {&q, &k, &v, &attn_output, &gate, &up, &down}; }
};

/// The same bytes twice, once by what they are for and once by the type of the numbers.
struct WeightBytes {
    size_t attention = 0, mlp = 0, output = 0;  // matrices with their biases
    size_t norms = 0;
    size_t codes = 0;  // code map and folded layer 0
    std::map<std::string_view, size_t> types;
};

struct Weights {
    Hyperparams hyperparams;
    codes::CodeMap code_map;       // unless CodeKind::learned
    codes::FoldedProjection fold;  // norm1 and q, k, v of layer 0, rows stacked [qkv_length]
    std::vector<Layer> layers;
    Norm output_norm;
    Linear output;
    Pages panels;

    // CodeKind::learned: rows are read from the file when they are needed.
    std::optional<gguf::GgufFile> file;
    std::span<const std::byte> embedding;  // [V][row_bytes(embedding_type, D)]
    quant::WeightType embedding_type = quant::WeightType::f32;

    std::unique_ptr<std::atomic<bool>> unreadable = std::make_unique<std::atomic<bool>>(false);  // a row of it

    /// Throws GgufError if the rows that embed() has given since the last call may be wrong.
    void check_readable() const;

    size_t file_bytes = 0;  // of the whole file that this came from

    /// Everything that stays in memory; a learned embedding stays in the file.
    WeightBytes bytes() const;

    /// x [D] of one token: the lifted code, or the row of the embedding.
    void embed(uint32_t id, float* x) const;

    /// Bytes of weights that every decoded token reads: matrices with their biases, norms, the columns of the folded
    /// layer 0, one row of a learned embedding.
    size_t bytes_per_token() const;

    /// Weights in the matrix products of all blocks, which every token of a prompt passes; `output` is not among them.
    uint64_t block_product_weights() const;
};

/// Calls body(begin, end) for parts of 0..n on several threads.
using ParallelFor = std::function<void(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body)>;

/// Reads, checks and repacks everything.
/// Throws GgufError for a tensor that is missing, unknown, of a wrong shape or not finite; UnsupportedError for its
/// type. `progress` gets the fraction done, 0 to 1.
Weights load_weights(gguf::GgufFile file, const Packing& packing, const ParallelFor& parallel_for,
                     const std::function<void(double)>& progress);

}  // namespace fixmin::model
