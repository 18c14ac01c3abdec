// A GPU as the back end sees it: memory, copies and launches, all in one order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/args.h"
#include "cuda/kernel_list.h"

namespace fixmin::cuda {

enum class Kernel : uint8_t {
#define FIXMIN_NAME(name, Args) name,
    FIXMIN_KERNELS(FIXMIN_NAME)
#undef FIXMIN_NAME
};

struct Grid {
    uint32_t x, y;
    uint32_t threads;
    size_t shared_bytes = 0;
};

/// What is known of a device without a context on it.
struct DeviceInfo {
    std::string name;
    uint32_t compute_major, compute_minor;
    uint32_t multiprocessors;
    size_t memory_bytes;
    size_t shared_bytes;  // most that a block may have
};

/// One device with a stream of its own. What is asked for happens in the order in which it is asked for. Used by one
/// thread at a time. Every function throws DeviceError if the device has failed, now or earlier.
class Device {
  public:
    virtual ~Device() = default;

    virtual const DeviceInfo& info() const = 0;

    /// Zeroed. Throws OutOfMemory, which says `what` for and how many bytes.
    virtual std::byte* allocate(size_t bytes, const char* what) = 0;
    virtual void free(std::byte* memory) noexcept = 0;

    /// `from` may be changed once it has returned.
    virtual void upload(std::byte* to, const void* from, size_t bytes) = 0;
    /// Waits for everything asked for before.
    virtual void download(void* to, const std::byte* from, size_t bytes) = 0;
    virtual void copy(std::byte* to, const std::byte* from, size_t bytes) = 0;
    virtual void wait() = 0;

    template <typename Args>
    void launch(Kernel kernel, const Grid& grid, const Args& args) {
        launch_with(kernel, grid, &args);
    }

  private:
    virtual void launch_with(Kernel kernel, const Grid& grid, const void* args) = 0;
};

/// All usable devices, without a context on any; empty without a driver.
std::vector<DeviceInfo> devices();

/// Throws UnsupportedError, which says why there is no such device: no driver, too old, no device, chip too old.
std::unique_ptr<Device> open_device(uint32_t number);

/// Memory of a device that grows when it is asked for more; what was in it is lost then.
class DeviceBuffer {
  public:
    DeviceBuffer(Device& device, const char* what) : device_(device), what_(what) {}
    DeviceBuffer(Device& device, const char* what, size_t bytes) : DeviceBuffer(device, what) { reserve(bytes); }
    ~DeviceBuffer() { device_.free(data_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    void reserve(size_t bytes) {
        if (bytes <= size_) return;
        device_.free(data_);
        data_ = nullptr;
        size_ = 0;
        data_ = device_.allocate(bytes, what_);
        size_ = bytes;
    }
    std::byte* data() const { return data_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t size() const { return size_; }

  private:
    Device& device_;
    const char* const what_;
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace fixmin::cuda
