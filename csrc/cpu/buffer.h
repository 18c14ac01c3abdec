// Vectors for activations: aligned to cache lines, large ones to huge pages.
//
// The rows of a chunk lie kilobytes apart, so every tile of a product writes to as many pages as it has tokens. With
// pages of 4 KiB the translations of a chunk of 512 tokens fill the processor's tables several times over.
#pragma once
#include <cstddef>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fixmin::cpu {

template <typename T>
struct BufferAllocator {
    using value_type = T;

    BufferAllocator() = default;
    template <typename U>
    BufferAllocator(const BufferAllocator<U>&) {}

    T* allocate(size_t n) {
        const size_t bytes = n * sizeof(T);
        void* p = ::operator new(bytes, alignment(bytes));
#ifdef MADV_HUGEPAGE  // Linux; a refusal does not matter
        if (bytes >= huge_page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(p);
    }
    void deallocate(T* p, size_t n) { ::operator delete(p, alignment(n * sizeof(T))); }

    bool operator==(const BufferAllocator&) const = default;

  private:
    static constexpr size_t huge_page = size_t(1) << 21, cache_line = 64;
    static std::align_val_t alignment(size_t bytes) {
        return std::align_val_t(bytes < huge_page ? cache_line : huge_page);
    }
};

template <typename T>
using Buffer = std::vector<T, BufferAllocator<T>>;

}  // namespace fixmin::cpu
