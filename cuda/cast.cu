/* cast.cu --- converts rows from one float dtype to another, adds scaled rows, and sums squares for the
 * gradient norm.
 *
 * Bound by memory: cast reads and writes each element once, accumulate also reads out, sum_squares reads
 * once. A thread takes 16 elements, in vectors that are 16 bytes of the wider dtype. */
#include "rows.cuh"

template <class To, class From> constexpr int elements =
    16 / (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));

/* out = scale x, or out += scale x. */
template <class To, class From, bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    rows_kernel(To *out, int64_t out_row, const From *x, int64_t x_row, int64_t M, int64_t C, float scale,
                bool add, unsigned shift) {
    constexpr int N = elements<To, From>, U = 16 / N;
    Part p = part<N, U>(shift);
    for (int64_t m = p.m; m < M; m += p.rows) {
        Raw<From, N> xs[U];
        Raw<To, N> outs[U];
#pragma unroll
        for (int u = 0; u < U; u++) get<ALIGNED>(xs[u], x + m * x_row, p.c + u * p.step, C);
        if (add)
#pragma unroll
            for (int u = 0; u < U; u++)
                get<ALIGNED>(outs[u], (const To *)out + m * out_row, p.c + u * p.step, C);
#pragma unroll
        for (int u = 0; u < U; u++) {
            float y[N], sum[N];
            widen<From>(y, xs[u]);
            if (add) {
                widen<To>(sum, outs[u]);
#pragma unroll
                for (int j = 0; j < N; j++) y[j] = sum[j] + scale * y[j];
            } else if (scale != 1) {
#pragma unroll
                for (int j = 0; j < N; j++) y[j] *= scale;
            }
            narrow<To>(outs[u], y);
            put<ALIGNED>(out + m * out_row, outs[u], p.c + u * p.step, C);
        }
    }
}

static int rows(const CudaCall *call, const Tensor *out, const Tensor *x, float scale, bool add) {
    Matrix s = flatten(out, x);
    return for_dtype(out->dtype, [&](auto to) {
        return for_dtype(x->dtype, [&](auto from) {
            using To = typename decltype(to)::is;
            using From = typename decltype(from)::is;
            constexpr int N = elements<To, From>, U = 16 / N;
            Deal d = deal<N, U>(s.M, s.C);
            bool fit = aligned(N, s.C, out, x);
            return launch(call, fit ? rows_kernel<To, From, true> : rows_kernel<To, From, false>, d.grid,
                          BLOCK, 0, (To *)out->data, out->stride[0], (const From *)x->data, x->stride[0], s.M,
                          s.C, scale, add, d.shift);
        });
    });
}

extern "C" int cast_cuda(const void *args, const CudaCall *call) {
    const Cast *a = (const Cast *)args;
    return rows(call, &a->out, &a->x, 1, false);
}

extern "C" int accumulate_cuda(const void *args, const CudaCall *call) {
    const Accumulate *a = (const Accumulate *)args;
    return rows(call, &a->out, &a->x, (float)a->scale, true);
}

extern "C" int scale_cuda(const void *args, const CudaCall *call) {
    const Scale *a = (const Scale *)args;
    return rows(call, &a->out, &a->x, (float)a->scale, false);
}

/* ---- sum of squares -------------------------------------------------------------------------- */

/* Blocks compute a sum in float64 each, then one block adds these. The order depends on the number of
 * elements only. A thread reads UNROLL vectors at a time. */
enum { UNROLL = SQUARES_UNROLL };

static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

/* Thread 0 of a block gets the sum. */
static __device__ __forceinline__ double sum_of_block(double x) {
    __shared__ double sums[BLOCK / WARP];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < BLOCK / WARP; i++) sum += sums[i];
    return sum;
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(BLOCK) squares_kernel(double *partial, const T *x, int64_t C) {
    constexpr int N = 16 / sizeof(T);
    double sum[2] = { 0, 0 };
    int64_t step = (int64_t)gridDim.x * UNROLL * BLOCK * N;
    for (int64_t c = ((int64_t)blockIdx.x * UNROLL * BLOCK + threadIdx.x) * N; c < C; c += step) {
        Raw<T, N> xs[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) get<ALIGNED>(xs[u], x, c + u * (BLOCK * N), C);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float y[N];
            widen<T>(y, xs[u]);
#pragma unroll
            for (int j = 0; j < N; j++) sum[j % 2] += (double)y[j] * y[j];
        }
    }
    double total = sum_of_block(sum[0] + sum[1]);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(BLOCK) partials_kernel(double *out, const double *partial, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += BLOCK) sum += partial[i];
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) *out += sum;
}

extern "C" int sum_squares_cuda(const void *args, const CudaCall *call) {
    const SumSquares *a = (const SumSquares *)args;
    unsigned n = squares_blocks(&a->x);
    double *partial = (double *)call->workspace;
    int status = for_dtype(a->x.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        int64_t N = a->x.shape[0];
        return launch(call,
                      aligned(16 / sizeof(T), N, &a->x) ? squares_kernel<T, true> : squares_kernel<T, false>,
                      dim3(n), BLOCK, 0, partial, (const T *)a->x.data, N);
    });
    return status ? status
                  : launch(call, partials_kernel, dim3(n ? 1 : 0), BLOCK, 0, (double *)a->out.data, partial,
                           (int)n);
}
