// Loaded before everything else (LD_PRELOAD), it makes calls of the system fail that a test names: the n-th one of a
// kind, or all from there on. tests/faults/injected.py is its other side.
//
// Allocations are those of C++ (operator new): the interpreter's own, and those of libraries in C and Rust, go
// elsewhere.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace {

enum Kind { allocation, mapping, thread, file, reading, kinds };
// What happens to a call: it fails, the process dies before it or after it, or after half of what it writes.
enum Action { fail_once, fail_on, die_before, die_after, die_within };

struct Plan {
    std::atomic<long> at{0};  // 0: nothing
    std::atomic<long> calls{0};
    std::atomic<int> action{fail_once};
    std::atomic<int> error{0};
};
Plan g_plans[kinds];
std::atomic<long> g_live{0};  // allocations of C++ that were not given back
char g_folder[4096] = "";     // files below it count

template <class F>
F next(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

[[noreturn]] void die() {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// Whether this call is to fail. What the process dies of happens here, or after the call.
struct Call {
    explicit Call(Kind kind) : plan(g_plans[kind]) {
        const long at = plan.at.load(std::memory_order_relaxed);
        if (at == 0) return;
        const long call = ++plan.calls;
        const int action = plan.action;
        hit = call == at;
        if (hit && action == die_before) die();
        fails = (hit && action == fail_once) || (call >= at && action == fail_on);
        if (fails) errno = plan.error;
    }
    ~Call() {
        if (hit && plan.action == die_after) die();
    }
    Call(const Call&) = delete;

    Plan& plan;
    bool hit = false, fails = false;
};

void* allocated(size_t n, size_t alignment, bool may_throw) {
    {
        const Call call(allocation);
        if (!call.fails) {
            void* p = nullptr;
            if (alignment)
                p = aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
            else
                p = malloc(n ? n : 1);
            if (p) {
                g_live.fetch_add(1, std::memory_order_relaxed);
                return p;
            }
        }
    }
    if (may_throw) throw std::bad_alloc();
    return nullptr;
}

void freed(void* p) {
    if (!p) return;
    g_live.fetch_sub(1, std::memory_order_relaxed);
    free(p);
}

bool below_folder(const char* path) {
    const size_t n = strlen(g_folder);
    return n && strncmp(path, g_folder, n) == 0;
}

bool counts(int fd) {
    if (g_plans[file].at == 0 && g_plans[reading].at == 0) return false;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (n <= 0) return false;
    path[n] = 0;
    return below_folder(path);
}

bool counts(const char* path) {
    if (g_plans[file].at == 0) return false;
    if (path[0] == '/') return below_folder(path);
    char whole[8192];
    if (!getcwd(whole, 4096)) return false;
    strncat(whole, "/", 2);
    strncat(whole, path, 4000);
    return below_folder(whole);
}

// A write of n bytes that dies within is one of half as many.
size_t written_before_death(const Call& call, size_t n) {
    return call.hit && call.plan.action == die_within ? n / 2 : n;
}
void die_if_within(const Call& call) {
    if (call.hit && call.plan.action == die_within) die();
}

}  // namespace

#define SHOWN extern "C" __attribute__((visibility("default")))

SHOWN void fault_folder(const char* folder) { snprintf(g_folder, sizeof g_folder, "%s", folder); }
SHOWN void fault_arm(int kind, long at, int action, int error) {
    if (at) g_plans[kind].calls = 0;
    g_plans[kind].action = action;
    g_plans[kind].error = error;
    g_plans[kind].at = at;
}
SHOWN long fault_calls(int kind) { return g_plans[kind].calls; }
SHOWN long fault_live() { return g_live; }

// ---- memory ---------------------------------------------------------------------------------------------------------

#define NEW __attribute__((visibility("default")))
NEW void* operator new(size_t n) { return allocated(n, 0, true); }
NEW void* operator new[](size_t n) { return allocated(n, 0, true); }
NEW void* operator new(size_t n, const std::nothrow_t&) noexcept { return allocated(n, 0, false); }
NEW void* operator new[](size_t n, const std::nothrow_t&) noexcept { return allocated(n, 0, false); }
NEW void* operator new(size_t n, std::align_val_t a) { return allocated(n, size_t(a), true); }
NEW void* operator new[](size_t n, std::align_val_t a) { return allocated(n, size_t(a), true); }
NEW void operator delete(void* p) noexcept { freed(p); }
NEW void operator delete[](void* p) noexcept { freed(p); }
NEW void operator delete(void* p, size_t) noexcept { freed(p); }
NEW void operator delete[](void* p, size_t) noexcept { freed(p); }
NEW void operator delete(void* p, const std::nothrow_t&) noexcept { freed(p); }
NEW void operator delete(void* p, std::align_val_t) noexcept { freed(p); }
NEW void operator delete[](void* p, std::align_val_t) noexcept { freed(p); }
NEW void operator delete(void* p, size_t, std::align_val_t) noexcept { freed(p); }
NEW void operator delete[](void* p, size_t, std::align_val_t) noexcept { freed(p); }

SHOWN void* mmap(void* address, size_t n, int protection, int flags, int fd, off_t offset) {
    const Call call(mapping);
    if (call.fails) return MAP_FAILED;
    return reinterpret_cast<void*>(syscall(SYS_mmap, address, n, protection, flags, fd, offset));
}

SHOWN int pthread_create(pthread_t* to, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
    static const auto real =
        next<int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*)>("pthread_create");
    const Call call(thread);
    return call.fails ? EAGAIN : real(to, attributes, body, argument);
}

// ---- files ----------------------------------------------------------------------------------------------------------

SHOWN ssize_t write(int fd, const void* data, size_t n) {
    if (!counts(fd)) return syscall(SYS_write, fd, data, n);
    const Call call(file);
    if (call.fails) return -1;
    const ssize_t done = syscall(SYS_write, fd, data, written_before_death(call, n));
    die_if_within(call);
    return done;
}
SHOWN ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
    if (!counts(fd)) return syscall(SYS_pwrite64, fd, data, n, at);
    const Call call(file);
    if (call.fails) return -1;
    const ssize_t done = syscall(SYS_pwrite64, fd, data, written_before_death(call, n), at);
    die_if_within(call);
    return done;
}
SHOWN ssize_t pwrite(int fd, const void* data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }
SHOWN ssize_t writev(int fd, const struct iovec* parts, int n) {
    if (!counts(fd)) return syscall(SYS_writev, fd, parts, n);
    const Call call(file);
    return call.fails ? -1 : syscall(SYS_writev, fd, parts, n);
}
SHOWN ssize_t sendfile64(int out, int in, off64_t* offset, size_t n) {
    if (!counts(out)) return syscall(SYS_sendfile, out, in, offset, n);
    const Call call(file);
    return call.fails ? -1 : syscall(SYS_sendfile, out, in, offset, n);
}
SHOWN ssize_t sendfile(int out, int in, off_t* offset, size_t n) { return sendfile64(out, in, offset, n); }
SHOWN int fsync(int fd) {
    if (!counts(fd)) return int(syscall(SYS_fsync, fd));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_fsync, fd));
}
SHOWN int fdatasync(int fd) {
    if (!counts(fd)) return int(syscall(SYS_fdatasync, fd));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_fdatasync, fd));
}
SHOWN int ftruncate64(int fd, off64_t n) {
    if (!counts(fd)) return int(syscall(SYS_ftruncate, fd, n));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_ftruncate, fd, n));
}
SHOWN int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }
SHOWN int renameat(int from_folder, const char* from, int to_folder, const char* to) {
    if (!counts(to)) return int(syscall(SYS_renameat2, from_folder, from, to_folder, to, 0));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_renameat2, from_folder, from, to_folder, to, 0));
}
SHOWN int rename(const char* from, const char* to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
SHOWN int mkdir(const char* path, mode_t mode) {
    if (!counts(path)) return int(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
SHOWN int open64(const char* path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    if (!(flags & O_CREAT) || !counts(path)) return int(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
    const Call call(file);
    return call.fails ? -1 : int(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
SHOWN int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return open64(path, flags, mode);
}

// A read of some bytes may give fewer: with `at`, at most so many.
SHOWN ssize_t read(int fd, void* data, size_t n) {
    const long most = g_plans[reading].at;
    if (most && n > size_t(most) && counts(fd)) n = size_t(most), ++g_plans[reading].calls;
    return syscall(SYS_read, fd, data, n);
}
SHOWN ssize_t pread64(int fd, void* data, size_t n, off64_t at) {
    const long most = g_plans[reading].at;
    if (most && n > size_t(most) && counts(fd)) n = size_t(most), ++g_plans[reading].calls;
    return syscall(SYS_pread64, fd, data, n, at);
}
SHOWN ssize_t pread(int fd, void* data, size_t n, off_t at) { return pread64(fd, data, n, at); }
