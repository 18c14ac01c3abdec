// A device whose memory is the host's and whose kernels run on the emulator. Linked instead of csrc/cuda/driver.cpp.
#include <cstdlib>
#include <cstring>

#include "cuda/attention.cuh"
#include "cuda/ceilings.cuh"
#include "cuda/device.h"
#include "cuda/persistent.cuh"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"
#include "error.h"

namespace fixmin::cuda {
namespace {

constexpr void (*kernels[])(const void*) = {
#define FIXMIN_ENTRY(name, Args) [](const void* args) { name(*static_cast<const Args*>(args)); },
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
    void wait() override {}
    std::unique_ptr<Recording> prepare(const Launches& launches) override {
        auto recording = std::make_unique<Prepared>();
        recording->launches = launches;
        return recording;
    }
    void run(const Recording& recording) override {
        for (const Launch& one : static_cast<const Prepared&>(recording).launches)
            launch_now(one.kernel, one.grid, one.args.data());
    }
    uint32_t blocks_at_once(Kernel, uint32_t, size_t shared_bytes) override {
        return shared_bytes <= info_.shared_bytes ? info_.multiprocessors : 0;
    }

  private:
    struct Prepared final : Recording {
        Launches launches;
    };

    static void copy_bytes(void* to, const void* from, size_t bytes) {
        if (bytes) std::memcpy(to, from, bytes);
    }
    void launch_now(Kernel kernel, const Grid& grid, const void* args) override {
        simt::run([&] { kernels[size_t(kernel)](args); }, {grid.x, grid.y}, grid.threads, grid.shared_bytes,
                  grid.at_once);
    }

    const DeviceInfo info_{"emulated", 8, 0, 2, size_t(1) << 30, 99 << 10, true};
};

}  // namespace

std::vector<DeviceInfo> devices() { return {EmulatedDevice().info()}; }

std::unique_ptr<Device> open_device(uint32_t number) {
    if (number != 0) throw UnsupportedError("there is one emulated device, cuda:0");
    return std::make_unique<EmulatedDevice>();
}

}  // namespace fixmin::cuda
