/* runtime.cpp --- the part of the CUDA runtime that emulation.h declares. */
#include "emulation.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* A test captures a stream by writing a number into it. Work is still done at once, but what a capture
 * forbids is refused. */
struct EmulatedStream {
    int device, capture;
};
struct EmulatedEvent {
    bool recorded, captured;
};
static int capture_in(cudaStream_t stream) {
    return (uintptr_t)stream > (uintptr_t)cudaStreamPerThread ? stream->capture : 0;
}

namespace {

enum { MAX_DEVICES = 8, PAGE = 4096 };
struct Block {
    char *memory, *mapping; /* an unreadable page follows `memory` */
    size_t bytes, mapped;
    int device;
    Block *next;
};
Block *allocated, *pinned;
size_t used[MAX_DEVICES];
thread_local int the_device;
thread_local cudaError_t last_error_;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
struct Locked {
    Locked() { pthread_mutex_lock(&lock); }
    ~Locked() { pthread_mutex_unlock(&lock); }
};

cudaError_t note(cudaError_t error) {
    if (error != cudaSuccess) last_error_ = error;
    return error;
}

size_t number(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? (size_t)strtoull(text, nullptr, 10) : otherwise;
}
int devices() { return (int)number("LONGLORA_EMULATION_DEVICES", 1); }
size_t memory_of_device() { return number("LONGLORA_EMULATION_MEMORY", (size_t)8 << 30); }
int compute_capability() { return (int)number("LONGLORA_EMULATION_SM", 86); }
cudaError_t lost() {
    return number("LONGLORA_EMULATION_LOST", 0) ? note(cudaErrorIllegalAddress) : cudaSuccess;
}

Block **find(Block **list, const void *p) {
    for (; *list; list = &(*list)->next)
        if ((const char *)p >= (*list)->memory && (const char *)p < (*list)->memory + (*list)->bytes)
            return list;
    return nullptr;
}

cudaError_t take(Block **list, void **p, size_t bytes, bool poison) {
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    size_t rounded = (bytes + 255) / 256 * 256, mapped = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    char *mapping = (char *)emulation::map(mapped);
    Block *block = mapping ? (Block *)malloc(sizeof *block) : nullptr;
    if (!block) return note(cudaErrorMemoryAllocation);
    mprotect(mapping + mapped - PAGE, PAGE, PROT_NONE);
    char *memory = mapping + mapped - PAGE - rounded;
    if (poison && bytes <= (size_t)1 << 30) memset(memory, 0xff, rounded);
    *block = { memory, mapping, bytes, mapped, the_device, *list };
    *list = block;
    *p = memory;
    return cudaSuccess;
}

cudaError_t give(Block **list, void *p) {
    if (!p) return cudaSuccess;
    Block **found = find(list, p);
    if (!found || (*found)->memory != p) return note(cudaErrorInvalidValue);
    Block *block = *found;
    *found = block->next;
    munmap(block->mapping, block->mapped);
    if (list == &allocated) used[block->device] -= block->bytes;
    free(block);
    return cudaSuccess;
}

}  // namespace

/* The binding fills in a call's device, so a wrong one means that it has not. A launch reports an earlier
 * error that nobody has taken. */
int emulation::check_call(const CudaCall *call) {
    if (cudaError_t left = cudaGetLastError()) return fail("CUDA: %s", cudaGetErrorString(left));
    if (call->device == the_device && call->sm == compute_capability() &&
        call->shared_bytes == emulation::SHARED)
        return 0;
    return fail(
        "emulation: the call is for cuda:%d, sm_%d with %d bytes of shared memory, the current device is "
        "cuda:%d, sm_%d with %d",
        call->device, call->sm, call->shared_bytes, the_device, compute_capability(), emulation::SHARED);
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    if (number("LONGLORA_EMULATION_DRIVER", 13000) < 13000) return note(cudaErrorInsufficientDriver);
    return *count ? lost() : note(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) {
    *device = the_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices() || device >= MAX_DEVICES) return note(cudaErrorInvalidDevice);
    the_device = device;
    return cudaSuccess;
}
/* By default compute capability 8.6, which with sm_120 has the least shared memory of all that the kernels
 * are built for: 99 KiB. Few multiprocessors, so that grids made from their number stay small. */
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrClockRate:
        case cudaDevAttrMemoryClockRate: *value = 1000000; break;
        case cudaDevAttrMultiProcessorCount: *value = 4; break;
        case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
        case cudaDevAttrComputeCapabilityMajor: *value = compute_capability() / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = compute_capability() % 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 100 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::SHARED; break;
        default: return note(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    *properties = {
        "emulation on the CPU", memory_of_device(), 48 << 10, emulation::SHARED, 8, 6, 4, 40 << 20, 32
    };
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    snprintf(id, (size_t)length, "0000:%02x:00.0", device);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = (int)number("LONGLORA_EMULATION_DRIVER", 13000);
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void **p, size_t bytes) {
    Locked locked;
    if (used[the_device] + bytes > memory_of_device()) return *p = nullptr, note(cudaErrorMemoryAllocation);
    cudaError_t error = take(&allocated, p, bytes, true);
    if (error == cudaSuccess) used[the_device] += bytes;
    return error;
}
cudaError_t cudaFree(void *p) {
    Locked locked;
    return give(&allocated, p);
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    Locked locked;
    return take(&pinned, p, bytes, false);
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return cudaMallocHost(p, bytes); }
cudaError_t cudaFreeHost(void *p) {
    Locked locked;
    return give(&pinned, p);
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    Locked locked;
    *total = memory_of_device();
    *free = *total - used[the_device];
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p) {
    Locked locked;
    Block **found = find(&allocated, p), **host = found ? nullptr : find(&pinned, p);
    *attributes = { found  ? cudaMemoryTypeDevice
                    : host ? cudaMemoryTypeHost
                           : cudaMemoryTypeUnregistered,
                    found ? (*found)->device : -1, found ? (void *)p : nullptr, found ? nullptr : (void *)p };
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    if (bytes) memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
    if (width > to_pitch || width > from_pitch) return note(cudaErrorInvalidValue);
    for (size_t i = 0; i < height; i++)
        cudaMemcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t) {
    if (to_device < 0 || to_device >= devices() || from_device < 0 || from_device >= devices())
        return note(cudaErrorInvalidDevice);
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    if (bytes) memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    return cudaMemset(p, value, bytes);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = (cudaStream_t)malloc(sizeof **stream);
    if (!*stream) return note(cudaErrorMemoryAllocation);
    **stream = { the_device, 0 };
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return lost(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return lost(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags) {
    return flags ? note(cudaErrorInvalidValue) : cudaSuccess; /* flags are for events of captured graphs */
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) {
    *device = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread
                  ? the_device
                  : stream->device;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *number) {
    *number = (unsigned long long)capture_in(stream);
    *status = *number ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = (cudaEvent_t)malloc(sizeof **event);
    if (!*event) return note(cudaErrorMemoryAllocation);
    **event = { false, false };
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *event = { true, capture_in(stream) != 0 };
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return event->captured ? note(cudaErrorCapturedEvent) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->recorded || !to->recorded) return note(cudaErrorInvalidResourceHandle);
    *milliseconds = 0.001f;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error_;
    last_error_ = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error_; }
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotReady: return "cudaErrorNotReady";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorCapturedEvent:
            return "operation not permitted on an event last recorded in a capturing stream";
    }
    return "unrecognized error code";
}
