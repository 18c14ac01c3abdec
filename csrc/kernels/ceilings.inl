// The bounds that the kernels are measured against: memory reads and integer multiply-adds with nothing around them.
// Included by kernels.inl, whose rules hold here too.
//
// Loops over accumulators are unrolled by pragma: `keep` would otherwise hold the array in memory.

namespace {

// Four chains, so that no load waits for the exclusive or before it.
void ceiling_read(const std::byte* p, size_t bytes) {
    const auto* begin = (const uint8_t*)p;
    Bytes acc[4];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; ++i) acc[i] = load_bytes(begin + 64 * i);
    for (const uint8_t* q = begin + 256; q < begin + bytes; q += 256) {
        for (uint32_t i = 0; i < 4; ++i) {  // as the product with one token does
            prefetch_far(q + stream_far + 64 * i);
            prefetch(q + stream_near + 64 * i);
        }
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; ++i) acc[i] = exclusive_or(acc[i], load_bytes(q + 64 * i));
    }
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; ++i) keep(acc[i]);
}

#ifdef FIXMIN_PAIRS
constexpr uint32_t ceiling_vectors = 8;  // of bytes, added to a chain at a time
#else
constexpr uint32_t ceiling_vectors = 1;
#endif

// As many independent accumulators as registers allow: the latency of one multiply-add is 4-5 cycles, two may start in
// each.
void ceiling_multiply(uint64_t rounds) {
    VecI acc[ceiling_chains];
#pragma GCC unroll 12
    for (uint32_t c = 0; c < ceiling_chains; ++c) acc[c] = set1_int(0);
    uint8_t bytes[64];
    for (uint32_t i = 0; i < 64; ++i) bytes[i] = uint8_t(i % 15);
    Bytes w = load_bytes(bytes);
    for (uint64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (uint32_t c = 0; c < ceiling_chains; ++c) {
#ifdef FIXMIN_PAIRS
            // 16 bits hold the sums of eight vectors of 4-bit codes.
            keep(w);
            Pairs pairs = multiply_pairs(w, 0x01020304);
#pragma GCC unroll 8
            for (uint32_t i = 1; i < ceiling_vectors; ++i) {
                keep(w);
                pairs = add(pairs, multiply_pairs(w, 0x01020304));
            }
            acc[c] = add_pairs(acc[c], pairs);
#else
            keep(w);  // else a product of the same two registers would be taken once for all
            acc[c] = dot_q4(acc[c], w, 0x01020304);
#endif
            keep(acc[c]);
        }
    }
}

constexpr Ceilings ceilings = {ceiling_read, ceiling_multiply, ceiling_chains * ceiling_vectors * 64 * 2, nullptr, 0};

}  // namespace
