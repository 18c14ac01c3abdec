// The compute kernels: one table of functions per instruction set, all compiled from kernels.inl and giving the same
// bits.
//
// Contract (docs/numerics.md): a vector has 16 lanes on every ISA; in a matrix product a lane is an output row, so each
// output is one chain over the inner dimension; a reduction along a row keeps 16 partial sums and adds them 8-4-2-1.
//
// Functions in this header are static: it is compiled with the flags of every ISA (tests/kernels/test_isolation.py).
#pragma once
#include <cstddef>
#include <cstdint>

#include "numerics/rope_style.h"
#include "quant/kv_format.h"
#include "quant/panels.h"

namespace fixmin::kernels {

using numerics::RopeStyle;
using quant::kv_block_tokens;
using quant::kv_head_bytes;
using quant::kv_scales;
using quant::kv_value_dim;
using quant::KvType;

inline constexpr uint32_t lanes = 16;

/// 32 activations in 8 bits: x ~ scale * q, q in [-127, 127].
struct ActivationBlock {
    int8_t q[quant::block_size];
    float scale;
    int32_t sum;       // q[0] + ... + q[31]
    int32_t half_sum;  // q[0] + ... + q[15]
    float scaled_sum;  // scale * float(sum)
};

/// Of a row of n activations in 8 bits with one scale, x ~ scale * q, q in [-127, 127]: its codes, zeros up to a
/// multiple of 64, and a line of 64 bytes that begins with a RowScale, so that rows of n = 2^k do not fall into the
/// same sets of a cache.
static constexpr size_t scaled_row_bytes(size_t n) { return (n + 63) / 64 * 64 + 64; }

struct RowScale {
    float scale;
    int32_t sum;  // of all codes
};

/// out[t][r] (+)= W[r] . activation[t] + bias[r] for every token t and every row r of the panels given.
struct MatmulArgs {
    quant::WeightType type;
    const std::byte* panels;           // 64-byte aligned
    size_t panel_stride;               // quant::panel_bytes(type, inner)
    uint32_t n_rows;                   // the last panel may be partial
    uint32_t inner;                    // length of a row
    const float* activations;          // [n_tokens][activation_stride]; float weight types
    size_t activation_stride;          // floats
    const ActivationBlock* quantized;  // [n_tokens][inner / 32]; weight types whose blocks have scales
    const std::byte* scaled_rows;      // [n_tokens][scaled_row_bytes(inner)]; W8A8
    uint32_t n_tokens;
    const float* bias;      // [n_rows rounded up to 16], or null
    float* out;             // [n_tokens][out_stride]
    size_t out_stride;      // floats
    bool accumulate;        // add to what `out` holds
    std::byte* scratch;     // matmul_scratch_bytes(inner, n_tokens); quantised weight types
    bool same_tokens;       // and type as in the call before with this scratch, which nothing has written to since
    const std::byte* next;  // what this thread reads after these panels, or null: prefetched
};

// Of ISAs that multiply tiles: tokens of a tile, panels that are laid out for tiles at a time.
inline constexpr uint32_t matmul_tile_tokens = 16, matmul_tile_panels = 8;
inline constexpr uint32_t matmul_tile_floats = 6;  // most that are kept beside 32 bytes: scales, mins, sums

/// Panels and all activations as bytes in the order of tiles; or activations as 16-bit integers.
static constexpr size_t matmul_scratch_bytes(size_t inner, size_t n_tokens) {
    const size_t tile_bytes = inner + inner / quant::block_size * matmul_tile_floats * sizeof(float);
    const size_t wide_bytes = 2 * inner + 64, row_bytes = tile_bytes > wide_bytes ? tile_bytes : wide_bytes;
    const size_t tiles = (n_tokens + matmul_tile_tokens - 1) / matmul_tile_tokens;
    return (matmul_tile_panels * lanes + tiles * matmul_tile_tokens) * row_bytes;
}

/// One key/value head of one layer in the blocks of one sequence: first the keys of kv_block_tokens tokens, then their
/// values, laid out as attention.inl says.
struct KvHead {
    KvType type;
    uint32_t head_dim;
    std::byte* memory;       // this head in block 0
    size_t block_bytes;      // from a block to the next
    const uint32_t* blocks;  // numbers of the sequence's blocks, one per kv_block_tokens tokens
};

/// Scores of queries, as many as the ISA takes at a time, with the keys of one block of a q8_0 cache whose head size is
/// a multiple of 32.
struct TileScores {
    const ActivationBlock* queries;  // [][n_scales]
    uint32_t n_scales;
    const uint8_t* keys;     // [n_panels][n_scales][8][16 keys][4]: codes + 128
    const uint16_t* scales;  // [n_panels][n_scales][16 keys]
    uint32_t n_panels;       // 1 or 2
    float* out;              // [][out_stride]
    size_t out_stride;
};

/// Causal attention of n_queries consecutive tokens of one head; the token at `position` sees keys 0..position.
struct AttentionArgs {
    KvHead kv;
    const float* queries;  // [n_queries][query_stride], rotated and multiplied by the attention scale
    size_t query_stride;
    uint32_t n_queries;
    uint32_t position;  // of the first query
    float* out;         // [n_queries][out_stride]
    size_t out_stride;
    float* scratch;                                    // attention_scratch_floats(position + n_queries, head_dim)
    void (*tile_scores)(const TileScores&) = nullptr;  // of an ISA with tiles
};

inline constexpr uint32_t attention_tile = 8;  // most queries that share a read of the keys and values

/// Scores of a tile, and its queries in 8 bits.
static constexpr size_t attention_scratch_floats(size_t n_keys, uint32_t head_dim) {
    const size_t query_floats = kv_scales(head_dim) * sizeof(ActivationBlock) / sizeof(float);
    return attention_tile * ((n_keys + lanes - 1) / lanes * lanes + query_floats);
}

/// Loops without any other work in them.
struct Ceilings {
    /// Reads every byte with the loads of the matrix products. p is 64-byte aligned; bytes is a multiple of 256.
    void (*read)(const std::byte* p, size_t bytes);

    /// The integer multiply-adds of the matrix products on registers only, `rounds` times int8_operations of them.
    void (*multiply)(uint64_t rounds);

    uint32_t int8_operations;  // multiplications and additions of 8-bit integers in a round

    /// Likewise of products of tiles, or null where there are none.
    void (*multiply_tiles)(uint64_t rounds);
    uint32_t tile_operations;
};

struct Kernels {
    const char* name;

    /// x [n] -> n / 32 blocks. scale = amax/127; q = x * (127/amax) rounded to nearest even.
    void (*quantize_activations)(const float* x, uint32_t n, ActivationBlock* out);

    /// x [n] -> scaled_row_bytes(n), likewise with amax of the whole row. A row with a NaN or an infinity is zeros with
    /// the scale NaN.
    void (*quantize_row)(const float* x, uint32_t n, std::byte* out);

    void (*matmul)(const MatmulArgs& args);

    /// y[i] = (x[i] - mean) * rstd * weight[i] + bias[i], rstd = 1/sqrt(var + eps); bias may be null.
    void (*layer_norm)(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y);

    /// y[i] = x[i] * rstd * weight[i] + bias[i], rstd = 1/sqrt(mean(x^2) + eps); bias may be null.
    void (*rms_norm)(const float* x, uint32_t n, float eps, const float* weight, const float* bias, float* y);

    /// Rotates the first `dim` values of a head in place. cos, sin: [dim/2] of the token's position.
    void (*rope)(float* x, uint32_t dim, RopeStyle style, const float* cos, const float* sin);

    /// x[i] *= factor.
    void (*scale)(float* x, uint32_t n, float factor);

    void (*gelu_erf)(float* x, uint32_t n);
    void (*gelu_tanh)(float* x, uint32_t n);

    /// up[i] = silu(gate[i]) * up[i].
    void (*silu_mul)(const float* gate, float* up, uint32_t n);

    /// Writes the key and value [head_dim] of one token into the cache.
    void (*kv_store)(const KvHead& kv, uint32_t position, const float* key, const float* value);

    /// Starts reading what kv_store at `position` touches and attention of one query there reads first. Changes
    /// nothing.
    void (*kv_prefetch)(const KvHead& kv, uint32_t position);

    void (*attention)(const AttentionArgs& args);

    /// max_i x[i] and sum_i exp(x[i] - max): the terms of a log-softmax over n logits.
    void (*softmax_stats)(const float* x, uint32_t n, float* max, float* sum);

    /// The first place of the largest of n >= 1 values. Returns false if one is NaN or +infinity.
    bool (*argmax)(const float* x, uint32_t n, uint32_t* index);

    /// y[i] = exp(x[i] - max).
    void (*exp_minus)(const float* x, uint32_t n, float max, float* y);

    /// What this instruction set can do at best; measured by `fixmin bench` (ceilings.inl).
    Ceilings ceilings;
};

/// What an instruction set with tiles does otherwise than the one of vectors that it stands on (tiles.inl).
struct TileKernels {
    void (*matmul)(const MatmulArgs& args);
    void (*attention)(const AttentionArgs& args);
    void (*ceiling)(uint64_t rounds);  // multiply_tiles of Ceilings
    uint32_t ceiling_operations;
};

}  // namespace fixmin::kernels
