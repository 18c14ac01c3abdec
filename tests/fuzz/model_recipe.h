// A small model of any kind as keys and tensors, made by the choices of an input, and its GGUF file.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "codes/code_map.h"
#include "gguf/ggml_type.h"
#include "gguf/gguf_file.h"
#include "input.h"

namespace fixmin::fuzz {

using gguf::ValueType;

// Ids in a file.
enum class Type : uint32_t {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    I8 = 24,
    BF16 = 30,
};

struct Key {
    std::string name;
    ValueType type;
    std::string value;  // encoded
};

struct Tensor {
    std::string name;
    std::vector<uint64_t> ne;
    uint32_t type = 0;
    std::string data;
};

template <class T>
std::string raw(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
}
inline std::string text(std::string_view value) { return raw(uint64_t(value.size())) + std::string(value); }
inline std::string array(ValueType type, uint64_t n, std::string data) {
    return raw(uint32_t(type)) + raw(n) + std::move(data);
}

// A small model as its keys and tensors; every choice is the input's.
class Recipe {
  public:
    explicit Recipe(Input& input) : input_(input) {
        constexpr uint32_t widths[] = {32, 64, 96, 48, 256};
        static constexpr const char* activations[] = {"gelu", "gelu_tanh", "swiglu"};
        static constexpr const char* kinds[] = {"affine", "table", "learned"};
        d_ = widths[input.below(5)];
        f_ = d_ == 256 ? 256 : 32 * (1 + input.below(3));
        heads_ = 1u << input.below(3);
        if (d_ / heads_ % 2) heads_ = 1;
        kv_heads_ = input.flag() ? 1 : heads_;
        layers_ = 1 + input.below(2);
        vocab_ = 2 + input.below(70);
        kind_ = kinds[input.below(3)];
        rms_ = input.flag();
        swiglu_ = activations[input.below(3)];
        biases_ = input.byte();
        width_ = 1;
        while (width_ < 32 && (1u << width_) < vocab_) ++width_;
        width_ += input.below(8) == 7 ? input.below(4) : 0;
        const uint32_t head_dim = d_ / heads_;
        string("general.architecture", "fixmin");
        count("fixmin.vocab_size", vocab_);
        count("fixmin.context_length", 80 - input.below(80));
        count("fixmin.embedding_length", d_);
        count("fixmin.block_count", layers_);
        count("fixmin.feed_forward_length", f_);
        count("fixmin.attention.head_count", heads_);
        count("fixmin.attention.head_count_kv", kv_heads_);
        count("fixmin.rope.dimension_count", head_dim - std::min(head_dim, 2 * input.below(64)));
        real("fixmin.attention.scale", input.flag() ? input.real() : 0.25f);
        real(rms_ ? "fixmin.attention.layer_norm_rms_epsilon" : "fixmin.attention.layer_norm_epsilon", 1e-5f);
        real("fixmin.rope.freq_base", input.flag() ? input.real() : 10000.0f);
        string("fixmin.rope.style", input.flag() ? "interleaved" : "half");
        string("fixmin.activation", swiglu_);
        string("fixmin.code.kind", kind_);
        if (kind_ != "learned") code();
        blocks();
    }

    std::vector<Key> keys;
    std::vector<Tensor> tensors;

  private:
    void string(const std::string& name, std::string_view value) {
        keys.push_back({name, ValueType::string, text(value)});
    }
    void count(const std::string& name, uint32_t value) { keys.push_back({name, ValueType::u32, raw(value)}); }
    void real(const std::string& name, float value) { keys.push_back({name, ValueType::f32, raw(value)}); }

    void code() {
        count("fixmin.code.width", width_);
        string("fixmin.code.lift", input_.flag() && d_ % width_ == 0 ? "interleave" : "tile");
        const float values[] = {input_.flag() ? -1.0f : 0.0f, 1.0f};
        keys.push_back(
            {"fixmin.code.values", ValueType::array, array(ValueType::f32, 2, raw(values[0]) + raw(values[1]))});
        if (kind_ == "table") {
            const uint32_t bytes = codes::packed_row_bytes(width_);
            std::string rows;
            for (uint32_t id = 0; id < vocab_; ++id) {
                for (uint32_t b = 0; b < bytes; ++b) rows += char(id >> 8 * b);
            }
            tensors.push_back({"token_code.weight", {bytes, vocab_}, uint32_t(Type::I8), rows});
            return;
        }
        std::string matrix(size_t(width_) * width_, 0), shift(width_, 0);
        const uint32_t turn = input_.below(width_);
        for (uint32_t i = 0; i < width_; ++i) {
            matrix[i * width_ + (i + turn) % width_] = 1;
            shift[i] = char(input_.flag());
        }
        keys.push_back({"fixmin.code.affine_matrix", ValueType::array, array(ValueType::u8, matrix.size(), matrix)});
        keys.push_back({"fixmin.code.affine_shift", ValueType::array, array(ValueType::u8, shift.size(), shift)});
    }

    void vector(const std::string& name, uint32_t n, float mean) {
        std::string data;
        for (uint32_t i = 0; i < n; ++i) data += raw(mean + float(next() % 64) / 256 - 0.125f);
        tensors.push_back({name, {n}, uint32_t(Type::F32), data});
    }

    void norm(const std::string& name) {
        vector(name + ".weight", d_, 1);
        if (!rms_) vector(name + ".bias", d_, 0);
    }

    void linear(const std::string& name, uint32_t rows, uint32_t inner, bool bias) {
        static constexpr Type types[] = {Type::F32,  Type::F16,    Type::BF16,   Type::Q8_0, Type::Q4_0, Type::Q4_1,
                                         Type::Q5_0, Type::Q5_1,   Type::Q2_K,   Type::Q3_K, Type::Q4_K, Type::Q5_K,
                                         Type::Q6_K, Type::IQ4_NL, Type::IQ4_XS, Type::I8};
        Type type = types[input_.below(uint32_t(std::size(types)))];
        const gguf::TypeTraits* traits = gguf::type_traits(uint32_t(type));
        if (inner % traits->block_size || (type == Type::I8 && inner % 32)) {
            type = Type::F32;
            traits = gguf::type_traits(uint32_t(type));
        }
        const size_t bytes = size_t(rows) * inner / traits->block_size * traits->block_bytes;
        const std::string& all = weights(type, traits->block_bytes);
        // Another part of them for each tensor, whole blocks.
        const size_t start = next() % 16 * traits->block_bytes;
        std::string data = all.substr(start, bytes);
        tensors.push_back({name + ".weight", {inner, rows}, uint32_t(type), data});
        if (type == Type::I8) {
            std::string scales;
            for (uint32_t r = 0; r < rows; ++r) scales += raw(0.001f * float(1 + next() % 4));
            tensors.push_back({name + ".weight_scale", {rows}, uint32_t(Type::F32), scales});
            if (!w8a8_) count("fixmin.w8a8.version", 1);
            w8a8_ = true;
        }
        if (bias) vector(name + ".bias", rows, 0);
    }

    // As many as a tensor has at most, and some more: any bytes, but scales that are halves of about 0.004 wherever a
    // block of the type has them.
    static const std::string& weights(Type type, size_t block_bytes) {
        static std::map<Type, std::string> made;
        std::string& data = made[type];
        uint32_t state = uint32_t(type) + 1;
        const auto next = [&] { return state = state * 1664525u + 1013904223u, state >> 12; };
        while (data.size() < 256 * 256 * 4 + 16 * block_bytes) {
            if (type == Type::F32) {
                data += raw(float(int32_t(next() % 64) - 32) / 256);
            } else if (type == Type::F16) {
                data += raw(uint16_t(0x2800 + next() % 0x400 + (next() & 0x8000)));
            } else if (type == Type::BF16) {
                data += raw(uint16_t(0x3d00 + next() % 0x80 + (next() & 0x8000)));
            } else if (type == Type::I8) {
                data += char(next() % 255 - 127);
            } else {
                const size_t begin = data.size();
                while (data.size() < begin + block_bytes) data += char(next());
                const auto half = [&](size_t at) { std::memcpy(&data[begin + at], "\x1e\x1c", 2); };
                half(type == Type::Q2_K ? 80 : type == Type::Q3_K ? 108 : type == Type::Q6_K ? 208 : 0);
                if (type == Type::Q2_K) half(82);
                if (type == Type::Q4_1 || type == Type::Q5_1 || type == Type::Q4_K || type == Type::Q5_K) half(2);
            }
        }
        return data;
    }

    void blocks() {
        const auto biased = [&](int bit) { return biases_ >> bit & 1; };
        if (kind_ == "learned") {
            linear("token_embd", vocab_, d_, false);
        }
        const uint32_t kv = d_ / heads_ * kv_heads_;
        for (uint32_t l = 0; l < layers_; ++l) {
            const std::string block = "blk." + std::to_string(l) + ".";
            norm(block + "attn_norm");
            linear(block + "attn_q", d_, d_, biased(0));
            linear(block + "attn_k", kv, d_, biased(1));
            linear(block + "attn_v", kv, d_, biased(2));
            linear(block + "attn_output", d_, d_, biased(3));
            norm(block + "ffn_norm");
            if (swiglu_ == "swiglu") linear(block + "ffn_gate", f_, d_, biased(4));
            linear(block + "ffn_up", f_, d_, biased(5));
            linear(block + "ffn_down", d_, f_, biased(6));
        }
        norm("output_norm");
        linear("output", vocab_, d_, biased(7));
    }

    uint32_t next() { return state_ = state_ * 1664525u + 1013904223u, state_ >> 12; }

    Input& input_;
    uint32_t d_, f_, heads_, kv_heads_, layers_, vocab_, width_, state_ = 1;
    uint8_t biases_;
    bool rms_, w8a8_ = false;
    std::string kind_, swiglu_;
};

inline std::string written(const Recipe& recipe) {
    std::string header = "GGUF" + raw(3u) + raw(uint64_t(recipe.tensors.size())) + raw(uint64_t(recipe.keys.size()));
    for (const Key& k : recipe.keys) header += text(k.name) + raw(uint32_t(k.type)) + k.value;
    uint64_t offset = 0;
    std::string data;
    for (const Tensor& t : recipe.tensors) {
        header += text(t.name) + raw(uint32_t(t.ne.size()));
        for (const uint64_t n : t.ne) header += raw(n);
        header += raw(t.type) + raw(offset);
        data += t.data;
        data.resize((data.size() + 31) / 32 * 32);
        offset = data.size();
    }
    header.resize((header.size() + 31) / 32 * 32);
    return header + data;
}

}  // namespace fixmin::fuzz
