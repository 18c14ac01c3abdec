// A GPU as the back end sees it: memory, copies and launches, all in one order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/args.h"
#include "cuda/kernel_list.h"

namespace fixmin::cuda {

struct Grid {
    uint32_t x, y;
    uint32_t threads;
    size_t shared_bytes = 0;
    bool at_once = false;  // its blocks wait for each other (simt.h, wait_for_grid)
};

struct Launch {
    Kernel kernel;
    Grid grid;
    std::vector<std::byte> args;
};
using Launches = std::vector<Launch>;

/// What is known of a device without a context on it.
struct DeviceInfo {
    std::string name;
    uint32_t compute_major, compute_minor;
    uint32_t multiprocessors;
    size_t memory_bytes;
    size_t shared_bytes;  // most that a block may have
    bool waiting_blocks;  // blocks of a grid may wait for each other
    uint32_t number = 0;  // of cuda:N
};

/// Launches on a device, prepared to be run again with one call.
class Recording {
  public:
    virtual ~Recording() = default;
};

/// One device with a stream of its own. What is asked for happens in the order in which it is asked for. Used by one
/// thread at a time. Every function throws DeviceError if the device has failed, now or earlier, and in a forked child.
class Device {
  public:
    virtual ~Device() = default;

    virtual const DeviceInfo& info() const = 0;

    /// Zeroed. Throws OutOfMemory, which says `what` for and how many bytes.
    virtual std::byte* allocate(size_t bytes, const std::string& what) = 0;
    virtual void free(std::byte* memory) noexcept = 0;

    /// `from` may be changed once it has returned.
    virtual void upload(std::byte* to, const void* from, size_t bytes) = 0;
    /// Waits for everything asked for before.
    virtual void download(void* to, const std::byte* from, size_t bytes) = 0;
    virtual void copy(std::byte* to, const std::byte* from, size_t bytes) = 0;
    virtual void wait() = 0;

    template <typename Args>
    void launch(Kernel kernel, const Grid& grid, const Args& args) {
        if (!recorded_) return launch_now(kernel, grid, &args);
        const std::byte* bytes = reinterpret_cast<const std::byte*>(&args);
        recorded_->push_back({kernel, grid, {bytes, bytes + sizeof args}});
    }

    /// The launches that `commands` makes, with their arguments of now; they do not run. It may not do anything else.
    Launches record(const std::function<void()>& commands) {
        Launches launches;
        recorded_ = &launches;
        try {
            commands();
        } catch (...) {
            recorded_ = nullptr;
            throw;
        }
        recorded_ = nullptr;
        return launches;
    }
    virtual std::unique_ptr<Recording> prepare(const Launches& launches) = 0;
    virtual void run(const Recording& recording) = 0;

    /// How many blocks of a kernel the device runs at once; 0: it cannot let them wait for each other.
    virtual uint32_t blocks_at_once(Kernel kernel, uint32_t threads, size_t shared_bytes) = 0;

  private:
    virtual void launch_now(Kernel kernel, const Grid& grid, const void* args) = 0;

    Launches* recorded_ = nullptr;
};

/// All usable devices, without a context on any; empty without a driver.
std::vector<DeviceInfo> devices();

/// What CUDA the driver supports and, if it tells, its own number: "13.0 (driver 580.65.06)". Throws UnsupportedError,
/// which says why no device can be used.
std::string driver_version();

/// Throws UnsupportedError, which says why there is no such device: no driver, too old, no device, chip too old.
std::unique_ptr<Device> open_device(uint32_t number);

/// Memory of a device for a while.
class DeviceBuffer {
  public:
    DeviceBuffer(Device& device, const char* what, size_t bytes)
        : device_(device), data_(device.allocate(bytes, what)) {}
    ~DeviceBuffer() { device_.free(data_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    std::byte* data() const { return data_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

  private:
    Device& device_;
    std::byte* const data_;
};

}  // namespace fixmin::cuda
