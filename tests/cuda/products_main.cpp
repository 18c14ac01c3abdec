// Every kernel of the forward pass but attention, on the emulator, against the CPU's: products_main CASES SEED
//
// Cases of each kind are drawn from pseudo-random numbers. The first one that differs in a bit is printed, and ends the
// program with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "codes/code_map.h"
#include "codes/fold.h"
#include "cuda/packing.h"
#include "quant/half.h"

#include "launches.h"

namespace {

using namespace fixmin;
using namespace fixmin::cases;
using namespace fixmin::cuda;
using kernels::ActivationBlock;
using quant::block_size;

std::string said;  // of the case at hand
void say(const char* what, uint32_t n) { said += std::string(", ") + what + " " + std::to_string(n); }

uint32_t tiles(uint32_t n, uint32_t of) { return (n + of - 1) / of; }

/// Of the kernels whose blocks may have any number of warps.
uint32_t any_threads() {
    constexpr uint32_t counts[] = {32, 96, row_threads};
    return one_of(counts);
}

// ---- rows in 8 bits -------------------------------------------------------------------------------------------------

using Blocks = std::vector<ActivationBlock>;  // [rows][length / 32]

Blocks quantized(const Floats& x, uint32_t length) {
    Blocks blocks(x.size() / block_size);
    for (size_t row = 0; row < x.size() / length; ++row)
        cpu.quantize_activations(x.data() + row * length, length, blocks.data() + row * (length / block_size));
    return blocks;
}

/// Of W8A8, as the CPU's products read them.
std::vector<std::byte> scaled_rows(const Floats& x, uint32_t length) {
    const size_t row_bytes = kernels::scaled_row_bytes(length);
    std::vector<std::byte> rows(x.size() / length * row_bytes);
    for (size_t row = 0; row < x.size() / length; ++row)
        cpu.quantize_row(x.data() + row * length, length, rows.data() + row * row_bytes);
    return rows;
}

/// The same as blocks, each with the scale and the sum of its row.
Blocks blocks_of(const std::vector<std::byte>& rows, uint32_t length) {
    const size_t row_bytes = kernels::scaled_row_bytes(length), n = length / block_size;
    Blocks blocks(rows.size() / row_bytes * n);
    for (size_t i = 0; i < blocks.size(); ++i) {
        const std::byte* const row = rows.data() + i / n * row_bytes;
        kernels::RowScale scale;
        std::memcpy(&scale, row + row_bytes - 64, sizeof scale);
        std::memcpy(blocks[i].q, row + i % n * block_size, block_size);
        blocks[i].scale = scale.scale;
        blocks[i].sum = scale.sum;
    }
    return blocks;
}

/// QuantizedRows and its memory. What nobody has written would show.
struct GpuRows {
    size_t plane;
    std::vector<uint32_t> codes;
    Floats factors;

    GpuRows(uint32_t n_rows, uint32_t length)
        : plane(size_t(tiles(n_rows, tile_tokens)) * tiles(length / block_size, 2) * tile_tokens * 2),
          codes(plane * block_size / 4, 0x7f7f7f7f),
          factors(plane * factor_planes, NAN) {}

    /// As args.h says.
    GpuRows(uint32_t n_rows, uint32_t length, const Blocks& blocks) : GpuRows(n_rows, length) {
        const uint32_t n_blocks = length / block_size, pairs = tiles(n_blocks, 2);
        for (uint32_t row = 0; row < n_rows; ++row) {
            for (uint32_t b = 0; b < n_blocks; ++b) {
                const ActivationBlock& block = blocks[size_t(row) * n_blocks + b];
                const size_t pair = size_t(row / tile_tokens) * pairs + b / 2;
                for (uint32_t k = 0; k < block_size; ++k) {
                    const uint32_t lane = row % tile_tokens * 4 + k % 16 / 4;
                    const size_t word = ((pair * 32 + lane) * 2 + b % 2) * 2 + k / 16;
                    reinterpret_cast<int8_t*>(&codes[word])[k % 4] = block.q[k];
                }
                const float of_block[] = {block.scale, block.scaled_sum, float(block.half_sum),
                                          float(block.sum - block.half_sum)};
                for (uint32_t p = 0; p < factor_planes; ++p) {
                    float* const to = factors.data() + p * plane + (pair * tile_tokens + row % tile_tokens) * 2;
                    to[b % 2] = of_block[p];
                    if (b % 2 == 0 && b + 1 == n_blocks) to[1] = 0;
                }
            }
        }
    }

    QuantizedRows rows() { return {codes.data(), factors.data(), plane}; }
    bool operator==(const GpuRows& other) const {
        return same(codes.data(), other.codes.data(), codes.size() * 4, "codes") &&
               same(factors, other.factors, "factors of codes");
    }
};

// ---- products -------------------------------------------------------------------------------------------------------

/// Rows as a file has them, of finite scales.
std::vector<std::byte> weights_of(WeightType type, uint32_t n_rows, uint32_t inner) {
    const quant::BlockFormat format = quant::block_format(type);
    std::vector<std::byte> rows(n_rows * quant::row_bytes(type, inner));
    if (quant::scales_rows(type)) {
        for (std::byte& b : rows) b = std::byte(int(below(255)) - 127);
        for (size_t end = rows.size() / n_rows; end <= rows.size(); end += rows.size() / n_rows) {
            const float scale = std::fabs(values(1)[0]);
            std::memcpy(rows.data() + end - sizeof scale, &scale, sizeof scale);
        }
        return rows;
    }
    const auto half = [](std::byte* at, float x) {
        const uint16_t bits = quant::f32_to_f16(x);
        std::memcpy(at, &bits, sizeof bits);
    };
    for (std::byte* at = rows.data(); at < rows.data() + rows.size(); at += format.bytes) {
        const float x = values(1)[0];
        if (type == WeightType::f32) {
            std::memcpy(at, &x, sizeof x);
        } else if (type == WeightType::f16) {
            half(at, x);
        } else if (type == WeightType::bf16) {
            std::memcpy(at, reinterpret_cast<const std::byte*>(&x) + 2, 2);
        } else {
            for (uint32_t i = 0; i < format.bytes; ++i) at[i] = std::byte(below(256));
            const uint32_t d = type == WeightType::q2_k                               ? 80
                               : type == WeightType::q3_k || type == WeightType::q6_k ? format.bytes - 2
                                                                                      : 0;
            half(at + d, x);
            if (format.has_min) half(at + d + 2, values(1)[0]);
        }
    }
    return rows;
}

struct Free {
    void operator()(std::byte* p) const { std::free(p); }
};
using Panels = std::unique_ptr<std::byte, Free>;

template <typename Pack>
Panels packed(const std::vector<std::byte>& rows, uint32_t n_rows, size_t row_bytes, size_t stride, Pack pack) {
    const uint32_t n = tiles(n_rows, 16);
    Panels panels(static_cast<std::byte*>(std::aligned_alloc(64, (n * stride + 63) / 64 * 64)));
    std::memset(panels.get(), 0xff, n * stride);  // what is not written would show
    for (uint32_t i = 0; i < n; ++i) {
        if (!pack(rows.data() + i * 16 * row_bytes, std::min(16u, n_rows - i * 16), panels.get() + i * stride)) {
            std::fprintf(stderr, "a drawn row is refused%s\n", said.c_str());
            std::abort();
        }
    }
    return panels;
}

enum class Tiles { few, narrow, wide };

// q, k and v share a launch: up to three matrices side by side in the rows of the result.
bool products_agree(WeightType type, Tiles of) {
    constexpr uint32_t token_counts[] = {1, 1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 130},
                       row_counts[] = {1, 15, 16, 17, 40, 64, 100, 130}, short_rows[] = {32, 64, 96, 160, 1056},
                       long_rows[] = {256, 512, 768, 1280};
    const bool floats = !quant::is_quantized(type), blocks_of_256 = quant::block_format(type).values == 256;
    const uint32_t n_tokens = one_of(token_counts), n_parts = 1 + below(3);
    const uint32_t inner = blocks_of_256 ? one_of(long_rows) : floats ? 1 + below(200) : one_of(short_rows);
    said = std::string(quant::name(type)) + (of == Tiles::few ? ", few" : of == Tiles::narrow ? ", narrow" : ", wide");
    say("tokens", n_tokens), say("inner", inner);

    const Floats x = values(size_t(n_tokens) * inner);
    const bool scales_rows = quant::scales_rows(type);
    const auto scaled = scales_rows ? scaled_rows(x, inner) : std::vector<std::byte>();
    const Blocks blocks = floats ? Blocks() : scales_rows ? blocks_of(scaled, inner) : quantized(x, inner);
    GpuRows rows = floats ? GpuRows(1, block_size) : GpuRows(n_tokens, inner, blocks);
    std::vector<std::byte> scratch(kernels::matmul_scratch_bytes(inner, n_tokens));
    const model::Packing packing = cuda::packing();

    ProductArgs args{};
    args.n_parts = n_parts, args.inner = inner, args.n_tokens = n_tokens;
    args.panel_stride = packing.panel_bytes(type, inner);
    args.values = x.data(), args.quantized = rows.rows();
    args.accumulate = below(2), args.wide = of == Tiles::wide;
    uint32_t n_rows[most_parts], stride = 0;
    for (uint32_t p = 0; p < n_parts; ++p) stride += n_rows[p] = one_of(row_counts);
    args.out_stride = stride;
    Floats expected = values(size_t(n_tokens) * stride), out = expected;
    Panels panels[most_parts];
    Floats biases[most_parts];
    const uint32_t rows_of_block = of == Tiles::few ? 16 : of == Tiles::narrow ? narrow_rows : wide_rows;
    uint32_t grid_rows = 0;
    for (uint32_t p = 0, first = 0; p < n_parts; first += n_rows[p++]) {
        const std::vector<std::byte> file = weights_of(type, n_rows[p], inner);
        const size_t row_bytes = quant::row_bytes(type, inner), own_stride = quant::panel_bytes(type, inner);
        if (below(2)) biases[p] = values(tiles(n_rows[p], 16) * 16);
        const float* const bias = biases[p].empty() ? nullptr : biases[p].data();
        say("rows", n_rows[p]), say("bias", bias != nullptr);
        const Panels own = packed(file, n_rows[p], row_bytes, own_stride, [&](auto* from, uint32_t n, auto* to) {
            return quant::pack_panel(type, from, n, inner, to);
        });
        cpu.matmul({type, own.get(), own_stride, n_rows[p], inner, x.data(), inner, blocks.data(), scaled.data(),
                    n_tokens, bias, expected.data() + first, stride, args.accumulate, scratch.data(), false, nullptr});
        panels[p] = packed(file, n_rows[p], row_bytes, args.panel_stride, [&](auto* from, uint32_t n, auto* to) {
            return packing.pack_panel(type, from, n, inner, to);
        });
        args.parts[p] = {panels[p].get(), bias, out.data() + first, n_rows[p]};
        grid_rows += tiles(n_rows[p], rows_of_block);
    }
    say("accumulate", args.accumulate);

    using Function = void(const ProductArgs&);
    static constexpr Function* few[] = {floats_f32, floats_f16, floats_bf16, few_q8_0, few_q4_0, few_q4_1,
                                        few_q5_0,   few_q5_1,   few_q2_k,    few_q3_k, few_q4_k, few_q5_k,
                                        few_q6_k,   few_iq4_nl, few_iq4_xs,  few_w8a8};
    static constexpr Function* many[] = {nullptr,   nullptr,     nullptr,     many_q8_0, many_q4_0, many_q4_1,
                                         many_q5_0, many_q5_1,   many_q2_k,   many_q3_k, many_q4_k, many_q5_k,
                                         many_q6_k, many_iq4_nl, many_iq4_xs, many_w8a8};
    const auto number = Kernel(uint32_t(Kernel::floats_f32) + uint32_t(type));  // of a product of few
    const bool has_min = quant::block_format(type).has_min;
    if (floats) {
        launch(few[uint32_t(type)], number, args, {grid_rows, tiles(n_tokens, float_tokens)}, float_threads,
               float_bytes);
    } else if (of == Tiles::few) {
        launch(few[uint32_t(type)], number, args, {grid_rows, tiles(n_tokens, few_tokens(has_min))}, few_threads,
               quant::scales_rows(type) ? few_sums_bytes : few_bytes(has_min, n_tokens));
    } else {
        const Index grid{grid_rows, tiles(n_tokens, of == Tiles::wide ? wide_tokens : narrow_tokens)};
        simt::run([&] { many[uint32_t(type)](args); }, {grid.x, grid.y}, many_threads, many_bytes, false);
    }
    return same(expected, out, "result");
}

// ---- rows -----------------------------------------------------------------------------------------------------------

bool same_scaled_rows(GpuRows& rows, const Floats& x, uint32_t length) {
    GpuRows expected(uint32_t(x.size() / length), length, blocks_of(scaled_rows(x, length), length));
    // Of the planes the first is used, and the bits of a NaN are not promised.
    for (GpuRows* of : {&rows, &expected}) {
        of->factors.resize(of->plane);
        for (float& f : of->factors) f = f == f ? f : 0.5f;
    }
    return rows == expected;
}

bool norm_agrees() {
    constexpr uint32_t lengths[] = {1, 15, 16, 17, 32, 50, 96, 288, 1024};
    const uint32_t length = one_of(lengths), n = 1 + below(20), n_rows = n + below(5);
    const bool rms = below(2), picks = below(2), quantizes = length % 32 == 0 && below(3);
    const bool scales_rows = quantizes && below(2);
    const float eps = one_of({0u, 1u}) ? 1e-5f : 0.5f;
    said = rms ? "rms norm" : "layer norm";
    say("length", length), say("rows", n), say("picked", picks), say("8 bits", quantizes),
        say("one scale", scales_rows);
    const Floats x = values(size_t(n_rows) * length), weight = values(length), bias = values(length);
    const float* const or_null = below(2) ? bias.data() : nullptr;
    say("bias", or_null != nullptr);
    std::vector<uint32_t> rows(n);
    for (uint32_t i = 0; i < n; ++i) rows[i] = picks ? below(n_rows) : i;

    Floats expected(size_t(n) * length), out(expected.size());
    for (uint32_t i = 0; i < n; ++i)
        (rms ? cpu.rms_norm : cpu.layer_norm)(x.data() + size_t(rows[i]) * length, length, eps, weight.data(), or_null,
                                              expected.data() + size_t(i) * length);
    GpuRows codes(quantizes ? n : 1, quantizes ? length : block_size);
    const NormArgs args{x.data(),
                        picks ? rows.data() : nullptr,
                        length,
                        eps,
                        rms,
                        weight.data(),
                        or_null,
                        out.data(),
                        quantizes ? codes.rows() : QuantizedRows{},
                        scales_rows};
    launch(FIXMIN_KERNEL_NAMED(norm_rows), args, {n, 1}, any_threads(), (length + row_scale_floats) * sizeof(float));
    if (!same(expected, out, "result")) return false;
    if (!quantizes) return true;
    return scales_rows ? same_scaled_rows(codes, expected, length)
                       : codes == GpuRows(n, length, quantized(expected, length));
}

bool rows_in_bytes_agree() {
    constexpr uint32_t lengths[] = {32, 64, 96, 288, 1024};
    const uint32_t length = one_of(lengths), n = 1 + below(20), kind = below(6);
    said = "rows in bytes";
    say("length", length), say("rows", n), say("kind", kind);
    Floats x = values(size_t(n) * length);
    float& one = x[below(uint32_t(x.size()))];
    if (kind == 0) one = NAN;
    if (kind == 1) one = -INFINITY;
    if (kind == 2) std::fill_n(x.data(), length, 1e-38f);
    GpuRows rows(n, length);
    const RowsInBytesArgs args{x.data(), length, rows.rows()};
    launch(FIXMIN_KERNEL_NAMED(quantize_rows), args, {n, 1}, any_threads(), 2 * row_threads / 32 * sizeof(float));
    return same_scaled_rows(rows, x, length);
}

bool activation_agrees() {
    using Function = ActivateArgs::Function;
    constexpr uint32_t lengths[] = {1, 31, 32, 33, 96, 256};
    const uint32_t length = one_of(lengths), n = 1 + below(20);
    const bool quantizes = length % 32 == 0 && below(3);
    const auto function = Function(below(4));
    said = "activation";
    say("function", uint32_t(function)), say("length", length), say("rows", n), say("8 bits", quantizes);
    Floats x = values(size_t(n) * length), expected = x;
    const Floats gate = values(x.size());
    for (float& v : x) v *= 4;
    expected = x;
    for (uint32_t row = 0; row < n; ++row) {
        float* const y = expected.data() + size_t(row) * length;
        if (function == Function::gelu) cpu.gelu_erf(y, length);
        if (function == Function::gelu_tanh) cpu.gelu_tanh(y, length);
        if (function == Function::swiglu) cpu.silu_mul(gate.data() + size_t(row) * length, y, length);
    }
    GpuRows codes(quantizes ? n : 1, quantizes ? length : block_size);
    const ActivateArgs args{function, gate.data(), x.data(), length, n, quantizes ? codes.rows() : QuantizedRows{}};
    launch(FIXMIN_KERNEL_NAMED(activate), args, {tiles(length, 32), tiles(n, tile_tokens)}, 32 * tile_tokens, 0);
    return same(expected, x, "result") && (!quantizes || codes == GpuRows(n, length, quantized(expected, length)));
}

// ---- codes ----------------------------------------------------------------------------------------------------------

/// A map of ids and what the kernels are given of it.
struct Map {
    codes::CodeMap map;
    CodeMapArgs args{};
    std::vector<uint32_t> words;

    Map(uint32_t width, uint32_t vocab_size) {
        const bool affine = below(3);
        say("affine", affine);
        args.width = width;
        if (affine) {
            // Ones on the diagonal, anything below: invertible. The order of the rows does not change that.
            std::vector<uint8_t> matrix(width * width), shift(width);
            const uint32_t turn = below(width);
            for (uint32_t i = 0; i < width; ++i) {
                uint8_t* const row = matrix.data() + (i + turn) % width * width;
                for (uint32_t j = 0; j < i; ++j) row[j] = uint8_t(below(2));
                row[i] = 1;
                shift[i] = uint8_t(below(2));
            }
            for (uint32_t i = 0; i < width; ++i) {
                for (uint32_t j = 0; j < width; ++j) args.columns[j] |= uint32_t(matrix[i * width + j]) << i;
                args.shift |= uint32_t(shift[i]) << i;
            }
            map = codes::CodeMap::affine(vocab_size, width, matrix, shift);
        } else {
            std::vector<uint8_t> rows;
            for (uint32_t id = 0; id < vocab_size; ++id) {
                words.push_back(below(1u << width));
                for (uint32_t i = 0; i < codes::packed_row_bytes(width); ++i)
                    rows.push_back(uint8_t(words[id] >> 8 * i));
            }
            args.table = words.data();
            map = codes::CodeMap::table(vocab_size, width, rows);
        }
    }
};

bool codes_agree() {
    constexpr uint32_t widths[] = {1, 5, 8, 16}, lengths[] = {16, 48, 80, 100, 256};
    const uint32_t width = one_of(widths), vocab_size = std::min(1u << width, 1 + below(300)), n = 1 + below(12);
    const uint32_t length = one_of(lengths);
    const auto kind = length % width == 0 && below(2) ? codes::LiftKind::interleave : codes::LiftKind::tile;
    said = "codes";
    say("width", width), say("length", length), say("interleaved", kind == codes::LiftKind::interleave);
    const Map map(width, vocab_size);
    std::vector<uint32_t> ids(n);
    for (uint32_t& id : ids) id = below(vocab_size);
    const float v0 = one_of({0u, 1u}) ? 0.0f : -1.0f, v1 = 1.0f;
    const auto lift = codes::Lift::make(kind, width, length, v0, v1);

    Floats expected(size_t(n) * length), x(expected.size());
    for (uint32_t i = 0; i < n; ++i) lift.apply(map.map.code(ids[i]), expected.data() + size_t(i) * length);
    const LiftArgs lift_args{map.args, ids.data(), length, kind == codes::LiftKind::interleave, v0, v1, x.data()};
    launch(FIXMIN_KERNEL_NAMED(lift), lift_args, {n, 1}, any_threads(), 0);
    if (!same(expected, x, "lift")) return false;
    if (kind == codes::LiftKind::interleave) return true;  // is not folded

    const uint32_t n_rows = 1 + below(600);
    const bool rms = below(2);
    say("rows", n_rows), say("rms", rms);
    const Floats weight = values(length), bias = values(length), matrix = values(size_t(n_rows) * length),
                 of_rows = values(n_rows);
    const codes::FoldNorm norm{weight, rms ? std::span<const float>() : bias, 1e-5f, rms};
    codes::FoldBuilder builder(n_rows, norm, lift);
    builder.add_rows(0, n_rows, matrix.data(), of_rows.data());
    const codes::FoldedProjection fold = builder.finish();
    Floats folded(size_t(n) * n_rows), out(folded.size());
    for (uint32_t i = 0; i < n; ++i) fold.apply(map.map.code(ids[i]), folded.data() + size_t(i) * n_rows);
    const FoldArgs fold_args{map.args,       ids.data(), length,          v0,        v1, 1e-5f, rms, n_rows,
                             fold.columns(), fold.sum(), fold.constant(), out.data()};
    launch(FIXMIN_KERNEL_NAMED(fold), fold_args, {tiles(n_rows, row_threads), n}, row_threads, 0);
    return same(folded, out, "fold");
}

bool agrees(uint32_t number) {
    constexpr uint32_t n_types = std::size(quant::all_weight_types);
    const auto type = quant::all_weight_types[number % n_types];
    if (!products_agree(type, Tiles::few)) return false;
    if (quant::is_quantized(type) && !products_agree(type, Tiles::narrow)) return false;
    if (has_wide_tiles(type) && !products_agree(type, Tiles::wide)) return false;
    return norm_agrees() && activation_agrees() && rows_in_bytes_agree() && codes_agree();
}

}  // namespace

int main(int n_args, char** args) {
    if (n_args != 3) return 2;
    state = uint64_t(std::atoi(args[2]));
    for (uint32_t i = 0; i < uint32_t(std::atoi(args[1])); ++i) {
        if (agrees(i)) continue;
        std::printf("differs: %s\n", said.c_str());
        return 1;
    }
    std::puts("all agree");
}
