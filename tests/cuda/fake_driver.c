// A libcuda.so.1 without a GPU, for tests/cuda/test_driver.py, and a libnvidia-ml.so.1. Memory is the host's and
// kernels compute nothing. It fails as the environment says: FAKE_INIT, FAKE_CONTEXT, FAKE_MODULE, FAKE_LAUNCH,
// FAKE_GRAPH, FAKE_NVML, FAKE_RELEASE (of NVML's) are what these calls return; FAKE_VERSION, FAKE_DEVICES,
// FAKE_CAPABILITY (75), FAKE_MEMORY (bytes), FAKE_RESIDENT (blocks of a kernel at once) what the driver and its GPU
// are. FAKE_LOG is a file that gets a line for whatever is taken or given back.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;
typedef unsigned long long Address;

static long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void note(const char* what) {
    const char* path = getenv("FAKE_LOG");
    if (!path) return;
    FILE* file = fopen(path, "a");
    fprintf(file, "%s\n", what);
    fclose(file);
}

static size_t used;

static pid_t owner;

Result cuInit(unsigned flags) {
    if (owner && owner != getpid()) return 3;  // not initialised: what CUDA says in a forked child
    owner = getpid();
    return (Result)setting("FAKE_INIT", (long)flags);
}
Result cuDriverGetVersion(int* version) { return *version = (int)setting("FAKE_VERSION", 13000), 0; }
Result cuGetErrorString(Result result, const char** text) {
    static char words[64];
    snprintf(words, sizeof words, "failure %d of the fake", result);
    return *text = words, 0;
}
Result cuDeviceGetCount(int* count) { return *count = (int)setting("FAKE_DEVICES", 1), 0; }
Result cuDeviceGet(int* device, int number) { return *device = number, 0; }
Result cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Fake GPU") + device < 0; }
Result cuDeviceGetAttribute(int* value, int which, int device) {
    const int capability = (int)setting("FAKE_CAPABILITY", 90);
    *value = which == 75   ? capability / 10
             : which == 76 ? capability % 10
             : which == 97 ? 200000
             : which == 95 ? 1
                           : 100 + device;
    return 0;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return *bytes = (size_t)setting("FAKE_MEMORY", 1 << 30), device > 1;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
    const Result result = (Result)setting("FAKE_CONTEXT", 0);
    if (result == 0) note("retain");
    return *context = &used, result + (device > 1);
}
Result cuDevicePrimaryCtxRelease_v2(int device) { return note("release"), device > 1; }
Result cuCtxSetCurrent(void* context) { return context ? 0 : 201; }
Result cuMemGetInfo_v2(size_t* left, size_t* all) {
    *all = (size_t)setting("FAKE_MEMORY", 1 << 30);
    return *left = *all - used, 0;
}
Result cuModuleLoadData(void** module, const void* image) {
    const Result result = (Result)setting("FAKE_MODULE", 0);
    // What nvcc writes begins with this number, whatever is in it.
    if (*(const uint32_t*)image != 0xba55ed50u) return 200;
    if (result == 0) note("load");
    return *module = &used, result;
}
Result cuModuleUnload(void* module) { return note("unload"), module == NULL; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
    return *function = strdup(name), module == NULL;
}
Result cuFuncSetAttribute(void* function, int which, int value) { return !(function && which == 8 && value > 0); }
Result cuStreamCreate(void** stream, unsigned flags) { return *stream = &used, flags != 1; }
Result cuStreamDestroy_v2(void* stream) { return stream == NULL; }
Result cuStreamSynchronize(void* stream) { return stream == NULL; }
Result cuMemAlloc_v2(Address* address, size_t bytes) {
    if (bytes == 0) return 1;
    if (used + bytes > (size_t)setting("FAKE_MEMORY", 1 << 30)) return 2;
    size_t* memory = malloc(bytes + sizeof(size_t));
    *memory = bytes;
    used += bytes;
    note("alloc");
    return *address = (Address)(uintptr_t)(memory + 1), 0;
}
Result cuMemFree_v2(Address address) {
    size_t* memory = (size_t*)(uintptr_t)address - 1;
    used -= *memory;
    free(memory);
    return note("free"), 0;
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t n, void* stream) {
    return memset((void*)(uintptr_t)to, value, n), stream == NULL;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t n, void* stream) {
    return memcpy((void*)(uintptr_t)to, from, n), stream == NULL;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t n, void* stream) {
    return memcpy(to, (const void*)(uintptr_t)from, n), stream == NULL;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, void* stream) {
    return memcpy((void*)(uintptr_t)to, (const void*)(uintptr_t)from, n), stream == NULL;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
    return *blocks = (int)setting("FAKE_RESIDENT", 1), !(function && threads % 32 == 0 && shared <= 200000);
}

// A graph is what was launched while it was recorded: here the number of launches.
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned n_attributes;
} LaunchConfig;
static int recording;
static size_t launches;

Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
    const unsigned *grid = config->grid, *block = config->block;
    const int sane = function && config->stream && parameters && !extra && grid[0] && grid[1] && grid[2] == 1 &&
                     block[1] == 1 && block[2] == 1 && block[0] % 32 == 0 && block[0] <= 1024 &&
                     config->shared <= 200000 && config->n_attributes <= 1;
    launches += (size_t)recording;
    if (!strncmp(function, "run_step", 8)) note("persistent");
    return sane ? (recording ? 0 : (Result)setting("FAKE_LAUNCH", 0)) : 1;
}
Result cuStreamBeginCapture_v2(void* stream, int mode) {
    launches = 0;
    return recording = 1, mode != 1 || !stream;
}
Result cuStreamEndCapture(void* stream, void** graph) {
    recording = 0;
    *graph = malloc(sizeof launches);
    memcpy(*graph, &launches, sizeof launches);
    return note("graph"), stream == NULL;
}
Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    *executable = malloc(sizeof launches);
    memcpy(*executable, graph, sizeof launches);
    return note("instantiate"), flags != 0;
}
Result cuGraphLaunch(void* executable, void* stream) {
    return *(size_t*)executable && stream ? (Result)setting("FAKE_GRAPH", 0) : 1;
}
Result cuGraphDestroy(void* graph) {
    free(graph);
    return note("destroy graph"), 0;
}
Result cuGraphExecDestroy(void* executable) {
    free(executable);
    return note("destroy instance"), 0;
}

Result nvmlInit_v2(void) { return note("nvml init"), (Result)setting("FAKE_NVML", 0); }
Result nvmlSystemGetDriverVersion(char* release, unsigned size) {
    return snprintf(release, size, "580.65.06"), (Result)setting("FAKE_RELEASE", 0);
}
Result nvmlShutdown(void) { return note("nvml shutdown"), 0; }
