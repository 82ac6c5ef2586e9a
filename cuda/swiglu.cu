/* swiglu.cu --- out = silu(gate) * up, forward and backward. The backward may overwrite its inputs.
 *
 * Bound by memory: 3 passes over the elements forward and 5 backward, which are 6 M F and 10 M F bytes in 16
 * bits; 0.54 and 0.90 GB for F = 11008 and 8192 rows. A thread issues loads of 64 bytes (forward) or 48 bytes
 * (backward) before it uses the first one. */
#include "rows.cuh"

enum { FORWARD = 2, BACKWARD = 1 }; /* vectors per thread, of each array */

/* Below LOWEST exp(-x) leaves float32's range, and exp(x) is the sigmoid. */
static __device__ __forceinline__ float sigmoid(float x) {
    constexpr float LOWEST = -87;
    float e = expf(x < LOWEST ? x : -x);
    return x < LOWEST ? e : reciprocal_fast(1.0f + e);
}
/* For products with a sigmoid of 0: -inf times that is NaN. */
static __device__ __forceinline__ float clipped(float x) { return fmaxf(x, -1e30f); }

template <class T, bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    forward_kernel(T *out, int64_t out_row, const T *gate, int64_t gate_row, const T *up, int64_t up_row,
                   int64_t M, int64_t F, unsigned shift) {
    constexpr int N = 16 / sizeof(T), U = FORWARD;
    Part p = part<N, U>(shift);
    for (int64_t m = p.m; m < M; m += p.rows) {
        Raw<T, N> gates[U], ups[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            get<ALIGNED>(gates[u], gate + m * gate_row, p.c + u * p.step, F);
            get<ALIGNED>(ups[u], up + m * up_row, p.c + u * p.step, F);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            float g[N], x[N];
            widen<T>(g, gates[u]);
            widen<T>(x, ups[u]);
#pragma unroll
            for (int j = 0; j < N; j++) g[j] = clipped(g[j]) * sigmoid(g[j]) * x[j];
            narrow<T>(gates[u], g);
            put<ALIGNED>(out + m * out_row, gates[u], p.c + u * p.step, F);
        }
    }
}

/* d silu(g)/dg = s (1 + g (1 - s)) with s = sigmoid(g). */
template <class T, bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    backward_kernel(T *dgate, int64_t dgate_row, T *dup, int64_t dup_row, const T *dout, int64_t dout_row,
                    const T *gate, int64_t gate_row, const T *up, int64_t up_row, int64_t M, int64_t F,
                    unsigned shift) {
    constexpr int N = 16 / sizeof(T);
    Part p = part<N, BACKWARD>(shift);
    for (int64_t m = p.m; m < M; m += p.rows) {
        Raw<T, N> gates, ups, douts;
        float g[N], x[N], d[N];
        get<ALIGNED>(gates, gate + m * gate_row, p.c, F);
        get<ALIGNED>(ups, up + m * up_row, p.c, F);
        get<ALIGNED>(douts, dout + m * dout_row, p.c, F);
        widen<T>(g, gates);
        widen<T>(x, ups);
        widen<T>(d, douts);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float s = sigmoid(g[j]), y = clipped(g[j]);
            g[j] = d[j] * x[j] * s * (1.0f + y * (1.0f - s));
            x[j] = d[j] * y * s;
        }
        narrow<T>(gates, g);
        narrow<T>(ups, x);
        put<ALIGNED>(dgate + m * dgate_row, gates, p.c, F);
        put<ALIGNED>(dup + m * dup_row, ups, p.c, F);
    }
}

extern "C" int swiglu_forward_cuda(const void *args, const CudaCall *call) {
    const SwigluForward *a = (const SwigluForward *)args;
    Matrix x = flatten(&a->out, &a->gate, &a->up);
    return for_dtype(a->out.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        constexpr int N = 16 / sizeof(T);
        Deal d = deal<N, FORWARD>(x.M, x.C);
        bool fit = aligned(N, x.C, &a->out, &a->gate, &a->up);
        return launch(call, fit ? forward_kernel<T, true> : forward_kernel<T, false>, d.grid, BLOCK, 0,
                      (T *)a->out.data, a->out.stride[0], (const T *)a->gate.data, a->gate.stride[0],
                      (const T *)a->up.data, a->up.stride[0], x.M, x.C, d.shift);
    });
}

extern "C" int swiglu_backward_cuda(const void *args, const CudaCall *call) {
    const SwigluBackward *a = (const SwigluBackward *)args;
    Matrix x = flatten(&a->dout, &a->dgate, &a->dup, &a->gate, &a->up);
    return for_dtype(a->dout.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        constexpr int N = 16 / sizeof(T);
        Deal d = deal<N, BACKWARD>(x.M, x.C);
        bool fit = aligned(N, x.C, &a->dgate, &a->dup, &a->dout, &a->gate, &a->up);
        return launch(call, fit ? backward_kernel<T, true> : backward_kernel<T, false>, d.grid, BLOCK, 0,
                      (T *)a->dgate.data, a->dgate.stride[0], (T *)a->dup.data, a->dup.stride[0],
                      (const T *)a->dout.data, a->dout.stride[0], (const T *)a->gate.data, a->gate.stride[0],
                      (const T *)a->up.data, a->up.stride[0], x.M, x.C, d.shift);
    });
}
