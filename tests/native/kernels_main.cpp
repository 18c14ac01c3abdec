// Hashes of what the kernels of one instruction set compute from pseudo-random and from extreme inputs, one line per
// case, so that machines can be compared without Python: kernels_main ISA
//
// Inputs come from integers by exact operations only, so every machine makes the same. All NaN count as one value:
// their bits are not part of the contract (docs/numerics.md).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "model/pages.h"
#include "quant/half.h"
#include "quant/panels.h"

namespace {

using namespace fixmin;
using kernels::ActivationBlock;
using quant::KvType;
using quant::WeightType;
using Floats = std::vector<float>;

const kernels::Kernels* k;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {  // SplitMix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    /// In [-4, 4), a multiple of 2^-21.
    float value() { return float(int32_t(bits() >> 40) - (1 << 23)) * 0x1p-21f; }
    Floats values(size_t n, float factor = 1.0f) {
        Floats out(n);
        for (float& x : out) x = value() * factor;
        return out;
    }

  private:
    uint64_t state_;
};

// FNV-1a, 64 bits.
class Hash {
  public:
    void add(const void* data, size_t n) {
        const auto* bytes = static_cast<const unsigned char*>(data);
        for (size_t i = 0; i < n; ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3u;
    }
    void add(const Floats& values) {
        for (const float x : values) {
            const uint32_t bits = std::isnan(x) ? 0x7fc00000u : quant::float_bits(x);
            add(&bits, sizeof bits);
        }
    }
    void print(const std::string& name) const { std::printf("%s %016llx\n", name.c_str(), (unsigned long long)hash_); }

  private:
    uint64_t hash_ = 0xcbf29ce484222325u;
};

void print(const std::string& name, const Floats& values) {
    Hash hash;
    hash.add(values);
    hash.print(name);
}

// Every 65,537th float, so that all exponents, both signs, subnormals, infinities and NaN occur; then the borders.
Floats extremes() {
    Floats out;
    for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 65537)
        out.push_back(quant::float_from_bits(uint32_t(bits)));
    for (const float x : {0.0f,
                          0x1p31f,
                          0x1.fffffep30f,
                          127.5f,
                          88.3f,
                          87.3f,
                          88.0f,
                          1.0f,
                          4.0f,
                          0.5f,
                          1.5f,
                          2.5f,
                          65504.0f,
                          65520.0f,
                          65519.99f,
                          0x1p-14f,
                          0x1p-24f,
                          0x1p-25f,
                          0x1.000002p-25f,
                          INFINITY,
                          NAN}) {
        out.insert(out.end(), {x, -x});
    }
    return out;
}

constexpr uint32_t lengths[] = {1, 5, 15, 16, 17, 31, 33, 64, 192, 1000};

// ---- cases ----------------------------------------------------------------------------------------------------------

void quantize(const std::string& name, Floats x) {
    x.resize((x.size() + 31) / 32 * 32);
    std::vector<ActivationBlock> blocks(x.size() / 32);
    k->quantize_activations(x.data(), uint32_t(x.size()), blocks.data());
    Hash hash;
    for (const ActivationBlock& b : blocks) {
        hash.add(b.q, sizeof b.q);
        hash.add(Floats{b.scale});
        hash.add(&b.sum, sizeof b.sum);
        hash.add(&b.half_sum, sizeof b.half_sum);
        hash.add(Floats{b.scaled_sum});
    }
    hash.print(name);
}

void quantizations() {
    for (const float factor : {0.0f, 1e-38f, 1e-31f, 1e-20f, 1.0f, 1e30f})
        quantize("quantize x " + std::to_string(std::log10(factor)), Random(1).values(320, factor));
    Floats finite = extremes(), other;
    std::erase_if(finite, [](float x) { return !std::isfinite(x); });
    quantize("quantize extremes", finite);
    for (const float x : {INFINITY, -INFINITY, NAN}) {
        for (size_t at = 0; at < 32; ++at) {  // in every lane, one per block
            Floats values = Random(2).values(32);
            values[at] = x;
            other.insert(other.end(), values.begin(), values.end());
        }
    }
    quantize("quantize not finite", other);
}

// `n` elements in the file's layout, every value finite.
void random_weights(WeightType type, Random& random, size_t n, std::byte* out) {
    const size_t step = quant::is_quantized(type) ? 256 : 1;  // 256: the largest block of ggml's types
    const size_t bytes = quant::row_bytes(type, uint32_t(step));
    Floats check(step);
    for (size_t i = 0; i < n; i += step, out += bytes) {
        const float value = random.value();
        if (type == WeightType::f32) {
            std::memcpy(out, &value, 4);
        } else if (type == WeightType::bf16) {
            const uint16_t half = uint16_t(quant::float_bits(value) >> 16);
            std::memcpy(out, &half, 2);
        } else {
            do {  // any bits: also blocks that no quantiser writes
                for (size_t b = 0; b < bytes; ++b) out[b] = std::byte(random.bits());
            } while (!quant::dequantize_row(type, out, uint32_t(step), check.data()));
        }
    }
}

// A row of W8A8: codes from -127 to 127 and a scale.
void random_scaled_row(Random& random, uint32_t n, std::byte* out) {
    for (uint32_t i = 0; i < n; ++i) out[i] = std::byte(int(random.bits() % 255) - 127);
    const float scale = random.value();
    std::memcpy(out + n, &scale, sizeof scale);
}

void matmul(WeightType type, uint32_t rows, uint32_t tokens) {
    const uint32_t inner = 512, n_panels = (rows + quant::panel_rows - 1) / quant::panel_rows;
    const size_t row_bytes = quant::row_bytes(type, inner), stride = quant::panel_bytes(type, inner);
    Random random(rows * 100 + tokens);
    std::vector<std::byte> file(rows * row_bytes);
    for (uint32_t r = 0; r < rows; ++r) {
        std::byte* const row = file.data() + r * row_bytes;
        if (quant::scales_rows(type))
            random_scaled_row(random, inner, row);
        else
            random_weights(type, random, inner, row);
    }
    const model::Pages panels(n_panels * stride + 8192, "panels");
    for (uint32_t p = 0; p < n_panels; ++p) {
        const uint32_t first = p * quant::panel_rows, n = std::min(quant::panel_rows, rows - first);
        quant::pack_panel(type, file.data() + first * row_bytes, n, inner, panels.data() + p * stride);
    }
    const Floats x = random.values(size_t(tokens) * inner), bias = random.values(n_panels * quant::panel_rows);
    std::vector<ActivationBlock> blocks(x.size() / quant::block_size);
    const size_t scaled_bytes = kernels::scaled_row_bytes(inner);
    const model::Pages scaled(tokens * scaled_bytes, "rows in 8 bits");
    for (uint32_t t = 0; t < tokens; ++t) {
        const float* row = x.data() + size_t(t) * inner;
        if (quant::scales_rows(type))
            k->quantize_row(row, inner, scaled.data() + t * scaled_bytes);
        else
            k->quantize_activations(row, inner, blocks.data() + size_t(t) * (inner / quant::block_size));
    }
    Floats out = random.values(size_t(tokens) * rows);
    std::vector<std::byte> scratch(kernels::matmul_scratch_bytes(inner, tokens));
    k->matmul({type, panels.data(), stride, rows, inner, x.data(), inner, blocks.data(), scaled.data(), tokens,
               bias.data(), out.data(), rows, true, scratch.data(), false, nullptr});
    print("matmul " + std::string(quant::name(type)) + " " + std::to_string(rows) + " x " + std::to_string(tokens),
          out);
}

void matmuls() {
    for (const WeightType type : quant::all_weight_types) {
        for (const uint32_t rows : {1u, 80u})
            for (const uint32_t tokens : {1u, 2u, 13u}) matmul(type, rows, tokens);
    }
}

void norms() {
    for (const uint32_t n : lengths) {
        Random random(n);
        const Floats x = random.values(n), weight = random.values(n), bias = random.values(n);
        Floats y(n);
        k->layer_norm(x.data(), n, 1e-5f, weight.data(), bias.data(), y.data());
        print("layer_norm " + std::to_string(n), y);
        k->rms_norm(x.data(), n, 1e-6f, weight.data(), nullptr, y.data());
        print("rms_norm " + std::to_string(n), y);
    }
}

void elementwise(const std::string& name, const Floats& x) {
    const uint32_t n = uint32_t(x.size());
    Floats y = x;
    k->gelu_erf(y.data(), n);
    print("gelu_erf " + name, y);
    y = x;
    k->gelu_tanh(y.data(), n);
    print("gelu_tanh " + name, y);
    y.assign(n, 1.25f);
    k->silu_mul(x.data(), y.data(), n);
    print("silu_mul " + name, y);
    y = x;
    k->scale(y.data(), n, 0.3f);
    print("scale " + name, y);
    k->exp_minus(x.data(), n, 0.0f, y.data());
    print("exp " + name, y);
    Floats stats(2);
    k->softmax_stats(x.data(), n, &stats[0], &stats[1]);
    print("softmax_stats " + name, stats);
    uint32_t index;
    stats[0] = k->argmax(x.data(), n, &index);
    stats[1] = float(index);
    print("argmax " + name, stats);
}

void ropes() {
    for (const uint32_t dim : {2u, 8u, 32u, 34u, 128u}) {
        Random random(dim);
        const Floats cos = random.values(dim / 2, 0.25f), sin = random.values(dim / 2, 0.25f);
        for (const auto style : {numerics::RopeStyle::half, numerics::RopeStyle::interleaved}) {
            Floats x = random.values(dim + 6);
            k->rope(x.data(), dim, style, cos.data(), sin.data());
            print("rope " + std::to_string(dim) + (style == numerics::RopeStyle::half ? " half" : " interleaved"), x);
        }
    }
}

// One head of a cache filled with `keys` and `values` [tokens][d], and the attention of the last `n` tokens.
void attention(const std::string& name, KvType type, uint32_t d, const Floats& keys, const Floats& values, uint32_t n) {
    const uint32_t tokens = uint32_t(keys.size()) / d;
    const size_t block_bytes = quant::kv_head_bytes(type, d);
    const uint32_t n_blocks = (tokens + quant::kv_block_tokens - 1) / quant::kv_block_tokens;
    std::vector<std::byte> cache(n_blocks * block_bytes);
    std::vector<uint32_t> blocks(n_blocks);
    std::iota(blocks.begin(), blocks.end(), 0u);
    const kernels::KvHead kv{type, d, cache.data(), block_bytes, blocks.data()};
    for (uint32_t t = 0; t < tokens; ++t) k->kv_store(kv, t, &keys[size_t(t) * d], &values[size_t(t) * d]);
    const Floats queries = Random(d).values(size_t(n) * d, 0.25f);
    Floats scratch(kernels::attention_scratch_floats(tokens, d)), out(size_t(n) * d);
    k->attention({kv, queries.data(), d, n, tokens - n, out.data(), d, scratch.data()});
    Hash hash;
    hash.add(cache.data(), cache.size());
    hash.add(out);
    hash.print("attention " + name + " " + quant::name(type));
}

// Conversion to the type and back: what is stored is hashed, and a single key has the weight 1.
void stored_extremes(KvType type) {
    const uint32_t d = 32;
    Floats all = extremes();
    if (type == KvType::q8_0) std::erase_if(all, [](float x) { return !std::isfinite(x); });  // codes are not promised
    const Floats zeros(d);
    Hash hash;
    std::vector<std::byte> cache(quant::kv_head_bytes(type, d));
    const uint32_t block = 0;
    const kernels::KvHead kv{type, d, cache.data(), cache.size(), &block};
    Floats scratch(kernels::attention_scratch_floats(1, d)), out(d);
    for (size_t i = 0; i + d <= all.size(); i += d) {
        k->kv_store(kv, 0, zeros.data(), &all[i]);
        hash.add(cache.data(), cache.size());
        k->attention({kv, zeros.data(), d, 1, 0, out.data(), d, scratch.data()});
        hash.add(out);
    }
    hash.print(std::string(quant::name(type)) + " extremes");
}

void attentions() {
    for (const KvType type : quant::all_kv_types) {
        for (const uint32_t d : {7u, 16u, 20u, 32u, 48u, 64u, 80u, 96u, 128u}) {
            for (const uint32_t tokens : {1u, 7u, 33u, 150u}) {  // 150: more than one block
                Random random(d + tokens);
                const Floats keys = random.values(size_t(tokens) * d), values = random.values(size_t(tokens) * d);
                for (const uint32_t n : {1u, tokens}) {
                    const std::string name =
                        std::to_string(d) + " " + std::to_string(tokens) + " keys " + std::to_string(n) + " queries";
                    attention(name, type, d, keys, values, n);
                }
            }
        }
    }
    stored_extremes(KvType::f16);
    stored_extremes(KvType::q8_0);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        k = &kernels::select(argc == 2 ? argv[1] : "");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    quantizations();
    matmuls();
    norms();
    ropes();
    attentions();
    for (const uint32_t n : lengths) elementwise(std::to_string(n), Random(n).values(n, 4.0f));
    elementwise("extremes", extremes());
}
