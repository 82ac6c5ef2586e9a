/* copy.cu --- Tensor.copy_ and Tensor.fill for tensors of any strides, one thread per element. Bound by
 * memory. Dense tensors of one dtype are copied by the copy engine instead. Kernels access pinned host memory
 * through the bus. */
#include "common.cuh"
#include "../csrc/cuda.h"

enum { BLOCK = 256 };

/* Axes that follow each other without gaps in both tensors are merged. */
struct Walk {
    int ndim;
    int64_t n, size[MAX_NDIM], out[MAX_NDIM], x[MAX_NDIM];
};

static Walk walk(const Tensor *out, const Tensor *x) {
    Walk w = {};
    w.n = 1;
    for (int i = 0; i < out->ndim; i++) {
        int64_t size = out->shape[i], last = w.ndim - 1;
        w.n *= size;
        if (size == 1) continue;
        if (w.ndim && w.out[last] == size * out->stride[i] && w.x[last] == size * x->stride[i])
            w.size[last] *= size;
        else w.size[++last] = size, w.ndim++;
        w.out[last] = out->stride[i];
        w.x[last] = x->stride[i];
    }
    return w;
}

static __device__ __forceinline__ void place(const Walk &w, int64_t i, int64_t *out, int64_t *x) {
    *out = *x = 0;
    for (int axis = w.ndim - 1; axis >= 0; axis--) {
        int64_t at = axis ? i % w.size[axis] : i;
        if (axis) i /= w.size[axis];
        *out += at * w.out[axis];
        *x += at * w.x[axis];
    }
}

template <class T> static __device__ __forceinline__ void convert(T *out, const T *x) { *out = *x; }
template <class T, class U> static __device__ __forceinline__ void convert(T *out, const U *x) {
    *out = from_float<T>(to_float(*x));
}

template <class T, class U> __global__ void __launch_bounds__(BLOCK) copy_kernel(T *out, const U *x, Walk w) {
    int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x, to, from;
    if (i >= w.n) return;
    place(w, i, &to, &from);
    convert(out + to, x + from);
}

template <class T> __global__ void __launch_bounds__(BLOCK) fill_kernel(T *out, T value, Walk w) {
    int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x, to, unused;
    if (i >= w.n) return;
    place(w, i, &to, &unused);
    out[to] = value;
}

/* f(type<T>()) with T an unsigned integer of `bytes` bytes. */
template <class F> static int for_size(int64_t bytes, F f) {
    switch (bytes) {
        case 1: return f(type<uint8_t>());
        case 2: return f(type<uint16_t>());
        case 4: return f(type<uint32_t>());
        default: return f(type<uint64_t>());
    }
}

extern "C" int copy_tensor(const Tensor *out, const Tensor *x, void *stream) {
    CudaCall call = {};
    call.stream = stream;
    if (describe_device(&call)) return -1;
    Walk w = walk(out, x);
    dim3 grid((unsigned)ceil_div(w.n, BLOCK));
    auto run = [&](auto t, auto u) {
        using T = typename decltype(t)::is;
        using U = typename decltype(u)::is;
        return launch(&call, copy_kernel<T, U>, grid, BLOCK, 0, (T *)out->data, (const U *)x->data, w);
    };
    if (out->dtype == x->dtype) {
        int64_t size = size_of(out->dtype);
        if (!w.ndim || (w.ndim == 1 && w.out[0] == 1 && w.x[0] == 1)) {
            size_t bytes = (size_t)(w.n * size);
            if (bytes)
                CUDA_TRY(cudaMemcpyAsync(out->data, x->data, bytes, cudaMemcpyDefault, (cudaStream_t)stream));
            return 0;
        }
        return for_size(size, [&](auto t) { return run(t, t); });
    }
    return for_dtype(out->dtype,
                     [&](auto t) { return for_dtype(x->dtype, [&](auto u) { return run(t, u); }); });
}

extern "C" int fill_tensor(const Tensor *out, const void *value, void *stream) {
    CudaCall call = {};
    call.stream = stream;
    if (describe_device(&call)) return -1;
    Walk w = walk(out, out);
    return for_size(size_of(out->dtype), [&](auto t) {
        using T = typename decltype(t)::is;
        T bits;
        memcpy(&bits, value, sizeof bits);
        return launch(&call, fill_kernel<T>, dim3((unsigned)ceil_div(w.n, BLOCK)), BLOCK, 0, (T *)out->data,
                      bits, w);
    });
}
