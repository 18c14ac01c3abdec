// Keys, values and attention. The cache lies as on the CPU (kernels/attention.inl), so that a block that one device has
// written can be read by another.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"
#include "cuda/rows.cuh"

namespace fixmin::cuda {

using quant::block_size;
using quant::kv_block_tokens;

FIXMIN_DEVICE float bf16_to_float(uint16_t x) { return __int_as_float(int(unsigned(x) << 16)); }

/// Nearest, ties to even; a NaN stays one.
FIXMIN_DEVICE uint16_t float_to_bf16(float x) {
    const unsigned bits = unsigned(__float_as_int(x));
    return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

/// One key/value head of a token's block.
struct Head {
    std::byte* memory;
    uint32_t dim, padded, scales;  // padded: to 16

    FIXMIN_DEVICE Head(const CacheArgs& cache, const uint32_t* blocks, uint32_t position, uint32_t head, uint32_t dim)
        : memory(cache.memory + blocks[position / kv_block_tokens] * cache.block_bytes + head * cache.head_bytes),
          dim(dim),
          padded((dim + 15) / 16 * 16),
          scales((dim + 31) / 32) {}

    // Elements of the float types; n is a position in the block.
    FIXMIN_DEVICE uint32_t key(uint32_t n, uint32_t d) const { return n / 16 * 16 * dim + d * 16 + n % 16; }
    FIXMIN_DEVICE uint32_t value(uint32_t n, uint32_t d) const { return kv_block_tokens * dim + n * padded + d; }

    // Of q8_0: bytes of codes, elements of scales.
    FIXMIN_DEVICE uint32_t key_code(uint32_t n, uint32_t d) const {
        return n / 16 * 16 * padded + d / 4 * 64 + n % 16 * 4 + d % 4;
    }
    FIXMIN_DEVICE uint16_t* key_scale(uint32_t n, uint32_t b) const {
        return reinterpret_cast<uint16_t*>(memory + kv_block_tokens * padded) + n / 16 * 16 * scales + b * 16 + n % 16;
    }
    FIXMIN_DEVICE std::byte* values() const { return memory + kv_block_tokens * (padded + 2 * scales); }
    FIXMIN_DEVICE uint16_t* value_scale(uint32_t n, uint32_t b) const {
        return reinterpret_cast<uint16_t*>(values() + kv_block_tokens * padded) + b * kv_block_tokens + n;
    }
};

// 32 values, one in each lane of a warp, in 8 bits with a scale of bfloat16; the scale is NaN if one is not finite.
struct QuantizedKv {
    int code;
    uint16_t scale;
};
FIXMIN_DEVICE QuantizedKv quantize_kv(float x) {
    const float amax = max_of_warp(lane::abs({x}).v);
    float poison = x - x;  // 0, or NaN
    for (int by = 16; by; by /= 2) poison += __shfl_xor_sync(whole_warp, poison, by);
    const bool empty = amax < 1e-30f;
    const uint16_t scale = float_to_bf16(empty ? poison : amax / 127.0f + poison);
    return {__float2int_rn(x * (empty ? 0.0f : 1.0f / bf16_to_float(scale))), scale};
}

// Of a whole warp: writes the key or the value of one token; value_at(d) is called by all lanes, for d < head.dim.
template <typename ValueAt>
FIXMIN_DEVICE void store_row(const Head& head, KvType type, uint32_t n, bool is_value, ValueAt value_at) {
    const uint32_t i = threadIdx.x % 32;
    for (uint32_t first = 0; first < head.padded; first += 32) {
        const uint32_t d = first + i;
        const float v = d < head.dim ? value_at(d) : 0.0f;
        const bool stored = d < (is_value || type == KvType::q8_0 ? head.padded : head.dim);
        if (type == KvType::q8_0) {
            const QuantizedKv q = quantize_kv(v);
            if (stored) {
                if (is_value)
                    reinterpret_cast<int8_t*>(head.values())[n * head.padded + d] = int8_t(q.code);
                else
                    reinterpret_cast<uint8_t*>(head.memory)[head.key_code(n, d)] = uint8_t(q.code + 128);
            }
            if (i == 0) *(is_value ? head.value_scale(n, first / 32) : head.key_scale(n, first / 32)) = q.scale;
        } else if (stored) {
            const uint32_t at = is_value ? head.value(n, d) : head.key(n, d);
            if (type == KvType::f32)
                reinterpret_cast<float*>(head.memory)[at] = v;
            else
                reinterpret_cast<uint16_t*>(head.memory)[at] = float_to_half(v);
        }
    }
}

// Element i of a query or key x at a position, rotated.
FIXMIN_DEVICE float rotated_at(const KeyValueArgs& kv, const float* x, uint32_t position, uint32_t i) {
    if (i >= kv.rope_dim) return x[i];
    const uint32_t pairs = kv.rope_dim / 2;
    const bool half = kv.style == RopeStyle::half, is_second = half ? i >= pairs : i % 2;
    const uint32_t pair = half ? i - (is_second ? pairs : 0) : i / 2, first = half ? pair : 2 * pair;
    const size_t turn = size_t(position) * pairs + pair;
    const lane::Pair turned =
        lane::rotated({{x[first]}, {x[first + (half ? pairs : 1)]}}, {kv.cos[turn]}, {kv.sin[turn]});
    return is_second ? turned.second.v : turned.first.v;
}

FIXMIN_DEVICE const float* row_of(const KeyValueArgs& kv, uint32_t token) {
    return kv.qkv + size_t(token) * (kv.head_count + 2 * kv.head_count_kv) * kv.head_dim;
}

// Of a whole warp: a token's key (row < kv_heads) or value (the rows after those).
FIXMIN_DEVICE void store_token(const KeyValueArgs& kv, uint32_t token, uint32_t position, uint32_t table,
                               uint32_t row) {
    const bool is_value = row >= kv.head_count_kv;
    const uint32_t kv_head = row % kv.head_count_kv;
    const float* x = row_of(kv, token) + size_t(kv.head_count + row) * kv.head_dim;
    const Head head(kv.cache, kv.blocks + table, position, kv_head, kv.head_dim);
    store_row(head, kv.cache.type, position % kv_block_tokens, is_value,
              [&](uint32_t i) { return is_value ? x[i] : rotated_at(kv, x, position, i); });
}

FIXMIN_KERNEL(store_kv, StoreArgs, 32 * store_warps) {
    after_previous();
    const uint32_t token = block.y, row = block.x * store_warps + warp_of_block();
    if (row >= 2 * args.kv.head_count_kv) return;  // a whole warp
    store_token(args.kv, token, args.positions[token], args.tables[token], row);
}

// ---- attention ------------------------------------------------------------------------------------------------------

/// Some elements that are loaded and stored at once.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
    T v[n];
};
template <int n, typename T>
FIXMIN_DEVICE Pack<T, n> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, n>*>(p);
}
template <int n, typename T>
FIXMIN_DEVICE void store_pack(T* p, const Pack<T, n>& pack) {
    *reinterpret_cast<Pack<T, n>*>(p) = pack;
}

/// use(i) for i = 0 .. n-1, for what `put` has brought to shared memory, into one of two buffers in turn. Meanwhile the
/// next is put there, and the one after that is on its way from global memory, in registers.
template <uint32_t n_raw, typename Fetch, typename Put, typename Use>
FIXMIN_DEVICE void pipeline(uint32_t n, Fetch fetch, Put put, Use use) {
    int4 raw[n_raw] = {};
    for (uint32_t i = 0; i < n + 2; ++i) {
        if (i - 1 < n) put(i - 1, raw);
        if (i < n) fetch(i, raw);
        if (i >= 2) use(i - 2);
        if (i) __syncthreads();
    }
}

/// Of one block of threads: the attention of one tile. Its order of operations (docs/numerics.md) is that of
/// kernels/attention.inl: scores of all keys, their maximum; exp and sum in 16 lanes; even and odd values in chains of
/// their own. Between, shared memory holds
/// - queries [d][N], of q8_0 words of four codes and scales
/// - in a buffer, keys [panel of 16][d][16] or values [key][d], as floats, of q8_0 keys words of four codes
/// - scores [N][keys]: of all keys; or, where those are too many, of some keys, computed again when they are needed
/// - weights [key][N], of q8_0 one for each scale.
template <KvType type, uint32_t shape_number>
class Attention {
  public:
    FIXMIN_DEVICE Attention(const AttentionArgs& args, Index block, unsigned char* shared)
        : args_(args),
          kv_(args.kv),
          kv_head_(block.x),
          tile_(args.tiles[block.y]),
          blocks_(args.kv.blocks + tile_.table),
          shared_(reinterpret_cast<float*>(shared)),
          space_(shape, type, kv_.head_dim, args.kept_keys),
          group_(kv_.head_count / kv_.head_count_kv),
          first_keys_(tile_.position + tile_.first / group_ + 1),
          n_keys_(tile_.position + (tile_.first + tile_.n - 1) / group_ + 1),
          keeps_(n_keys_ <= space_.kept_keys) {}

    FIXMIN_DEVICE void run() {
        if (args_.stores) prefetch();
        after_previous();
        if (args_.stores) {
            store();
            __syncthreads();
        }
        load_queries();
        attend();
    }

  private:
    static constexpr TileShape shape = tile_shapes[shape_number];
    static constexpr uint32_t N = shape.queries, Q = shape.queries_of_thread, K = shape.keys_of_thread,
                              V = shape.dims_of_thread, groups = N / Q;
    static constexpr bool is_q8 = type == KvType::q8_0;
    static constexpr uint32_t bytes = type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1;  // of an element
    static constexpr uint32_t in_raw = 16 / bytes;
    // Dimensions of keys in a buffer; rows of 16 keys, whose elements are words of four codes with q8_0.
    static constexpr uint32_t key_dims = is_q8 ? block_size : staged, key_rows = is_q8 ? key_dims / 4 : key_dims;
    static constexpr uint32_t panel_size = key_rows * 16 + 16;  // 16: two panels lie in different banks
    static constexpr uint32_t panel_raws = key_dims * bytes;
    static constexpr uint32_t key_raws = panel_raws / 16, value_raws = staged * bytes / 16;
    static constexpr uint32_t passes = N > 4 ? N / 4 : 1;  // over queries where 16 threads have one

    FIXMIN_DEVICE float* buffer(uint32_t i) const { return shared_ + space_.buffers + i % 2 * space_.buffer_size; }
    FIXMIN_DEVICE float* weights(uint32_t i) const { return shared_ + space_.weights + i % 2 * space_.weights_size; }
    FIXMIN_DEVICE uint32_t* limits() const { return reinterpret_cast<uint32_t*>(shared_ + space_.limits); }
    FIXMIN_DEVICE Head head(uint32_t key) const { return {kv_.cache, blocks_, key, kv_head_, kv_.head_dim}; }
    FIXMIN_DEVICE uint32_t token(uint32_t query) const { return (tile_.first + query) / group_; }
    FIXMIN_DEVICE uint32_t query_head(uint32_t query) const {
        return kv_head_ * group_ + (tile_.first + query) % group_;
    }

    // Older keys and values come nearer while the kernel before still runs. What that one writes is not read.
    FIXMIN_DEVICE void prefetch() const {
        const uint32_t lines = uint32_t((kv_.cache.head_bytes + 127) / 128);
        const uint32_t n = (n_keys_ + kv_block_tokens - 1) / kv_block_tokens * lines;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < n; i += space_.threads)
            prefetch_line(head(i / lines * kv_block_tokens).memory + i % lines * 128);
    }

    FIXMIN_DEVICE void store() const {
        const uint32_t n_tokens = tile_.n / group_;
        for (uint32_t i = warp_of_block(); i < 2 * n_tokens; i += space_.threads / 32) {
            const uint32_t row = i % 2 * kv_.head_count_kv + kv_head_;
            store_token(kv_, tile_.row + i / 2, tile_.position + i / 2, tile_.table, row);
        }
    }

    // A warp for each query.
    FIXMIN_DEVICE void load_queries() const {
        float* const to = shared_ + space_.queries;
        const uint32_t padded = (kv_.head_dim + 31) / 32 * 32, lane = threadIdx.x % 32;
        for (uint32_t q = warp_of_block(); q < N; q += space_.threads / 32) {
            const bool is_there = q < tile_.n;
            const uint32_t position = tile_.position + token(q);
            const float* x = row_of(kv_, tile_.row + token(q)) + size_t(query_head(q)) * kv_.head_dim;
            if (lane == 0) limits()[q] = is_there ? position + 1 : 0;
            for (uint32_t first = 0; first < padded; first += 32) {
                const uint32_t i = first + lane;
                float v = 0;
                if (is_there && i < kv_.head_dim) v = rotated_at(kv_, x, position, i) * args_.attention_scale;
                if (is_q8) {
                    const Quantized one = quantize(v);
                    reinterpret_cast<int8_t*>(to)[(i / 4 * N + q) * 4 + i % 4] = int8_t(one.code);
                    if (lane == 0) shared_[space_.query_scales + i / 32 * N + q] = one.scale;
                } else {
                    to[i * N + q] = v;
                }
            }
        }
    }

    // ---- scores

    // A thread's place: keys K * near .. of a panel or, with more for each thread, of several.
    FIXMIN_DEVICE uint32_t score_key() const { return (threadIdx.x / (16 * groups) * 16 + threadIdx.x % 16) * K; }
    FIXMIN_DEVICE uint32_t score_query() const { return threadIdx.x / 16 % groups * Q; }

    // Of some dimensions of as many keys as there are threads.
    FIXMIN_DEVICE void fetch_keys(uint32_t first, uint32_t dim, int4 (&raw)[key_raws]) const {
        const uint32_t left = (is_q8 ? head(0).padded : kv_.head_dim) - dim;
        const uint32_t n = (left < key_dims ? left : key_dims) * bytes;
        for (uint32_t j = 0; j < key_raws; ++j) {
            const uint32_t i = threadIdx.x + j * space_.threads, key = first + i / panel_raws * 16, r = i % panel_raws;
            if (key >= n_keys_ || r >= n) continue;
            const Head from = head(key);
            const uint32_t at =
                is_q8 ? from.key_code(key % kv_block_tokens, dim) : from.key(key % kv_block_tokens, dim) * bytes;
            raw[j] = *reinterpret_cast<const int4*>(from.memory + at + r * 16);
        }
    }

    FIXMIN_DEVICE void put_keys(uint32_t first, uint32_t dim, const int4 (&raw)[key_raws], float* to) const {
        for (uint32_t j = 0; j < key_raws; ++j) {
            const uint32_t i = threadIdx.x + j * space_.threads;
            float* const at = to + i / panel_raws * panel_size + i % panel_raws * (is_q8 ? 4 : in_raw);
            if (is_q8)
                store_pack(reinterpret_cast<int*>(at), signed_codes(raw[j]));
            else
                put_floats(raw[j], at);
        }
        if (is_q8) {
            const uint32_t key = first + threadIdx.x;
            float scale = 0;
            if (key < n_keys_) scale = bf16_to_float(*head(key).key_scale(key % kv_block_tokens, dim / block_size));
            to[space_.threads / 16 * panel_size + threadIdx.x] = scale;
        }
    }

    FIXMIN_DEVICE static Pack<int, 4> signed_codes(int4 raw) {  // of q + 128
        const auto word = [](int x) { return int(unsigned(x) ^ 0x80808080u); };
        return {{word(raw.x), word(raw.y), word(raw.z), word(raw.w)}};
    }

    // Of the types of floats, and of the values of q8_0.
    FIXMIN_DEVICE static void put_floats(int4 raw, float* to) {
        const int words[4] = {raw.x, raw.y, raw.z, raw.w};
        for (uint32_t i = 0; i < in_raw; i += 4) {
            Pack<float, 4> four;
            for (uint32_t j = 0; j < 4; ++j) {
                if (type == KvType::f32)
                    four.v[j] = __int_as_float(words[j]);
                else if (type == KvType::f16)
                    four.v[j] = half_to_float(uint16_t(unsigned(words[(i + j) / 2]) >> 16 * (j % 2)));
                else
                    four.v[j] = float(int8_t(words[i / 4] >> 8 * j));
            }
            store_pack(to + i, four);
        }
    }

    // Adds what a buffer has to the chains of scores.
    FIXMIN_DEVICE void add_keys(const float* buffer, uint32_t dim, float (&acc)[Q][K]) const {
        const uint32_t key = score_key(), query = score_query();
        const float* const keys = buffer + key / 16 * panel_size + key % 16;
        if constexpr (is_q8) {
            const uint32_t left = (head(0).padded - dim) / 4, n = left < key_rows ? left : key_rows;
            const int* const codes = reinterpret_cast<const int*>(keys);
            const int* const q = reinterpret_cast<const int*>(shared_ + space_.queries) + dim / 4 * N + query;
            int dots[Q][K] = {};
#pragma unroll 4
            for (uint32_t row = 0; row < n; ++row) {
                const auto a = load_pack<K>(codes + row * 16);
                const auto b = load_pack<Q>(q + row * N);
                for (uint32_t i = 0; i < Q; ++i) {
                    for (uint32_t k = 0; k < K; ++k) dots[i][k] = __dp4a(a.v[k], b.v[i], dots[i][k]);
                }
            }
            const auto scales = load_pack<K>(buffer + space_.threads / 16 * panel_size + key);
            const auto q_scales = load_pack<Q>(shared_ + space_.query_scales + dim / block_size * N + query);
            for (uint32_t i = 0; i < Q; ++i) {
                for (uint32_t k = 0; k < K; ++k)
                    acc[i][k] = __fmaf_rn(float(dots[i][k]), scales.v[k] * q_scales.v[i], acc[i][k]);
            }
        } else {
            const uint32_t left = kv_.head_dim - dim, n = left < key_rows ? left : key_rows;
            const float* const q = shared_ + space_.queries + dim * N + query;
#pragma unroll 4
            for (uint32_t row = 0; row < n; ++row) {
                const auto a = load_pack<K>(keys + row * 16);
                const auto b = load_pack<Q>(q + row * N);
                for (uint32_t i = 0; i < Q; ++i) {
                    for (uint32_t k = 0; k < K; ++k) acc[i][k] = __fmaf_rn(b.v[i], a.v[k], acc[i][k]);
                }
            }
        }
    }

    // Of keys [begin, end); take(key, acc) gets a thread's scores of queries score_query() .. and keys key ..
    template <typename Take>
    FIXMIN_DEVICE void score(uint32_t begin, uint32_t end, Take take) const {
        const uint32_t slabs = (kv_.head_dim + key_dims - 1) / key_dims, n = space_.threads;  // keys at a time
        const auto key_of = [&](uint32_t i) { return begin + i / slabs * n; };
        float acc[Q][K] = {};
        pipeline<key_raws>(
            (end - begin + n - 1) / n * slabs,
            [&](uint32_t i, int4(&raw)[key_raws]) { fetch_keys(key_of(i), i % slabs * key_dims, raw); },
            [&](uint32_t i, int4(&raw)[key_raws]) { put_keys(key_of(i), i % slabs * key_dims, raw, buffer(i)); },
            [&](uint32_t i) {
                add_keys(buffer(i), i % slabs * key_dims, acc);
                if (i % slabs != slabs - 1) return;
                take(key_of(i) + score_key(), acc);
                for (auto& row : acc) {
                    for (float& x : row) x = 0;
                }
            });
    }

    // The scores of keys from `key` on go to a column.
    FIXMIN_DEVICE void keep_scores(uint32_t column, const float (&acc)[Q][K]) const {
        for (uint32_t i = 0; i < Q; ++i) {
            Pack<float, K> row;
            for (uint32_t k = 0; k < K; ++k) row.v[k] = acc[i][k];
            store_pack(shared_ + space_.scores + (score_query() + i) * space_.score_stride + column, row);
        }
    }

    FIXMIN_DEVICE void note_highest(uint32_t key, const float (&acc)[Q][K], float (&top)[Q]) const {
        for (uint32_t i = 0; i < Q; ++i) {
            for (uint32_t k = 0; k < K; ++k) {
                if (key + k < limits()[score_query() + i]) top[i] = acc[i][k] > top[i] ? acc[i][k] : top[i];
            }
        }
    }

    // The highest score of each query, of what its threads have noted.
    FIXMIN_DEVICE void find_highest(float (&top)[Q]) {
        float* const tops = shared_ + space_.tops + threadIdx.x / (16 * groups) * N + score_query();
        for (uint32_t i = 0; i < Q; ++i) {
            for (int by = 8; by; by /= 2) {
                const float other = __shfl_xor_sync(whole_warp, top[i], by);
                top[i] = top[i] > other ? top[i] : other;
            }
            if (threadIdx.x % 16 == 0) tops[i] = top[i];
        }
        __syncthreads();
        for (uint32_t pass = 0; pass < passes; ++pass) {
            const uint32_t q = weight_query(pass);
            highest_[pass] = lowest;
#pragma unroll 2
            for (uint32_t i = 0; q < N && i < space_.threads / (16 * groups); ++i) {
                const float other = shared_[space_.tops + i * N + q];
                highest_[pass] = highest_[pass] > other ? highest_[pass] : other;
            }
        }
    }

    // ---- weights: 16 threads have a query. They are counted from the last, which may have no values to add.

    FIXMIN_DEVICE uint32_t weight_query(uint32_t pass) const {
        return (pass * space_.threads + space_.threads - 1 - threadIdx.x) / 16;
    }

    // Of the keys of a buffer, whose scores begin at a column; adds them to sums.
    FIXMIN_DEVICE void weigh(uint32_t first, uint32_t column, uint32_t dim, float* to, float (&sums)[passes]) const {
        for (uint32_t pass = 0; pass < passes; ++pass) {
            const uint32_t q = weight_query(pass);
            if (q >= N) continue;
            const float* const scores = shared_ + space_.scores + q * space_.score_stride + column;
            const uint32_t left = limits()[q] > first ? limits()[q] - first : 0;
            const uint32_t n = left < space_.value_keys ? left : space_.value_keys;
#pragma unroll 2
            for (uint32_t k = 15 - threadIdx.x % 16; k < n; k += 16) {
                const float weight = lane::exp({scores[k] - highest_[pass]}).v;
                sums[pass] += weight;
                if constexpr (is_q8) {
                    const Head from = head(first + k);
                    for (uint32_t b = 0; b < space_.dims / 32 && dim / 32 + b < from.scales; ++b) {
                        const float scale =
                            bf16_to_float(*from.value_scale((first + k) % kv_block_tokens, dim / 32 + b));
                        to[(b * space_.value_keys + k) * space_.weight_row + q] = weight * scale;
                    }
                } else {
                    to[k * space_.weight_row + q] = weight;
                }
            }
        }
    }

    // ---- values: a thread has some dimensions, some queries, and even or odd keys

    FIXMIN_DEVICE uint32_t value_dim() const { return threadIdx.x / 2 * V % space_.dims; }
    FIXMIN_DEVICE uint32_t value_query() const { return threadIdx.x / 2 * V / space_.dims * Q; }

    FIXMIN_DEVICE void fetch_values(uint32_t first, uint32_t dim, int4 (&raw)[value_raws]) const {
        const uint32_t in_row = space_.dims / in_raw;
        for (uint32_t j = 0; j < value_raws; ++j) {
            const uint32_t i = threadIdx.x + j * space_.threads, key = first + i / in_row,
                           d = dim + i % in_row * in_raw;
            const Head from = head(key < n_keys_ ? key : 0);
            if (key >= n_keys_ || d >= from.padded) continue;
            const uint32_t n = key % kv_block_tokens;
            const std::byte* at = is_q8 ? from.values() + n * from.padded + d : from.memory + from.value(n, d) * bytes;
            raw[j] = *reinterpret_cast<const int4*>(at);
        }
    }

    FIXMIN_DEVICE void put_values(const int4 (&raw)[value_raws], float* to) const {
        const uint32_t in_row = space_.dims / in_raw;
        for (uint32_t j = 0; j < value_raws; ++j) {
            const uint32_t i = threadIdx.x + j * space_.threads;
            put_floats(raw[j], to + i / in_row * space_.value_row + i % in_row * in_raw);
        }
    }

    // The keys that all queries see; then those that only some do, which the others never touch.
    FIXMIN_DEVICE void add_values(uint32_t first, const float* values, const float* weights, float (&acc)[Q][V]) const {
        const uint32_t query = value_query();
        if (query >= N) return;
        values += value_dim();
        weights += (is_q8 ? value_dim() / 32 * space_.value_keys * space_.weight_row : 0) + query;
        const auto in_buffer = [&](uint32_t end) {
            const uint32_t left = end > first ? end - first : 0;
            return left < space_.value_keys ? left : space_.value_keys;
        };
        const auto add = [&](uint32_t i, const Pack<float, V>& value, float weight) {
            for (uint32_t d = 0; d < V; ++d) acc[i][d] = __fmaf_rn(weight, value.v[d], acc[i][d]);
        };
        const uint32_t n_common = in_buffer(first_keys_), n = in_buffer(n_keys_);
        uint32_t k = threadIdx.x % 2;
#pragma unroll 4
        for (; k < n_common; k += 2) {
            const auto value = load_pack<V>(values + k * space_.value_row);
            const auto weight = load_pack<Q>(weights + k * space_.weight_row);
            for (uint32_t i = 0; i < Q; ++i) add(i, value, weight.v[i]);
        }
        if constexpr (N > 1) {  // of one query all keys are common
#pragma unroll 1
            for (; k < n; k += 2) {
                const auto value = load_pack<V>(values + k * space_.value_row);
                for (uint32_t i = 0; i < Q; ++i) {
                    if (first + k < limits()[query + i]) add(i, value, weights[k * space_.weight_row + i]);
                }
            }
        }
    }

    // Scores of all keys, for the highest; then weights and values, of some dimensions after the other. Scores that are
    // not kept are computed again for some keys after the other. One loop, so that there is one copy of the code.
    FIXMIN_DEVICE void attend() {
        float acc[Q][V], sums[passes], top[Q];
        for (float& x : top) x = lowest;
        bool searches = true;
        for (uint32_t dim = 0, begin = 0; dim < kv_.head_dim;) {
            const uint32_t left = n_keys_ - begin;
            const uint32_t n = searches || keeps_ || left < space_.threads ? left : space_.threads;
            if (searches || !keeps_) {
                score(begin, begin + n, [&](uint32_t key, const float (&scores)[Q][K]) {
                    if (keeps_ || !searches) keep_scores(key - begin, scores);
                    if (searches) note_highest(key, scores, top);
                });
            }
            if (searches) {
                find_highest(top);
                searches = false;
                if (!keeps_) continue;
            }
            if (begin == 0) {
                for (auto& row : acc) {
                    for (float& x : row) x = 0;
                }
                for (float& x : sums) x = 0;
            }
            add(begin, n, dim, acc, sums);
            begin += n;
            if (begin < n_keys_) continue;
            finish(dim, acc, sums);
            begin = 0;
            dim += space_.dims;
            if (dim < kv_.head_dim) __syncthreads();  // the results have been read
        }
    }

    // n keys from `begin` on, whose scores begin at column 0, to dimensions `dim` .. of the results.
    FIXMIN_DEVICE void add(uint32_t begin, uint32_t n, uint32_t dim, float (&acc)[Q][V], float (&sums)[passes]) const {
        const auto key_of = [&](uint32_t i) { return i * space_.value_keys; };
        pipeline<value_raws>((n + space_.value_keys - 1) / space_.value_keys,
                             [&](uint32_t i, int4(&raw)[value_raws]) { fetch_values(begin + key_of(i), dim, raw); },
                             [&](uint32_t i, int4(&raw)[value_raws]) {
                                 weigh(begin + key_of(i), key_of(i), dim, weights(i), sums);
                                 put_values(raw, buffer(i));
                             },
                             [&](uint32_t i) { add_values(begin + key_of(i), buffer(i), weights(i), acc); });
    }

    FIXMIN_DEVICE void finish(uint32_t dim, const float (&acc)[Q][V], const float (&sums)[passes]) const {
        float* const inverses = shared_ + space_.inverses;
        for (uint32_t pass = 0; pass < passes; ++pass) {
            float sum = sums[pass];
            for (int by = 8; by; by /= 2) sum += __shfl_xor_sync(whole_warp, sum, by);  // the tree 8-4-2-1
            if (threadIdx.x % 16 == 0 && weight_query(pass) < N) inverses[weight_query(pass)] = 1.0f / sum;
        }
        float* const results = buffer(0);  // [N][dims]
        for (uint32_t i = 0; i < Q; ++i) {
            Pack<float, V> both;
            for (uint32_t d = 0; d < V; ++d) both.v[d] = acc[i][d] + __shfl_xor_sync(whole_warp, acc[i][d], 1);
            if (threadIdx.x % 2 == 0 && value_query() < N)
                store_pack(results + (value_query() + i) * space_.dims + value_dim(), both);
        }
        __syncthreads();
        const uint32_t in_row = space_.dims / 32;
        for (uint32_t i = warp_of_block(); i < tile_.n * in_row; i += space_.threads / 32) {  // whole warps
            const uint32_t q = i / in_row, first = dim + i % in_row * 32;
            if (first >= kv_.head_dim) continue;
            write(q, first, results[i * 32 + threadIdx.x % 32] * inverses[q]);
        }
    }

    // Of a whole warp: 32 dimensions of a query's result.
    FIXMIN_DEVICE void write(uint32_t query, uint32_t first, float result) const {
        const uint32_t d = first + threadIdx.x % 32, row = tile_.row + token(query);
        const uint32_t at = query_head(query) * kv_.head_dim, length = kv_.head_count * kv_.head_dim;
        if (args_.out && d < kv_.head_dim) args_.out[size_t(row) * length + at + d] = result;
        if (args_.quantized.codes) store_quantized(args_.quantized, row, (at + first) / 32, length / 32, result);
    }

    static constexpr float lowest = -3.402823466e+38f;

    const AttentionArgs& args_;
    const KeyValueArgs& kv_;
    const uint32_t kv_head_;
    const Tile tile_;
    const uint32_t* const blocks_;
    float* const shared_;
    const AttentionSpace space_;
    const uint32_t group_;                // query heads of a key/value head
    const uint32_t first_keys_, n_keys_;  // that the first query sees, and the last
    const bool keeps_;                    // all scores in shared memory
    float highest_[passes];               // of the queries whose weights this thread computes
};

// Of few queries as if there were twice as many threads: then the compiler takes at most 128 registers, and leaves some
// for other blocks. Of many it would have to spill.
#define FIXMIN_ATTENTION(name, type, shape, threads)               \
    FIXMIN_KERNEL(attention_##name, AttentionArgs, threads) {      \
        FIXMIN_SHARED(shared);                                     \
        Attention<KvType::type, shape>(args, block, shared).run(); \
    }
#define FIXMIN_ATTENTION_OF(type)                                \
    FIXMIN_ATTENTION(one_##type, type, 0, 2 * attention_threads) \
    FIXMIN_ATTENTION(many_##type, type, 2, attention_threads)
FIXMIN_ATTENTION_OF(f32)
FIXMIN_ATTENTION_OF(f16)
FIXMIN_ATTENTION_OF(q8_0)
FIXMIN_ATTENTION(four_f16, f16, 1, 2 * attention_threads)
FIXMIN_ATTENTION(four_q8_0, q8_0, 1, 2 * attention_threads)
#undef FIXMIN_ATTENTION_OF
#undef FIXMIN_ATTENTION

}  // namespace fixmin::cuda
