// Large memory of the host.
#pragma once
#include <cstddef>
#include <memory>

namespace fixmin::model {

/// Zeroed pages straight from the kernel: 64-byte aligned, resident only once touched.
class Pages {
  public:
    Pages() = default;
    /// Throws OutOfMemory, which says `what` for.
    Pages(size_t bytes, const char* what);
    std::byte* data() const { return data_.get(); }
    size_t size() const { return data_.get_deleter().bytes; }

  private:
    struct Unmap {
        size_t bytes;
        void operator()(std::byte* p) const;
    };
    std::unique_ptr<std::byte, Unmap> data_;
};

}  // namespace fixmin::model
