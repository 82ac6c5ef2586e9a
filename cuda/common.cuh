/* common.cuh --- the base of all CUDA kernels: launches, dtypes, the choice of a kernel by the GPU, vectors
 * of 16 bytes, sums over a warp and a block, and all inline PTX (mma.sync, ldmatrix, cp.async) as named
 * functions.
 *
 * The .cu files also compile as C++ against tests/emulation, which runs blocks one after another, has fibers
 * as threads and defines the PTX functions again. So the tests run the kernels' logic on machines without a
 * GPU. For that, kernels use only this part of CUDA: __global__, __device__, __shared__ (static) and
 * DYNAMIC_SHARED, threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_*_sync,
 * __any_sync,
 * __all_sync, __ballot_sync, the float math functions, and this file. Every launch goes through launch(). */
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
#if CUDART_VERSION < 11080 /* OLDEST_CUDA of setup.py */
#error "the CUDA kernels need CUDA 11.8 or later"
#endif
#endif

#define HOST_DEVICE __host__ __device__
#include "../csrc/workspace.h" /* also ceil_div, size_of and WARP */

#include <math.h>

/* ---- errors and launches --------------------------------------------------------------------- */

/* In functions that return 0, or -1 after fail(). */
#define CUDA_TRY(call_)                                                                 \
    do {                                                                                \
        cudaError_t error_ = (call_);                                                   \
        if (error_ != cudaSuccess) return fail("CUDA: %s", cudaGetErrorString(error_)); \
    } while (0)

/* Queues kernel<<<grid, block, shared>>>(args...) on the call's stream. An empty grid launches nothing.
 *
 * Every launch with dynamic shared memory sets the kernel's limit, because the limit without is 48 KiB less
 * the static part, which is not known here. The limit is an attribute of the kernel: a lock keeps other
 * threads from changing it before the launch, and it never decreases, because a captured graph may later
 * replay a launch that needs more. */
#ifdef LONGLORA_EMULATION
template <class... P, class... A>
int launch(const CudaCall *call, void (*kernel)(P...), dim3 grid, unsigned block, size_t shared, A... args) {
    if (!grid.x || !grid.y || !grid.z) return 0;
    if (emulation::check_call(call)) return -1;
    return emulation::run(grid, block, shared, [&] { kernel(static_cast<P>(args)...); });
}
#else
inline pthread_mutex_t shared_is_set = PTHREAD_MUTEX_INITIALIZER;
typedef struct {
    const void *kernel;
    int32_t device;
    int bytes;
} Shared;
inline Shared shared_of[512]; /* when it is full, further kernels share the last entry */

/* The largest size that a kernel has been launched with on a device, including this launch. */
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

/* ---- dtypes ---------------------------------------------------------------------------------- */

typedef __nv_bfloat16 bf16;
typedef __half f16;

template <class T> struct type {
    using is = T;
};

/* f(type<T>()) with T float, bf16 or f16. The only place where a runtime dtype becomes a type. */
template <class F> int for_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case F32: return f(type<float>());
        case BF16: return f(type<bf16>());
        case F16: return f(type<f16>());
        default: return fail("CUDA: no kernel for dtype %d", (int)dtype);
    }
}

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x); /* rounds to nearest even */
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

/* ---- the choice of a kernel ------------------------------------------------------------------ */

/* Chooses a kernel, or an op's whole implementation, by the GPU; no other function does. `general` runs on
 * every GPU from sm_80 on. `hopper` comes from cuda/hopper/, whose files are compiled for sm_90a alone, so it
 * runs on sm_90 only. A build without code for sm_90a has no such kernels, hence HOPPER():
 *
 *     choose(call, forward<T>, HOPPER(forward_hopper<T>))(a, call) */
template <class Kernel>
Kernel choose(const CudaCall *call, Kernel general, typename type<Kernel>::is hopper) {
    return hopper && call->sm == 90 ? hopper : general;
}

#ifdef LONGLORA_HOPPER /* set by setup.py */
#define HOPPER(kernel) (kernel)
#else
#define HOPPER(kernel) nullptr
#endif

/* ---- vectors --------------------------------------------------------------------------------- */

/* N elements that are loaded and stored at once, in steps of 16 bytes if they are longer. */
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

/* Whether rows of t, which has a dense last axis, can be read in vectors of `elements`: the address, the
 * strides and the length of a row must be multiples of a vector. True for tensors that are not given. */
static inline bool vectors_fit(const Tensor *t, int elements) {
    if (!given(t)) return true;
    int64_t bytes = elements * size_of(t->dtype);
    if ((uintptr_t)t->data % (uintptr_t)bytes || (t->ndim && t->shape[t->ndim - 1] % elements)) return false;
    for (int i = 0; i < t->ndim - 1; i++)
        if (t->shape[i] > 1 && t->stride[i] % elements) return false;
    return true;
}

/* ---- sums ------------------------------------------------------------------------------------ */

/* Every lane gets the sum, added in a fixed tree. */
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

/* Every thread of a block of whole warps gets the sum. `shared` has 32 floats, and a next call may use the
 * same ones. */
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

/* d[16,8] += a[16,16] b[16,8], float32 sums. Fragments as in the PTX manual, with g = lane / 4, t = lane % 4:
 *
 *   - a[0]: row g, k 2t and 2t+1; a[1]: row g+8, the same k; a[2]: row g, k 2t+8 and 2t+9; a[3]: row g+8,
 * these;
 *   - b[0]: column g, k 2t and 2t+1; b[1]: column g, k 2t+8 and 2t+9;
 *   - d[0], d[1]: row g, columns 2t and 2t+1; d[2], d[3]: row g+8, the same columns. */
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

/* Loads four 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + r passes the address of row r of
 * matrix i, 16 aligned bytes. Register i of lane 4 g + t gets elements 2t and 2t+1 of row g of matrix i, with
 * _trans of column g. */
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

/* Copies 16 bytes from global to shared memory in the background; both addresses are 16-byte aligned. If not
 * `there`, writes zeros and does not read `from`. The copies since the last commit are one group. wait<N>
 * returns when all but the newest N groups of this thread have arrived; other threads see them after the next
 * __syncthreads. */
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

/* One store of 16 or 8 bytes to global memory. The compiler sometimes splits a plain assignment into four. */
static __device__ __forceinline__ void store_whole(uint4 *to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
static __device__ __forceinline__ void store_whole(uint2 *to, uint2 x) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

/* Starts to load `bytes` from p on, both multiples of 16, into the second-level cache. Does nothing before
 * sm_90, which has one instruction for it that CUDA 12 knows. */
static __device__ __forceinline__ void prefetch_l2(const void *p, unsigned bytes) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12000
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#else
    (void)p, (void)bytes;
#endif
}

/* 2^x with a relative error of 2^-22; exactly 0 for -inf. */
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1/x with an error of 1 ulp; 0 for x above 2^126. */
static __device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two floats, rounded to T, in one register; the first one is in the low half. */
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
