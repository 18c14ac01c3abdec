// The memory of a model on a GPU: one allocation, so that there is enough of it from the start or a clear error.
#pragma once
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

namespace fixmin::cuda {

/// Memory that an arena gives to one use.
class Part {
  public:
    std::byte* data() const { return data_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t size() const { return size_; }

  private:
    friend class Arena;
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

class Arena {
  public:
    explicit Arena(Device& device) : device_(device) {}
    ~Arena() { device_.free(memory_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    /// `part` has so many bytes once allocate() has been called, null if none; it has to stay where it is until then.
    void add(Part& part, size_t bytes) {
        if (bytes == 0) return;
        part.size_ = bytes;
        parts_.push_back({&part, size_});
        size_ += (bytes + alignment - 1) / alignment * alignment;
    }

    /// Takes the memory, zeroed. Throws OutOfMemory, which says `what` for.
    void allocate(const std::string& what) {
        memory_ = device_.allocate(size_, what);
        for (const auto& [part, offset] : parts_) part->data_ = memory_ + offset;
        parts_.clear();
    }

    size_t size() const { return size_; }

  private:
    static constexpr size_t alignment = 256;  // whole lines of the caches, also for the widest loads

    Device& device_;
    std::byte* memory_ = nullptr;
    size_t size_ = 0;
    std::vector<std::pair<Part*, size_t>> parts_;
};

}  // namespace fixmin::cuda
