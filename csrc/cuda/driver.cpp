// NVIDIA's driver, found when it is needed: the extension is not linked to it and starts without one.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "cuda/device.h"
#include "error.h"

/// The kernels for all architectures, as nvcc wrote them (embedded by CMakeLists.txt).
extern "C" const unsigned char fixmin_cuda_kernels[];

namespace fixmin::cuda {
namespace {

// What is used of cuda.h (CUDA driver API 12), so that no header of the toolkit is needed.
using Result = int;
using Address = unsigned long long;
using Handle = struct Opaque*;
enum : Result { success = 0, out_of_memory = 2, no_device = 100, no_binary_for_gpu = 209 };
enum : int {
    attribute_multiprocessors = 16,
    attribute_major = 75,
    attribute_minor = 76,
    attribute_cooperative = 95,
    attribute_shared_optin = 97
};
constexpr int function_max_dynamic_shared = 8;
constexpr int oldest_driver = 12000, overlapping_driver = 12030;  // which records launches that overlap
constexpr uint32_t oldest_major = 7, oldest_minor = 5;

// CUlaunchConfig and CUlaunchAttribute.
struct LaunchAttribute {
    int id;
    alignas(8) int value;
    char rest[60];  // of a union of 64 bytes
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    LaunchAttribute* attributes;
    unsigned n_attributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);
constexpr int cooperative = 2, programmatic_serialization = 6;
constexpr int capture_of_this_thread = 1;

// Name, version of its symbol, arguments.
#define FIXMIN_DRIVER_FUNCTIONS(X)                                                  \
    X(cuInit, "", (unsigned))                                                       \
    X(cuDriverGetVersion, "", (int*))                                               \
    X(cuGetErrorString, "", (Result, const char**))                                 \
    X(cuDeviceGetCount, "", (int*))                                                 \
    X(cuDeviceGet, "", (int*, int))                                                 \
    X(cuDeviceGetName, "", (char*, int, int))                                       \
    X(cuDeviceGetAttribute, "", (int*, int, int))                                   \
    X(cuDeviceTotalMem, "_v2", (size_t*, int))                                      \
    X(cuDevicePrimaryCtxRetain, "", (Handle*, int))                                 \
    X(cuDevicePrimaryCtxRelease, "_v2", (int))                                      \
    X(cuCtxSetCurrent, "", (Handle))                                                \
    X(cuMemGetInfo, "_v2", (size_t*, size_t*))                                      \
    X(cuModuleLoadData, "", (Handle*, const void*))                                 \
    X(cuModuleUnload, "", (Handle))                                                 \
    X(cuModuleGetFunction, "", (Handle*, Handle, const char*))                      \
    X(cuFuncSetAttribute, "", (Handle, int, int))                                   \
    X(cuStreamCreate, "", (Handle*, unsigned))                                      \
    X(cuStreamDestroy, "_v2", (Handle))                                             \
    X(cuStreamSynchronize, "", (Handle))                                            \
    X(cuMemAlloc, "_v2", (Address*, size_t))                                        \
    X(cuMemFree, "_v2", (Address))                                                  \
    X(cuMemsetD8Async, "", (Address, unsigned char, size_t, Handle))                \
    X(cuMemcpyHtoDAsync, "_v2", (Address, const void*, size_t, Handle))             \
    X(cuMemcpyDtoHAsync, "_v2", (void*, Address, size_t, Handle))                   \
    X(cuMemcpyDtoDAsync, "_v2", (Address, Address, size_t, Handle))                 \
    X(cuLaunchKernelEx, "", (const LaunchConfig*, Handle, void**, void**))          \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, "", (int*, Handle, int, size_t)) \
    X(cuStreamBeginCapture, "_v2", (Handle, int))                                   \
    X(cuStreamEndCapture, "", (Handle, Handle*))                                    \
    X(cuGraphInstantiateWithFlags, "", (Handle*, Handle, unsigned long long))       \
    X(cuGraphLaunch, "", (Handle, Handle))                                          \
    X(cuGraphDestroy, "", (Handle))                                                 \
    X(cuGraphExecDestroy, "", (Handle))

struct Driver {
    int version;  // 12030: CUDA 12.3
    pid_t owner;  // the process that has started it: CUDA does not work in those that are forked from it
#define FIXMIN_POINTER(name, version, arguments) Result(*name) arguments;
    FIXMIN_DRIVER_FUNCTIONS(FIXMIN_POINTER)
#undef FIXMIN_POINTER
};

std::string words(const Driver& driver, Result result) {
    const char* text = nullptr;
    if (driver.cuGetErrorString(result, &text) != success || !text) text = "unknown error";
    return std::string(text) + " (CUDA error " + std::to_string(result) + ")";
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// NVIDIA's number of the driver, "580.65.06", from its library of management, which makes no context; empty without it.
std::string driver_release() {
    void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return "";
    const auto start = reinterpret_cast<Result (*)()>(dlsym(library, "nvmlInit_v2"));
    const auto read = reinterpret_cast<Result (*)(char*, unsigned)>(dlsym(library, "nvmlSystemGetDriverVersion"));
    const auto end = reinterpret_cast<Result (*)()>(dlsym(library, "nvmlShutdown"));
    char release[80] = "";  // NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    if (start && read && end && start() == success) {
        if (read(release, sizeof release) != success) release[0] = 0;
        end();
    }
    dlclose(library);
    return release;
}

constexpr const char* forked =
    "this process was forked from one that has used a GPU, and CUDA does not work in it: start it by \"spawn\"";

// Loaded once; a process without a driver is told so each time.
const Driver& load_driver() {
    static std::mutex mutex;
    static Driver driver;
    static bool loaded = false;
    const std::lock_guard lock(mutex);
    if (loaded && driver.owner != getpid()) throw UnsupportedError(forked);
    if (loaded) return driver;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char* reason = dlerror();
        const bool is_missing = reason && std::string_view(reason).find("No such file") != std::string_view::npos;
        throw UnsupportedError(is_missing ? "no NVIDIA driver is installed (libcuda.so.1 is not found)"
                                          : "the NVIDIA driver cannot be loaded: " +
                                                std::string(reason ? reason : "libcuda.so.1"));
    }
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        if (!function) throw UnsupportedError(std::string("the NVIDIA driver is too old: it lacks ") + name);
    };
#define FIXMIN_FIND(name, version, arguments) find(driver.name, #name version);
    FIXMIN_DRIVER_FUNCTIONS(FIXMIN_FIND)
#undef FIXMIN_FIND
    if (const Result result = driver.cuDriverGetVersion(&driver.version); result != success)
        throw UnsupportedError("the NVIDIA driver does not tell its version: " + words(driver, result));
    if (driver.version < oldest_driver) {
        throw UnsupportedError("the NVIDIA driver is too old: it supports CUDA " + version_text(driver.version) +
                               ", needed is 12.0");
    }
    if (const Result result = driver.cuInit(0); result != success)
        throw UnsupportedError("the NVIDIA driver finds no usable GPU: " + words(driver, result));
    driver.owner = getpid();
    loaded = true;
    return driver;
}

DeviceInfo describe(const Driver& driver, int device, uint32_t number) {
    const auto check = [&](Result result) {
        if (result != success) throw DeviceError("the GPU cannot be asked: " + words(driver, result));
    };
    const auto attribute = [&](int which) {
        int value = 0;
        check(driver.cuDeviceGetAttribute(&value, which, device));
        return uint32_t(value);
    };
    char name[256] = {};
    check(driver.cuDeviceGetName(name, sizeof name, device));
    DeviceInfo info{name,
                    attribute(attribute_major),
                    attribute(attribute_minor),
                    attribute(attribute_multiprocessors),
                    0,
                    attribute(attribute_shared_optin),
                    attribute(attribute_cooperative) != 0};
    check(driver.cuDeviceTotalMem(&info.memory_bytes, device));
    info.number = number;
    return info;
}

constexpr const char* kernel_names[] = {
#define FIXMIN_NAME(name, Args) #name,
    FIXMIN_KERNELS(FIXMIN_NAME)
#undef FIXMIN_NAME
};

class Graph final : public Recording {
  public:
    Graph(const Driver& driver, Handle handle) : handle(handle), driver_(driver) {}
    ~Graph() override {
        if (driver_.owner == getpid()) driver_.cuGraphExecDestroy(handle);
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    const Handle handle;

  private:
    const Driver& driver_;
};

class DriverDevice final : public Device {
  public:
    DriverDevice(const Driver& driver, int device, uint32_t number)
        : driver_(driver),
          device_(device),
          info_(describe(driver, device, number)),
          overlaps_(info_.compute_major >= 9 && driver.version >= overlapping_driver) {
        if (info_.compute_major * 10 + info_.compute_minor < oldest_major * 10 + oldest_minor) {
            throw UnsupportedError(info_.name + " is too old: it has compute capability " +
                                   std::to_string(info_.compute_major) + "." + std::to_string(info_.compute_minor) +
                                   ", needed is 7.5");
        }
        start("context", driver_.cuDevicePrimaryCtxRetain(&context_, device_));
        try {
            start("context", driver_.cuCtxSetCurrent(context_));
            start("kernels", driver_.cuModuleLoadData(&module_, fixmin_cuda_kernels));
            for (size_t i = 0; i < std::size(kernel_names); ++i)
                start(kernel_names[i], driver_.cuModuleGetFunction(&functions_[i], module_, kernel_names[i]));
            start("stream", driver_.cuStreamCreate(&stream_, 1));  // which does not wait for the default one
        } catch (...) {
            close();
            throw;
        }
    }
    ~DriverDevice() override { close(); }

    const DeviceInfo& info() const override { return info_; }

    std::byte* allocate(size_t bytes, const std::string& what) override {
        enter();
        Address address = 0;
        const Result result = driver_.cuMemAlloc(&address, bytes);
        if (result == out_of_memory) {
            size_t left = 0, all = 0;
            driver_.cuMemGetInfo(&left, &all);
            throw OutOfMemory("the GPU has no " + std::to_string(bytes) + " bytes for " + what + ": " +
                              std::to_string(left) + " of " + std::to_string(all) + " are free");
        }
        check(result);
        check(driver_.cuMemsetD8Async(address, 0, bytes, stream_));
        return reinterpret_cast<std::byte*>(address);
    }
    void free(std::byte* memory) noexcept override {
        if (!memory || driver_.owner != getpid()) return;
        driver_.cuCtxSetCurrent(context_);
        driver_.cuMemFree(reinterpret_cast<Address>(memory));
    }
    void upload(std::byte* to, const void* from, size_t bytes) override {
        enter();
        if (bytes) check(driver_.cuMemcpyHtoDAsync(reinterpret_cast<Address>(to), from, bytes, stream_));
    }
    void download(void* to, const std::byte* from, size_t bytes) override {
        enter();
        check(driver_.cuMemcpyDtoHAsync(to, reinterpret_cast<Address>(from), bytes, stream_));
        wait();
    }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override {
        enter();
        check(
            driver_.cuMemcpyDtoDAsync(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), bytes, stream_));
    }
    void wait() override {
        enter();
        check(driver_.cuStreamSynchronize(stream_));
    }
    std::unique_ptr<Recording> prepare(const Launches& launches) override {
        enter();
        Handle graph = nullptr, executable = nullptr;
        check(driver_.cuStreamBeginCapture(stream_, capture_of_this_thread));
        try {
            for (const Launch& one : launches) launch_now(one.kernel, one.grid, one.args.data());
        } catch (...) {
            driver_.cuStreamEndCapture(stream_, &graph);
            if (graph) driver_.cuGraphDestroy(graph);
            throw;
        }
        check(driver_.cuStreamEndCapture(stream_, &graph));
        const Result result = driver_.cuGraphInstantiateWithFlags(&executable, graph, 0);
        driver_.cuGraphDestroy(graph);
        check(result);
        return std::make_unique<Graph>(driver_, executable);
    }
    void run(const Recording& recording) override {
        enter();
        check(driver_.cuGraphLaunch(static_cast<const Graph&>(recording).handle, stream_));
    }
    uint32_t blocks_at_once(Kernel kernel, uint32_t threads, size_t shared_bytes) override {
        enter();
        if (!info_.waiting_blocks || shared_bytes > info_.shared_bytes) return 0;
        grant_shared(kernel, shared_bytes);
        int blocks = 0;
        check(driver_.cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, functions_[size_t(kernel)], int(threads),
                                                                  shared_bytes));
        return uint32_t(blocks) * info_.multiprocessors;
    }

  private:
    // Calls come from whatever thread the engine has.
    void enter() {
        if (driver_.owner != getpid()) throw DeviceError(forked);
        if (failure_ != success) check(failure_);
        check(driver_.cuCtxSetCurrent(context_));
    }
    void check(Result result) {
        if (result == success) return;
        failure_ = result;
        throw DeviceError(info_.name + " has failed: " + words(driver_, result));
    }
    void start(const char* what, Result result) const {
        if (result == success) return;
        const std::string text = info_.name + " gives no " + what + ": " + words(driver_, result);
        if (result == out_of_memory) throw OutOfMemory(text);
        throw UnsupportedError(text);
    }
    void close() noexcept {
        if (!context_ || driver_.owner != getpid()) return;
        driver_.cuCtxSetCurrent(context_);
        if (stream_) driver_.cuStreamDestroy(stream_);
        if (module_) driver_.cuModuleUnload(module_);
        driver_.cuDevicePrimaryCtxRelease(device_);
        context_ = nullptr;
    }
    // More than 48 kB have to be asked for.
    void grant_shared(Kernel kernel, size_t bytes) {
        size_t& granted = shared_bytes_[size_t(kernel)];
        if (bytes <= granted) return;
        if (bytes > info_.shared_bytes) {
            throw UnsupportedError(std::string(kernel_names[size_t(kernel)]) + " needs " + std::to_string(bytes) +
                                   " bytes of shared memory, " + info_.name + " has " +
                                   std::to_string(info_.shared_bytes));
        }
        check(driver_.cuFuncSetAttribute(functions_[size_t(kernel)], function_max_dynamic_shared, int(bytes)));
        granted = bytes;
    }
    void launch_now(Kernel kernel, const Grid& grid, const void* args) override {
        enter();
        grant_shared(kernel, grid.shared_bytes);
        void* parameters[] = {const_cast<void*>(args)};
        // A kernel may begin while the one before it runs (simt.h, after_previous), or all its blocks run at once.
        LaunchAttribute attribute{grid.at_once ? cooperative : programmatic_serialization, 1, {}};
        const LaunchConfig config{{grid.x, grid.y, 1},
                                  {grid.threads, 1, 1},
                                  unsigned(grid.shared_bytes),
                                  stream_,
                                  &attribute,
                                  grid.at_once || overlaps_ ? 1u : 0u};
        check(driver_.cuLaunchKernelEx(&config, functions_[size_t(kernel)], parameters, nullptr));
    }

    const Driver& driver_;
    const int device_;
    const DeviceInfo info_;
    const bool overlaps_;  // a kernel may start before the one before it has ended
    Handle context_ = nullptr, module_ = nullptr, stream_ = nullptr;
    Handle functions_[std::size(kernel_names)] = {};
    size_t shared_bytes_[std::size(kernel_names)] = {};
    Result failure_ = success;  // sticky: the context is of no more use
};

int device_count(const Driver& driver) {
    int count = 0;
    if (driver.cuDeviceGetCount(&count) != success) return 0;
    return count;
}

}  // namespace

std::vector<DeviceInfo> devices() {
    std::vector<DeviceInfo> found;
    try {
        const Driver& driver = load_driver();
        for (int i = 0; i < device_count(driver); ++i) {
            int device = 0;
            if (driver.cuDeviceGet(&device, i) == success) found.push_back(describe(driver, device, uint32_t(i)));
        }
    } catch (const Error&) {
    }
    return found;
}

std::string driver_version() {
    const std::string version = version_text(load_driver().version), release = driver_release();
    return version + (release.empty() ? "" : " (driver " + release + ")");
}

std::unique_ptr<Device> open_device(uint32_t number) {
    const Driver& driver = load_driver();
    const int count = device_count(driver);
    int device = 0;
    if (number >= uint32_t(count) || driver.cuDeviceGet(&device, int(number)) != success) {
        throw UnsupportedError("there is no GPU cuda:" + std::to_string(number) + ": the driver shows " +
                               std::to_string(count));
    }
    return std::make_unique<DriverDevice>(driver, device, number);
}

}  // namespace fixmin::cuda
