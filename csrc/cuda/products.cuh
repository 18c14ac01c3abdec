// Matrix products. The weights lie in panels of 16 rows as on the CPU (quant/panels.h), but that words of 8- and 4-bit
// codes stand in the order of the lanes that multiply them (pack_panel in packing.cpp).
//
// Each output is the chain of docs/numerics.md over blocks of 32: an exact dot product, made by the tensor cores, and
// one or two fused products with the scales.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"
#include "quant/panels.h"

namespace fixmin::cuda {

using quant::WeightType;

/// iq4_values[nibble] of each byte.
FIXMIN_DEVICE int look_up(unsigned nibbles) {
    constexpr auto four = [](int first) {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) word |= unsigned(uint8_t(quant::iq4_values[first + i])) << 8 * i;
        return word;
    };
    constexpr unsigned table[4] = {four(0), four(4), four(8), four(12)};
    unsigned select = nibbles & 0x07070707u;
    select |= select >> 4;
    select = (select & 0xffu) | (select >> 8 & 0xff00u);
    const unsigned low = __byte_perm(table[0], table[1], select), high = __byte_perm(table[2], table[3], select);
    const unsigned upper = (nibbles >> 3 & 0x01010101u) * 255u;
    return int((low & ~upper) | (high & upper));
}

/// What a lane multiplies of a block of 32 weights of 16 rows: rows g and g + 8.
template <WeightType Type>
struct WeightBlock {
    static constexpr quant::BlockFormat format = quant::block_format(Type);
    static constexpr quant::PanelLayout layout = quant::panel_layout(Type);
    static constexpr bool halves = format.scale_values == 16;

    /// The signed bytes that stand for its weights.
    static FIXMIN_DEVICE int4 weights(const std::byte* panel, uint32_t b) {
        constexpr quant::PanelLayout here = layout;  // nvcc has no address of a static member on the device
        const std::byte* p = panel + quant::codes_at(here, b);
        const unsigned i = threadIdx.x % 32, g = i / 4, t = i % 4;
        if constexpr (format.bits == 8) return reinterpret_cast<const int4*>(p)[i];
        const auto word = [](const std::byte* at, unsigned n) { return reinterpret_cast<const unsigned*>(at)[n]; };
        unsigned w[4];  // row g: k = 4t.., row g + 8, and both 16 further
        const auto take = [&](unsigned n, unsigned from, unsigned shift, unsigned mask, unsigned to) {
            w[n] |= (from >> shift & mask) << to;
        };
        w[0] = w[1] = w[2] = w[3] = 0;
        constexpr bool four = format.bits >= 4, two = format.bits % 4 >= 2, one = format.bits % 2;
        if constexpr (four) {
            const int2 both = reinterpret_cast<const int2*>(p)[i];
            for (unsigned h = 0; h < 2; ++h) {
                take(2 * h, unsigned(both.x), 4 * h, 0x0f0f0f0fu, 0);
                take(2 * h + 1, unsigned(both.y), 4 * h, 0x0f0f0f0fu, 0);
            }
            p += 256;
        }
        if constexpr (two) {
            for (unsigned n = 0; n < 4; ++n)
                take(n, word(p, t % 2 * 16 + g + n % 2 * 8), t / 2 * 2 + n / 2 * 4, 0x03030303u, four ? 4 : 0);
            p += 128;
        }
        if constexpr (one) {
            for (unsigned n = 0; n < 4; ++n) take(n, word(p, g + n % 2 * 8), t + n / 2 * 4, 0x01010101u, four ? 4 : 2);
        }
        int4 result;
        result.x = as_signed(w[0]), result.y = as_signed(w[1]), result.z = as_signed(w[2]), result.w = as_signed(w[3]);
        return result;
    }

    static FIXMIN_DEVICE int as_signed(unsigned codes) {
        if constexpr (format.table) return look_up(codes);
        if constexpr (format.zero == 0) return int(codes);
        // No byte overflows: codes and zeros are below 64.
        return int((codes + 0x80808080u - unsigned(format.zero) * 0x01010101u) ^ 0x80808080u);
    }

    /// The factors of row r.
    struct Scales {
        float scale, offset;               // d * s and m * n; with halves d and m
        float half_scale[2], half_min[2];  // with halves s and n
    };
    static FIXMIN_DEVICE Scales scales(const std::byte* panel, uint32_t b, uint32_t r) {
        constexpr quant::PanelLayout here = layout;
        const std::byte* p = panel + quant::scales_at(here, b);
        const auto half = [&](uint32_t n) { return half_to_float(reinterpret_cast<const uint16_t*>(p)[n * 16 + r]); };
        Scales s{};
        s.scale = half(0);
        if constexpr (format.has_min) s.offset = half(1);
        p += (format.has_min ? 4 : 2) * 16;
        const uint32_t in_record = b % layout.record_blocks;
        const auto byte = [&](uint32_t n) { return int(reinterpret_cast<const int8_t*>(p)[n * 16 + r]); };
        if constexpr (Type == WeightType::q2_k) {
            for (uint32_t h = 0; h < 2; ++h) {
                const int both = byte(in_record * 2 + h);
                s.half_scale[h] = float(both & 15);
                s.half_min[h] = float(both >> 4 & 15);
            }
        } else if constexpr (halves) {
            for (uint32_t h = 0; h < 2; ++h) s.half_scale[h] = float(byte(in_record * 2 + h));
        } else if constexpr (layout.record_blocks > 1) {
            s.scale *= float(byte(in_record));  // exact
            if constexpr (format.has_min) s.offset *= float(byte(in_record + 256 / format.scale_values));
        }
        return s;
    }

    /// The dot products of two rows and two tokens, of a whole warp, where halves have scales of their own: of each.
    struct Dots {
        int all[4];
        int upper[halves ? 4 : 1];
    };
    static FIXMIN_DEVICE void multiply(Dots& dots, int4 w, int2 a) {
        for (int& dot : dots.all) dot = 0;
        if constexpr (halves) {
            for (int& dot : dots.upper) dot = 0;
            multiply_half_tile(dots.all, make_int2(w.x, w.y), a.x);
            multiply_half_tile(dots.upper, make_int2(w.z, w.w), a.y);
        } else {
            multiply_tile(dots.all, w, a);
        }
    }

    /// What one block adds to a chain: acc = fma(dot, scale, acc), and with a minimum fma(offset, sum, acc).
    struct Terms {
        float dot, scale, offset, sum;
    };
    static FIXMIN_DEVICE Terms terms(const Dots& dots, int i, const Scales& s, const BlockFactors& a) {
        Terms term{};
        term.scale = s.scale * a.scale;
        if constexpr (halves) {
            // Exact, as in kernels.inl.
            term.dot = __fmaf_rn(s.half_scale[1], float(dots.upper[i]), s.half_scale[0] * float(dots.all[i]));
            if constexpr (format.has_min) {
                term.sum = __fmaf_rn(s.half_min[1], a.sums[1], s.half_min[0] * a.sums[0]);
                term.offset = s.offset * a.scale;
            }
        } else {
            term.dot = float(dots.all[i]);
            if constexpr (format.has_min) term.offset = s.offset, term.sum = a.scaled_sum;
        }
        return term;
    }
    static FIXMIN_DEVICE float add(float acc, const Terms& term) {
        acc = __fmaf_rn(term.dot, term.scale, acc);
        if constexpr (format.has_min) acc = __fmaf_rn(term.offset, term.sum, acc);
        return acc;
    }
};

FIXMIN_DEVICE void finish(const ProductArgs& args, uint32_t token, uint32_t row, float value) {
    if (token >= args.n_tokens || row >= args.n_rows) return;
    float* out = args.out + size_t(token) * args.out_stride + row;
    if (args.bias) value = value + args.bias[row];
    if (args.accumulate) value = *out + value;
    *out = value;
}

// ---- few tokens -----------------------------------------------------------------------------------------------------
// A tile of 16 rows and 8 tokens for a block of threads: its warps multiply different blocks of the inner dimension and
// hand the terms over, a thread for each output runs the chain.

template <WeightType Type>
FIXMIN_DEVICE void product_of_few(const ProductArgs& args, Index block, unsigned char* shared) {
    using Block = WeightBlock<Type>;
    after_previous();
    static_assert(sizeof(typename Block::Terms) * few_blocks * 16 * tile_tokens <= few_bytes);
    auto* const terms = reinterpret_cast<typename Block::Terms*>(shared);  // [few_blocks][16 rows][8 tokens]
    const uint32_t n_blocks = args.inner / quant::block_size, warp = threadIdx.x / 32;
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const std::byte* panel = args.panels + size_t(block.x) * args.panel_stride;
    const size_t tile = size_t(block.y) * n_blocks;
    const int2* codes = reinterpret_cast<const int2*>(args.quantized.codes) + tile * 32;
    const BlockFactors* factors = args.quantized.factors + tile * tile_tokens;
    float acc = 0;
    for (uint32_t first = 0; first < n_blocks; first += few_blocks) {
        const uint32_t end = first + few_blocks < n_blocks ? first + few_blocks : n_blocks;
        for (uint32_t b = first + warp; b < end; b += few_threads / 32) {
            typename Block::Dots dots;
            Block::multiply(dots, Block::weights(panel, b), codes[b * 32 + threadIdx.x % 32]);
            for (uint32_t r = 0; r < 2; ++r) {
                const auto scales = Block::scales(panel, b, g + r * 8);
                for (uint32_t c = 0; c < 2; ++c) {
                    const uint32_t token = 2 * t + c;
                    terms[((b - first) * 16 + g + r * 8) * tile_tokens + token] =
                        Block::terms(dots, int(r * 2 + c), scales, factors[b * tile_tokens + token]);
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < 16 * tile_tokens) {
            for (uint32_t b = 0; b < end - first; ++b) acc = Block::add(acc, terms[b * 16 * tile_tokens + threadIdx.x]);
        }
        __syncthreads();
    }
    if (threadIdx.x < 16 * tile_tokens) {
        finish(args, block.y * tile_tokens + threadIdx.x % tile_tokens, block.x * 16 + threadIdx.x / tile_tokens, acc);
    }
}

// ---- many tokens ----------------------------------------------------------------------------------------------------
// A warp has 16 rows and 8 tiles of tokens, in registers from the first block to the last.

template <WeightType Type>
FIXMIN_DEVICE void product_of_many(const ProductArgs& args, Index block) {
    using Block = WeightBlock<Type>;
    after_previous();
    const uint32_t n_blocks = args.inner / quant::block_size, i = threadIdx.x % 32, g = i / 4, t = i % 4;
    const uint32_t panel_number = block.x * (many_threads / 32) + threadIdx.x / 32;
    if (panel_number * 16 >= args.n_rows) return;  // a whole warp
    const std::byte* panel = args.panels + size_t(panel_number) * args.panel_stride;
    const uint32_t first_tile = block.y * many_tiles, last_tile = (args.n_tokens - 1) / tile_tokens;
    const int2* codes = reinterpret_cast<const int2*>(args.quantized.codes);
    float acc[many_tiles][4];
    for (auto& tile : acc) {
        for (float& x : tile) x = 0;
    }
    for (uint32_t b = 0; b < n_blocks; ++b) {
        const int4 w = Block::weights(panel, b);
        const typename Block::Scales scales[2] = {Block::scales(panel, b, g), Block::scales(panel, b, g + 8)};
#pragma unroll
        for (uint32_t n = 0; n < many_tiles; ++n) {
            // Behind the last tile there is nothing: it is computed again, and not written.
            const uint32_t tile = first_tile + n < last_tile ? first_tile + n : last_tile;
            const size_t at = size_t(tile) * n_blocks + b;
            typename Block::Dots dots;
            Block::multiply(dots, w, codes[at * 32 + i]);
            const BlockFactors* factors = args.quantized.factors + at * tile_tokens + 2 * t;
            for (int k = 0; k < 4; ++k)
                acc[n][k] = Block::add(acc[n][k], Block::terms(dots, k, scales[k / 2], factors[k % 2]));
        }
    }
#pragma unroll
    for (uint32_t n = 0; n < many_tiles; ++n) {
        for (uint32_t k = 0; k < 4; ++k)
            finish(args, (first_tile + n) * tile_tokens + 2 * t + k % 2, panel_number * 16 + g + k / 2 * 8, acc[n][k]);
    }
}

// ---- float weights --------------------------------------------------------------------------------------------------
// A thread for each output, which is one chain: these are slow on a GPU (docs/cuda.md).

template <WeightType Type>
FIXMIN_DEVICE float float_weight(const std::byte* panel, size_t i) {
    if constexpr (Type == WeightType::f32) return reinterpret_cast<const float*>(panel)[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(panel)[i];
    if constexpr (Type == WeightType::f16) return half_to_float(half);
    return __int_as_float(int(unsigned(half) << 16));
}

template <WeightType Type>
FIXMIN_DEVICE void product_of_floats(const ProductArgs& args, Index block) {
    after_previous();
    const uint32_t r = threadIdx.x % 16, token = block.y * tile_tokens + threadIdx.x / 16;
    if (token >= args.n_tokens) return;
    const std::byte* panel = args.panels + size_t(block.x) * args.panel_stride;
    const float* values = args.values + size_t(token) * args.inner;
    float acc = 0;
    for (uint32_t k = 0; k < args.inner; ++k)
        acc = __fmaf_rn(float_weight<Type>(panel, size_t(k) * 16 + r), values[k], acc);
    finish(args, token, block.x * 16 + r, acc);
}

#define FIXMIN_QUANTIZED(name)                                 \
    FIXMIN_KERNEL(few_##name, ProductArgs, few_threads) {      \
        FIXMIN_SHARED(shared);                                 \
        product_of_few<WeightType::name>(args, block, shared); \
    }                                                          \
    FIXMIN_KERNEL(many_##name, ProductArgs, many_threads) { product_of_many<WeightType::name>(args, block); }
#define FIXMIN_FLOATS(name) \
    FIXMIN_KERNEL(floats_##name, ProductArgs, float_threads) { product_of_floats<WeightType::name>(args, block); }

FIXMIN_QUANTIZED(q8_0)
FIXMIN_QUANTIZED(q4_0)
FIXMIN_QUANTIZED(q4_1)
FIXMIN_QUANTIZED(q5_0)
FIXMIN_QUANTIZED(q5_1)
FIXMIN_QUANTIZED(q2_k)
FIXMIN_QUANTIZED(q3_k)
FIXMIN_QUANTIZED(q4_k)
FIXMIN_QUANTIZED(q5_k)
FIXMIN_QUANTIZED(q6_k)
FIXMIN_QUANTIZED(iq4_nl)
FIXMIN_QUANTIZED(iq4_xs)
FIXMIN_FLOATS(f32)
FIXMIN_FLOATS(f16)
FIXMIN_FLOATS(bf16)

}  // namespace fixmin::cuda
