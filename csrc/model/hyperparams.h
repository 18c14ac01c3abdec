// What kind of model a file holds: the keys of docs/design.md, checked.
#pragma once
#include <cstdint>
#include <string_view>

#include "codes/code_map.h"
#include "codes/lift.h"
#include "gguf/gguf_file.h"
#include "numerics/rope_style.h"

namespace fixmin::model {

// Their names in files are in hyperparams.cpp, in the same order.
enum class Activation { gelu, gelu_tanh, swiglu };
enum class CodeKind { affine, table, learned };

struct Hyperparams {
    uint32_t vocab_size = 0;        // V
    uint32_t context_length = 0;    // tokens
    uint32_t embedding_length = 0;  // D
    uint32_t block_count = 0;
    uint32_t feed_forward_length = 0;  // F
    uint32_t head_count = 0;           // H
    uint32_t head_count_kv = 0;
    uint32_t head_dim = 0;      // d = D / H
    float attention_scale = 0;  // multiplies q.k
    bool rms_norm = false;
    float norm_eps = 0;
    uint32_t rope_dim = 0;  // rotated elements at the start of each head, even
    float rope_base = 0;
    numerics::RopeStyle rope_style = numerics::RopeStyle::half;
    Activation activation = Activation::gelu;
    CodeKind code_kind = CodeKind::affine;
    uint32_t code_width = 0;  // K; 0 for CodeKind::learned
    codes::Lift lift;         // unless CodeKind::learned

    uint32_t q_length() const { return head_count * head_dim; }
    uint32_t kv_length() const { return head_count_kv * head_dim; }
    uint32_t qkv_length() const { return q_length() + 2 * kv_length(); }
    /// Layer 0 needs no norm and no q, k, v matrices: they fold into the code (docs/kernels.md).
    bool folds_layer_0() const { return code_kind != CodeKind::learned; }
};

/// Throws GgufError for a missing key, a value out of range or values that contradict each other.
Hyperparams read_hyperparams(const gguf::GgufFile& file);

std::string_view name(Activation activation);
std::string_view name(CodeKind kind);
std::string_view name(numerics::RopeStyle style);

}  // namespace fixmin::model
