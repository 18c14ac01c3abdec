#include "model/hyperparams.h"

#include <span>
#include <string>

#include "error.h"

namespace fixmin::model {
namespace {

// Generous limits: far above any model of this kind, low enough that no product of two of them overflows.
constexpr uint32_t max_length = 1u << 20;

uint32_t read_count(const gguf::GgufFile& file, const char* key, uint32_t max = max_length) {
    const uint32_t value = file.get_u32(key);
    if (value < 1 || value > max) {
        throw GgufError(std::string(key) + " is " + std::to_string(value) + "; it must lie in 1.." +
                        std::to_string(max));
    }
    return value;
}

// Names of the members of enumerations, in their order.
constexpr std::string_view activations[] = {"gelu", "gelu_tanh", "swiglu"};
constexpr std::string_view code_kinds[] = {"affine", "table", "learned"};
constexpr std::string_view rope_styles[] = {"half", "interleaved"};

// The place in `names` of the string under a key.
size_t read_name(const gguf::GgufFile& file, const char* key, std::span<const std::string_view> names) {
    const std::string_view value = file.get_string(key);
    std::string known;
    for (size_t i = 0; i < names.size(); ++i) {
        if (value == names[i]) return i;
        known += (i ? ", " : "") + std::string(names[i]);
    }
    throw GgufError(std::string(key) + " is " + quoted(value) + "; known: " + known);
}

void read_norm(const gguf::GgufFile& file, Hyperparams& hp) {
    const char* layer_norm = "fixmin.attention.layer_norm_epsilon";
    const char* rms_norm = "fixmin.attention.layer_norm_rms_epsilon";
    hp.rms_norm = file.has(rms_norm);
    if (hp.rms_norm == file.has(layer_norm)) {
        throw GgufError(std::string("exactly one of ") + layer_norm + " and " + rms_norm + " must be present");
    }
    hp.norm_eps = file.get_f32(hp.rms_norm ? rms_norm : layer_norm);
    if (hp.norm_eps < 0) throw GgufError("the norm epsilon is negative: " + std::to_string(hp.norm_eps));
}

void read_attention(const gguf::GgufFile& file, Hyperparams& hp) {
    hp.head_count = read_count(file, "fixmin.attention.head_count");
    hp.head_count_kv = read_count(file, "fixmin.attention.head_count_kv");
    if (hp.embedding_length % hp.head_count != 0) {
        throw GgufError("fixmin.embedding_length " + std::to_string(hp.embedding_length) +
                        " is not a multiple of fixmin.attention.head_count " + std::to_string(hp.head_count));
    }
    if (hp.head_count % hp.head_count_kv != 0) {
        throw GgufError("fixmin.attention.head_count " + std::to_string(hp.head_count) +
                        " is not a multiple of fixmin.attention.head_count_kv " + std::to_string(hp.head_count_kv));
    }
    hp.head_dim = hp.embedding_length / hp.head_count;
    hp.attention_scale = file.get_f32("fixmin.attention.scale");

    hp.rope_dim = file.get_u32("fixmin.rope.dimension_count");
    if (hp.rope_dim % 2 != 0 || hp.rope_dim > hp.head_dim) {
        throw GgufError("fixmin.rope.dimension_count is " + std::to_string(hp.rope_dim) +
                        "; it must be even and at most the head size " + std::to_string(hp.head_dim));
    }
    hp.rope_base = file.get_f32("fixmin.rope.freq_base");
    if (!(hp.rope_base > 0)) throw GgufError("fixmin.rope.freq_base must be positive");
    hp.rope_style = numerics::RopeStyle(read_name(file, "fixmin.rope.style", rope_styles));
}

void read_code(const gguf::GgufFile& file, Hyperparams& hp) {
    hp.code_kind = CodeKind(read_name(file, "fixmin.code.kind", code_kinds));
    if (hp.code_kind == CodeKind::learned) return;
    hp.code_width = read_count(file, "fixmin.code.width", codes::max_width);
    const std::vector<float> values = file.get_f32_array("fixmin.code.values");
    if (values.size() != 2) {
        throw GgufError("fixmin.code.values has " + std::to_string(values.size()) + " elements; expected 2");
    }
    try {
        hp.lift = codes::Lift::make(codes::parse_lift_kind(file.get_string("fixmin.code.lift")), hp.code_width,
                                    hp.embedding_length, values[0], values[1]);
    } catch (const ArgumentError& error) {
        throw GgufError(std::string("fixmin.code.*: ") + error.what());
    }
}

}  // namespace

std::string_view name(Activation activation) { return activations[size_t(activation)]; }
std::string_view name(CodeKind kind) { return code_kinds[size_t(kind)]; }
std::string_view name(numerics::RopeStyle style) { return rope_styles[size_t(style)]; }

Hyperparams read_hyperparams(const gguf::GgufFile& file) {
    // Other parts than the first have these keys alone.
    if (const uint32_t n = file.has("split.count") ? file.get_u32("split.count") : 1; n > 1) {
        throw GgufError("the file is one of " + std::to_string(n) +
                        " parts of a model (split.count); join them first: llama-gguf-split --merge");
    }
    constexpr std::string_view architectures[] = {"fixmin"};
    read_name(file, "general.architecture", architectures);
    Hyperparams hp;
    hp.vocab_size = read_count(file, "fixmin.vocab_size", 1u << 28);
    hp.context_length = read_count(file, "fixmin.context_length");
    hp.embedding_length = read_count(file, "fixmin.embedding_length");
    hp.block_count = read_count(file, "fixmin.block_count");
    hp.feed_forward_length = read_count(file, "fixmin.feed_forward_length");
    read_attention(file, hp);
    read_norm(file, hp);
    hp.activation = Activation(read_name(file, "fixmin.activation", activations));
    read_code(file, hp);
    return hp;
}

}  // namespace fixmin::model
