/* adamw.cu --- AdamW (arXiv 1711.05101, algorithm 2) on float32 masters and moments, in place, in one pass.
 *
 * Bound by memory: a parameter has 16 bytes in and 12 out, and 2 more for a copy in 16 bits. Each thread
 * loads 4 vectors of 16 bytes at a time. The host computes what depends on the step only, in float64, as
 * csrc/cpu/adamw.c does. */
#include "rows.cuh"

enum { N = 4 }; /* parameters per thread */

struct Step {
    float decay, rate, root, keep1, keep2, add1, add2, eps, scale;
};

template <bool ALIGNED, class T>
static __device__ __forceinline__ void put_as(void *to, const float (&x)[N], int64_t c, int64_t C) {
    Raw<T, N> y;
    narrow<T>(y, x);
    put<ALIGNED>((T *)to, y, c, C);
}

template <bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    adamw_kernel(float *param, float *m, float *v, void *copy, int copy_dtype, const float *grad, int64_t C,
                 Step s) {
    int64_t c = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    if (c >= C) return;
    Raw<float, N> grads, ms, vs, params;
    get<ALIGNED>(grads, grad, c, C);
    get<ALIGNED>(ms, m, c, C);
    get<ALIGNED>(vs, v, c, C);
    get<ALIGNED>(params, param, c, C);
    float g[N], a[N], b[N], p[N];
    widen<float>(g, grads);
    widen<float>(a, ms);
    widen<float>(b, vs);
    widen<float>(p, params);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float x = g[j] * s.scale;
        a[j] = s.keep1 * a[j] + s.add1 * x;
        /* The square of a large gradient overflows, its share in v need not. */
        bool large = fabsf(x) > 1e19f;
        float part = large ? x * 0x1p-32f : x, share = large ? s.add2 * 0x1p64f : s.add2;
        b[j] = s.keep2 * b[j] + share * (part * part);
        p[j] = p[j] * s.decay - s.rate * a[j] / (sqrtf(b[j]) * s.root + s.eps);
    }
    put_as<ALIGNED, float>(m, a, c, C);
    put_as<ALIGNED, float>(v, b, c, C);
    put_as<ALIGNED, float>(param, p, c, C);
    if (!copy) return;
    switch (copy_dtype) {
        case F32: put_as<ALIGNED, float>(copy, p, c, C); break;
        case BF16: put_as<ALIGNED, bf16>(copy, p, c, C); break;
        default: put_as<ALIGNED, f16>(copy, p, c, C);
    }
}

extern "C" int adamw_cuda(const void *args, const CudaCall *call) {
    const Adamw *a = (const Adamw *)args;
    double c1 = 1 - pow(a->beta1, a->step), c2 = 1 - pow(a->beta2, a->step);
    Step s = { (float)(1 - a->lr * a->weight_decay),
               (float)(a->lr / c1),
               (float)(1 / sqrt(c2)),
               (float)a->beta1,
               (float)a->beta2,
               (float)(1 - a->beta1),
               (float)(1 - a->beta2),
               (float)a->eps,
               (float)a->grad_scale };
    bool fit = aligned(N, a->grad.shape[0], &a->param, &a->m, &a->v, &a->copy, &a->grad);
    return launch(call, fit ? adamw_kernel<true> : adamw_kernel<false>,
                  dim3((unsigned)ceil_div(a->grad.shape[0], BLOCK * N)), BLOCK, 0, (float *)a->param.data,
                  (float *)a->m.data, (float *)a->v.data, given(&a->copy) ? a->copy.data : nullptr,
                  a->copy.dtype, (const float *)a->grad.data, a->grad.shape[0], s);
}
