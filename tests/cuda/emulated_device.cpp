// A device whose memory is the host's and whose kernels run on the emulator. Linked instead of csrc/cuda/driver.cpp.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/attention.cuh"
#include "cuda/ceilings.cuh"
#include "cuda/device.h"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"
#include "error.h"

namespace fixmin::cuda {
namespace {

struct Entry {
    void (*run)(const void* args);
    size_t args_bytes;
};
constexpr Entry kernels[] = {
#define FIXMIN_ENTRY(name, Args) {[](const void* args) { name(*static_cast<const Args*>(args)); }, sizeof(Args)},
    FIXMIN_KERNELS(FIXMIN_ENTRY)
#undef FIXMIN_ENTRY
};

class EmulatedDevice final : public Device {
  public:
    const DeviceInfo& info() const override { return info_; }

    std::byte* allocate(size_t bytes, const std::string& what) override {
        void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
        if (!memory) throw OutOfMemory("no memory on the emulated device for " + what);
        std::memset(memory, 0, bytes);
        return static_cast<std::byte*>(memory);
    }
    void free(std::byte* memory) noexcept override { std::free(memory); }
    void upload(std::byte* to, const void* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void download(void* to, const std::byte* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void wait() override { expect_not_recording(); }
    std::unique_ptr<Recording> record(const std::function<void()>& commands) override {
        auto recording = std::make_unique<Launches>();
        recording_ = recording.get();
        try {
            commands();
        } catch (...) {
            recording_ = nullptr;
            throw;
        }
        recording_ = nullptr;
        return recording;
    }
    void run(const Recording& recording) override {
        for (const Launch& one : static_cast<const Launches&>(recording).all) run(one);
    }

  private:
    struct Launch {
        Kernel kernel;
        Grid grid;
        std::vector<std::byte> args;
    };
    struct Launches final : Recording {
        std::vector<Launch> all;
    };

    static void run(const Launch& launch) {
        const auto kernel = kernels[size_t(launch.kernel)];
        const Grid& grid = launch.grid;
        simt::run([&] { kernel.run(launch.args.data()); }, {grid.x, grid.y}, grid.threads, grid.shared_bytes);
    }
    void expect_not_recording() const {
        if (recording_) throw DeviceError("only launches can be recorded");
    }
    void copy_bytes(void* to, const void* from, size_t bytes) const {
        expect_not_recording();
        if (bytes) std::memcpy(to, from, bytes);
    }
    void launch_with(Kernel kernel, const Grid& grid, const void* args) override {
        const std::byte* bytes = static_cast<const std::byte*>(args);
        const Launch launch{kernel, grid, {bytes, bytes + kernels[size_t(kernel)].args_bytes}};
        if (recording_)
            recording_->all.push_back(launch);
        else
            run(launch);
    }

    Launches* recording_ = nullptr;
    const DeviceInfo info_{"emulated", 8, 0, 2, size_t(1) << 30, 99 << 10};
};

}  // namespace

std::vector<DeviceInfo> devices() { return {EmulatedDevice().info()}; }

std::unique_ptr<Device> open_device(uint32_t number) {
    if (number != 0) throw UnsupportedError("there is one emulated device, cuda:0");
    return std::make_unique<EmulatedDevice>();
}

}  // namespace fixmin::cuda
