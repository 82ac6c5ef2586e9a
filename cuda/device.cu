/* device.cu --- devices, memory, copies and streams for the binding: csrc/cuda.h on the CUDA runtime. */
#include "common.cuh"
#include "../csrc/cuda.h"

#include <stdlib.h>

/* ---- devices --------------------------------------------------------------------------------- */

static bool touched[MAX_DEVICES]; /* devices that may have queued work */

static void versions(int *driver, int *runtime) {
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
    if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}

static int count() {
    static int known;
    if (known) return known;
    int n = 0, driver, runtime;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n > 0) return known = n < MAX_DEVICES ? n : MAX_DEVICES;
    cudaGetLastError();
    versions(&driver, &runtime);
    if (!driver) return fail("there is no NVIDIA driver");
    if (error == cudaErrorInsufficientDriver)
        return fail("the NVIDIA driver is too old: it supports CUDA %d.%d, this build needs CUDA %d.%d",
                    driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaSuccess || error == cudaErrorNoDevice) {
        const char *visible = getenv("CUDA_VISIBLE_DEVICES");
        return fail("the NVIDIA driver shows no GPU%s%s", visible ? " with CUDA_VISIBLE_DEVICES=" : "",
                    visible ? visible : "");
    }
    return fail("CUDA: %s", cudaGetErrorString(error));
}

static int sm_of(int device, int *sm) {
    int major, minor;
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    *sm = major * 10 + minor;
    return 0;
}

/* "80 90a 100 120": the GPUs that this build has code for, and PTX for GPUs later than the last one. */
#ifdef LONGLORA_EMULATION
static const char built_for[] = "emulation";
static bool covered(int) { return true; }
#else
#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)
static const char built_for[] = TEXT(LONGLORA_CUDA_ARCHS);

/* Code for sm_80 runs on sm_80 and later GPUs of the same generation. Code with a letter (90a) runs on that
 * GPU only. PTX, of the last entry, runs on all later GPUs. */
static bool covered(int sm) {
    for (const char *p = built_for; *p;) {
        char *end;
        int arch = (int)strtol(p, &end, 10);
        bool only = *end && *end != ' ';
        end += only;
        if (arch == sm || (!only && arch < sm && (!*end || arch / 10 == sm / 10))) return true;
        p = *end ? end + 1 : end;
    }
    return false;
}
#endif

static int usable(int device) {
    static bool known[MAX_DEVICES];
    int n, sm = 0;
    if (device >= 0 && device < MAX_DEVICES && known[device]) return 0;
    if ((n = count()) < 0) return -1;
    if (device < 0 || device >= n)
        return fail("there %s %d CUDA device%s", n == 1 ? "is" : "are", n, n == 1 ? "" : "s");
    if (sm_of(device, &sm)) return -1;
    if (sm < OLDEST_SM)
        return fail("the GPU is an sm_%d, the oldest supported one is sm_%d", sm, (int)OLDEST_SM);
    if (!covered(sm))
        return fail("the GPU is an sm_%d, this build has code for %s: see LONGLORA_CUDA_ARCH in setup.py", sm,
                    built_for);
    known[device] = true;
    return 0;
}

static int properties(int device, CudaProperties *p) {
    cudaDeviceProp all;
    CUDA_TRY(cudaGetDeviceProperties(&all, device));
    CUDA_TRY(cudaDeviceGetPCIBusId(p->bus, sizeof p->bus, device));
    memcpy(p->name, all.name, sizeof p->name);
    p->multiprocessors = all.multiProcessorCount;
    return sm_of(device, &p->sm);
}

/* enter() pushes the primary context of a device that is not the thread's current one. Unlike two calls of
 * cudaSetDevice, this restores the thread's state exactly and creates no context on an unused device. */
#ifdef LONGLORA_EMULATION
static thread_local int before;
static int push(int device) {
    CUDA_TRY(cudaGetDevice(&before));
    CUDA_TRY(cudaSetDevice(device));
    return 0;
}
static void pop() { cudaSetDevice(before); }
#else
static int (*retain_context)(void **context, int device), (*push_context)(void *context),
    (*pop_context)(void **context);

static int driver_function(const char *name, void **function) {
    *function = NULL;
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult found;
    CUDA_TRY(cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found));
#else
    CUDA_TRY(cudaGetDriverEntryPoint(name, function, cudaEnableDefault));
#endif
    return *function ? 0 : fail("CUDA: the driver has no %s", name);
}
static int find_contexts() {
    return !push_context && (driver_function("cuDevicePrimaryCtxRetain", (void **)&retain_context) ||
                             driver_function("cuCtxPopCurrent", (void **)&pop_context) ||
                             driver_function("cuCtxPushCurrent", (void **)&push_context))
               ? -1
               : 0;
}
static int push(int device) {
    static void *contexts[MAX_DEVICES];
    if (find_contexts()) return -1;
    int error = contexts[device] ? 0 : retain_context(&contexts[device], device);
    if (!error) error = push_context(contexts[device]);
    return error ? fail("CUDA: cannot make cuda:%d the current device: driver error %d", device, error) : 0;
}
static void pop() {
    void *context;
    pop_context(&context);
}
#endif

static int enter(int device) {
    int current;
    CUDA_TRY(cudaGetDevice(&current));
    touched[device] = true;
    if (current == device) return 0;
    return push(device) ? -1 : 1;
}
static void leave(int entered) {
    if (entered > 0) pop();
}

extern "C" int describe_device(CudaCall *call) {
    static uint64_t
        known[MAX_DEVICES]; /* sm and shared bytes; one number, so that no thread sees half of it */
    CUDA_TRY(cudaGetDevice(&call->device));
    uint64_t *both = &known[call->device];
    if (!*both) {
        int sm = 0, bytes = 0;
        if (sm_of(call->device, &sm)) return -1;
        CUDA_TRY(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, call->device));
        *both = (uint64_t)sm << 32 | (uint32_t)bytes;
    }
    call->sm = (int32_t)(*both >> 32);
    call->shared_bytes = (int32_t)*both;
    return 0;
}

/* While an object lives, this thread may do what a capture on another stream forbids. Its work is part of no
 * graph. */
struct Relaxed {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

static int recover(int device) {
    cudaGetLastError();
    int entered = enter(device);
    Relaxed relaxed;
    cudaError_t error =
        cudaStreamQuery(cudaStreamPerThread); /* after a fatal error, every call returns that error */
    cudaGetLastError();
    leave(entered);
    return error != cudaSuccess && error != cudaErrorNotReady;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static int memory(int64_t *free, int64_t *total) {
    size_t available, all;
    CUDA_TRY(cudaMemGetInfo(&available, &all));
    *free = (int64_t)available;
    *total = (int64_t)all;
    return 0;
}

static int no_memory(cudaError_t error, int64_t bytes) {
    if (error != cudaErrorMemoryAllocation) return fail("CUDA: %s", cudaGetErrorString(error));
    cudaGetLastError();
    return fail("out of memory: cannot allocate %lld bytes", (long long)bytes);
}

static int allocate(int64_t bytes, void **p) {
    Relaxed relaxed;
    cudaError_t error = cudaMalloc(p, bytes ? (size_t)bytes : 1);
    if (error != cudaSuccess) return no_memory(error, bytes);
    CUDA_TRY(cudaMemsetAsync(*p, 0, (size_t)bytes, cudaStreamPerThread));
    CUDA_TRY(cudaStreamSynchronize(cudaStreamPerThread)); /* so that every stream sees zeros */
    return 0;
}
static void release(void *p) {
    Relaxed relaxed;
    cudaFree(p);
    cudaGetLastError();
}

static int allocate_pinned(int64_t bytes, void **p) {
    cudaError_t error = cudaHostAlloc(p, bytes ? (size_t)bytes : 1, cudaHostAllocPortable);
    if (error != cudaSuccess) return no_memory(error, bytes);
    memset(*p, 0, (size_t)bytes);
    return 0;
}
static void release_pinned(void *p) {
    for (int device = 0; device < MAX_DEVICES; device++) {
        int entered = touched[device] ? enter(device) : -1;
        if (entered < 0) continue;
        cudaDeviceSynchronize();
        leave(entered);
    }
    cudaFreeHost(p);
    cudaGetLastError();
}

static int copy_bytes(void *to, const void *from, int64_t bytes, void *stream) {
    if (bytes) CUDA_TRY(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDefault, (cudaStream_t)stream));
    return 0;
}
static int copy_peer(void *to, int to_device, const void *from, int from_device, int64_t bytes,
                     void *stream) {
    if (bytes)
        CUDA_TRY(cudaMemcpyPeerAsync(to, to_device, from, from_device, (size_t)bytes, (cudaStream_t)stream));
    return 0;
}

/* ---- streams --------------------------------------------------------------------------------- */

static int synchronize(void *stream) {
    CUDA_TRY(cudaStreamSynchronize((cudaStream_t)stream));
    return 0;
}
static int synchronize_device() {
    CUDA_TRY(cudaDeviceSynchronize());
    return 0;
}
#if CUDART_VERSION >= 12080
static int device_of(void *stream, int *device) {
    CUDA_TRY(cudaStreamGetDevice((cudaStream_t)stream, device));
    return 0;
}
#else /* older runtimes do not say, but the driver knows the stream's context */
static int device_of(void *stream, int *device) {
    static int (*context_of)(void *stream, void **context), (*current_device)(int *device);
    void *context;
    if (find_contexts() || driver_function("cuStreamGetCtx", (void **)&context_of) ||
        driver_function("cuCtxGetDevice", (void **)&current_device))
        return -1;
    int error = context_of(stream, &context);
    if (!error) error = push_context(context);
    if (!error) {
        error = current_device(device);
        pop();
    }
    return error ? fail("CUDA: no device has this stream: driver error %d", error) : 0;
}
#endif

static int stream_device(void *stream, int *device) {
    *device = -1;
    return (uintptr_t)stream > (uintptr_t)cudaStreamPerThread ? device_of(stream, device) : 0;
}
static int64_t capture(void *stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long number = 0;
    if ((uintptr_t)stream >
        (uintptr_t)cudaStreamLegacy) /* neither it nor the default stream is ever captured */
        CUDA_TRY(cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &number));
    return status == cudaStreamCaptureStatusActive ? (int64_t)number : 0;
}

static int mark(void *stream, void **made) {
    cudaEvent_t event;
    CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    *made = event;
    CUDA_TRY(cudaEventRecord(event, (cudaStream_t)stream));
    return 0;
}
static int wait(void *stream, void *mark) {
    CUDA_TRY(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)mark, 0));
    return 0;
}
static int passed(void *mark) {
    cudaError_t error = cudaEventQuery((cudaEvent_t)mark);
    if (error == cudaSuccess) return 1;
    cudaGetLastError(); /* so that the next launch does not report it */
    return error == cudaErrorNotReady ? 0 : fail("CUDA: %s", cudaGetErrorString(error));
}
static int await(void *mark) {
    CUDA_TRY(cudaEventSynchronize((cudaEvent_t)mark));
    return 0;
}
static void forget(void *mark) { cudaEventDestroy((cudaEvent_t)mark); }

/* ---- the table ------------------------------------------------------------------------------- */

extern "C" const CudaRuntime cuda_runtime = { built_for,      count,     usable,      properties,
                                              versions,       enter,     leave,       describe_device,
                                              recover,        allocate,  release,     allocate_pinned,
                                              release_pinned, memory,    copy_tensor, fill_tensor,
                                              copy_bytes,     copy_peer, synchronize, synchronize_device,
                                              stream_device,  capture,   mark,        wait,
                                              passed,         await,     forget,      cublas_paths,
                                              cublas_version };
