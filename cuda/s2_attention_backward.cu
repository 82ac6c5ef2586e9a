/* s2_attention_backward.cu --- shifted sparse attention, backward, on every GPU from sm_80 on. csrc/ops.h has
 * the rule, s2_attention.cuh the rows that a block works on, docs/tuning/cuda_s2_attention.md the reasons for
 * the sizes.
 *
 * Three kernels: delta = rowsum(dout * out); dq by tiles of queries; dk and dv by tiles of keys, which go
 * through the query heads of their KV head in order. A block of four warps walks as in the forward. In dk and
 * dv rows are keys (scores are transposed), so that weights and gradients of scores lie in the registers as
 * the left operand of the next product. Every row of a result is written once, by one block: without atomics
 * and float32 copies, and with equal bits in every run. At most one KV head has plain and shifted query
 * heads; their segments differ, so two launches sum it.
 *
 * For D = 256, dk and dv are computed in two halves, and each half computes the scores.
 *
 * NaN and infinities of a key spread to the queries that see it. Those of a value or a query may also reach
 * rows in the same step of the diagonal, by a product with a weight of 0. */
#include "s2_attention_tiles.cuh"

struct Backward {
    Pattern p;
    int slots;
    Rows dq, dk, dv, dout, q, k, v, out, lse;
    float scale, c; /* signed; c = scale log2(e) */
    float *delta;   /* [B,H,T], workspace: row sums of dout * out */
    float *sums;    /* [B,T,2,D], workspace: dk and dv of the plain heads of `mixed` */
    int mixed;      /* the KV head that has plain and shifted query heads, or -1 */
    bool second;    /* this launch adds its shifted heads */
};

static __device__ __forceinline__ const float *delta_of(const Backward &a, int batch, int head) {
    return a.delta + ((int64_t)batch * a.p.H + head) * a.p.T;
}

template <int M, int C> static __device__ __forceinline__ void scale_sums(float (&sum)[M][C][4], float by) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][j][i] *= by;
}

/* ---- backward, 16 bits ----------------------------------------------------------------------- */

/* delta[b,h,t] = the sum of dout * out over a row. A row has `lanes` lanes, a power of two. */
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

/* lse in base 2, which exponents are relative to. Where all keys of a query are at -inf it is 0, so that the
 * weights are 2^(-inf - 0) and not 2^(-inf + inf). */
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
    int row = w.first + offset, end = min_of(row + 16 * M, s.rows); /* of this warp; row >= end: no rows */
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
        __syncthreads(); /* step n has arrived, and no thread still reads step n + 1 */
        if (n > 0) load_step<D, BN>(k, v, n - 1, a.k, a.v, w.kv_head, w, (n - 1) * BN, p.D);
        if (row >= end || n * BN >= end) continue;
        float x[M][N][4] = {}, dx[M][N][4] = {};
        multiply_rows<D>(x, q + offset * D, k + n % 2 * BN * D);
        multiply_rows<D>(dx, g + offset * D, v + n % 2 * BN * D);
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
            }
        if (any_hidden(s, w.first, BM, n * BN, BN)) hide_keys(dx, s, row + group, n * BN + pair, 0);
        multiply_columns<D>(dq, dx, k + n % 2 * BN * D);
    }

    if (row >= end) return;
    scale_sums(dq, a.scale);
    store_rows<D, D, M>(a.dq, w.head, w, row, 0, p.D, dq, q + offset * D);
}

/* Sets weights x and gradients of scores dx to 0 where the query is behind the segment or does not see the
 * key. Rows are keys from `key` on and columns are queries from `query` on; both are those of this lane's
 * first element. */
template <int N> static __device__ __forceinline__ void hide_queries(float (&x)[N][4], float (&dx)[N][4],
                                                                     const Segment &s, int key, int query) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int from = query + 8 * j + i % 2, at = key + i / 2 * 8;
            if (from >= s.rows || at > from || at < first_key(s, from)) x[j][i] = dx[j][i] = 0;
        }
}

/* The KV head that has query heads of both kinds: the first launch leaves the sums of the plain ones in the
 * workspace, the second launch adds them to its own. key and column are those of this lane's first
 * element. */
template <int C> static __device__ __forceinline__ void
exchange(float (&dk)[C][4], float (&dv)[C][4], const Backward &a, const Work &w, int key, int column) {
    const Pattern &p = a.p;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int at = key + 8 * r;
        if (at >= w.s.rows) continue;
        float *sums = a.sums + (w.batch * (int64_t)p.T + token(w.s, at)) * 2 * p.D;
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int d = column + 8 * j + i;
                if (d >= p.D) continue;
                if (a.second) {
                    dk[j][2 * r + i] += sums[d];
                    dv[j][2 * r + i] += sums[p.D + d];
                } else {
                    sums[d] = dk[j][2 * r + i];
                    sums[p.D + d] = dv[j][2 * r + i];
                }
            }
    }
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

    /* Steps go through the queries from the diagonal on, head after head. Step n uses tile n % 2. */
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
        __syncthreads(); /* step n has arrived, and no thread still reads step n - 1 */
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
            if (any_hidden(s, row, BN, w.first, BM) || row + BN > s.rows)
                hide_queries(x[0], dx[0], s, key + group, row + pair);
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
        exchange(dk[0], dv[0], a, w, key + group, column + pair);
        if (!a.second) return;
    }
    store_rows<D, COLUMNS, 1>(a.dk, w.kv_head, w, key, column, p.D, dk, k + offset * D);
    store_rows<D, COLUMNS, 1>(a.dv, w.kv_head, w, key, column, p.D, dv, v + offset * D);
}

/* ---- float32 --------------------------------------------------------------------------------- */

/* Turns scores e and products dout v^T (de) of 64 queries from `row` on and 64 keys from `key` on into
 * weights and gradients of scores. ROWS_ARE_KEYS: element (i,j) is key 4 y + i and query x + 16 j, else query
 * 4 y + i and key x + 16 j. */
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
            float weight = seen ? expf(__fmul_rn(e[i][j], scale) - (l == -INFINITY ? 0 : l)) : 0;
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
    if (a.second) { /* the sums of the plain heads */
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

/* For calls without query heads, where no query sees any key. */
template <class T> __global__ void zero_kernel(Rows x, int64_t T_, int64_t K, int64_t D, int64_t elements) {
    int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i < elements)
        ((T *)x.data)[i / D / K / T_ * x.batch + i / D / K % T_ * x.token + i / D % K * x.head + i % D] =
            from_float<T>(0);
}

/* ---- launches -------------------------------------------------------------------------------- */

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

/* dq, then dk and dv of all KV heads, then the shifted heads of the KV head that has both kinds. */
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
    a.sums = (float *)((char *)call->workspace + attention_parts(x).sums);
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
        a.mixed = (int)mixed_head(p->H, p->K, x->shift);
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
