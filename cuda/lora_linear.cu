/* lora_linear.cu --- a linear layer with LoRA (arXiv 2106.09685 section 4.1), forward and backward.
 *
 * Forward: out = scale u b^T + residual, u = x a^T, in one kernel; then the frozen product is added on top
 * (beta = 1). docs/tuning/cuda_lora_linear.md compares this with five other ways.
 *
 * u and du stay float32. Where they meet 16-bit matrices on the tensor cores, each number is split into two
 * or three 16-bit ones that add up to it. da and db are sums over M with small results: at most 16 pieces
 * of the rows are summed one by one, then the pieces are added in order.
 *
 * Backward reads dout for du and db, and x for da (and for u where it is not given), and writes dx before the
 * product. db goes backwards through dout right after du went forwards, to find the last rows in L2. */
#include "gemm.cuh"

#include <string.h>
#include <type_traits>

enum { BLOCK = 256, WARPS = BLOCK / WARP };

/* Two 16-bit numbers as bits, the first one in the low half, and back. */
template <class T> static __device__ __forceinline__ unsigned bits_of(T low, T high) {
    Vector<T, 2> v = { { low, high } };
    unsigned bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
template <class T> static __device__ __forceinline__ Vector<T, 2> numbers_of(unsigned bits) {
    Vector<T, 2> v;
    memcpy(&v, &bits, sizeof bits);
    return v;
}

/* ---- out = scale u b^T + from: 16-bit -------------------------------------------------------- */

/* A block computes 128 x 128 elements of out, a warp 32 x 64. A step of mma takes 8 ranks: k 0..7 are the
 * high parts of u and k 8..15 the low ones, both times the same b. Each row of u is first scaled by a power
 * of two, so that all its parts are in the range of T. */
enum { UPDATE_ROWS = 128, UPDATE_COLS = 128, WARP_ROWS = 32, WARP_COLS = 64, STAGE_PITCH = WARP_COLS + 4 };

template <class T> struct Update {
    T *out;
    const T *from, *b; /* from may be NULL, or out */
    const float *u;
    int64_t out_row, from_row, u_row, b_row, b_col, M, N;
    int R;
    float scale;
    /* What can be loaded and stored at once: 16 bytes of out and from, two elements of u, two of b. */
    bool vectors, u_pairs, b_pairs;
};

/* Stores the 32 x 64 elements of a warp at row m0, column n0, through its rows of shared memory: from + scale
 * d, with the scaling of u's rows undone. */
template <class T> static __device__ __forceinline__ void
store_update(const Update<T> &f, const float (&d)[2][8][4], const float (&down)[2][2],
             float (*rows)[STAGE_PITCH], int64_t m0, int64_t n0) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float up[2] = { 1.0f / down[i][0], 1.0f / down[i][1] }; /* exact */
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                rows[e / 2 * 8 + g][j * 8 + 2 * t + e % 2] = d[i][j][e] * up[e / 2] * f.scale;
        __syncwarp();
#pragma unroll
        for (int q = 0; q < 4; q++) {
            int row = q * 4 + lane / 8, col = lane % 8 * 8;
            int64_t m = m0 + i * 16 + row, n = n0 + col;
            if (m >= f.M || n >= f.N) continue;
            float x[8], y[8] = {};
#pragma unroll
            for (int e = 0; e < 8; e++) x[e] = rows[row][col + e];
            T *out = f.out + m * f.out_row + n;
            const T *from = f.from ? f.from + m * f.from_row + n : NULL;
            if (f.vectors) {
                if (from) load(y, from);
#pragma unroll
                for (int e = 0; e < 8; e++) x[e] += y[e];
                store(out, x);
            } else
                for (int e = 0; e < 8 && n + e < f.N; e++)
                    out[e] = from_float<T>(x[e] + (from ? to_float(from[e]) : 0.0f));
        }
    }
}

template <class T> static __global__ void __launch_bounds__(BLOCK) update_kernel(Update<T> f) {
    __shared__ float stage[WARPS][16][STAGE_PITCH];
    int64_t across = ceil_div(f.N, UPDATE_COLS);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int64_t m0 = blockIdx.x / across * UPDATE_ROWS + warp / 2 * WARP_ROWS;
    int64_t n0 = blockIdx.x % across * UPDATE_COLS + warp % 2 * WARP_COLS;
    float d[2][8][4] = {}, down[2][2];
    /* Elements r and r+1 of row m. */
    auto pair_of_u = [&](int64_t m, int r) {
        float2 v = make_float2(0, 0);
        if (m >= f.M || r >= f.R) return v;
        const float *at = f.u + m * f.u_row + r;
        if (f.u_pairs) return *(const float2 *)at;
        v.x = at[0];
        if (r + 1 < f.R) v.y = at[1];
        return v;
    };
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = 0;
            for (int r = 2 * t; r < f.R; r += 8) {
                float2 v = pair_of_u(m0 + i * 16 + h * 8 + g, r);
                top = fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y)));
            }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            int power = (int)(__float_as_uint(top) >> 23); /* 1 .. 254 mean 2^-126 .. 2^127 */
            down[i][h] =
                power > 254 ? 1.0f : __uint_as_float((unsigned)(power > 253 ? 1 : 254 - power) << 23);
        }
    for (int r0 = 0; r0 < f.R; r0 += 8) {
        int r = r0 + 2 * t;
        unsigned a[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float2 v = pair_of_u(m0 + i * 16 + h * 8 + g, r);
                v.x *= down[i][h], v.y *= down[i][h];
                a[i][h] = pack<T>(v.x, v.y);
                Vector<T, 2> high = numbers_of<T>(a[i][h]);
                a[i][2 + h] = pack<T>(v.x - to_float(high.x[0]), v.y - to_float(high.x[1]));
            }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int64_t n = n0 + j * 8 + g;
            unsigned twice[2] = { 0, 0 };
            if (n < f.N && r < f.R) {
                const T *at = f.b + n * f.b_row + r * f.b_col;
                if (f.b_pairs) twice[0] = *(const unsigned *)at;
                else twice[0] = bits_of<T>(at[0], r + 1 < f.R ? at[f.b_col] : from_float<T>(0.0f));
                twice[1] = twice[0];
            }
            mma_16816<T>(d[0][j], a[0], twice);
            mma_16816<T>(d[1][j], a[1], twice);
        }
    }
    store_update(f, d, down, stage[warp], m0, n0);
}

/* out = scale u b^T + (beta ? from : 0). from NULL: out itself. u is float32, b is [R,N]. */
static int update(const CudaCall *call, const Tensor *out, Matrix u, Matrix b, int64_t R, float scale,
                  bool beta, const Tensor *from) {
    int64_t M = out->shape[0], N = out->shape[1];
    if (!from) from = out;
    if (out->dtype == F32) {
        Gemm g = {};
        g.M = M, g.N = N, g.K = R, g.a = u, g.b = b, g.c = out->data, g.c_row = out->stride[0],
        g.c_dtype = F32;
        g.alpha = scale, g.beta = beta, g.from = from->data, g.from_row = from->stride[0];
        return gemm(call, g);
    }
    auto run = [&](auto zero) {
        using T = decltype(zero);
        Update<T> f = {};
        f.out = (T *)out->data, f.out_row = out->stride[0], f.M = M, f.N = N, f.R = (int)R, f.scale = scale;
        if (beta) f.from = (const T *)from->data, f.from_row = from->stride[0];
        f.u = (const float *)u.data, f.u_row = u.row, f.b = (const T *)b.data, f.b_row = b.col,
        f.b_col = b.row;
        f.vectors = vectors_fit(out, 8) && (!beta || vectors_fit(from, 8));
        f.u_pairs = R % 2 == 0 && f.u_row % 2 == 0 && (uintptr_t)f.u % 8 == 0;
        f.b_pairs = R % 2 == 0 && f.b_col == 1 && f.b_row % 2 == 0 && (uintptr_t)f.b % 4 == 0;
        dim3 grid((unsigned)(ceil_div(M, UPDATE_ROWS) * ceil_div(N, UPDATE_COLS)));
        return launch(call, update_kernel<T>, grid, BLOCK, 0, f);
    };
    return out->dtype == BF16 ? run(bf16()) : run(f16());
}

/* ---- sums over M: out[r,c] += alpha (sum over m of q[m,r] x[m,c]) ---------------------------- */

/* q is float32, or all ones. A block takes SUM_COLS columns of x, up to SUM_RANKS of q and one piece of the
 * rows. A piece is every gridDim.z-th stretch of SUM_ROWS rows, from the last one to the first, so that all
 * blocks go backwards through x together. A warp computes 16 columns. In shared memory, x and q are bfloat16
 * numbers that add up to them: three for q, as many as its dtype needs for x. Products of parts below 2^-24
 * are left out. The tensor cores sum over one stretch only, because they round worse. */
enum {
    SUM_ROWS = 32,
    SUM_COLS = WARPS * 16,
    SUM_RANKS = 32,
    X_PITCH = SUM_COLS + 8,
    Q_PITCH = SUM_RANKS + 8,
    Q_PARTS = 3,
    Q_LOADS = SUM_ROWS * SUM_RANKS / BLOCK
};

/* Takes the next bfloat16 part from x. */
static __device__ __forceinline__ bf16 take(float &x) {
    bf16 part = from_float<bf16>(x);
    x -= to_float(part);
    return part;
}

/* Loads this thread's vectors of SUM_ROWS rows of x from m0 on, `columns` columns; zeros elsewhere. */
template <class T, int N, int LOADS> static __device__ __forceinline__ void
fetch_x(Vector<T, N> (&next)[LOADS], const T *x, int64_t x_row, int64_t m0, int64_t M, int columns,
        bool vectors) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int at = threadIdx.x + i * BLOCK;
        int64_t m = m0 + at / (SUM_COLS / N);
        int c = at % (SUM_COLS / N) * N;
        const T *from = x + m * x_row + c;
        if (vectors && m < M && c < columns) next[i] = *(const Vector<T, N> *)from;
        else
            for (int e = 0; e < N; e++)
                next[i].x[e] = m < M && c + e < columns ? from[e] : from_float<T>(0.0f);
    }
}

/* The same for q, whose rows are read 1 << shift ranks wide. */
static __device__ __forceinline__ void fetch_q(float (&next)[Q_LOADS], const float *q, int64_t q_row, int r0,
                                               int64_t m0, int64_t M, int ranks, int shift) {
#pragma unroll
    for (int i = 0; i < Q_LOADS; i++) {
        int at = threadIdx.x + i * BLOCK, r = at & ((1 << shift) - 1);
        int64_t m = m0 + (at >> shift);
        next[i] = at < SUM_ROWS << shift && m < M && r < ranks ? (q ? q[m * q_row + r0 + r] : 1.0f) : 0.0f;
    }
}

/* Puts the parts of what was fetched into shared memory. */
template <class T, int N, int LOADS, int PARTS> static __device__ __forceinline__ void
put_x(bf16 (&xs)[PARTS][SUM_ROWS][X_PITCH], const Vector<T, N> (&next)[LOADS]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int at = threadIdx.x + i * BLOCK;
        float rest[N];
#pragma unroll
        for (int e = 0; e < N; e++) rest[e] = to_float(next[i].x[e]);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            Vector<bf16, N> v;
#pragma unroll
            for (int e = 0; e < N; e++) v.x[e] = take(rest[e]);
            *(Vector<bf16, N> *)&xs[p][at / (SUM_COLS / N)][at % (SUM_COLS / N) * N] = v;
        }
    }
}
static __device__ __forceinline__ void put_q(bf16 (&qs)[Q_PARTS][SUM_ROWS][Q_PITCH], float (&next)[Q_LOADS],
                                             int shift) {
#pragma unroll
    for (int i = 0; i < Q_LOADS; i++) {
        int at = threadIdx.x + i * BLOCK;
        if (at >= SUM_ROWS << shift) continue;
#pragma unroll
        for (int p = 0; p < Q_PARTS; p++) qs[p][at >> shift][at & ((1 << shift) - 1)] = take(next[i]);
    }
}

template <class T, int PARTS> static __global__ void __launch_bounds__(BLOCK, PARTS == 1 ? 3 : 2)
    sum_kernel(float *partial, const T *x, int64_t x_row, const float *q, int64_t q_row, int64_t M, int64_t C,
               int R, bool vectors) {
    constexpr int N = 16 / sizeof(T), LOADS = SUM_ROWS * SUM_COLS / BLOCK / N;
    __shared__ __align__(16) bf16 xs[PARTS][SUM_ROWS][X_PITCH];
    __shared__ __align__(16) bf16 qs[Q_PARTS][SUM_ROWS][Q_PITCH];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t c0 = (int64_t)blockIdx.x * SUM_COLS, first = (int64_t)blockIdx.z * SUM_ROWS,
            step = (int64_t)gridDim.z * SUM_ROWS;
    int r0 = blockIdx.y * SUM_RANKS, ranks = R - r0 < SUM_RANKS ? R - r0 : SUM_RANKS;
    int columns = C - c0 < SUM_COLS ? (int)(C - c0) : (int)SUM_COLS;
    int shift = ranks > 16 ? 5 : ranks > 8 ? 4 : 3; /* rows of q are read 8, 16 or 32 ranks wide */
    Vector<T, N> next[LOADS];
    float next_q[Q_LOADS];
    auto fetch = [&](int64_t m0) {
        fetch_x(next, x + c0, x_row, m0, M, columns, vectors);
        fetch_q(next_q, q, q_row, r0, m0, M, ranks, shift);
    };
    float sum[SUM_RANKS / 8][4] = {};
    int64_t end = first + (M - 1 - first) / step * step;
    fetch(end);
    for (int64_t m0 = end; m0 >= 0; m0 -= step) {
        __syncthreads();
        put_x(xs, next);
        put_q(qs, next_q, shift);
        __syncthreads();
        if (m0 >= step) fetch(m0 - step);
        float d[SUM_RANKS / 8][4] = {};
#pragma unroll 1 /* saves registers: unrolled, bfloat16 spills on sm_100 and sm_120 */
        for (int k = 0; k < SUM_ROWS; k += 16) {
            unsigned a[PARTS][4]; /* columns of x are the rows of mma, rows of x its k */
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                ldmatrix_x4_trans(a[p], &xs[p][k + lane / 16 * 8 + lane % 8][warp * 16 + lane / 8 % 2 * 8]);
#pragma unroll
            for (int j = 0; j < SUM_RANKS / 8; j += 2) {
                if (j * 8 >= ranks) break;
#pragma unroll
                for (int s = 0; s < Q_PARTS; s++) {
                    unsigned b[4];
                    ldmatrix_x4_trans(b, &qs[s][k + lane / 8 % 2 * 8 + lane % 8][j * 8 + lane / 16 * 8]);
                    unsigned left[2] = { b[0], b[1] }, right[2] = { b[2], b[3] };
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        if (p + s >= Q_PARTS) continue;
                        mma_16816<bf16>(d[j], a[p], left);
                        if ((j + 1) * 8 < ranks) mma_16816<bf16>(d[j + 1], a[p], right);
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < SUM_RANKS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[j][e] += d[j][e];
    }
#pragma unroll
    for (int j = 0; j < SUM_RANKS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int64_t c = c0 + warp * 16 + e / 2 * 8 + lane / 4;
            int r = j * 8 + lane % 4 * 2 + e % 2;
            if (c < C && r < ranks) partial[(blockIdx.z * (int64_t)R + r0 + r) * C + c] = sum[j][e];
        }
}

static __global__ void __launch_bounds__(BLOCK)
    add_pieces_kernel(float *out, int64_t out_r, int64_t out_c, const float *partial, int64_t pieces,
                      int64_t R, int64_t C, float alpha) {
    int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= R * C) return;
    float sum = 0;
    for (int64_t s = 0; s < pieces; s++) sum += partial[s * R * C + i];
    out[i / C * out_r + i % C * out_c] += alpha * sum;
}

/* out[r,c] is at out + r out_r + c out_c. q.data NULL: all ones. */
static int add_sums(const CudaCall *call, float *out, int64_t out_r, int64_t out_c, Matrix q, int64_t R,
                    const Tensor *x, float alpha, float *partial) {
    int64_t M = x->shape[0], C = x->shape[1], pieces = lora_pieces(M);
    if (!M || !R || !C) return 0;
    int status = for_dtype(x->dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        constexpr int PARTS = std::is_same<T, bf16>::value ? 1 : sizeof(T) == 2 ? 2 : 3;
        dim3 grid((unsigned)ceil_div(C, SUM_COLS), (unsigned)ceil_div(R, SUM_RANKS), (unsigned)pieces);
        return launch(call, sum_kernel<T, PARTS>, grid, BLOCK, 0, partial, (const T *)x->data, x->stride[0],
                      (const float *)q.data, q.row, M, C, (int)R, vectors_fit(x, 16 / sizeof(T)));
    });
    if (status) return status;
    return launch(call, add_pieces_kernel, dim3((unsigned)ceil_div(R * C, BLOCK)), BLOCK, 0, out, out_r,
                  out_c, (const float *)partial, pieces, R, C, alpha);
}

/* ---- the ops --------------------------------------------------------------------------------- */

/* c = alpha a b + (beta ? from : 0) + bias. c is a whole tensor. */
static int product(const CudaCall *call, const Tensor *c, Matrix a, Matrix b, int64_t K, float alpha,
                   bool beta, const Tensor *from = NULL, const Tensor *bias = NULL) {
    Gemm g = {};
    g.M = c->shape[0], g.N = c->shape[1], g.K = K, g.a = a, g.b = b, g.c = c->data, g.c_row = c->stride[0],
    g.c_dtype = c->dtype;
    g.alpha = alpha, g.beta = beta;
    if (from) g.from = from->data, g.from_row = from->stride[0];
    if (bias && given(bias)) g.bias = bias->data;
    return gemm(call, g);
}

/* A dense float32 [M,R] in the workspace. */
static Tensor dense(void *data, int64_t M, int64_t R) {
    Tensor t = {};
    t.data = data, t.shape[0] = M, t.shape[1] = R, t.stride[0] = R, t.stride[1] = 1, t.ndim = 2,
    t.dtype = F32;
    return t;
}

extern "C" int lora_linear_forward_cuda(const void *args, const CudaCall *call) {
    const LoraLinearForward *f = (const LoraLinearForward *)args;
    int64_t M = f->x.shape[0], C = f->x.shape[1], R = rank_of_lora(&f->a);
    Tensor u = given(&f->u) ? f->u : dense((char *)call->workspace + GEMM_WORKSPACE, M, R);
    const Tensor *residual = given(&f->residual) ? &f->residual : NULL, *from = residual;
    if (R) {
        if (product(call, &u, matrix(&f->x), transposed(matrix(&f->a)), C, 1, false)) return -1;
        if (update(call, &f->out, matrix(&u), transposed(matrix(&f->b)), R, (float)f->scale, residual,
                   residual))
            return -1;
        from = &f->out;
    }
    return product(call, &f->out, matrix(&f->x), transposed(matrix(&f->weight)), C, 1, from, from, &f->bias);
}

extern "C" int lora_linear_backward_cuda(const void *args, const CudaCall *call) {
    const LoraLinearBackward *f = (const LoraLinearBackward *)args;
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], C = f->weight.shape[1];
    int64_t R = rank_of_lora(&f->a);
    LoraParts parts = lora_parts(f);
    char *memory = (char *)call->workspace;
    float scale = (float)f->scale, *partial = (float *)(memory + parts.partial);
    Tensor du = dense(memory + parts.du, M, R), u = given(&f->u) ? f->u : dense(memory + parts.u, M, R);
    Matrix dout = matrix(&f->dout), x = given(&f->x) ? matrix(&f->x) : Matrix{};
    if (R && given(&f->db) && !given(&f->u) && product(call, &u, x, transposed(matrix(&f->a)), C, 1, false))
        return -1;
    if (R && (given(&f->dx) || given(&f->da)) && product(call, &du, dout, matrix(&f->b), N, scale, false))
        return -1;
    if (R && given(&f->db) &&
        add_sums(call, (float *)f->db.data, 1, f->db.stride[0], matrix(&u), R, &f->dout, scale, partial))
        return -1;
    if (given(&f->dx)) {
        if (R && update(call, &f->dx, matrix(&du), matrix(&f->a), R, 1, false, NULL)) return -1;
        if (product(call, &f->dx, dout, matrix(&f->weight), N, 1, R > 0)) return -1;
    }
    if (R && given(&f->da) &&
        add_sums(call, (float *)f->da.data, f->da.stride[0], 1, matrix(&du), R, &f->x, 1, partial))
        return -1;
    if (given(&f->dweight) && product(call, &f->dweight, transposed(dout), x, M, 1, true)) return -1;
    if (!given(&f->dbias)) return 0;
    return add_sums(call, (float *)f->dbias.data, 0, f->dbias.stride[0], Matrix{}, 1, &f->dout, 1, partial);
}
