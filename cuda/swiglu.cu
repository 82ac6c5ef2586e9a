/* swiglu.cu --- out = silu(gate) * up, forward and backward; backward may write over its inputs. Bound by memory: 3 and 5
 * passes. One thread handles 16 bytes of each array. */
#include "common.cuh"

enum { BLOCK = 256 };

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Blocks go along the rows: `blocks` of them to each. */
template<class T, int N> __global__ void __launch_bounds__(BLOCK) forward_kernel(
    T *out, int64_t out_row, const T *gate, int64_t gate_row, const T *up, int64_t up_row, int64_t F, unsigned blocks) {
    int64_t m = blockIdx.x / blocks, i = ((int64_t)(blockIdx.x % blocks) * BLOCK + threadIdx.x) * N;
    if (i >= F) return;
    float g[N], u[N];
    load(g, gate + m * gate_row + i);
    load(u, up + m * up_row + i);
#pragma unroll
    for (int j = 0; j < N; j++) g[j] = g[j] * sigmoid(g[j]) * u[j];
    store(out + m * out_row + i, g);
}

/* d silu(g)/dg = s (1 + g (1 - s)), s = sigmoid(g). */
template<class T, int N> __global__ void __launch_bounds__(BLOCK) backward_kernel(
    T *dgate, int64_t dgate_row, T *dup, int64_t dup_row, const T *dout, int64_t dout_row, const T *gate, int64_t gate_row,
    const T *up, int64_t up_row, int64_t F, unsigned blocks) {
    int64_t m = blockIdx.x / blocks, i = ((int64_t)(blockIdx.x % blocks) * BLOCK + threadIdx.x) * N;
    if (i >= F) return;
    float g[N], u[N], d[N];
    load(g, gate + m * gate_row + i);
    load(u, up + m * up_row + i);
    load(d, dout + m * dout_row + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float s = sigmoid(g[j]), x = g[j];
        g[j] = d[j] * u[j] * s * (1.0f + x * (1.0f - s));
        u[j] = d[j] * x * s;
    }
    store(dgate + m * dgate_row + i, g);
    store(dup + m * dup_row + i, u);
}

extern "C" int swiglu_forward_cuda(const void *args, const CudaCall *call) {
    const SwigluForward *a = (const SwigluForward *)args;
    int64_t M = a->out.shape[0], F = a->out.shape[1];
    return for_dtype(a->out.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        auto run = [&](auto kernel, int N) {
            unsigned blocks = (unsigned)ceil_div(F, (int64_t)BLOCK * N);
            return launch(call, kernel, dim3((unsigned)(M * blocks)), BLOCK, 0, (T *)a->out.data, a->out.stride[0],
                          (const T *)a->gate.data, a->gate.stride[0], (const T *)a->up.data, a->up.stride[0], F, blocks);
        };
        constexpr int N = 16 / sizeof(T);
        bool fit = vectors_fit(&a->out, N) && vectors_fit(&a->gate, N) && vectors_fit(&a->up, N);
        return fit ? run(forward_kernel<T, N>, N) : run(forward_kernel<T, 1>, 1);
    });
}

extern "C" int swiglu_backward_cuda(const void *args, const CudaCall *call) {
    const SwigluBackward *a = (const SwigluBackward *)args;
    int64_t M = a->dout.shape[0], F = a->dout.shape[1];
    return for_dtype(a->dout.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        auto run = [&](auto kernel, int N) {
            unsigned blocks = (unsigned)ceil_div(F, (int64_t)BLOCK * N);
            return launch(call, kernel, dim3((unsigned)(M * blocks)), BLOCK, 0, (T *)a->dgate.data, a->dgate.stride[0],
                          (T *)a->dup.data, a->dup.stride[0], (const T *)a->dout.data, a->dout.stride[0],
                          (const T *)a->gate.data, a->gate.stride[0], (const T *)a->up.data, a->up.stride[0], F, blocks);
        };
        constexpr int N = 16 / sizeof(T);
        bool fit = vectors_fit(&a->dgate, N) && vectors_fit(&a->dup, N) && vectors_fit(&a->dout, N) && vectors_fit(&a->gate, N) &&
                   vectors_fit(&a->up, N);
        return fit ? run(backward_kernel<T, N>, N) : run(backward_kernel<T, 1>, 1);
    });
}
