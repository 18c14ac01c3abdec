// Compiled, not run, where NVIDIA's header is (test_compile.py): that csrc/cuda/driver.cpp, which does without it, has
// its numbers and layouts.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "../../csrc/cuda/driver.cpp"

namespace fixmin::cuda {

static_assert(success == CUDA_SUCCESS && out_of_memory == CUDA_ERROR_OUT_OF_MEMORY &&
              no_device == CUDA_ERROR_NO_DEVICE);
static_assert(no_binary_for_gpu == CUDA_ERROR_NO_BINARY_FOR_GPU);
static_assert(attribute_multiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(attribute_major == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(attribute_minor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(attribute_cooperative == CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH);
static_assert(attribute_shared_optin == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(function_max_dynamic_shared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(capture_of_this_thread == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
static_assert(cooperative == CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
static_assert(programmatic_serialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(sizeof(Address) == sizeof(CUdeviceptr) && sizeof(Handle) == sizeof(CUstream) && sizeof(CUdevice) == 4);

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, n_attributes) == offsetof(CUlaunchConfig, numAttrs));

// The functions: their symbols, which the header gives by macros, and arguments of the same sizes and kinds.
constexpr bool same(const char* a, const char* b) {
    while (*a && *a == *b) ++a, ++b;
    return *a == *b;
}
template <typename Ours, typename Theirs>
constexpr bool compatible = sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
template <typename... Ours, typename... Theirs>
constexpr bool compatible_calls(Result (*)(Ours...), CUresult (*)(Theirs...)) {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) return (compatible<Ours, Theirs> && ...);
    return false;
}
#define FIXMIN_QUOTED(name) #name
#define FIXMIN_SYMBOL(name) FIXMIN_QUOTED(name)
#define FIXMIN_CHECK(name, version, arguments)               \
    static_assert(same(FIXMIN_SYMBOL(name), #name version)); \
    static_assert(compatible_calls(decltype(Driver::name)(nullptr), decltype (&::name)(nullptr)));
FIXMIN_DRIVER_FUNCTIONS(FIXMIN_CHECK)

}  // namespace fixmin::cuda
