// What the kernels are given, by value. Pointers are the device's.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/kernel_list.h"
#include "numerics/rope_style.h"
#include "quant/blocks.h"
#include "quant/kv_format.h"

namespace fixmin::cuda {

using numerics::RopeStyle;
using quant::KvType;

/// Tokens that share a tile of the matrix products: activations in 8 bits lie in tiles of so many.
inline constexpr uint32_t tile_tokens = 8;

// Threads of a block, and what it has of shared memory, where that does not depend on the model.
inline constexpr uint32_t row_scale_floats = 16;  // of shared memory: 2 for each warp of row_threads
inline constexpr uint32_t row_threads = 256, attention_threads = 256;  // of attention: at most
inline constexpr uint32_t step_threads = 256;                          // as every kernel of a step
inline constexpr uint32_t ceiling_threads = 256, ceiling_chains = 8;
inline constexpr uint32_t few_threads = 256, few_depth = 4;  // products of few tokens (products.cuh)
inline constexpr uint32_t many_threads = 256;                // of many
inline constexpr uint32_t wide_rows = 128, wide_tokens = 128, narrow_rows = 64, narrow_tokens = 64;  // of a block
inline constexpr size_t many_bytes = 48 << 10;
inline constexpr size_t few_sums_bytes = 8 << 10;  // of W8A8 (scaled_rows.cuh)
/// Those that the usual files consist of: a second size of tiles for every type would double what there is to compile.
constexpr bool has_wide_tiles(quant::WeightType type) {
    using enum quant::WeightType;
    return type == q8_0 || type == q4_0 || type == q4_k || type == q6_k || type == w8a8;
}
/// Types of which the code of 0 is the middle of all codes.
constexpr bool is_centred(quant::WeightType type) {
    const quant::BlockFormat format = quant::block_format(type);
    return format.bits > 0 && format.bits < 8 && format.zero == 1 << (format.bits - 1);
}
inline constexpr uint32_t float_threads = 256, float_step = 64;  // of float weights
inline constexpr uint32_t float_thread_tokens = 4, float_tokens = float_threads / 16 * float_thread_tokens;
inline constexpr size_t float_bytes = 46 << 10;

/// Tokens of a block of the products of few tokens.
constexpr uint32_t few_tokens(bool has_min) { return (has_min ? 1 : 2) * tile_tokens; }
constexpr size_t few_term_bytes(bool has_min) { return has_min ? 16 : 8; }
/// From a token to the next; 16 rows, and so much that the lanes of a warp write to different banks.
constexpr uint32_t few_stride(bool has_min) { return has_min ? 17 : 18; }
/// Blocks of the inner dimension that each warp multiplies before terms are handed over: 1, 2 or 4.
constexpr uint32_t few_turns(bool has_min, uint32_t n_tokens) {
    const uint32_t tokens = n_tokens < few_tokens(has_min) ? n_tokens : few_tokens(has_min), most = few_tokens(has_min);
    return tokens * few_depth <= most ? few_depth : tokens * 2 <= most ? 2 : 1;
}
constexpr size_t few_bytes(bool has_min, uint32_t n_tokens) {
    const uint32_t tokens = n_tokens < few_tokens(has_min) ? n_tokens : few_tokens(has_min);
    return 2 * few_turns(has_min, n_tokens) * (few_threads / 32) * tokens * few_stride(has_min) *
           few_term_bytes(has_min);
}

/// Rows of activations as the products read them, in 8 bits: x ~ scale * q per block of 32. Two blocks, a pair, lie
/// together; if their number is odd the factors of a last one that is not there are 0.
struct QuantizedRows {
    // Of 8 tokens lane g * 4 + t of a warp has the words k = 4t..4t+3 and 16 more of token g, four signed bytes each.
    uint32_t* codes;  // [tiles][pairs][32 lanes][2 blocks][2]
    // Planes of so many floats, [tiles][pairs][8 tokens][2 blocks] each: scale; scale * float(sum of q); sum of the
    // first 16 q and of the others.
    float* factors;
    size_t plane;
};
inline constexpr uint32_t factor_planes = 4;

/// Token id -> K-bit code.
struct CodeMapArgs {
    const uint32_t* table;  // [V], or null: affine
    uint32_t columns[32];   // of A: bit i of columns[j] = A[i][j]
    uint32_t shift;
    uint32_t width;
};

/// grid (tokens): the lifted codes.
struct LiftArgs {
    CodeMapArgs map;
    const uint32_t* ids;  // [T]
    uint32_t length;      // D
    bool interleave;
    float v0, v1;
    float* x;  // [T][D]
};

/// grid (rows / 256, tokens): the fold of layer 0 (codes/fold.h).
struct FoldArgs {
    CodeMapArgs map;
    const uint32_t* ids;
    uint32_t length;  // D
    float v0, v1, eps;
    bool rms;
    uint32_t n_rows;
    const float *columns, *sum, *constant;  // [K][rows], [rows], [rows]
    float* out;                             // [T][rows]
};

/// grid (tokens): norm of rows, as float32 and in 8 bits.
struct NormArgs {
    const float* x;        // [..][length]
    const uint32_t* rows;  // [T]: of x, or null: 0, 1, ...
    uint32_t length;
    float eps;
    bool rms;
    const float *weight, *bias;  // bias may be null
    float* out;                  // [T][length]
    QuantizedRows quantized;     // codes may be null
    bool scales_rows;            // one scale for a row of `quantized`
};

/// grid (blocks of 32, tokens / 8): what is between two products of the feed-forward network, and rows in 8 bits.
struct ActivateArgs {
    enum class Function { none, gelu, gelu_tanh, swiglu } function;
    const float* gate;  // swiglu
    float* values;      // [T][length], in place
    uint32_t length, n_tokens;
    QuantizedRows quantized;  // codes may be null
};

/// grid (tokens): rows in 8 bits with one scale for a row, which stands at each block; length is a multiple of 32.
struct RowsInBytesArgs {
    const float* values;  // [T][length]
    uint32_t length;
    QuantizedRows quantized;
};

/// A matrix that is multiplied.
struct ProductPart {
    const std::byte* panels;
    const float* bias;  // [rows rounded up to 16], or null
    float* out;         // [T][out_stride]
    uint32_t n_rows;
};
inline constexpr uint32_t most_parts = 3;

/// grid (blocks of rows of all parts, blocks of tokens): out[t][r] (+)= W[r] . x[t] + bias[r]. Matrices of one type and
/// length of rows that multiply the same x may share a launch.
struct ProductArgs {
    ProductPart parts[most_parts];
    uint32_t n_parts;
    uint32_t inner, n_tokens, out_stride;
    size_t panel_stride;
    const float* values;  // [T][inner]; float types
    QuantizedRows quantized;
    bool accumulate;
    bool wide;  // many tokens: which blocks
};

/// Keys and values of a layer: of each block of the cache, `heads` heads of head_bytes.
struct CacheArgs {
    KvType type;
    std::byte* memory;  // of this layer in block 0
    size_t block_bytes, head_bytes;
};

/// Keys and values of a batch, before positions are rotated, and where they belong.
struct KeyValueArgs {
    const float* qkv;  // [T][(heads + 2 * kv_heads) * head_dim]
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t rope_dim;
    RopeStyle style;
    const float *cos, *sin;  // [positions][rope_dim / 2]
    CacheArgs cache;
    const uint32_t* blocks;  // numbers of the sequences' blocks, one sequence after the other
};

/// grid (2 * key/value heads / store_warps, tokens), a warp for each row: rotates and stores keys, stores values.
struct StoreArgs {
    KeyValueArgs kv;
    const uint32_t* positions;  // [T]
    const uint32_t* tables;     // [T]: where the numbers of the token's blocks begin
};
inline constexpr uint32_t store_warps = 8;

/// Queries of one key/value head that a block of threads works on together: consecutive ones of a chunk
/// (model/backend.h), which are counted token by token and of each token head by head.
struct Tile {
    uint32_t row, position;  // of the first token of the chunk: in the batch, in its sequence
    uint32_t table;          // where the numbers of its blocks begin
    uint32_t first, n;       // of the queries
};

/// How attention divides its work (attention.cuh). A thread has so many of the tile's queries, with so many keys for
/// scores, so many dimensions for values.
struct TileShape {
    uint32_t queries, queries_of_thread, keys_of_thread, dims_of_thread;
};
inline constexpr TileShape tile_shapes[] = {{1, 1, 1, 1}, {4, 4, 1, 1}, {16, 4, 4, 4}};
/// Caches of f32, which few ask for, have no kernel of the second.
constexpr bool has_tile_shape(uint32_t shape, KvType type) { return shape != 1 || type != KvType::f32; }
inline constexpr uint32_t staged = 16;  // elements for each thread that are in a buffer of shared memory

/// A block of threads of attention: how many threads, and where in its shared memory what begins, in floats.
struct AttentionSpace {
    uint32_t dims;     // of a value at a time, a power of two
    uint32_t threads;  // as many as the products of values take, or more where few queries shall read fast
    uint32_t kept_keys;
    uint32_t limits, tops, inverses, queries, query_scales, weights, buffers, scores, end;
    uint32_t weight_row, weights_size, value_keys, value_row, buffer_size, score_stride;

    /// Scores of at most kept_keys keys stay, rounded down to what fits in the same space.
    constexpr AttentionSpace(TileShape shape, KvType type, uint32_t head_dim, uint32_t most_kept_keys)
        : dims(head_dim <= 32   ? 32
               : head_dim <= 64 ? 64
                                : 128),
          threads(shape.queries == 16 ? 2 * dims : attention_threads),
          kept_keys(most_kept_keys / threads * threads),
          weight_row(shape.queries == 16 ? 20 : shape.queries),  // 20: against conflicts of banks
          value_keys(threads * staged / dims),
          value_row(dims + 16),  // the same, as rows are read in pairs
          buffer_size(threads * staged * 3 / 2) {
        const uint32_t padded = (head_dim + 31) / 32 * 32, q = shape.queries;
        weights_size = (type == KvType::q8_0 ? dims / 32 : 1) * value_keys * weight_row;
        score_stride = (kept_keys > threads ? kept_keys : threads) + 4;  // of one query for each thread
        limits = 0;
        tops = limits + whole(q);
        inverses = tops + whole(threads / 16 / (q / shape.queries_of_thread) * q);
        queries = inverses + whole(q);
        query_scales = queries + padded * q;
        weights = query_scales + whole(padded / 32 * q);
        buffers = weights + 2 * weights_size;
        scores = buffers + 2 * buffer_size;
        end = scores + q * score_stride;
    }
    constexpr size_t bytes() const { return end * sizeof(float); }

  private:
    static constexpr uint32_t whole(uint32_t n) { return (n + 3) / 4 * 4; }
};

/// grid (key/value heads, tiles).
struct AttentionArgs {
    KeyValueArgs kv;
    const Tile* tiles;
    float attention_scale;
    bool stores;              // the keys and values of the tiles' chunks, each of which is one tile
    uint32_t kept_keys;       // scores of more are computed twice (AttentionSpace)
    float* out;               // [T][heads * head_dim], or null
    QuantizedRows quantized;  // codes may be null; else head_dim is a multiple of 32
};

/// A launch of a step, for the kernel that makes them all.
struct Phase {
    Kernel kernel;
    uint32_t x, y;  // its grid
    uint32_t args;  // bytes in StepArgs::args
};

/// grid (blocks that are there at once).
struct StepArgs {
    const Phase* phases;  // [n_phases]
    uint32_t n_phases;
    const std::byte* args;
    unsigned* count;  // of blocks that have ended a phase
};

/// What is asked about a row (numerics/extract.h).
struct QueryArgs {
    uint32_t row, n_largest;
    float temperature;
    uint32_t mask;  // which of ExtractArgs::masks, or no_mask
    double uniform;
};
inline constexpr uint32_t no_mask = UINT32_MAX;

/// So many logits that follow each other, of which the sampler sums the weights by themselves.
inline constexpr uint32_t segment = 1024;

/// Of 32 groups of logits.
struct alignas(8) Survey {
    float highest;
    uint32_t finite;
};

/// An answer. Behind it stand up to ExtractArgs::capacity LogitOfId.
struct alignas(8) ExtractOfRow {
    double total;
    float highest, floor;
    uint32_t best, finite, drawn;
    uint32_t n_largest;  // more than `capacity`: they did not fit
};
struct alignas(8) LogitOfId {
    float logit;
    uint32_t id;
};
constexpr size_t extract_bytes(uint32_t capacity) { return sizeof(ExtractOfRow) + capacity * sizeof(LogitOfId); }

/// Rows asked about at a time: what is asked travels with the launch, which takes 4 KB.
inline constexpr uint32_t extract_rows = 64, extract_threads = 256;
inline constexpr size_t extract_notes_bytes = 128;

struct ExtractArgs {
    const float* logits;    // [rows][V]
    const uint32_t* masks;  // [masks][V / 32 rounded up]
    uint32_t vocab_size;
    uint32_t group, n_groups;  // logits in one, 1 or 32: every n_groups-th of the row
    uint32_t capacity;
    float* maxima;    // [queries][groups]
    Survey* surveys;  // [queries][groups / 32 rounded up]
    double* sums;     // of weights, [queries][V / segment rounded up]
    std::byte* out;   // [queries] of extract_bytes(capacity)
    QueryArgs queries[extract_rows];
};
static_assert(sizeof(ExtractArgs) <= 4096);

/// grid (any): reads all bytes, a multiple of 16.
struct ReadArgs {
    const std::byte* memory;
    size_t bytes;
    int* sink;
};

/// grid (any): every warp multiplies ceiling_chains tiles in each round.
struct MultiplyArgs {
    uint32_t rounds;
    int* sink;
};

}  // namespace fixmin::cuda
