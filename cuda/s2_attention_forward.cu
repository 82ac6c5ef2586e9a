/* s2_attention_forward.cu --- shifted sparse attention, forward, on every GPU from sm_80 on. csrc/ops.h has
 * the rule, s2_attention.cuh the rows that a block works on, docs/tuning/cuda_s2_attention.md the reasons for
 * the sizes.
 *
 * A block of four warps takes a tile of queries of one segment: 16 or 32 rows per warp. It walks through the
 * keys in steps, from the diagonal backwards. Shared memory holds two tiles of a step's keys and values: one
 * is used while cp.async fills the other one, so a step needs one barrier. All products are mma.sync with
 * float32 sums. The sums of q k^T already lie in the registers as the left operand of the next product needs
 * them, so the weights are rounded to 16 bits and used there. Only steps that cross the diagonal mask. Blocks
 * are numbered head by head, those with most work first, so that a group's keys and values stay in L2.
 *
 * Rows of D elements are padded by zeros in shared memory to 64, 96, 128 or 256. Rows that are not whole
 * pieces of 16 bytes are loaded element by element. float32 is multiplied by float32 multiply-adds, in a
 * kernel of its own.
 *
 * NaN and infinities of a key spread to the queries that see it. Those of a value may also reach queries in
 * the same step of the diagonal, by a product with a weight of 0. */
#include "s2_attention_tiles.cuh"

struct Forward {
    Pattern p;
    int slots; /* per head */
    Rows out, lse, q, k, v;
    float scale, c; /* |scale|, and that times log2(e) */
    bool negative;  /* scale < 0: queries are negated */
};

/* Sum and maximum over the four lanes that share a row. */
static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* ---- forward, 16 bits ------------------------------------------------------------------------ */

/* A step of the online softmax: turns scores x into weights relative to the new maximum `top` of each row,
 * and scales the sums so far, `total` and `out`, to it. c: the scale, times log2(e). */
template <int M, int N, int C> static __device__ __forceinline__ void
soften(float (&x)[M][N][4], float (&out)[M][C][4], float (&top)[M][2], float (&total)[M][2], float c) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float highest = top[m][r];
#pragma unroll
            for (int j = 0; j < N; j++) highest = fmaxf(highest, fmaxf(x[m][j][2 * r], x[m][j][2 * r + 1]));
            highest = quad_max(highest);
            /* A row that has seen nothing: 2^(-inf - 0), not 2^(-inf + inf). */
            float shift = highest == -INFINITY ? 0.0f : highest * c;
            float shrink = exp2_fast(top[m][r] * c - shift), sum = 0;
            top[m][r] = highest;
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) sum += x[m][j][i] = exp2_fast(x[m][j][i] * c - shift);
            total[m][r] = total[m][r] * shrink + sum;
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) out[m][j][i] *= shrink;
        }
}

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
    int row = w.first + offset, end = min_of(row + 16 * M, s.rows); /* of this warp; row >= end: no rows */
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
        __syncthreads(); /* step n has arrived, and no thread still reads step n + 1 */
        if (n > 0) load_step<D, BN>(k, v, n - 1, a.k, a.v, w.kv_head, w, (n - 1) * BN, p.D);
        if (row >= end || n * BN >= end) continue; /* no row of the warp sees any key of the block */
        float x[M][N][4] = {};
        multiply_rows<D>(x, own, k + n % 2 * BN * D);
        if (any_hidden(s, w.first, BM, n * BN, BN)) hide_keys(x, s, row + group, n * BN + pair, -INFINITY);
        soften(x, out, top, total, c);
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

/* ---- float32 --------------------------------------------------------------------------------- */

/* Sum and maximum over the sixteen lanes that share a row. */
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

/* ---- launches -------------------------------------------------------------------------------- */

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
    a.c = fmaxf(a.scale * LOG2E, 1.2e-38f); /* above 0, so that -inf times it is -inf */
    a.negative = x->scale < 0;
    return for_dtype(x->q.dtype, [&](auto t) { return forward<typename decltype(t)::is>(a, call); });
}
