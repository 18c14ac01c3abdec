#include "model/pages.h"

#include <sys/mman.h>

#include <string>

#include "error.h"

namespace fixmin::model {

Pages::Pages(size_t bytes, const char* what) {
    if (bytes == 0) return;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw OutOfMemory("the system gives no " + std::to_string(bytes) + " bytes for " + what);
    // Fewer translation misses while weights stream past; a refusal does not matter.
#ifdef MADV_HUGEPAGE  // Linux
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    data_ = {static_cast<std::byte*>(p), Unmap{bytes}};
}

void Pages::Unmap::operator()(std::byte* p) const { munmap(p, bytes); }

}  // namespace fixmin::model
