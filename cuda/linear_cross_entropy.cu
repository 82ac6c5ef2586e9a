/* linear_cross_entropy.cu --- the head's matrix product and the loss, for a chunk of rows at a time.
 *
 * The logits of a chunk are float32 in the workspace, [rows, V], at most 448 MiB (csrc/workspace.h). One
 * block per row finds the maximum and the sum in one pass. In the backward it then writes the gradient of the
 * logits in their place, in the dtype of x, so that both products that read it run on the tensor cores. The
 * second pass reads as many logits of the row as fit from shared memory, and the others from L2 or memory.
 * docs/tuning/cuda_linear_cross_entropy.md has the figures.
 *
 * In float16 the gradients of the logits of a long step would be too small and, with a scaled loss, too
 * large. They are stored times a power of two that brings the largest of dlosses to 2^14 .. 2^15, so that
 * 2^-39 of it still differs from 0. The products are multiplied by the inverse. The device computes and keeps
 * both numbers. */
#include "gemm.cuh"

#include <float.h>

enum { BLOCK = 1024, ELEMENTS = 4 };

typedef struct {
    float *logits; /* [rows, stride] of the chunk */
    int64_t stride, V;
    float *losses, *lse; /* of the chunk's first row; lse may be NULL */
    const int32_t *targets;
    const float *dlosses;
    int64_t losses_step, lse_step, targets_step, dlosses_step, ignore;
    int64_t kept;   /* logits of a row that fit into shared memory */
    float *scalars; /* {scale, 1 / scale, 0, 1}: gradients are stored times scale; NULL: unscaled */
} Chunk;

static __device__ __forceinline__ bool counts(const Chunk &c, int64_t target) {
    return target != c.ignore && target >= 0 && target < c.V;
}

/* Every thread gets the maximum, as in block_sum. */
static __device__ __forceinline__ float block_max(float x, float *shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < (int)blockDim.x / WARP ? shared[lane] : -FLT_MAX);
}

/* One block computes the scalars from all M rows. They are powers of two, so scaling does not round, and
 * within 2^-115 .. 2^115, so neither is subnormal. */
static __global__ void __launch_bounds__(BLOCK) scale_kernel(Chunk c, int64_t M) {
    __shared__ float shared[WARP];
    float max = 0;
    for (int64_t m = threadIdx.x; m < M; m += BLOCK) {
        float dloss = fabsf(c.dlosses[m * c.dlosses_step]);
        if (counts(c, c.targets[m * c.targets_step]) && dloss <= FLT_MAX) max = fmaxf(max, dloss);
    }
    max = block_max(max, shared);
    if (threadIdx.x) return;
    int exponent;
    frexpf(max, &exponent);
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
    c.scalars[0] = ldexpf(1, 15 - exponent), c.scalars[1] = ldexpf(1, exponent - 15), c.scalars[2] = 0,
    c.scalars[3] = 1;
}

/* Loads ELEMENTS logits from i on; -inf from V on. */
static __device__ __forceinline__ void load_logits(float (&x)[ELEMENTS], const float *row, int64_t i,
                                                   int64_t V) {
    if (i + ELEMENTS <= V) load(x, row + i);
    else
        for (int e = 0; e < ELEMENTS; e++) x[e] = i + e < V ? row[i + e] : -INFINITY;
}

/* The gradient has elements T, which are not longer than logits. So its element i is not behind logit i, and
 * a block that has read a stretch of logits may write their gradients over them. */
template <class T, bool GRADIENT> static __global__ void __launch_bounds__(BLOCK) row_kernel(Chunk c) {
    __shared__ float shared[WARP];
    DYNAMIC_SHARED(float, kept);
    float *row = c.logits + blockIdx.x * c.stride;
    int64_t target = c.targets[blockIdx.x * c.targets_step];
    bool used = counts(c, target);
    float max = -FLT_MAX, sum = 0, picked = used ? row[target] : 0;
    for (int64_t i = threadIdx.x * ELEMENTS; i < c.V; i += blockDim.x * ELEMENTS) {
        float x[ELEMENTS];
        load_logits(x, row, i, c.V);
        if (i < c.kept) store(kept + i, x);
        float top = max;
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) top = fmaxf(top, x[e]);
        sum *= expf(max - top);
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) sum += expf(x[e] - top);
        max = top;
    }
    float top = block_max(max, shared);
    sum = block_sum(sum * expf(max - top), shared);
    float log_sum = logf(sum),
          loss = log_sum - (picked - top); /* more precise than lse - picked for large logits */
    if (threadIdx.x == 0) {
        c.losses[blockIdx.x * c.losses_step] = used ? loss : target == c.ignore ? 0.0f : NAN;
        if (c.lse) c.lse[blockIdx.x * c.lse_step] = top + log_sum;
    }
    if (!GRADIENT) return;
    T *out = (T *)row;
    float dloss = used ? c.dlosses[blockIdx.x * c.dlosses_step] : 0;
    if (c.scalars) dloss *= c.scalars[0];
    float factor = dloss / sum;
    for (int64_t start = 0; start < c.V; start += blockDim.x * ELEMENTS) {
        int64_t i = start + threadIdx.x * ELEMENTS;
        float x[ELEMENTS] = {};
        if (used && i < c.V) {
            if (i < c.kept) load(x, kept + i);
            else load_logits(x, row, i, c.V);
#pragma unroll
            for (int e = 0; e < ELEMENTS; e++) x[e] = expf(x[e] - top) * factor;
        }
        __syncthreads();
        if (i < c.V) store(out + i, x); /* rows are padded to whole stores */
    }
    __syncthreads();
    if (used && threadIdx.x == 0) out[target] = from_float<T>(dloss * expm1f(-loss));
}

static Matrix rows_from(const Tensor *t, int64_t row) {
    Matrix m = matrix(t);
    m.data = (const char *)m.data + row * m.row * size_of(m.dtype);
    return m;
}

/* Floats that fit into a block's shared memory beside its static part, for which 1024 bytes are kept. */
static int64_t shared_floats(const CudaCall *call) {
    return (call->shared_bytes - 1024) / 4 / ELEMENTS * ELEMENTS;
}

/* dx NULL: the forward. */
static int run(const CudaCall *call, const Tensor *losses, const Tensor *lse, const Tensor *dx,
               const Tensor *dweight, const Tensor *x, const Tensor *weight, const Tensor *targets,
               const Tensor *dlosses, int64_t ignore) {
    int64_t M = x->shape[0], C = x->shape[1], V = weight->shape[0], chunk = logits_rows(M, V);
    unsigned block = BLOCK; /* at most as many threads as a row has work for */
    while (block > WARP && block / 2 * ELEMENTS >= V) block /= 2;
    Chunk c = {};
    char *scalars = (char *)call->workspace + GEMM_WORKSPACE;
    c.logits = (float *)(scalars + SCALARS), c.stride = logits_stride(V), c.V = V, c.ignore = ignore;
    c.targets_step = targets->stride[0], c.targets = (const int32_t *)targets->data;
    if (dx) c.dlosses_step = dlosses->stride[0], c.dlosses = (const float *)dlosses->data;
    if (dx && x->dtype == F16) {
        c.scalars = (float *)scalars;
        if (launch(call, scale_kernel, dim3(M > 0), BLOCK, 0, c, M)) return -1;
    }
    for (int64_t m = 0; m < M; m += chunk) {
        int64_t rows = M - m < chunk ? M - m : chunk;
        Gemm logits = {};
        logits.M = rows, logits.N = V, logits.K = C, logits.a = rows_from(x, m),
        logits.b = transposed(matrix(weight));
        logits.c = c.logits, logits.c_row = c.stride, logits.c_dtype = F32, logits.alpha = 1;
        if (gemm(call, logits)) return -1;
        c.losses_step = losses->stride[0], c.losses = (float *)losses->data + m * c.losses_step;
        c.targets = (const int32_t *)targets->data + m * c.targets_step;
        if (lse) c.lse_step = lse->stride[0], c.lse = (float *)lse->data + m * c.lse_step;
        if (!dx) {
            if (launch(call, row_kernel<float, false>, dim3((unsigned)rows), block, 0, c)) return -1;
            continue;
        }
        c.dlosses = (const float *)dlosses->data + m * c.dlosses_step;
        int64_t room = shared_floats(call);
        c.kept = room < c.stride ? room : c.stride;
        int status = for_dtype(x->dtype, [&](auto t) {
            return launch(call, row_kernel<typename decltype(t)::is, true>, dim3((unsigned)rows), block,
                          (size_t)c.kept * 4, c);
        });
        if (status) return status;
        Matrix dlogits = { c.logits, c.stride * 4 / size_of(x->dtype), 1, x->dtype };
        Gemm g = {};
        g.M = rows, g.N = C, g.K = V, g.a = dlogits, g.b = matrix(weight), g.alpha = 1;
        if (c.scalars) g.scalars = c.scalars + 1;
        g.c = (char *)dx->data + m * dx->stride[0] * size_of(dx->dtype), g.c_row = dx->stride[0],
        g.c_dtype = dx->dtype;
        if (gemm(call, g)) return -1;
        if (!given(dweight)) continue;
        g.M = V, g.K = rows, g.a = transposed(dlogits), g.b = rows_from(x, m), g.beta = 1;
        g.c = dweight->data, g.c_row = dweight->stride[0], g.c_dtype = F32;
        if (gemm(call, g)) return -1;
    }
    return 0;
}

extern "C" int linear_cross_entropy_forward_cuda(const void *args, const CudaCall *call) {
    const LinearCrossEntropyForward *f = (const LinearCrossEntropyForward *)args;
    return run(call, &f->losses, &f->lse, NULL, NULL, &f->x, &f->weight, &f->targets, NULL,
               (int64_t)f->ignore_index);
}

extern "C" int linear_cross_entropy_backward_cuda(const void *args, const CudaCall *call) {
    const LinearCrossEntropyBackward *f = (const LinearCrossEntropyBackward *)args;
    return run(call, &f->losses, NULL, &f->dx, &f->dweight, &f->x, &f->weight, &f->targets, &f->dlosses,
               (int64_t)f->ignore_index);
}
