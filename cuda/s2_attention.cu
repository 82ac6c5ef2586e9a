/* s2_attention.cu --- shifted sparse attention on any GPU from sm_80 on, forward and backward. The rule is in
 * csrc/ops.h; which rows a block works on, in s2_attention.cuh.
 *
 * A block of four warps has a tile of one segment: queries (forward, dq) or keys (dk and dv), 16 or 32 rows
 * to each warp. It walks along the other kind in steps, from the diagonal on; two tiles of a step's operands
 * are in shared memory, one used, one arriving by cp.async, so that there is one barrier in a step. All
 * products are mma.sync with float32 sums. Sums lie in the registers as a left operand does, so weights and
 * gradients of scores go from one product into the next rounded to 16 bits and never leave the registers. In
 * dk and dv rows are keys (scores transposed) for the same reason. Only steps that cross the diagonal mask.
 * Blocks are numbered head by head, those with most to do first, so that a group's keys and values stay in
 * L2.
 *
 * Backward: delta = rowsum(dout * out); dq by tiles of queries; dk and dv by tiles of keys, over the query
 * heads of the KV head in their order. Every row of a result is written once, by one block: no atomics, no
 * float32 copies, equal bits. The KV head that has plain and shifted query heads, if there is one, is summed
 * by two launches, since their segments differ.
 *
 * Rows of D elements are padded by zeros in shared memory to 64, 96, 128 or 256; of D = 256, dk and dv are
 * two halves, with scores computed for each. Rows that are no whole 16-byte pieces are loaded element by
 * element. float32 is multiplied by float32 multiply-adds, in kernels of their own at the end.
 *
 * Computed, for a head and a segment of G rows, D = 128. A product of the triangle has G^2 D FLOPs: forward
 * 2, dq 3, dk and dv 4, so the backward has 7 where one kernel with atomics has 5. Of L2 the forward reads
 * G^2 D / 64 bytes (128 FLOPs to a byte), dq as many (192), dk and dv twice as many (128). Of shared memory a
 * right operand's fragment serves 32 rows in forward and dq: 32 FLOPs to a byte; 16 rows in dk and dv: 16
 * FLOPs to a byte, 2048 a clock and SM at 128 bytes a clock.
 *
 * The ladder, by the compiler's report, not by time:
 *   forward, steps of 64 keys at D = 128: 292 bytes of spills; of 32 keys: none
 *   masked and unmasked steps compiled apart: twice the code, 23 s instead of 14 s to compile, and spills
 *
 * NaN and infinities: a key's spread to the queries that see it. A value's, or in the backward a query's, may
 * also reach those within the same step of the diagonal, by a product with a weight of 0. */
#include "s2_attention.cuh"

enum { THREADS = 128, WARPS = THREADS / WARP };
static const float LOG2E = 1.44269504088896341f;

/* ---- arguments ------------------------------------------------------------------------------- */

/* A tensor [B,T,heads,D] (lse: [B,H,T], token stride 1), strides in elements. */
struct Rows {
    void *data;
    int64_t batch, token, head;
    bool vectors;
}; /* vectors: rows are whole aligned 16-byte pieces */

static Rows rows_of(const Tensor *t) {
    return Rows{ t->data, t->stride[0], t->stride[1], t->stride[2],
                 vectors_fit(t, (int)(16 / size_of(t->dtype))) };
}
static Rows lse_of(const Tensor *t) { return Rows{ t->data, t->stride[0], 1, t->stride[1], false }; }

template <class T> __device__ __forceinline__ T *head_of(const Rows &x, int batch, int head) {
    return (T *)x.data + batch * x.batch + head * x.head;
}

struct Forward {
    Pattern p;
    int slots; /* of a head */
    Rows out, lse, q, k, v;
    float scale, c; /* |scale|, the same times log2(e) */
    bool negative;  /* scale < 0: queries are negated */
};

struct Backward {
    Pattern p;
    int slots;
    Rows dq, dk, dv, dout, q, k, v, out, lse;
    float scale, c; /* signed */
    float *delta;   /* [B,H,T], workspace: row sums of dout * out */
    float *sums;    /* [B,T,2,D], workspace: dk and dv of the plain heads of `mixed` */
    int mixed;      /* the KV head that has plain and shifted query heads, or -1 */
    bool second;    /* this launch adds its shifted heads */
};

static __device__ __forceinline__ const float *delta_of(const Backward &a, int batch, int head) {
    return a.delta + ((int64_t)batch * a.p.H + head) * a.p.T;
}

/* ---- tiles in shared memory ------------------------------------------------------------------ */

/* A tile has rows of D elements of 16 bits in pieces of 16 bytes. Piece `piece` of row `row` stands where no
 * eight rows of one piece, and no eight pieces of a row, share a bank. Eight rows further down all is the
 * same. */
template <int D> __device__ __forceinline__ int place(int row, int piece) {
    return row * D + 8 * (piece ^ (D % 64 ? row / 2 % 4 : row % 8));
}
/* place(row, piece + 2 k) from place(row, piece), piece 0 or 1. */
template <int D> __device__ __forceinline__ int along(int place, int k) {
    constexpr int turn = D % 64 ? 2 : 4;
    return (place ^ k % turn * 16) + k / turn * turn * 16;
}

/* Queues the loads of rows first .. first+ROWS-1 of the segment; beyond its end and beyond so many columns
 * all is zero. */
template <int D, int ROWS, class T> __device__ __forceinline__ void
load_tile(T *tile, const Rows &x, int head, const Work &w, int first, int columns) {
    constexpr int PIECES = D / 8, STEP = THREADS / PIECES / 4 * 4; /* rows at a time */
    static_assert(ROWS % STEP == 0, "a tile is loaded in whole steps");
    int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const Segment &s = w.s;
    const T *from = head_of<const T>(x, w.batch, head);
    if (!x.vectors) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            int r = i / D, d = i % D;
            bool there = first + r < s.rows && d < columns;
            tile[place<D>(r, d / 8) + d % 8] =
                there ? from[token(s, first + r) * x.token + d] : from_float<T>(0);
        }
        return;
    }
    if (row >= STEP) return;
    bool there = piece * 8 < columns;
    if (first + ROWS <= s.rows &&
        (s.turn <= first || s.turn >= first + ROWS)) { /* all there, all of one run */
        const T *at = from + token(s, first + row) * x.token + piece * 8;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP, at += STEP * x.token)
            cp_async_16(tile + place<D>(row + i, piece), at, there);
    } else {
#pragma unroll 1
        for (int i = row; i < ROWS; i += STEP)
            cp_async_16(tile + place<D>(i, piece), from + token(s, first + i) * x.token + piece * 8,
                        there && first + i < s.rows);
    }
}

/* The tiles of step n of two tensors: each has two tiles, one is used while the other arrives. */
template <int D, int ROWS, class T> __device__ __forceinline__ void load_step(T *one, T *two, int n,
                                                                              const Rows &x, const Rows &y,
                                                                              int head, const Work &w,
                                                                              int first, int columns) {
    load_tile<D, ROWS>(one + n % 2 * ROWS * D, x, head, w, first, columns);
    load_tile<D, ROWS>(two + n % 2 * ROWS * D, y, head, w, first, columns);
    cp_async_commit();
}

/* Stores 16 M rows of a warp, the segment's from `row` on, COLUMNS columns from `column` on, through its rows
 * of a tile. */
template <int D, int COLUMNS, int M, class T> __device__ __forceinline__ void
store_rows(const Rows &x, int head, const Work &w, int row, int column, int columns,
           const float (&sum)[M][COLUMNS / 8][4], T *tile) {
    constexpr int PIECES = COLUMNS / 8;
    int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4 * 2;
    T *to = head_of<T>(x, w.batch, head);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < PIECES; j++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                store(tile + place<D>(16 * m + 8 * r + group, j) + pair,
                      { sum[m][j][2 * r], sum[m][j][2 * r + 1] });
    __syncwarp();
    for (int i = lane; i < 16 * M * PIECES; i += WARP) {
        int r = row + i / PIECES, d = column + i % PIECES * 8;
        if (r >= w.s.rows) return;
        Vector<T, 8> v = *(const Vector<T, 8> *)(tile + place<D>(i / PIECES, i % PIECES));
        T *at = to + token(w.s, r) * x.token + d;
        if (x.vectors && d < columns) *(Vector<T, 8> *)at = v;
        else
            for (int j = 0; j < 8 && d + j < columns; j++) at[j] = v.x[j];
    }
}

/* ---- products -------------------------------------------------------------------------------- */

/* Of a warp, fragments as in common.cuh: sum[16 M,8 N] += a b^T, both rows of D elements in tiles. */
template <int D, int M, int N, class T> __device__ __forceinline__ void
multiply_rows(float (&sum)[M][N][4], const T *a, const T *b) {
    int lane = threadIdx.x % WARP;
    int at_a = place<D>(lane % 16, lane / 16), at_b = place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(x[m], a + 16 * m * D + along<D>(at_a, k));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned y[4];
            ldmatrix_x4(y, b + 8 * n * D + along<D>(at_b, k));
            unsigned left[2] = { y[0], y[1] }, right[2] = { y[2], y[3] };
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sum[m][n], x[m], left);
                mma_16816<T>(sum[m][n + 1], x[m], right);
            }
        }
    }
}

/* sum[16 M,8 C] += p[16 M,8 N] b: p the sums of another product, rounded to T; b 8 N rows of a tile, 8 C
 * columns from where it points. */
template <int D, int M, int N, int C, class T> __device__ __forceinline__ void
multiply_columns(float (&sum)[M][C][4], const float (&p)[M][N][4], const T *b) {
    int lane = threadIdx.x % WARP, at_b = place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[m][i] = pack<T>(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            unsigned y[4];
            ldmatrix_x4_trans(y, b + 8 * n * D + along<D>(at_b, c / 2));
            unsigned left[2] = { y[0], y[1] }, right[2] = { y[2], y[3] };
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sum[m][c], x[m], left);
                mma_16816<T>(sum[m][c + 1], x[m], right);
            }
        }
    }
}

template <int M, int C> static __device__ __forceinline__ void scale_sums(float (&sum)[M][C][4], float by) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][j][i] *= by;
}

/* Over the four lanes that share a row. */
static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* 16-row pieces of a warp where rows are queries. */
template <int D> constexpr int row_pieces = D <= 128 ? 2 : 1;
/* Keys of a step of the forward and of dq, queries of a step of dk and dv. */
template <int D> constexpr int forward_step = D <= 64 ? 64 : 32;
template <int D> constexpr int dq_step = D <= 128 ? 32 : 16;
template <int D> constexpr int dkdv_step = D <= 64 ? 64 : dq_step<D>;

/* ---- forward, 16 bits ------------------------------------------------------------------------ */

template <class T, int D> __global__ void __launch_bounds__(THREADS) forward_kernel(const Forward a) {
    constexpr int M = row_pieces<D>, BM = 16 * M * WARPS, BN = forward_step<D>, N = BN / 8, C = D / 8;
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_queries(p, a.slots, BM, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(T, q);
    T *k = q + BM * D, *v = k + 2 * BN * D; /* two tiles of each: one is used, one arrives */
    int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4 * 2,
        offset = threadIdx.x / WARP * 16 * M;
    int row = w.first + offset, end = min_of(row + 16 * M, s.rows); /* of this warp; none if row >= end */
    T *own = q + offset * D;
    float c = s.wrong ? NAN : a.c, out[M][C][4] = {}, top[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;

    int n = (min_of(w.first + BM, s.rows) - 1) / BN;
    load_tile<D, BM>(q, a.q, w.head, w, w.first, p.D);
    load_step<D, BN>(k, v, n, a.k, a.v, w.kv_head, w, n * BN, p.D);
    if (a.negative) {
        cp_async_wait<0>();
        __syncthreads();
        for (int i = threadIdx.x; i < BM * D; i += THREADS) q[i] = from_float<T>(-to_float(q[i]));
    }
    for (; n >= 0; n--) {
        cp_async_wait<0>();
        __syncthreads(); /* step n is there, and nobody is at step n + 1 */
        if (n > 0) load_step<D, BN>(k, v, n - 1, a.k, a.v, w.kv_head, w, (n - 1) * BN, p.D);
        if (row >= end || n * BN >= end) continue; /* no row of the warp sees any key of the block */
        float x[M][N][4] = {};
        multiply_rows<D>(x, own, k + n % 2 * BN * D);
        if (any_hidden(s, w.first, BM, n * BN, BN)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int at = row + 16 * m + 8 * r + group, low = first_key(s, at), key = n * BN + pair - low;
#pragma unroll
                    for (int j = 0; j < N; j++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if ((unsigned)(key + 8 * j + i) > (unsigned)(at - low))
                                x[m][j][2 * r + i] = -INFINITY;
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float highest = top[m][r];
#pragma unroll
                for (int j = 0; j < N; j++)
                    highest = fmaxf(highest, fmaxf(x[m][j][2 * r], x[m][j][2 * r + 1]));
                highest = quad_max(highest);
                float shift = highest == -INFINITY
                                  ? 0.0f
                                  : highest * c; /* nothing seen: 2^(-inf - 0), not 2^(-inf + inf) */
                float shrink = exp2_fast(top[m][r] * c - shift), sum = 0;
                top[m][r] = highest;
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++)
                        sum += x[m][j][i] = exp2_fast(x[m][j][i] * c - shift);
                total[m][r] = total[m][r] * shrink + sum;
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++) out[m][j][i] *= shrink;
            }
        multiply_columns<D>(out, x, v + n % 2 * BN * D);
    }

    if (row >= end) return;
    float *lse = head_of<float>(a.lse, w.batch, w.head);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = quad_sum(total[m][r]), inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) out[m][j][i] *= inverse;
            int at = row + 16 * m + 8 * r + group;
            if (pair == 0 && at < end)
                lse[token(s, at)] = (top[m][r] == -INFINITY ? 0 : top[m][r] * a.scale) + logf(sum);
        }
    store_rows<D, D, M>(a.out, w.head, w, row, 0, p.D, out, own);
}

/* ---- backward, 16 bits ----------------------------------------------------------------------- */

/* delta[b,h,t] = sum of dout * out over a row: `lanes` lanes, a power of two, to a row. */
template <class T, int N> __global__ void __launch_bounds__(THREADS)
    delta_kernel(const Backward a, int lanes, int64_t rows) {
    const Pattern &p = a.p;
    int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) / lanes;
    int lane = threadIdx.x % lanes, t = (int)(i % p.T), head = (int)(i / p.T % p.H),
        batch = (int)(i / p.T / p.H);
    float sum = 0;
    if (i < rows) {
        const T *x = head_of<const T>(a.dout, batch, head) + t * a.dout.token;
        const T *y = head_of<const T>(a.out, batch, head) + t * a.out.token;
        for (int d = lane * N; d < p.D; d += lanes * N) {
            float u[N], v[N];
            load(u, x + d);
            load(v, y + d);
#pragma unroll
            for (int j = 0; j < N; j++) sum += u[j] * v[j];
        }
    }
    for (int offset = lanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i < rows && lane == 0) a.delta[i] = sum;
}

/* What exponents are taken relative to, base 2. A query whose keys are all at -inf has the weights 2^(-inf -
 * 0). */
static __device__ __forceinline__ float shift_of(float lse) { return lse == -INFINITY ? 0.0f : lse * LOG2E; }

template <class T, int D> __global__ void __launch_bounds__(THREADS) dq_kernel(const Backward a) {
    constexpr int M = row_pieces<D>, BM = 16 * M * WARPS, BN = dq_step<D>, N = BN / 8, C = D / 8;
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_queries(p, a.slots, BM, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(T, q);
    T *g = q + BM * D, *k = g + BM * D, *v = k + 2 * BN * D; /* g: dout */
    int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4 * 2,
        offset = threadIdx.x / WARP * 16 * M;
    int row = w.first + offset, end = min_of(row + 16 * M, s.rows); /* of this warp; none if row >= end */
    const float *lse = head_of<const float>(a.lse, w.batch, w.head), *delta = delta_of(a, w.batch, w.head);
    __shared__ float shift[BM], less[BM];
    float c = s.wrong ? NAN : a.c, dq[M][C][4] = {};
    for (int i = threadIdx.x; i < min_of(BM, s.rows - w.first); i += THREADS) {
        shift[i] = shift_of(lse[token(s, w.first + i)]);
        less[i] = delta[token(s, w.first + i)];
    }

    int n = (min_of(w.first + BM, s.rows) - 1) / BN;
    load_tile<D, BM>(q, a.q, w.head, w, w.first, p.D);
    load_tile<D, BM>(g, a.dout, w.head, w, w.first, p.D);
    load_step<D, BN>(k, v, n, a.k, a.v, w.kv_head, w, n * BN, p.D);
    for (; n >= 0; n--) {
        cp_async_wait<0>();
        __syncthreads(); /* step n is there, and nobody is at step n + 1 */
        if (n > 0) load_step<D, BN>(k, v, n - 1, a.k, a.v, w.kv_head, w, (n - 1) * BN, p.D);
        if (row >= end || n * BN >= end) continue;
        float x[M][N][4] = {}, dx[M][N][4] = {};
        multiply_rows<D>(x, q + offset * D, k + n % 2 * BN * D);
        multiply_rows<D>(dx, g + offset * D, v + n % 2 * BN * D);
        bool masked = any_hidden(s, w.first, BM, n * BN, BN);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int at = row + 16 * m + 8 * r + group;
                float under = shift[at - w.first], minus = less[at - w.first];
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++)
                        dx[m][j][i] = exp2_fast(x[m][j][i] * c - under) * (dx[m][j][i] - minus);
                if (!masked) continue;
                int low = first_key(s, at), key = n * BN + pair - low;
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if ((unsigned)(key + 8 * j + i) > (unsigned)(at - low)) dx[m][j][2 * r + i] = 0;
            }
        multiply_columns<D>(dq, dx, k + n % 2 * BN * D);
    }

    if (row >= end) return;
    scale_sums(dq, a.scale);
    store_rows<D, D, M>(a.dq, w.head, w, row, 0, p.D, dq, q + offset * D);
}

template <class T, int D> __global__ void __launch_bounds__(THREADS) dkdv_kernel(const Backward a) {
    constexpr int BM = 16 * WARPS, BN = dkdv_step<D>, N = BN / 8, COLUMNS = D < 128 ? D : 128,
                  C = COLUMNS / 8;
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_keys(p, a.slots, BM, a.mixed, a.second, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(T, k);
    T *v = k + BM * D, *q = v + BM * D, *g = q + 2 * BN * D;
    __shared__ float shift[2][BN], less[2][BN];
    int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4 * 2, offset = threadIdx.x / WARP * 16;
    int key = w.first + offset; /* the first one of this warp */
    float c = s.wrong ? NAN : a.c, dk[1][C][4] = {}, dv[1][C][4] = {};

    /* Steps go through the queries from the diagonal on, head after head; step n is in tile n % 2. */
    int column = blockIdx.y * COLUMNS, head = w.head, row = w.first, n = 0;
    float next_shift = 0, next_less = 0;
    auto load_rows = [&](int head, int row) {
        int at = row + threadIdx.x;
        if (threadIdx.x >= BN || at >= s.rows) return;
        next_shift = head_of<const float>(a.lse, w.batch, head)[token(s, at)];
        next_less = delta_of(a, w.batch, head)[token(s, at)];
    };
    auto keep_rows = [&](int n) {
        if (threadIdx.x >= BN) return;
        shift[n % 2][threadIdx.x] = shift_of(next_shift);
        less[n % 2][threadIdx.x] = next_less;
    };
    load_tile<D, BM>(k, a.k, w.kv_head, w, w.first, p.D);
    load_tile<D, BM>(v, a.v, w.kv_head, w, w.first, p.D);
    load_step<D, BN>(q, g, 0, a.q, a.dout, head, w, row, p.D);
    load_rows(head, row);
    keep_rows(0);
    for (; head < w.to_head; n++) {
        int next_head = row + BN < s.rows ? head : head + 1,
            next_row = row + BN < s.rows ? row + BN : w.first;
        cp_async_wait<0>();
        __syncthreads(); /* step n is there, and nobody is at step n - 1 */
        if (next_head < w.to_head) {
            load_step<D, BN>(q, g, n + 1, a.q, a.dout, next_head, w, next_row, p.D);
            load_rows(next_head, next_row);
        }
        if (key < s.rows && key < row + BN) {
            float x[1][N][4] = {}, dx[1][N][4] = {};
            multiply_rows<D>(x, k + offset * D, q + n % 2 * BN * D);
            multiply_rows<D>(dx, v + offset * D, g + n % 2 * BN * D);
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int at = 8 * j + pair + i % 2;
                    x[0][j][i] = exp2_fast(x[0][j][i] * c - shift[n % 2][at]);
                    dx[0][j][i] = x[0][j][i] * (dx[0][j][i] - less[n % 2][at]);
                }
            if (any_hidden(s, row, BN, w.first, BM) || row + BN > s.rows) {
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int query = row + 8 * j + pair + i % 2, at = key + group + i / 2 * 8;
                        if (query >= s.rows || at > query || at < first_key(s, query))
                            x[0][j][i] = dx[0][j][i] = 0;
                    }
            }
            multiply_columns<D>(dv, x, g + n % 2 * BN * D + column);
            multiply_columns<D>(dk, dx, q + n % 2 * BN * D + column);
        }
        keep_rows(n + 1);
        head = next_head;
        row = next_row;
    }

    if (key >= s.rows) return;
    scale_sums(dk, a.scale);
    if (w.kv_head == a.mixed) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = key + 8 * r + group;
            if (at >= s.rows) continue;
            float *sums = a.sums + (w.batch * (int64_t)p.T + token(s, at)) * 2 * p.D;
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int d = column + 8 * j + pair + i;
                    if (d >= p.D) continue;
                    if (a.second) {
                        dk[0][j][2 * r + i] += sums[d];
                        dv[0][j][2 * r + i] += sums[p.D + d];
                    } else {
                        sums[d] = dk[0][j][2 * r + i];
                        sums[p.D + d] = dv[0][j][2 * r + i];
                    }
                }
        }
        if (!a.second) return;
    }
    store_rows<D, COLUMNS, 1>(a.dk, w.kv_head, w, key, column, p.D, dk, k + offset * D);
    store_rows<D, COLUMNS, 1>(a.dv, w.kv_head, w, key, column, p.D, dv, v + offset * D);
}

/* ---- float32 --------------------------------------------------------------------------------- */

/* The same three kernels by multiply-adds, for any D at most 256: squares of 64 rows and 64 columns in shared
 * memory, thread (x,y) of 16 by 16 has rows 4 y .. 4 y + 3 of every product. Rows of D columns come and go in
 * squares. */
enum { SIDE = 64, PITCH = SIDE + 4, SQUARE = SIDE * PITCH, FLOAT_THREADS = 256, MOST_SQUARES = 4 };

static __device__ __forceinline__ void load_square(float *square, const Rows &x, int head, const Work &w,
                                                   int first, int column, int columns) {
    const float *from = head_of<const float>(x, w.batch, head);
    for (int i = threadIdx.x; i < SIDE * SIDE; i += FLOAT_THREADS) {
        int r = i / SIDE, d = i % SIDE;
        bool there = first + r < w.s.rows && column + d < columns;
        square[r * PITCH + d] = there ? from[token(w.s, first + r) * x.token + column + d] : 0;
    }
}

/* sum[i][j] += row 4 y + i of one tensor times row x + 16 j of the other, D columns; a, b: squares that both
 * come through. It and add_rows begin with a barrier, and have one more before they read: so none is needed
 * between them. */
static __device__ __forceinline__ void dot_rows(float (&sum)[4][4], float *a, float *b, const Rows &rows_a,
                                                int head_a, int first_a, const Rows &rows_b, int head_b,
                                                int first_b, const Work &w, int D) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int column = 0; column < D; column += SIDE) {
        __syncthreads();
        load_square(a, rows_a, head_a, w, first_a, column, D);
        load_square(b, rows_b, head_b, w, first_b, column, D);
        __syncthreads();
        if (first_a + 4 * y < w.s.rows)
            for (int d = 0; d < min_of(SIDE, D - column); d += 4) {
                float u[4][4], v[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    load(u[i], a + (4 * y + i) * PITCH + d);
                    load(v[i], b + (x + 16 * i) * PITCH + d);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[i][j] += u[i][e] * v[j][e];
            }
    }
}

/* sum[c][i][j] += row 4 y + i of the square p times column 64 c + 4 x + j of SIDE rows; b: a square that
 * these come through. */
static __device__ __forceinline__ void add_rows(float (&sum)[MOST_SQUARES][4][4], const float *p, float *b,
                                                const Rows &rows, int head, int first, const Work &w, int D) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int c = 0; c < MOST_SQUARES; c++) {
        if (c * SIDE >= D) break;
        __syncthreads();
        load_square(b, rows, head, w, first, c * SIDE, D);
        __syncthreads();
        if (c * SIDE + 4 * x < D)
            for (int k = 0; k < min_of(SIDE, w.s.rows - first); k += 4) {
                float u[4][4], v[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    load(u[i], p + (4 * y + i) * PITCH + k);
                    load(v[i], b + (k + i) * PITCH + 4 * x);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[c][i][j] += u[i][e] * v[e][j];
            }
    }
}

static __device__ __forceinline__ void store_sums(const Rows &rows, int head, const Work &w,
                                                  const float (&sum)[MOST_SQUARES][4][4], int D) {
    float *to = head_of<float>(rows, w.batch, head);
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int c = 0; c < MOST_SQUARES; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = w.first + 4 * y + i, d = c * SIDE + 4 * x + j;
                if (row < w.s.rows && d < D) to[token(w.s, row) * rows.token + d] = sum[c][i][j];
            }
}

/* Over the sixteen lanes that share a row. */
static __device__ __forceinline__ float row_sum(float x) {
    for (int offset = 8; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
static __device__ __forceinline__ float row_max(float x) {
    for (int offset = 8; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

static __global__ void __launch_bounds__(FLOAT_THREADS) forward_float_kernel(const Forward a) {
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_queries(p, a.slots, SIDE, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(float, one);
    float *two = one + SQUARE, *weights = two + SQUARE;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float scale = s.wrong      ? NAN
                  : a.negative ? -a.scale
                               : a.scale,
          out[MOST_SQUARES][4][4] = {}, top[4], total[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) top[i] = -INFINITY;
    for (int key = 0; key < min_of(w.first + SIDE, s.rows); key += SIDE) {
        float e[4][4] = {};
        dot_rows(e, one, two, a.q, w.head, w.first, a.k, w.kv_head, key, w, p.D);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = w.first + 4 * y + i, low = first_key(s, row);
            float highest = top[i], sum = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int at = key + x + 16 * j;
                e[i][j] = at > row || at < low ? -INFINITY : e[i][j] * scale;
                highest = fmaxf(highest, e[i][j]);
            }
            highest = row_max(highest);
            float shift = highest == -INFINITY ? 0 : highest, shrink = expf(top[i] - shift);
            top[i] = highest;
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum += weights[(4 * y + i) * PITCH + x + 16 * j] = expf(e[i][j] - shift);
            total[i] = total[i] * shrink + sum;
#pragma unroll
            for (int c = 0; c < MOST_SQUARES; c++)
#pragma unroll
                for (int j = 0; j < 4; j++) out[c][i][j] *= shrink;
        }
        add_rows(out, weights, two, a.v, w.kv_head, key, w, p.D);
    }
    float *lse = head_of<float>(a.lse, w.batch, w.head);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float sum = row_sum(total[i]), inverse = sum == 0 ? 0 : 1 / sum;
        int row = w.first + 4 * y + i;
#pragma unroll
        for (int c = 0; c < MOST_SQUARES; c++)
#pragma unroll
            for (int j = 0; j < 4; j++) out[c][i][j] *= inverse;
        if (x == 0 && row < s.rows) lse[token(s, row)] = (top[i] == -INFINITY ? 0 : top[i]) + logf(sum);
    }
    store_sums(a.out, w.head, w, out, p.D);
}

/* Turns scores and products dout v^T of 64 rows and 64 keys into weights and gradients of scores.
 * ROWS_ARE_KEYS: element (i,j) is key 4 y + i and query x + 16 j, else query 4 y + i and key x + 16 j. shift,
 * less: of the queries' rows from `row` on. */
template <bool ROWS_ARE_KEYS> __device__ __forceinline__ void
gradients(float (&e)[4][4], float (&de)[4][4], const Backward &a, const Work &w, int head, int row, int key) {
    const Segment &s = w.s;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const float *lse = head_of<const float>(a.lse, w.batch, head), *delta = delta_of(a, w.batch, head);
    float scale = s.wrong ? NAN : a.scale;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int down = 4 * y + i, across = x + 16 * j, r = row + (ROWS_ARE_KEYS ? across : down);
            int at = key + (ROWS_ARE_KEYS ? down : across);
            bool seen = r < s.rows && at <= r && at >= first_key(s, r);
            float l = seen ? lse[token(s, r)] : 0;
            float weight = seen ? expf(e[i][j] * scale - (l == -INFINITY ? 0 : l)) : 0;
            e[i][j] = weight;
            de[i][j] = seen ? weight * (de[i][j] - delta[token(s, r)]) : 0;
        }
}

static __global__ void __launch_bounds__(FLOAT_THREADS) dq_float_kernel(const Backward a) {
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_queries(p, a.slots, SIDE, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(float, one);
    float *two = one + SQUARE, *ds = two + SQUARE;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float dq[MOST_SQUARES][4][4] = {};
    for (int key = 0; key < min_of(w.first + SIDE, s.rows); key += SIDE) {
        float e[4][4] = {}, de[4][4] = {};
        dot_rows(e, one, two, a.q, w.head, w.first, a.k, w.kv_head, key, w, p.D);
        dot_rows(de, one, two, a.dout, w.head, w.first, a.v, w.kv_head, key, w, p.D);
        gradients<false>(e, de, a, w, w.head, w.first, key);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) ds[(4 * y + i) * PITCH + x + 16 * j] = de[i][j] * a.scale;
        add_rows(dq, ds, two, a.k, w.kv_head, key, w, p.D);
    }
    store_sums(a.dq, w.head, w, dq, p.D);
}

static __global__ void __launch_bounds__(FLOAT_THREADS) dkdv_float_kernel(const Backward a) {
    const Pattern &p = a.p;
    __shared__ Work w;
    if (!find_keys(p, a.slots, SIDE, a.mixed, a.second, &w)) return;
    const Segment &s = w.s;
    DYNAMIC_SHARED(float, one);
    float *two = one + SQUARE, *weights = two + SQUARE, *ds = weights + SQUARE;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float dk[MOST_SQUARES][4][4] = {}, dv[MOST_SQUARES][4][4] = {};
    if (a.second) { /* what the plain heads gave */
        const float *from_k = head_of<float>(a.dk, w.batch, w.kv_head),
                    *from_v = head_of<float>(a.dv, w.batch, w.kv_head);
#pragma unroll
        for (int c = 0; c < MOST_SQUARES; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int row = w.first + 4 * y + i, d = c * SIDE + 4 * x + j;
                    if (row >= s.rows || d >= p.D) continue;
                    dk[c][i][j] = from_k[token(s, row) * a.dk.token + d];
                    dv[c][i][j] = from_v[token(s, row) * a.dv.token + d];
                }
    }
    for (int head = w.head; head < w.to_head; head++)
        for (int row = w.first; row < s.rows; row += SIDE) {
            float e[4][4] = {}, de[4][4] = {};
            dot_rows(e, one, two, a.k, w.kv_head, w.first, a.q, head, row, w, p.D);
            dot_rows(de, one, two, a.v, w.kv_head, w.first, a.dout, head, row, w, p.D);
            gradients<true>(e, de, a, w, head, row, w.first);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    weights[(4 * y + i) * PITCH + x + 16 * j] = e[i][j];
                    ds[(4 * y + i) * PITCH + x + 16 * j] = de[i][j] * a.scale;
                }
            add_rows(dv, weights, two, a.dout, head, row, w, p.D);
            add_rows(dk, ds, one, a.q, head, row, w, p.D);
        }
    store_sums(a.dk, w.kv_head, w, dk, p.D);
    store_sums(a.dv, w.kv_head, w, dv, p.D);
}

/* Keys that no query sees: there are no query heads. */
template <class T> __global__ void zero_kernel(Rows x, int64_t T_, int64_t K, int64_t D, int64_t elements) {
    int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i < elements)
        ((T *)x.data)[i / D / K / T_ * x.batch + i / D / K % T_ * x.token + i / D % K * x.head + i % D] =
            from_float<T>(0);
}

/* ---- launches -------------------------------------------------------------------------------- */

/* A block for each slot of `heads` heads of each sequence. */
static int blocks_of(const char *op, const Pattern *p, int heads, int tile, int *slots, dim3 *grid) {
    int64_t each = slots_of(p, tile), blocks = (int64_t)p->B * heads;
    if (each && blocks > INT32_MAX / each)
        return fail("%s: too much for one call: B=%d T=%d H=%d group_size=%d", op, p->B, p->T, p->H, p->G);
    *slots = (int)each;
    *grid = dim3((unsigned)(blocks * each));
    return 0;
}

/* f(constant of the tiles' columns): D rounded up. */
template <int D> struct columns {
    static constexpr int value = D;
};
template <class F> static int for_columns(int D, F f) {
    if (D <= 64) return f(columns<64>());
    if (D <= 96) return f(columns<96>());
    if (D <= 128) return f(columns<128>());
    return f(columns<256>());
}

template <class T> static int forward(Forward a, const CudaCall *call) {
    auto run = [&](auto kernel, int tile, unsigned threads, size_t shared) {
        dim3 grid;
        if (blocks_of("s2_attention_forward", &a.p, a.p.H, tile, &a.slots, &grid)) return -1;
        return launch(call, kernel, grid, threads, shared, a);
    };
    if constexpr (sizeof(T) == 4)
        return run(forward_float_kernel, SIDE, FLOAT_THREADS, 3 * SQUARE * sizeof(float));
    else
        return for_columns(a.p.D, [&](auto columns) {
            constexpr int D = decltype(columns)::value, BM = 16 * row_pieces<D> * WARPS, BN = forward_step<D>;
            return run(forward_kernel<T, D>, BM, THREADS, (BM + 4 * BN) * D * sizeof(T));
        });
}

extern "C" int s2_attention_forward_cuda(const void *args, const CudaCall *call) {
    const S2AttentionForward *x = (const S2AttentionForward *)args;
    Forward a = {};
    if (make_pattern("s2_attention_forward", &a.p, x)) return -1;
    a.out = rows_of(&x->out);
    a.lse = lse_of(&x->lse);
    a.q = rows_of(&x->q);
    a.k = rows_of(&x->k);
    a.v = rows_of(&x->v);
    a.scale = fabsf((float)x->scale);
    a.c = fmaxf(a.scale * LOG2E, 1.2e-38f); /* above 0, that -inf stays what it is */
    a.negative = x->scale < 0;
    return for_dtype(x->q.dtype, [&](auto t) { return forward<typename decltype(t)::is>(a, call); });
}

/* The KV head that has plain and shifted query heads, or -1. */
static int mixed_head(const Pattern *p) {
    return p->K && p->border % (p->H / p->K) ? p->border / (p->H / p->K) : -1;
}
static int64_t delta_bytes(const Pattern *p) {
    return align_up((int64_t)p->B * p->H * p->T * (int64_t)sizeof(float));
}

extern "C" int64_t s2_attention_backward_cuda_workspace(const void *args) {
    const S2AttentionBackward *x = (const S2AttentionBackward *)args;
    Pattern p = {};
    if (make_pattern("s2_attention_backward", &p, x)) return -1;
    bool sums = p.H && mixed_head(&p) >= 0 && x->q.dtype != F32;
    return delta_bytes(&p) + (sums ? (int64_t)p.B * p.T * 2 * p.D * (int64_t)sizeof(float) : 0);
}

template <class T> static int delta(const Backward &a, const CudaCall *call) {
    auto run = [&](auto kernel, int N) {
        int lanes = 1;
        while (lanes < WARP && lanes * N < a.p.D) lanes *= 2;
        int64_t rows = (int64_t)a.p.B * a.p.H * a.p.T;
        return launch(call, kernel, dim3((unsigned)ceil_div(rows * lanes, THREADS)), THREADS, 0, a, lanes,
                      rows);
    };
    constexpr int N = 16 / sizeof(T);
    return a.dout.vectors && a.out.vectors ? run(delta_kernel<T, N>, N) : run(delta_kernel<T, 1>, 1);
}

/* dq, then dk and dv of all KV heads, then what the shifted heads of a KV head of both kinds add. */
template <class Dq, class Dkdv> static int backward(Backward a, const CudaCall *call, Dq dq, int dq_tile,
                                                    size_t dq_shared, Dkdv dkdv, int dkdv_tile,
                                                    size_t dkdv_shared, unsigned parts, unsigned threads) {
    dim3 grid;
    if (blocks_of("s2_attention_backward", &a.p, a.p.H, dq_tile, &a.slots, &grid) ||
        launch(call, dq, grid, threads, dq_shared, a))
        return -1;
    for (int second = 0; second <= (a.mixed >= 0); second++) {
        a.second = second;
        if (blocks_of("s2_attention_backward", &a.p, second ? 1 : a.p.K, dkdv_tile, &a.slots, &grid))
            return -1;
        grid.y = parts;
        if (launch(call, dkdv, grid, threads, dkdv_shared, a)) return -1;
    }
    return 0;
}

extern "C" int s2_attention_backward_cuda(const void *args, const CudaCall *call) {
    const S2AttentionBackward *x = (const S2AttentionBackward *)args;
    Backward a = {};
    Pattern *p = &a.p;
    if (make_pattern("s2_attention_backward", p, x)) return -1;
    a.dq = rows_of(&x->dq);
    a.dk = rows_of(&x->dk);
    a.dv = rows_of(&x->dv);
    a.dout = rows_of(&x->dout);
    a.q = rows_of(&x->q);
    a.k = rows_of(&x->k);
    a.v = rows_of(&x->v);
    a.out = rows_of(&x->out);
    a.lse = lse_of(&x->lse);
    a.scale = (float)x->scale;
    a.c = a.scale * LOG2E;
    a.delta = (float *)call->workspace;
    a.sums = (float *)((char *)call->workspace + delta_bytes(p));
    return for_dtype(x->q.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        if (!p->H) {
            int64_t elements = (int64_t)p->B * p->T * p->K * p->D;
            dim3 grid((unsigned)ceil_div(elements, THREADS));
            return launch(call, zero_kernel<T>, grid, THREADS, 0, a.dk, p->T, p->K, p->D, elements) ||
                           launch(call, zero_kernel<T>, grid, THREADS, 0, a.dv, p->T, p->K, p->D, elements)
                       ? -1
                       : 0;
        }
        a.mixed = mixed_head(p);
        if (delta<T>(a, call)) return -1;
        if constexpr (sizeof(T) == 4) {
            size_t square = SQUARE * sizeof(float);
            return backward(a, call, dq_float_kernel, SIDE, 3 * square, dkdv_float_kernel, SIDE, 4 * square,
                            1, FLOAT_THREADS);
        } else
            return for_columns(p->D, [&](auto columns) {
                constexpr int D = decltype(columns)::value, BM = 16 * row_pieces<D> * WARPS, BK = 16 * WARPS;
                size_t row = D * sizeof(T);
                return backward(a, call, dq_kernel<T, D>, BM, (2 * BM + 4 * dq_step<D>)*row,
                                dkdv_kernel<T, D>, BK, (2 * BK + 4 * dkdv_step<D>)*row, D > 128 ? 2 : 1,
                                THREADS);
            });
    });
}
