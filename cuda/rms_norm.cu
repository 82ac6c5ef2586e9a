/* rms_norm.cu --- RMSNorm with a trainable weight, fused with the addition of a residual; forward and
 * backward.
 *
 * Bound by memory. Forward reads x and writes out; with a residual it also reads that and writes sum.
 * Backward reads dout, x and the gradient of the residual and writes dx. For 8192 rows of 4096 elements of 16
 * bits that is 134 MB (with a residual 268) and 201 MB (268).
 *
 * A team of `width` threads takes a row. Its elements stay in registers between the row's sum and their use.
 * A team is a power of two up to a warp, then whole warps up to MOST threads, which are a block. Longer rows
 * (over 16384 elements; in the backward of float32 over 8192) are taken in pieces, and all pieces but the
 * last are read twice.
 *
 * dweight sums over rows. Every block keeps the sums of its rows in registers and writes them once; for rows
 * in pieces another kernel reads x and dout again. A last kernel adds the blocks in a fixed order. */
#include "rows.cuh"

#include <float.h>

enum { MOST = NORM_MOST };

/* Every thread of a team gets the sum. `shared` has 32 floats. */
static __device__ __forceinline__ float team_sum(float x, unsigned width, float *shared) {
    if (width > WARP) return block_sum(x, shared);
    for (unsigned offset = width / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

/* What a row is multiplied by so that its squares stay in float32's range: nearly always 1. mean: that of the
 * squares, plus eps. */
static __device__ __forceinline__ float scale_of(float mean) {
    return mean > FLT_MAX ? 0x1p-96f : mean < 0x1p-100f ? 0x1p96f : 1.0f;
}

/* The sum of the squares of a thread's elements of a row times `scale`. They begin at column c. */
template <class T, bool ALIGNED, int N, int U> static __device__ __attribute__((noinline)) float
squares_of(const T *row, int64_t c, int64_t step, int64_t piece, int64_t end, float scale) {
    float squares = 0;
    for (; c < end; c += piece)
        for (int u = 0; u < U; u++) {
            Raw<T, N> raw;
            float v[N];
            get<ALIGNED>(raw, row, c + u * step, end);
            widen<T>(v, raw);
            for (int j = 0; j < N; j++) squares += v[j] * scale * (v[j] * scale);
        }
    return squares;
}

/* Squares are those of the rounded sum, because the backward reads that. */
template <class T, bool ALIGNED> __global__ void __launch_bounds__(MOST)
    forward_kernel(T *out, int64_t out_row, float *rstd, T *sum, int64_t sum_row, const T *x, int64_t x_row,
                   const T *residual, int64_t residual_row, const T *weight, int64_t M, int64_t C, float eps,
                   unsigned width) {
    constexpr int N = 16 / sizeof(T), U = 32 / N;
    __shared__ float shared[WARP];
    unsigned team = threadIdx.x / width, lane = threadIdx.x - team * width;
    int64_t m = (int64_t)blockIdx.x * (blockDim.x / width) + team, piece = (int64_t)width * (N * U),
            step = (int64_t)width * N;
    int64_t end = m < M ? C : 0; /* teams without a row still take part in the barriers */
    if (m >= M) m = 0;
    out += m * out_row;
    x += m * x_row;
    if (sum) sum += m * sum_row;
    if (residual) residual += m * residual_row;
    Raw<T, N> xs[U];
    float squares = 0;
    int64_t last = C > piece ? (C - 1) / piece * piece : 0;
    for (int64_t base = 0; base <= last; base += piece) {
        int64_t c = base + lane * N;
        Raw<T, N> more[U];
#pragma unroll
        for (int u = 0; u < U; u++) get<ALIGNED>(xs[u], x, c + u * step, end);
        if (residual)
#pragma unroll
            for (int u = 0; u < U; u++) get<ALIGNED>(more[u], residual, c + u * step, end);
#pragma unroll
        for (int u = 0; u < U; u++) {
            float v[N];
            widen<T>(v, xs[u]);
            if (residual) {
                float r[N];
                widen<T>(r, more[u]);
#pragma unroll
                for (int j = 0; j < N; j++) v[j] += r[j];
                narrow<T>(xs[u], v);
                widen<T>(v, xs[u]);
            }
            if (sum) put<ALIGNED>(sum, xs[u], c + u * step, end);
#pragma unroll
            for (int j = 0; j < N; j++) squares += v[j] * v[j];
        }
    }
    const T *source = sum ? sum : x;
    float count = (float)(C ? C : 1), mean = team_sum(squares, width, shared) / count + eps,
          scale = scale_of(mean);
    if (width > WARP ? scale != 1 : __any_sync(0xffffffffu, scale != 1)) {
        squares = squares_of<T, ALIGNED, N, U>(source, lane * N, step, piece, end, scale);
        mean = team_sum(squares, width, shared) / count + eps * scale * scale;
    }
    float r = 1.0f / sqrtf(mean);
    if (lane == 0 && (end || !C)) rstd[m] = r * scale;
    for (int64_t base = last; base >= 0; base -= piece) {
        int64_t c = base + lane * N;
        Raw<T, N> ws[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            get<ALIGNED>(ws[u], weight, c + u * step, C);
            if (base < last) get<ALIGNED>(xs[u], source, c + u * step, end);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            float v[N], w[N];
            widen<T>(w, ws[u]);
            widen<T>(v, xs[u]);
#pragma unroll
            for (int j = 0; j < N; j++) v[j] = v[j] * scale * r * w[j];
            narrow<T>(xs[u], v);
            put<ALIGNED>(out, xs[u], c + u * step, end);
        }
    }
}

extern "C" int rms_norm_forward_cuda(const void *args, const CudaCall *call) {
    const RmsNormForward *a = (const RmsNormForward *)args;
    int64_t M = a->x.shape[0], C = a->x.shape[1];
    return for_dtype(a->x.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        NormTeam s = norm_team(C, 32);
        bool fit = aligned(16 / sizeof(T), C, &a->out, &a->sum, &a->x, &a->residual, &a->weight);
        return launch(call, fit ? forward_kernel<T, true> : forward_kernel<T, false>,
                      dim3((unsigned)ceil_div(M, s.rows)), s.width * s.rows, 0, (T *)a->out.data,
                      a->out.stride[0], (float *)a->rstd.data, given(&a->sum) ? (T *)a->sum.data : nullptr,
                      a->sum.stride[0], (const T *)a->x.data, a->x.stride[0],
                      given(&a->residual) ? (const T *)a->residual.data : nullptr, a->residual.stride[0],
                      (const T *)a->weight.data, M, C, (float)a->eps, s.width);
    });
}

/* ---- backward -------------------------------------------------------------------------------- */

enum { VECTORS = NORM_VECTORS }; /* per thread: of 16 bytes, of each of x, dout, dresidual and weight */

/* Stores the sums over a block's rows as its row of `partial`. */
template <int N> static __device__ __forceinline__ void store_totals(const float (&total)[VECTORS][N],
                                                                     float *partial, int64_t pitch,
                                                                     float *sums, int64_t C, unsigned width,
                                                                     unsigned lane) {
    constexpr int U = VECTORS;
    int64_t step = (int64_t)width * N;
    if (width > WARP) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            Raw<float, N> raw;
            narrow<float>(raw, total[u]);
            put<true>(partial, raw, lane * N + u * step, pitch);
        }
        return;
    }
    /* Adds the teams of a warp, then the warps of the block, in order. */
    unsigned columns = width * (N * U);
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int j = 0; j < N; j++) {
            float sum = total[u][j];
            for (unsigned offset = width; offset < WARP; offset *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (threadIdx.x % WARP < width)
                sums[threadIdx.x / WARP * columns + lane * N + u * step + j] = sum;
        }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
        for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) sum += sums[warp * columns + c];
        partial[c] = sum;
    }
}

/* dot += the sum of dout weight (x by) over this thread's vectors, which begin at column c. */
template <class T, bool ALIGNED, int N, int U> static __device__ __forceinline__ void
add_products(float &dot, const Words<sizeof(T) * N> (&xs)[U], const Words<sizeof(T) * N> (&ds)[U],
             const T *weight, int64_t c, int64_t step, int64_t C, float by) {
#pragma unroll
    for (int u = 0; u < U; u++) {
        Raw<T, N> ws;
        float w[N], d[N], v[N];
        get<ALIGNED>(ws, weight, c + u * step, C);
        widen<T>(w, ws);
        widen<T>(d, ds[u]);
        widen<T>(v, xs[u]);
#pragma unroll
        for (int j = 0; j < N; j++) dot += d[j] * w[j] * (v[j] * by);
    }
}

/* Whether the powers of rstd and their products with x may leave float32's range: then x rstd, which is about
 * 1, comes first. */
static __device__ __forceinline__ bool far_from_1(float rstd) {
    return fabsf(rstd) < 0x1p-40f || fabsf(rstd) > 0x1p40f;
}

/* out_i = x_i r w_i with r = (mean x^2 + eps)^-1/2, so dx_i = r g_i - x_i r^3 mean(g x) with g = dout w. A
 * block takes rows blockIdx.x, blockIdx.x + gridDim.x, ..., one per team at a time, and prefetches the next
 * ones. */
template <class T, bool ALIGNED> __global__ void __launch_bounds__(MOST, 1)
    backward_kernel(T *dx, int64_t dx_row, float *partial, int64_t pitch, const T *dout, int64_t dout_row,
                    const T *x, int64_t x_row, const float *rstd, const T *weight, const T *dresidual,
                    int64_t dresidual_row, int64_t M, int64_t C, unsigned width) {
    constexpr int N = 16 / sizeof(T), U = VECTORS;
    __shared__ float shared[WARP];
    DYNAMIC_SHARED(float, sums);
    unsigned team = threadIdx.x / width, lane = threadIdx.x - team * width, teams = blockDim.x / width;
    int64_t piece = (int64_t)width * (N * U), step = (int64_t)width * N,
            last = C > piece ? (C - 1) / piece * piece : 0;
    float total[U][N] = {};
    for (int64_t first = (int64_t)blockIdx.x * teams; first < M; first += (int64_t)gridDim.x * teams) {
        int64_t m = first + team, next = m + (int64_t)gridDim.x * teams, end = m < M ? C : 0;
        if (m >= M) m = 0;
        if (ALIGNED && lane == 0 && next < M) {
            unsigned bytes = (unsigned)(C * sizeof(T));
            prefetch_l2(x + next * x_row, bytes);
            prefetch_l2(dout + next * dout_row, bytes);
            if (dresidual) prefetch_l2(dresidual + next * dresidual_row, bytes);
        }
        float r = rstd[m], dot = 0, by = far_from_1(r) ? r : 1.0f, after = far_from_1(r) ? 1.0f : r;
        Raw<T, N> xs[U], ds[U], more[U];
        for (int64_t base = 0; base <= last; base += piece) {
            int64_t c = base + lane * N;
#pragma unroll
            for (int u = 0; u < U; u++) {
                get<ALIGNED>(xs[u], x + m * x_row, c + u * step, end);
                get<ALIGNED>(ds[u], dout + m * dout_row, c + u * step, end);
            }
            if (dresidual && base == last)
#pragma unroll
                for (int u = 0; u < U; u++)
                    get<ALIGNED>(more[u], dresidual + m * dresidual_row, c + u * step, end);
            add_products<T, ALIGNED, N, U>(dot, xs, ds, weight, c, step, C, by);
        }
        float k = team_sum(dot, width, shared) * r * after * after / (float)C;
        for (int64_t base = last; base >= 0; base -= piece) {
            int64_t c = base + lane * N;
            Raw<T, N> ws;
            get<ALIGNED>(ws, weight, c, C);
#pragma unroll
            for (int u = 0; u < U; u++) {
                float w[N], d[N], v[N], g[N];
                if (!ALIGNED || base < last) {
                    get<ALIGNED>(xs[u], x + m * x_row, c + u * step, end);
                    get<ALIGNED>(ds[u], dout + m * dout_row, c + u * step, end);
                    if (dresidual) get<ALIGNED>(more[u], dresidual + m * dresidual_row, c + u * step, end);
                }
                widen<T>(w, ws);
                widen<T>(d, ds[u]);
                widen<T>(v, xs[u]);
                if (u + 1 < U) get<ALIGNED>(ws, weight, c + (u + 1) * step, C);
#pragma unroll
                for (int j = 0; j < N; j++) g[j] = r * d[j] * w[j] - k * (v[j] * by);
                if (dresidual) {
                    float e[N];
                    widen<T>(e, more[u]);
#pragma unroll
                    for (int j = 0; j < N; j++) g[j] += e[j];
                }
                narrow<T>(xs[u], g);
                put<ALIGNED>(dx + m * dx_row, xs[u], c + u * step, end);
#pragma unroll
                for (int j = 0; j < N; j++) total[u][j] += d[j] * (v[j] * by) * after;
            }
        }
    }
    if (!partial) return;
    store_totals(total, partial + blockIdx.x * pitch, pitch, sums, C, width, lane);
}

/* For rows in pieces, whose sums do not fit in registers. A block sums the rows from blockIdx.y on,
 * gridDim.y apart. */
template <class T> __global__ void __launch_bounds__(BLOCK)
    columns_kernel(float *partial, int64_t pitch, const T *dout, int64_t dout_row, const T *x, int64_t x_row,
                   const float *rstd, int64_t M, int64_t C) {
    int64_t c = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
#pragma unroll 4
    for (int64_t m = blockIdx.y; m < M; m += gridDim.y) {
        float r = rstd[m], v = to_float(x[m * x_row + c]), d = to_float(dout[m * dout_row + c]);
        sum += far_from_1(r) ? d * (v * r) : d * v * r;
    }
    partial[blockIdx.y * pitch + c] = sum;
}

/* dweight += the sum of n rows of partial. A warp sums 32 columns of every WARPS-th row, then the warps are
 * added. */
enum { WARPS = 16 };
__global__ void __launch_bounds__(WARPS *WARP)
    dweight_kernel(float *dweight, const float *partial, int64_t pitch, int n, int64_t C) {
    __shared__ float sums[WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t c = (int64_t)blockIdx.x * WARP + lane;
    float sum = 0;
    if (c < C)
#pragma unroll 8
        for (int i = warp; i < n; i += WARPS) sum += partial[i * pitch + c];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || c >= C) return;
    for (int i = 1; i < WARPS; i++) sum += sums[i][lane];
    dweight[c] += sum;
}

extern "C" int rms_norm_backward_cuda(const void *args, const CudaCall *call) {
    const RmsNormBackward *a = (const RmsNormBackward *)args;
    int64_t M = a->x.shape[0], C = a->x.shape[1];
    if (!M || !C) return 0;
    NormBackward b = norm_backward(a);
    float *partial = given(&a->dweight) ? (float *)call->workspace : nullptr;
    int status = for_dtype(a->x.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        constexpr int N = 16 / sizeof(T);
        const T *dout = (const T *)a->dout.data, *x = (const T *)a->x.data;
        const float *rstd = (const float *)a->rstd.data;
        unsigned threads = b.team.width * b.team.rows;
        size_t shared =
            b.team.width > WARP ? 0 : (size_t)threads / WARP * b.team.width * (N * VECTORS) * sizeof(float);
        bool fit = aligned(N, C, &a->dx, &a->dout, &a->x, &a->weight, &a->dresidual);
        bool whole = C <= (int64_t)b.team.width * (N * VECTORS);
        if (partial && !whole) { /* first, because dx may be the memory of dout or x */
            int status = launch(call, columns_kernel<T>, dim3((unsigned)ceil_div(C, BLOCK), b.blocks), BLOCK,
                                0, partial, b.pitch, dout, a->dout.stride[0], x, a->x.stride[0], rstd, M, C);
            if (status) return status;
        }
        return launch(call, fit ? backward_kernel<T, true> : backward_kernel<T, false>, dim3(b.blocks),
                      threads, shared, (T *)a->dx.data, a->dx.stride[0], whole ? partial : nullptr, b.pitch,
                      dout, a->dout.stride[0], x, a->x.stride[0], rstd, (const T *)a->weight.data,
                      given(&a->dresidual) ? (const T *)a->dresidual.data : nullptr, a->dresidual.stride[0],
                      M, C, b.team.width);
    });
    if (status || !partial) return status;
    return launch(call, dweight_kernel, dim3((unsigned)ceil_div(C, WARP)), WARPS * WARP, 0,
                  (float *)a->dweight.data, (const float *)partial, b.pitch, (int)b.blocks, C);
}
