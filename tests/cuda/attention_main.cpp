// Attention and what it stores, on the emulator, against the CPU's scalar kernels: attention_main CASES SEED
//
// Cases are drawn from pseudo-random numbers. The first one that differs in a bit is printed, and ends the program
// with 1.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "quant/kv_format.h"

#include "launches.h"

namespace {

using namespace fixmin;
using namespace fixmin::cases;
using namespace fixmin::cuda;
using quant::kv_block_tokens;

struct Case {
    KvType type;
    uint32_t shape, head_dim, group, kv_heads, rope_dim;
    RopeStyle style;
    uint32_t position, n_tokens;
    uint32_t kept_keys;  // of scores
    bool stores;         // or a kernel of its own does

    std::string words() const {
        std::string out = quant::name(type);
        for (const auto& [what, n] : {std::pair{"shape", shape},
                                      {"head_dim", head_dim},
                                      {"group", group},
                                      {"kv_heads", kv_heads},
                                      {"rope_dim", rope_dim},
                                      {"style", uint32_t(style)},
                                      {"position", position},
                                      {"n_tokens", n_tokens},
                                      {"kept_keys", kept_keys},
                                      {"stores", uint32_t(stores)}})
            out += std::string(", ") + what + " " + std::to_string(n);
        return out;
    }
};

Case draw() {
    constexpr uint32_t dims[] = {16, 20, 32, 32, 48, 64, 128, 160}, groups[] = {1, 1, 2, 3, 4, 8, 20};
    constexpr uint32_t lengths[] = {1, 1, 2, 4, 5, 16, 23, 70}, kept[] = {0, 0, 256, 512};
    Case one{};
    one.type = quant::all_kv_types[below(3)];
    one.head_dim = one_of(dims);
    one.group = one_of(groups);
    one.kv_heads = 1 + below(2);
    one.rope_dim = below(4) == 0 ? 8 : below(4) == 0 ? 0 : one.head_dim;
    one.style = RopeStyle(below(2));
    one.position = below(8) == 0 ? 400 + below(300) : below(201);
    one.n_tokens = one_of(lengths);
    do {
        one.shape = below(3);
    } while (!has_tile_shape(one.shape, one.type));
    one.kept_keys = one_of(kept);
    one.stores = one.n_tokens * one.group <= tile_shapes[one.shape].queries;
    return one;
}

/// A sequence: its blocks in the cache, in any order; what nothing was stored in is filled with nonsense.
struct Sequence {
    std::vector<uint32_t> blocks;
    std::vector<std::byte> memory;
    size_t head_bytes, block_bytes;

    explicit Sequence(const Case& one) {
        blocks.resize((one.position + one.n_tokens + kv_block_tokens - 1) / kv_block_tokens);
        std::iota(blocks.begin(), blocks.end(), 1u);
        for (uint32_t i = uint32_t(blocks.size()); i > 1; --i) std::swap(blocks[i - 1], blocks[below(i)]);
        head_bytes = quant::kv_head_bytes(one.type, one.head_dim);
        block_bytes = one.kv_heads * head_bytes;
        memory.resize((blocks.size() + 1) * block_bytes, std::byte(0xff));
    }
    kernels::KvHead head(const Case& one, uint32_t h) {
        return {one.type, one.head_dim, memory.data() + h * head_bytes, block_bytes, blocks.data()};
    }
};

/// What a step of the CPU makes of rows of queries, keys and values.
Floats on_cpu(const Case& one, Sequence& sequence, const Floats& qkv, const Floats& cos, const Floats& sin,
              float scale) {
    const uint32_t d = one.head_dim, heads = one.group * one.kv_heads, stride = (heads + 2 * one.kv_heads) * d;
    Floats rows = qkv, out(size_t(one.n_tokens) * heads * d);
    for (uint32_t t = 0; t < one.n_tokens; ++t) {
        float* row = rows.data() + size_t(t) * stride;
        const size_t turn = size_t(one.position + t) * (one.rope_dim / 2);
        for (uint32_t h = 0; h < heads + one.kv_heads; ++h)
            cpu.rope(row + h * d, one.rope_dim, one.style, cos.data() + turn, sin.data() + turn);
        cpu.scale(row, heads * d, scale);
        for (uint32_t h = 0; h < one.kv_heads; ++h) {
            const float* key = row + (heads + h) * d;
            cpu.kv_store(sequence.head(one, h), one.position + t, key, key + one.kv_heads * d);
        }
    }
    Floats scratch(kernels::attention_scratch_floats(one.position + one.n_tokens, d));
    for (uint32_t h = 0; h < heads; ++h) {
        cpu.attention({sequence.head(one, h / one.group), rows.data() + h * d, stride, one.n_tokens, one.position,
                       out.data() + h * d, heads * d, scratch.data()});
    }
    return out;
}

/// From one tile to the next, of any number of queries unless it has to be all of them.
std::vector<Tile> tiles_of(const Case& one, uint32_t first_row) {
    std::vector<Tile> tiles;
    const uint32_t n = one.n_tokens * one.group;
    for (uint32_t first = 0; first < n; first += tiles.back().n) {
        uint32_t some = std::min(n - first, tile_shapes[one.shape].queries);
        if (!one.stores) some = 1 + below(some);
        tiles.push_back({first_row, one.position, 0, first, some});
    }
    return tiles;
}

void launch_attention(const Case& one, const AttentionArgs& args, uint32_t n_tiles) {
    static constexpr void (*kernels[3][3])(const AttentionArgs&) = {
        {attention_one_f32, attention_one_f16, attention_one_q8_0},
        {nullptr, attention_four_f16, attention_four_q8_0},
        {attention_many_f32, attention_many_f16, attention_many_q8_0}};
    const AttentionSpace space(tile_shapes[one.shape], one.type, one.head_dim, one.kept_keys);
    constexpr Kernel numbers[] = {Kernel::attention_one_f32, Kernel::attention_one_f16, Kernel::attention_one_q8_0};
    const uint32_t type = uint32_t(one.type);
    launch(kernels[one.shape][type], one.shape == 0 ? numbers[type] : Kernel::attention_many_f32, args,
           {one.kv_heads, n_tiles}, space.threads, space.bytes());
}

// In 8 bits, what activate() makes of the floats.
bool same_in_8_bits(const Case& one, AttentionArgs args, uint32_t n_tiles, Floats floats, uint32_t n_rows) {
    const uint32_t length = args.kv.head_count * one.head_dim, row_tiles = (n_rows + tile_tokens - 1) / tile_tokens;
    const size_t plane = row_tiles * tile_tokens * ((length + 63) / 64) * 2;
    const auto words = [&] { return std::vector<uint32_t>(plane * 8); };
    const auto factors = [&] { return Floats(plane * factor_planes); };
    auto codes = words(), codes_of_floats = words();
    auto scales = factors(), scales_of_floats = factors();
    args.out = nullptr;
    args.quantized = {codes.data(), scales.data(), plane};
    launch_attention(one, args, n_tiles);
    const uint32_t first = n_rows - one.n_tokens;  // what stands there is not of this sequence
    floats.insert(floats.begin(), size_t(first) * length, 0.0f);
    const ActivateArgs activate_args{ActivateArgs::Function::none,
                                     nullptr,
                                     floats.data(),
                                     length,
                                     n_rows,
                                     {codes_of_floats.data(), scales_of_floats.data(), plane}};
    simt::run([&] { activate(activate_args); }, {length / 32, row_tiles}, 32 * tile_tokens, 0, false);
    return same(codes.data(), codes_of_floats.data(), codes.size() * 4, "codes") &&
           same(scales.data(), scales_of_floats.data(), scales.size() * sizeof scales[0], "factors of codes");
}

bool agrees(const Case& one) {
    const uint32_t d = one.head_dim, heads = one.group * one.kv_heads, stride = (heads + 2 * one.kv_heads) * d;
    const uint32_t end = one.position + one.n_tokens, first_row = below(3), n_rows = first_row + one.n_tokens;
    const float scale = 0.3f;
    Sequence sequence(one);
    for (uint32_t t = 0; t < one.position; ++t) {
        for (uint32_t h = 0; h < one.kv_heads; ++h)
            cpu.kv_store(sequence.head(one, h), t, values(d).data(), values(d).data());
    }
    Sequence on_gpu = sequence;
    const Floats qkv = values(size_t(n_rows) * stride);
    const Floats cos = values(size_t(end) * (one.rope_dim / 2)), sin = values(cos.size());
    const Floats expected =
        on_cpu(one, sequence, Floats(qkv.begin() + size_t(first_row) * stride, qkv.end()), cos, sin, scale);

    const KeyValueArgs kv{qkv.data(),
                          heads,
                          one.kv_heads,
                          d,
                          one.rope_dim,
                          one.style,
                          cos.data(),
                          sin.data(),
                          {one.type, on_gpu.memory.data(), on_gpu.block_bytes, on_gpu.head_bytes},
                          on_gpu.blocks.data()};
    if (!one.stores) {
        std::vector<uint32_t> positions(one.n_tokens), tables(one.n_tokens);
        std::iota(positions.begin(), positions.end(), one.position);
        KeyValueArgs own = kv;
        own.qkv += size_t(first_row) * stride;
        const StoreArgs args{own, positions.data(), tables.data()};
        simt::run([&] { store_kv(args); }, {(2 * one.kv_heads + store_warps - 1) / store_warps, one.n_tokens},
                  32 * store_warps, 0, false);
    }
    const std::vector<Tile> tiles = tiles_of(one, first_row);
    Floats out(size_t(n_rows) * heads * d);
    const AttentionArgs args{kv, tiles.data(), scale, one.stores, one.kept_keys, out.data(), {}};
    launch_attention(one, args, uint32_t(tiles.size()));
    const Floats own(out.begin() + size_t(first_row) * heads * d, out.end());
    if (!same(sequence.memory.data(), on_gpu.memory.data(), sequence.memory.size(), "cache")) return false;
    if (!same(own.data(), expected.data(), own.size() * sizeof(float), "result")) return false;
    return d % 32 != 0 || same_in_8_bits(one, args, uint32_t(tiles.size()), own, n_rows);
}

}  // namespace

int main(int n_args, char** args) {
    if (n_args != 3) return 2;
    state = uint64_t(std::atoi(args[2]));
    const bool positions = std::string(args[1]) == "positions";
    const uint32_t n = positions ? 201 : uint32_t(std::atoi(args[1]));
    for (uint32_t i = 0; i < n; ++i) {
        Case one = draw();
        if (positions) one = {one.type, 0, 32, 1, 1, 32, one.style, i, 1, 256, true};  // a token is decoded
        if (agrees(one)) continue;
        std::printf("differs: %s\n", one.words().c_str());
        return 1;
    }
    std::printf("all agree\n");
}
