/* emulation.h --- a GPU on the CPU: the CUDA that kernels may use (the head of common.cuh lists it), the PTX
 * functions of common.cuh and the CUDA runtime as far as the binding calls it, in C++. So cuda/ runs on a
 * machine without a GPU. setup.py builds the package for it; by hand:
 *
 *     g++ -std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas -fsanitize=alignment,bounds,shift
 *         -DLONGLORA_EMULATION -Icuda -Itests/emulation -x c++ cuda/swiglu.cu tests/emulation/[a-z]*.cpp
 *
 * Blocks run one after another on the calling thread. The threads of a block are fibers, which change only
 * where CUDA lets a thread wait. What a GPU leaves undefined becomes visible:
 *   - memory of cudaMalloc and dynamic shared memory begin as NaN;
 *   - the target of a cp.async is NaN until it is waited for;
 *   - a misaligned access, or one outside an array, is an error (found by -fsanitize);
 *   - a block that stands still is an error that says which threads wait where;
 *   - LONGLORA_EMULATION_ORDER=forward|reversed|shuffled sets the order of threads and blocks, on which
 * results must not depend.
 *
 * Other variables describe the machine: LONGLORA_EMULATION_DEVICES (default 1), _MEMORY (bytes of a device),
 * _SM (compute capability, default 86), _DRIVER (default 13000; 0: no driver), _LOST=1 (streams report an
 * illegal address, as after a kernel's). */
#ifndef LONGLORA_EMULATION_H
#define LONGLORA_EMULATION_H

#include "../../csrc/longlora.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

/* ---- vectors --------------------------------------------------------------------------------- */

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline int2 make_int2(int x, int y) { return { x, y }; }
inline int4 make_int4(int x, int y, int z, int w) { return { x, y, z, w }; }
inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

/* ---- dtypes: rounded to nearest even --------------------------------------------------------- */

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline unsigned __float_as_uint(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
inline int __float_as_int(float x) {
    int i;
    memcpy(&i, &x, 4);
    return i;
}
inline float __int_as_float(int i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}

inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((unsigned)h.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    unsigned u = __float_as_uint(x);
    if (x != x) return { 0x7fff };
    return { (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16) };
}
#ifdef __F16C__
inline float __half2float(__half h) { return _cvtsh_ss(h.bits); }
inline __half __float2half_rn(float x) {
    return { x != x ? (uint16_t)0x7fff : (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT) };
}
#else
inline float __half2float(__half h) {
    unsigned sign = (unsigned)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31,
             mantissa = h.bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float x = (float)mantissa * 0x1p-24f;
    return sign ? -x : x;
}
inline __half __float2half_rn(float x) {
    unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (x != x) return { 0x7fff };
    if (magnitude >= 0x477ff000) return { (uint16_t)(sign | 0x7c00) }; /* 65520 and above */
    if (magnitude < 0x38800000) { /* subnormal: a sum that is rounded at 2^-24 */
        volatile float sum = __uint_as_float(magnitude) + 0.5f;
        return { (uint16_t)(sign | (__float_as_uint(sum) - 0x3f000000)) };
    }
    return { (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13) };
}
#endif
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }

/* ---- arithmetic ------------------------------------------------------------------------------ */

template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

/* ---- blocks and threads: emulation.cpp ------------------------------------------------------- */

namespace emulation {

/* Where in the source a thread waits. Threads that meet at a barrier must be at the same place. */
struct Place {
    const char *file;
    int line;
};
#define EMULATION_HERE emulation::Place place = { __builtin_FILE(), __builtin_LINE() }

enum { SHARED = 99 << 10 }; /* bytes of shared memory that a block can have */

/* Pages of zeros, or NULL. */
void *map(size_t bytes);

/* 0 if the call describes the current device, or -1 after fail(). */
int check_call(const CudaCall *call);

/* Runs body() in every thread of every block. 0, or -1 after fail(). */
int run(dim3 grid, dim3 block, size_t shared, void (*body)(const void *context), const void *context);
template <class F> int run(dim3 grid, dim3 block, size_t shared, const F &body) {
    return run(grid, block, shared, [](const void *context) { (*(const F *)context)(); }, &body);
}

/* A thread ends the launch with this message and stops. */
[[noreturn]] void error(const char *format, ...) __attribute__((format(printf, 1, 2)));

void *dynamic_shared();
void sync_threads(Place place);
void sync_warp(unsigned mask, Place place);
/* The value of lane `from`, all ones if that lane has ended. */
uint64_t shuffle(unsigned mask, uint64_t value, int from, Place place);
unsigned ballot(unsigned mask, bool predicate, Place place);
void ldmatrix(unsigned *r, const void *row, bool transposed, Place place);
void mma(float *d, const unsigned *a, const unsigned *b, bool bf16, Place place);
void copy_async(void *to, const void *from, bool there);
void copy_commit();
void copy_wait(int newest);

template <class T> T shuffle_as(unsigned mask, T x, int from, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = shuffle(mask, bits, from, place);
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline int lane() {
    return (int)((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

}  // namespace emulation

inline void __syncthreads(EMULATION_HERE) { emulation::sync_threads(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) { emulation::sync_warp(mask, place); }

/* The lanes are divided into groups of `width`, a power of two. A lane that would read outside its group
 * keeps its value. */
template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32, EMULATION_HERE) {
    int lane = emulation::lane();
    return emulation::shuffle_as(mask, x, (lane & ~(width - 1)) | (from & (width - 1)), place);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, EMULATION_HERE) {
    int lane = emulation::lane(), from = lane ^ with;
    return emulation::shuffle_as(mask, x, from < (lane | (width - 1)) + 1 ? from : lane, place);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATION_HERE) {
    int lane = emulation::lane(), from = lane + (int)by;
    return emulation::shuffle_as(mask, x, from <= (lane | (width - 1)) ? from : lane, place);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATION_HERE) {
    int lane = emulation::lane(), from = lane - (int)by;
    return emulation::shuffle_as(mask, x, from >= (lane & ~(width - 1)) ? from : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return emulation::ballot(mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return emulation::ballot(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return emulation::ballot(mask, !predicate, place) == 0;
}

/* ---- the PTX functions of common.cuh --------------------------------------------------------- */

template <class T> void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                  EMULATION_HERE) {
    emulation::mma(d, a, b, std::is_same<T, __nv_bfloat16>::value, place);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void *row, EMULATION_HERE) {
    emulation::ldmatrix(r, row, false, place);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row, EMULATION_HERE) {
    emulation::ldmatrix(r, row, true, place);
}
inline void cp_async_16(void *to, const void *from, bool there) { emulation::copy_async(to, from, there); }
inline void cp_async_commit() { emulation::copy_commit(); }
template <int N> void cp_async_wait() { emulation::copy_wait(N); }
inline void store_whole(uint4 *to, uint4 x) { *to = x; }
inline void store_whole(uint2 *to, uint2 x) { *to = x; }
inline void prefetch_l2(const void *, unsigned) {}
inline float reciprocal_fast(float x) { return fabsf(x) > 0x1p126f ? 0.0f : 1.0f / x; }
inline float exp2_fast(float x) { return exp2f(x); }
template <class T> unsigned pack(float low, float high);
template <> inline unsigned pack<__nv_bfloat16>(float low, float high) {
    return __float2bfloat16_rn(low).bits | (unsigned)__float2bfloat16_rn(high).bits << 16;
}
template <> inline unsigned pack<__half>(float low, float high) {
    return __float2half_rn(low).bits | (unsigned)__float2half_rn(high).bits << 16;
}

/* ---- the CUDA runtime: runtime.cpp ----------------------------------------------------------- */

/* Device memory is host memory, and all work is done at once. */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorCapturedEvent = 907,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaMemoryType {
    cudaMemoryTypeUnregistered,
    cudaMemoryTypeHost,
    cudaMemoryTypeDevice,
    cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, l2CacheSize, warpSize;
};
typedef struct EmulatedStream *cudaStream_t;
typedef struct EmulatedEvent *cudaEvent_t;
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1 };
#define cudaStreamLegacy ((cudaStream_t)0x1)
#define cudaStreamPerThread ((cudaStream_t)0x2)

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device);
cudaError_t cudaDriverGetVersion(int *version);
#define CUDART_VERSION 13000
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t bytes);
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = 0);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream = 0);
cudaError_t cudaMemset(void *p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream = 0);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p);
cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *number);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);
template <class T> cudaError_t cudaMalloc(T **p, size_t bytes) { return cudaMalloc((void **)p, bytes); }
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return cudaMallocHost((void **)p, bytes);
}
template <class F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }

#endif
