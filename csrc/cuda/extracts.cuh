// Kernels that find out what the sampler wants to know of rows of logits; sums and choices in the order of
// csrc/sampling and of the kernels' argmax.
#pragma once
#include "cuda/args.h"
#include "cuda/lane.cuh"

namespace fixmin::cuda {

constexpr float lowest_logit = -3.402823466e+38f;
constexpr uint32_t nowhere = 0xffffffffu;
constexpr uint32_t extract_warps = extract_threads / 32;

FIXMIN_DEVICE float minus_infinity() { return __int_as_float(int(0xff800000u)); }

/// A row of logits; what is not allowed or lies behind its end is -infinity.
struct LogitRow {
    const float* x;
    const uint32_t* allowed;
    uint32_t n;

    FIXMIN_DEVICE bool allows(uint32_t i) const { return i < n && (!allowed || (allowed[i / 32] >> i % 32 & 1u)); }
    FIXMIN_DEVICE float operator[](uint32_t i) const { return allows(i) ? x[i] : minus_infinity(); }
};

FIXMIN_DEVICE LogitRow logit_row(const ExtractArgs& args, uint32_t query) {
    const QueryArgs& q = args.queries[query];
    const uint32_t words = (args.vocab_size + 31) / 32;
    return {args.logits + size_t(q.row) * args.vocab_size,
            q.mask == no_mask ? nullptr : args.masks + size_t(q.mask) * words, args.vocab_size};
}

FIXMIN_DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

FIXMIN_DEVICE uint32_t min_of_warp(uint32_t x) {
    for (int by = 16; by; by /= 2) {
        const uint32_t other = __shfl_xor_sync(whole_warp, x, by);
        x = x < other ? x : other;
    }
    return x;
}

FIXMIN_DEVICE uint32_t n_segments(const ExtractArgs& args) { return (args.vocab_size + segment - 1) / segment; }
FIXMIN_DEVICE uint32_t n_surveys(const ExtractArgs& args) { return (args.n_groups + 31) / 32; }

// grid (groups / 256, queries), a thread for each group: every n_groups-th logit, so that tokens that are probable lie
// in different ones also where neighbours are alike, as the ids of frequent tokens are.
FIXMIN_KERNEL(survey_logits, ExtractArgs, extract_threads) {
    after_previous();
    const uint32_t group = block.x * extract_threads + threadIdx.x, query = block.y;
    if (group / 32 >= n_surveys(args)) return;  // a whole warp
    const LogitRow row = logit_row(args, query);
    float largest = minus_infinity();
    uint32_t good = 1;
    for (uint32_t j = 0; j < args.group; ++j) {
        const uint32_t i = group < args.n_groups ? group + j * args.n_groups : row.n;
        const float x = i < row.n ? row.x[i] : minus_infinity();
        good &= x - x == 0.0f || x < lowest_logit ? 1u : 0u;  // no NaN, no +infinity
        if (row.allows(i) && x > largest) largest = x;
    }
    if (group < args.n_groups) args.maxima[size_t(query) * args.n_groups + group] = largest;
    const float highest = max_of_warp(largest);
    good = min_of_warp(good);
    if (threadIdx.x % 32 == 0) args.surveys[size_t(query) * n_surveys(args) + group / 32] = {highest, good};
}

/// Of a warp: what the surveys of all groups say.
FIXMIN_DEVICE Survey survey_of_row(const ExtractArgs& args, uint32_t query) {
    const Survey* const surveys = args.surveys + size_t(query) * n_surveys(args);
    Survey all{minus_infinity(), 1};
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < n_surveys(args); i += 32) {
        all.highest = lane::max({all.highest}, {surveys[i].highest}).v;
        all.finite &= surveys[i].finite;
    }
    return {max_of_warp(all.highest), min_of_warp(all.finite)};
}

/// exp((x - highest) / temperature), as Candidates::weigh has it.
FIXMIN_DEVICE float weight_of(float x, float highest, float temperature) {
    return lane::exp({(x - highest) / temperature}).v;
}

/// Of a whole block: the weights of a segment, [segment].
FIXMIN_DEVICE void weigh_segment(const LogitRow& row, uint32_t at, float highest, float temperature, float* weights) {
    for (uint32_t i = threadIdx.x; i < segment; i += blockDim.x)
        weights[i] = weight_of(row[at * segment + i], highest, temperature);
}

// grid (segments, queries): sums of weights as 16 lanes make them.
FIXMIN_KERNEL(weigh_logits, ExtractArgs, extract_threads) {
    after_previous();
    FIXMIN_SHARED(shared);
    double* const parts = reinterpret_cast<double*>(shared);      // [16]
    float* const weights = reinterpret_cast<float*>(parts + 16);  // [segment]
    const uint32_t at = block.x, query = block.y, lane = threadIdx.x % 32;
    const float temperature = args.queries[query].temperature;
    if (!(temperature > 0)) return;  // a whole block
    const float highest = survey_of_row(args, query).highest;
    weigh_segment(logit_row(args, query), at, highest, temperature, weights);
    __syncthreads();
    if (warp_of_block() > 0) return;
    if (lane < 16) {
        double sum = 0;
#pragma unroll 4
        for (uint32_t i = lane; i < segment; i += 16) sum += double(weights[i]);
        parts[lane] = sum;
    }
    __syncwarp();
    if (lane > 0) return;
#pragma unroll 1
    for (uint32_t half = 8; half; half /= 2) {
        for (uint32_t l = 0; l < half; ++l) parts[l] += parts[l + half];
    }
    args.sums[size_t(query) * n_segments(args) + at] = parts[0];
}

/// What the threads of a block tell each other.
struct ExtractNotes {
    uint32_t words[2][extract_warps];
    uint32_t drawn_segment, n_found;
    double rest;
};

/// Of a whole block: the first place of the largest logit.
FIXMIN_DEVICE uint32_t find_first(const ExtractArgs& args, uint32_t query, const LogitRow& row, float highest,
                                  ExtractNotes& notes) {
    const float* const maxima = args.maxima + size_t(query) * args.n_groups;
    uint32_t place = nowhere;
    for (uint32_t group = threadIdx.x; group < args.n_groups; group += blockDim.x) {
        if (maxima[group] < highest) continue;
#pragma unroll 1
        for (uint32_t j = 0; j < args.group; ++j) {
            const uint32_t i = group + j * args.n_groups;
            if (i < place && row[i] >= highest) place = i;
        }
    }
    place = min_of_warp(place);
    if (threadIdx.x % 32 == 0) notes.words[0][threadIdx.x / 32] = place;
    __syncthreads();
    for (uint32_t w = 0; w < extract_warps; ++w) place = notes.words[0][w] < place ? notes.words[0][w] : place;
    return place;
}

/// Of a whole block: the sum of all weights, and the token that `uniform` stands for (Candidates::draw).
FIXMIN_DEVICE void draw(const ExtractArgs& args, uint32_t query, const LogitRow& row, float highest,
                        ExtractNotes& notes, float* weights, ExtractOfRow& out) {
    const QueryArgs& q = args.queries[query];
    const double* const sums = args.sums + size_t(query) * n_segments(args);
    if (threadIdx.x == 0) {
        double total = 0;
        for (uint32_t s = 0; s < n_segments(args); ++s) total += sums[s];
        out.total = total;
        double rest = q.uniform * total;
        uint32_t last = n_segments(args) - 1, s = 0;
        while (last > 0 && sums[last] == 0) --last;
        while (s < last && rest >= sums[s]) rest -= sums[s++];
        notes.rest = rest;
        notes.drawn_segment = s;
    }
    if (q.uniform < 0) return;  // a whole block
    __syncthreads();
    weigh_segment(row, notes.drawn_segment, highest, q.temperature, weights);
    __syncthreads();
    if (threadIdx.x > 0) return;
    const uint32_t begin = notes.drawn_segment * segment;
    uint32_t chosen = begin;
    double rest = notes.rest;
    for (uint32_t i = 0; i < segment && begin + i < row.n; ++i) {
        if (weights[i] == 0) continue;
        chosen = begin + i;
        rest -= double(weights[i]);
        if (rest < 0) break;
    }
    out.drawn = chosen;
}

// Numbers that are ordered as floats.
FIXMIN_DEVICE uint32_t order_of(float x) {
    const uint32_t bits = uint32_t(__float_as_int(x));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FIXMIN_DEVICE float float_of(uint32_t order) { return __int_as_float(int(order >> 31 ? order & 0x7fffffffu : ~order)); }

/// Of a whole block: a value that k of n values reach, and, but for equal ones, not many more.
FIXMIN_DEVICE float floor_of(const float* values, uint32_t n, uint32_t k, ExtractNotes& notes) {
    if (n <= k) return lowest_logit;
    uint32_t floor = 0, round = 1;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1, ++round) {  // counts alternate, so that one barrier is enough
        const uint32_t tried = floor | bit;
        uint32_t count = 0;
        for (uint32_t first = 0; first < n; first += blockDim.x) {
            const uint32_t i = first + threadIdx.x;
            count += uint32_t(__popc(__ballot_sync(whole_warp, i < n && order_of(values[i]) >= tried)));
        }
        if (threadIdx.x % 32 == 0) notes.words[round % 2][threadIdx.x / 32] = count;
        __syncthreads();
        uint32_t all = 0;
        for (uint32_t w = 0; w < extract_warps; ++w) all += notes.words[round % 2][w];
        if (all >= k) floor = tried;
        if (all == k) break;
    }
    return lane::max({float_of(floor)}, {lowest_logit}).v;
}

/// Of a whole block: the groups with a value of at least `floor`, in their order. Returns their number, of which those
/// that fit were written.
FIXMIN_DEVICE uint32_t find_groups(const float* maxima, uint32_t n_groups, float floor, uint32_t capacity,
                                   ExtractNotes& notes, uint32_t* groups) {
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32;
    const uint32_t share = (n_groups + 32 * extract_warps - 1) / (32 * extract_warps) * 32;
    const auto reached = [&](uint32_t i) {
        const uint32_t group = warp * share + i + lane;
        return __ballot_sync(whole_warp, group < n_groups && maxima[group] >= floor);
    };
    __syncthreads();  // maxima of other threads, and words that they still read
    uint32_t count = 0;
    for (uint32_t i = 0; i < share; i += 32) count += uint32_t(__popc(reached(i)));
    if (lane == 0) notes.words[0][warp] = count;
    __syncthreads();
    uint32_t at = 0, all = 0;
    for (uint32_t w = 0; w < extract_warps; ++w) {
        if (w == warp) at = all;
        all += notes.words[0][w];
    }
    for (uint32_t i = 0; i < share; i += 32) {
        const uint32_t bits = reached(i);
        const uint32_t place = at + uint32_t(__popc(bits & ((1u << lane) - 1)));
        if ((bits >> lane & 1u) && place < capacity) groups[place] = warp * share + i + lane;
        at += uint32_t(__popc(bits));
    }
    return all;
}

/// Of a warp: offsets[i] = set bits of bits[0..i). Returns those of all.
FIXMIN_DEVICE uint32_t count_before(const uint32_t* bits, uint32_t n, uint32_t* offsets) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t at = 0;
    for (uint32_t first = 0; first < n; first += 32) {
        const uint32_t i = first + lane, own = i < n ? uint32_t(__popc(bits[i])) : 0;
        uint32_t sum = own;
        for (uint32_t by = 1; by < 32; by *= 2) {
            const uint32_t other = __shfl_sync(whole_warp, sum, (lane - by) & 31u);
            if (lane >= by) sum += other;
        }
        if (i < n) offsets[i] = at + sum - own;
        at += __shfl_sync(whole_warp, sum, 31);
    }
    return at;
}

/// Of a whole block: all logits of at least a floor that n_largest of them reach, if they fit.
FIXMIN_DEVICE void find_largest(const ExtractArgs& args, uint32_t query, const LogitRow& row, ExtractNotes& notes,
                                float* maxima, ExtractOfRow& out) {
    uint32_t* const ids = reinterpret_cast<uint32_t*>(maxima);            // [capacity], once maxima are done with
    uint32_t* const groups = ids + max_of(args.n_groups, args.capacity);  // [capacity], as the next two
    uint32_t* const found = groups + args.capacity;                       // a bit for each of a group
    uint32_t* const offsets = found + args.capacity;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % 32;
    for (uint32_t i = threadIdx.x; i < args.n_groups; i += blockDim.x)
        maxima[i] = args.maxima[size_t(query) * args.n_groups + i];  // floor_of gives the thread the same ones
    const float floor = floor_of(maxima, args.n_groups, args.queries[query].n_largest, notes);
    const uint32_t n = find_groups(maxima, args.n_groups, floor, args.capacity, notes, groups);
    if (threadIdx.x == 0) {
        out.floor = floor;
        out.n_largest = args.capacity + 1;  // too many, until they are counted
    }
    if (n > args.capacity) return;  // a whole block
    __syncthreads();
    const auto candidate = [&](uint32_t i) { return groups[i] + lane * args.n_groups; };
    for (uint32_t i = warp; i < n; i += extract_warps) {
        const bool reaches = lane < args.group && row[candidate(i)] >= floor;
        const uint32_t bits = __ballot_sync(whole_warp, reaches);
        if (lane == 0) found[i] = bits;
    }
    __syncthreads();
    if (warp == 0) {
        const uint32_t all = count_before(found, n, offsets);
        if (lane == 0) notes.n_found = all;
    }
    __syncthreads();
    const uint32_t all = notes.n_found;
    if (all > args.capacity) return;  // a whole block
    for (uint32_t i = warp; i < n; i += extract_warps) {
        const uint32_t place = offsets[i] + uint32_t(__popc(found[i] & ((1u << lane) - 1)));
        if (found[i] >> lane & 1u) ids[place] = candidate(i);
    }
    __syncthreads();
    if (threadIdx.x == 0) out.n_largest = all;
    LogitOfId* const largest = reinterpret_cast<LogitOfId*>(&out + 1);
    for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
        uint32_t place = 0;  // in the order of ids
#pragma unroll 1
        for (uint32_t k = 0; k < all; ++k) place += ids[k] < ids[i];
        largest[place] = {row[ids[i]], ids[i]};
    }
}

// grid (queries).
FIXMIN_KERNEL(extract_logits, ExtractArgs, extract_threads) {
    after_previous();
    FIXMIN_SHARED(shared);
    ExtractNotes& notes = *reinterpret_cast<ExtractNotes*>(shared);
    float* const values =
        reinterpret_cast<float*>(shared + extract_notes_bytes);  // weights, or maxima and what follows
    static_assert(sizeof(ExtractNotes) <= extract_notes_bytes);
    const uint32_t query = block.x;
    const LogitRow row = logit_row(args, query);
    ExtractOfRow& out = *reinterpret_cast<ExtractOfRow*>(args.out + query * extract_bytes(args.capacity));
    const Survey all = survey_of_row(args, query);  // by every warp
    // A row of nothing but the lowest number and -infinity is left to the host as well.
    const bool usable = all.finite && all.highest > lowest_logit;
    if (threadIdx.x == 0) out = {0, usable ? all.highest : minus_infinity(), lowest_logit, 0, all.finite, 0, 0};
    if (!usable) return;  // a whole block
    const uint32_t best = find_first(args, query, row, all.highest, notes);
    if (threadIdx.x == 0) out.best = best;
    const QueryArgs& q = args.queries[query];
    if (q.temperature > 0) draw(args, query, row, all.highest, notes, values, out);
    if (q.n_largest) find_largest(args, query, row, notes, values, out);
}

}  // namespace fixmin::cuda
