/* common.cuh --- what every CUDA kernel stands on: dtypes, launches, vectors of 16 bytes, sums of a warp and
 * a block, and all inline PTX of the general kernels (mma.sync, ldmatrix, cp.async) as named functions.
 *
 * The same .cu files also compile as C++ against tests/emulation, which runs blocks one after another with
 * threads as fibers and has its own body for each of the PTX functions; so a machine without a GPU runs the
 * kernels' logic in its tests. For that, kernels use of CUDA only: __global__, __device__, __shared__
 * (static) and DYNAMIC_SHARED, threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp,
 * __shfl_*_sync, __any_sync, __all_sync, __ballot_sync, the math functions of float, and what is in this
 * file. Every launch goes through launch(). */
#ifndef LONGLORA_COMMON_CUH
#define LONGLORA_COMMON_CUH

#include "../csrc/ops.h"

#ifdef LONGLORA_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pthread.h>
#if CUDART_VERSION < 12080
#error "the CUDA kernels need CUDA 12.8 or later: cudaStreamGetDevice, sm_100 and sm_120"
#endif
#endif

#include <math.h>

/* ---- errors and launches --------------------------------------------------------------------- */

/* For functions that return 0 or -1. */
#define CUDA_TRY(call_)                                                                 \
    do {                                                                                \
        cudaError_t error_ = (call_);                                                   \
        if (error_ != cudaSuccess) return fail("CUDA: %s", cudaGetErrorString(error_)); \
    } while (0)

/* Queues kernel<<<grid, block, shared>>>(args...) on the call's stream; an empty grid is no launch. Dynamic
 * shared memory is always asked for: what a kernel may have without is 48 KiB less its static part, which is
 * not known here. It is an attribute of the kernel, so no other thread may set it between the two; and it
 * does not sink again, as a graph that holds a launch with more may be instantiated or replayed later. */
#ifdef LONGLORA_EMULATION
template <class... P, class... A>
int launch(const CudaCall *, void (*kernel)(P...), dim3 grid, unsigned block, size_t shared, A... args) {
    if (!grid.x || !grid.y || !grid.z) return 0;
    return emulation::run(grid, block, shared, [&] { kernel(static_cast<P>(args)...); });
}
#else
inline pthread_mutex_t shared_is_set = PTHREAD_MUTEX_INITIALIZER;
typedef struct {
    const void *kernel;
    int32_t device;
    int bytes;
} Shared;
inline Shared shared_of[512]; /* the last entry: of all that find no other */

/* The most that a kernel has been launched with on a device, this launch included. */
inline int most_shared(const void *kernel, int32_t device, int bytes) {
    Shared *entry = shared_of;
    while (entry < shared_of + 511 && entry->kernel && (entry->kernel != kernel || entry->device != device))
        entry++;
    if (entry->kernel != kernel || entry->device != device) *entry = { kernel, device, 0 };
    return entry->bytes = entry->bytes < bytes ? bytes : entry->bytes;
}

template <class... P, class... A>
int launch(const CudaCall *call, void (*kernel)(P...), dim3 grid, unsigned block, size_t shared, A... args) {
    if (!grid.x || !grid.y || !grid.z) return 0;
    cudaError_t error = cudaSuccess;
    if (shared) {
        pthread_mutex_lock(&shared_is_set);
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most_shared((const void *)kernel, call->device, (int)shared));
    }
    if (error == cudaSuccess)
        kernel<<<grid, block, shared, (cudaStream_t)call->stream>>>(static_cast<P>(args)...);
    if (error == cudaSuccess) error = cudaGetLastError();
    if (shared) pthread_mutex_unlock(&shared_is_set);
    CUDA_TRY(error);
    return 0;
}
#endif

/* Dynamic shared memory, 128-byte aligned: DYNAMIC_SHARED(float, tile); */
#ifdef LONGLORA_EMULATION
#define DYNAMIC_SHARED(T, name) T *name = (T *)emulation::dynamic_shared()
#else
#define DYNAMIC_SHARED(T, name)                                       \
    extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
    T *name = (T *)dynamic_shared_
#endif

static inline __host__ __device__ int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline int64_t align_up(int64_t bytes) {
    return ceil_div(bytes, 256) * 256;
} /* pieces of a workspace */

/* ---- dtypes ---------------------------------------------------------------------------------- */

typedef __nv_bfloat16 bf16;
typedef __half f16;

template <class T> struct type {
    using is = T;
};

/* The only place where a runtime dtype becomes a compile-time type: f(type<T>()) for float, bf16, f16. */
template <class F> int for_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case F32: return f(type<float>());
        case BF16: return f(type<bf16>());
        case F16: return f(type<f16>());
        default: return fail("CUDA: no kernel for dtype %d", (int)dtype);
    }
}

static inline __host__ int64_t size_of(int32_t dtype) {
    switch (dtype) {
        case F32:
        case I32: return 4;
        case F64:
        case I64: return 8;
        case U8: return 1;
        default: return 2;
    }
}

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x); /* rounds to nearest even */
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

/* ---- vectors --------------------------------------------------------------------------------- */

/* N elements that are loaded and stored at once, by 16 bytes where there are more. */
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T x[N];
};

template <int N, class T> static __device__ __forceinline__ void load(float (&x)[N], const T *from) {
    Vector<T, N> v = *(const Vector<T, N> *)from;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(v.x[i]);
}
template <int N, class T> static __device__ __forceinline__ void store(T *to, const float (&x)[N]) {
    Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; i++) v.x[i] = from_float<T>(x[i]);
    *(Vector<T, N> *)to = v;
}

/* Whether rows of t, a matrix or a vector with a dense last axis, can be read in vectors of `elements`: data
 * and row strides are multiples of them, and so is the row's length. Absent tensors can. */
static inline bool vectors_fit(const Tensor *t, int elements) {
    if (!given(t)) return true;
    int64_t bytes = elements * size_of(t->dtype);
    if ((uintptr_t)t->data % (uintptr_t)bytes || (t->ndim && t->shape[t->ndim - 1] % elements)) return false;
    for (int i = 0; i < t->ndim - 1; i++)
        if (t->shape[i] > 1 && t->stride[i] % elements) return false;
    return true;
}

/* ---- sums ------------------------------------------------------------------------------------ */

enum { WARP = 32 };

/* Every lane gets the sum, in a fixed tree. */
static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* Every thread of a block of whole warps gets the sum; `shared` has 32 floats. May be called again with the
 * same memory. */
static __device__ __forceinline__ float block_sum(float x, float *shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}

/* ---- PTX ------------------------------------------------------------------------------------- */

#ifndef LONGLORA_EMULATION

static __device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* d[16,8] += a[16,16] b[16,8], float32 sums. Fragments as in the PTX manual: with g = lane / 4 and t = lane %
 * 4, a[0] = rows g, k 2t..2t+1; a[1] = rows g+8, same k; a[2] = rows g, k 2t+8..; a[3] = rows g+8, k 2t+8..
 *   b[0] = k 2t..2t+1, column g; b[1] = k 2t+8.., column g       (b is [k][n]; two k of one column in a
 * register) d[0], d[1] = row g, columns 2t, 2t+1; d[2], d[3] = row g+8. */
template <class T> __device__ __forceinline__ void mma_16816(float (&d)[4], const unsigned (&a)[4],
                                                             const unsigned (&b)[2]);
template <> __device__ __forceinline__ void mma_16816<bf16>(float (&d)[4], const unsigned (&a)[4],
                                                            const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> __device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const unsigned (&a)[4],
                                                           const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8x8 matrices of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of matrix
 * i (16 bytes, 16-byte aligned); register i of lane 4 g + t holds elements 2t, 2t+1 of row g of matrix i.
 * _trans: of column g. */
static __device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, both 16-byte aligned, in the background; zeros when not `there`
 * (then `from` is not read). Copies since the last commit are one group; wait<N> returns when all but the
 * newest N groups of this thread have arrived. Other threads see them after a __syncthreads that follows. */
static __device__ __forceinline__ void cp_async_16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* One store of 16 or 8 bytes to global memory: the compiler at times makes four of the plain assignment. */
static __device__ __forceinline__ void store_whole(uint4 *to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
static __device__ __forceinline__ void store_whole(uint2 *to, uint2 x) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

/* Asks for `bytes` from p on, both multiples of 16, to be brought to the second-level cache, and goes on.
 * Before sm_90, which does it in one instruction, nothing. */
static __device__ __forceinline__ void prefetch_l2(const void *p, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#else
    (void)p, (void)bytes;
#endif
}

/* 2^x, relative error 2^-22; exact 0 for -inf. */
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1/x, error 1 ulp; 0 above 2^126. */
static __device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two floats rounded to T in one register, the first in the low half. */
template <class T> __device__ __forceinline__ unsigned pack(float low, float high);
template <> __device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ unsigned pack<f16>(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

#endif
#endif
