#include "cuda/extracts.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fixmin::cuda {

using numerics::Extract;
using numerics::ExtractQuery;
using numerics::most_largest;

namespace {

constexpr size_t usual_shared_bytes = 48 << 10;  // of a block on every device
constexpr uint32_t small_vocabulary = 8192;      // of which all logits fit

// More than k logits reach the k-th largest maximum of a group: of 65,536 about 1.01 k with a k of 40, 1.07 k of 256.
// Of fewer, and where many are equal, they are more.
constexpr uint32_t capacity_of(uint32_t n_largest) { return n_largest ? std::max(128u, 4 * n_largest) : 0; }

size_t shared_bytes(uint32_t n_groups, uint32_t capacity) {
    return extract_notes_bytes + std::max(segment, std::max(n_groups, capacity) + 3 * capacity) * sizeof(float);
}

uint32_t parts_of(uint32_t n, uint32_t size) { return (n + size - 1) / size; }

}  // namespace

Extracts::Extracts(uint32_t vocab_size)
    : vocab_size_(vocab_size),
      mask_words_(parts_of(vocab_size, 32)),
      n_segments_(parts_of(vocab_size, segment)),
      group_(vocab_size <= small_vocabulary ? 1 : 32),
      n_groups_(parts_of(vocab_size, group_)),
      possible_(shared_bytes(n_groups_, capacity_of(most_largest)) <= usual_shared_bytes) {}

void Extracts::add_to(Arena& arena) {
    if (!possible_) return;
    arena.add(maxima_, size_t(extract_rows) * n_groups_ * sizeof(float));
    arena.add(surveys_, size_t(extract_rows) * parts_of(n_groups_, 32) * sizeof(Survey));
    arena.add(sums_, size_t(extract_rows) * n_segments_ * sizeof(double));
    arena.add(masks_, size_t(extract_rows) * mask_words_ * sizeof(uint32_t));
    arena.add(out_, extract_rows * extract_bytes(capacity_of(most_largest)));
}

void Extracts::take(Device& device, const float* logits, std::span<const ExtractQuery> queries, Extract* extracts) {
    uint32_t most = 0;
    for (const ExtractQuery& query : queries) most = std::max(most, query.n_largest);
    ExtractArgs args{.logits = logits,
                     .masks = masks_.as<uint32_t>(),
                     .vocab_size = vocab_size_,
                     .group = group_,
                     .n_groups = n_groups_,
                     .capacity = capacity_of(most),
                     .maxima = maxima_.as<float>(),
                     .surveys = surveys_.as<Survey>(),
                     .sums = sums_.as<double>(),
                     .out = out_.data(),
                     .queries = {}};
    const size_t size = extract_bytes(args.capacity);
    results_.resize(queries.size() * size);
    for (size_t first = 0; first < queries.size(); first += extract_rows) {
        const auto some = queries.subspan(first, std::min<size_t>(extract_rows, queries.size() - first));
        launch(device, args, some);
        device.download(results_.data() + first * size, out_.data(), some.size() * size);
    }
    for (size_t i = 0; i < queries.size(); ++i) extracts[i] = read(results_.data() + i * size, args.capacity);
}

void Extracts::launch(Device& device, ExtractArgs& args, std::span<const ExtractQuery> queries) {
    const uint32_t n = uint32_t(queries.size());
    words_.clear();
    bool weigh = false;
    for (uint32_t i = 0; i < n; ++i) {
        const ExtractQuery& query = queries[i];
        args.queries[i] = {query.row, query.n_largest, query.temperature, no_mask, query.uniform};
        weigh |= query.temperature > 0;
        if (!query.allowed) continue;
        args.queries[i].mask = uint32_t(words_.size() / mask_words_);
        words_.insert(words_.end(), query.allowed, query.allowed + mask_words_);
    }
    if (!words_.empty()) device.upload(masks_.data(), words_.data(), words_.size() * sizeof(uint32_t));
    const size_t weights = (16 * sizeof(double)) + segment * sizeof(float);
    device.launch(Kernel::survey_logits, {parts_of(n_groups_, extract_threads), n, extract_threads}, args);
    if (weigh) device.launch(Kernel::weigh_logits, {n_segments_, n, extract_threads, weights}, args);
    device.launch(Kernel::extract_logits, {n, 1, extract_threads, shared_bytes(n_groups_, args.capacity)}, args);
}

Extract Extracts::read(const std::byte* from, uint32_t capacity) const {
    ExtractOfRow row;
    std::memcpy(&row, from, sizeof row);
    static_assert(sizeof(numerics::Logit) == sizeof(LogitOfId));
    const auto* largest = reinterpret_cast<const numerics::Logit*>(from + sizeof row);
    const uint32_t n = row.n_largest <= capacity ? row.n_largest : 0;  // else they did not fit
    return {.finite = row.finite != 0,
            .best = row.best,
            .highest = row.highest,
            .total = row.total,
            .drawn = row.drawn,
            .largest = {largest, n},
            .floor = row.floor,
            .complete = row.floor == std::numeric_limits<float>::lowest()};
}

}  // namespace fixmin::cuda
