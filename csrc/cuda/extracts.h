// Extracts of rows of logits that are on the device (numerics/extract.h).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "numerics/extract.h"

namespace fixmin::cuda {

class Extracts {
  public:
    explicit Extracts(uint32_t vocab_size);

    /// Whether there are any: a row's maxima must fit the shared memory that every device has.
    bool possible() const { return possible_; }

    void add_to(Arena& arena);

    /// logits: [..][V] on the device; queries: [n]; extracts: [n], whose `largest` are valid until the next call.
    void take(Device& device, const float* logits, std::span<const numerics::ExtractQuery> queries,
              numerics::Extract* extracts);

  private:
    void launch(Device& device, ExtractArgs& args, std::span<const numerics::ExtractQuery> queries);
    numerics::Extract read(const std::byte* from, uint32_t capacity) const;

    const uint32_t vocab_size_, mask_words_, n_segments_, group_, n_groups_;
    const bool possible_;
    Part maxima_, surveys_, sums_, masks_, out_;
    std::vector<uint32_t> words_;     // masks to upload
    std::vector<std::byte> results_;  // what came back
};

}  // namespace fixmin::cuda
