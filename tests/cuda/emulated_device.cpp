// A device whose memory is the host's and whose kernels run on the emulator. Linked instead of csrc/cuda/driver.cpp.
//
// Tests read and set the variables that begin with emulated_ (emulated_state.py): what is allocated now, and in how
// many allocations or launches from now, of all devices, one fails (0: none). The file EMULATED_LOG gets a line for
// each device that is opened: CUDA_VISIBLE_DEVICES.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string_view>

#include "cuda/attention.cuh"
#include "cuda/ceilings.cuh"
#include "cuda/device.h"
#include "cuda/extracts.cuh"
#include "cuda/persistent.cuh"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"
#include "cuda/scaled_rows.cuh"
#include "error.h"

#define SHOWN extern "C" __attribute__((visibility("default")))
SHOWN std::atomic<long> emulated_bytes{0}, emulated_allocations{0}, emulated_recordings{0}, emulated_devices{0};
SHOWN std::atomic<long> emulated_fail_allocation{0}, emulated_fail_launch{0};
SHOWN void emulated_count_weights() { fixmin::simt::count_weights(); }
SHOWN size_t emulated_weight_bytes() { return fixmin::simt::weight_bytes(); }

namespace fixmin::cuda {
namespace {

constexpr const char* names[] = {
#define FIXMIN_ENTRY(name, Args) #name,
    FIXMIN_KERNELS(FIXMIN_ENTRY)
#undef FIXMIN_ENTRY
};
// Of each kernel; of products of many tokens in narrow and in wide tiles.
std::atomic<long> launches[std::size(names)][2];

}  // namespace
}  // namespace fixmin::cuda

SHOWN long emulated_launches(const char* name, int wide) {
    using namespace fixmin::cuda;
    const auto* const at = std::ranges::find(names, std::string_view(name));
    return at == std::end(names) ? -1 : launches[at - names][wide].load();
}
#undef SHOWN

namespace fixmin::cuda {
namespace {

// As the driver, so that what works here would work there.
constexpr const char* forked = "this process was forked from one that has used the emulated GPU";

// Counts down to the one that fails.
bool fails(std::atomic<long>& in) {
    long left = in;
    while (left > 0 && !in.compare_exchange_weak(left, left - 1)) {
    }
    return left == 1;
}

constexpr void (*kernels[])(const void*) = {
#define FIXMIN_ENTRY(name, Args) [](const void* args) { name(*static_cast<const Args*>(args)); },
    FIXMIN_KERNELS(FIXMIN_ENTRY)
#undef FIXMIN_ENTRY
};

class EmulatedDevice final : public Device {
  public:
    EmulatedDevice() { ++emulated_devices; }
    ~EmulatedDevice() override { --emulated_devices; }

    const DeviceInfo& info() const override { return info_; }

    std::byte* allocate(size_t bytes, const std::string& what) override {
        enter();
        void* memory = fails(emulated_fail_allocation) ? nullptr : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
        if (!memory) throw OutOfMemory("the emulated GPU has no " + std::to_string(bytes) + " bytes for " + what);
        std::memset(memory, 0, bytes);
        ++emulated_allocations;
        emulated_bytes += long(bytes);
        sizes_[memory] = bytes;
        return static_cast<std::byte*>(memory);
    }
    void free(std::byte* memory) noexcept override {
        if (!memory) return;
        --emulated_allocations;
        emulated_bytes -= long(sizes_.at(memory));
        sizes_.erase(memory);
        std::free(memory);
    }
    void upload(std::byte* to, const void* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void download(void* to, const std::byte* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override { copy_bytes(to, from, bytes); }
    void wait() override { enter(); }
    std::unique_ptr<Recording> prepare(const Launches& launches) override {
        enter();
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
        Prepared() { ++emulated_recordings; }
        ~Prepared() override { --emulated_recordings; }
        Launches launches;
    };

    void enter() const {
        if (owner_ != getpid()) throw DeviceError(forked);
        if (failed_) throw DeviceError("the emulated GPU has failed");
    }
    void copy_bytes(void* to, const void* from, size_t bytes) const {
        enter();
        if (bytes) std::memcpy(to, from, bytes);
    }
    void launch_now(Kernel kernel, const Grid& grid, const void* args) override {
        failed_ |= fails(emulated_fail_launch);
        enter();
        const bool wide =
            kernel >= Kernel::many_q8_0 && kernel <= Kernel::many_w8a8 && static_cast<const ProductArgs*>(args)->wide;
        ++launches[size_t(kernel)][wide];
        simt::run([&] { kernels[size_t(kernel)](args); }, {grid.x, grid.y}, grid.threads, grid.shared_bytes,
                  grid.at_once);
    }

    bool failed_ = false;
    const pid_t owner_ = getpid();
    std::map<void*, size_t> sizes_;  // of allocations
    const DeviceInfo info_{"emulated", 8, 0, 2, size_t(1) << 30, 99 << 10, true};
};

}  // namespace

std::vector<DeviceInfo> devices() { return {EmulatedDevice().info()}; }

std::string driver_version() { return "0.0"; }

std::unique_ptr<Device> open_device(uint32_t number) {
    static std::atomic<pid_t> user{0};  // the first process to open one
    pid_t first = 0;
    if (!user.compare_exchange_strong(first, getpid()) && first != getpid()) throw UnsupportedError(forked);
    if (number != 0) throw UnsupportedError("there is one emulated device, cuda:0");
    if (const char* log = std::getenv("EMULATED_LOG")) {
        const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
        std::ofstream(log, std::ios::app) << (visible ? visible : "all") + std::string("\n");
    }
    return std::make_unique<EmulatedDevice>();
}

}  // namespace fixmin::cuda
