/* embedding.cu --- rows of a table by token id, and the sums of their gradients, without atomics.
 *
 * The forward is bound by memory: it reads and writes each row once (2 M C elements). A thread loads 64 bytes
 * at a time.
 *
 * The backward goes through the tokens in the order of their ids, in pieces of equal length. A block sums one
 * piece, for some columns, in registers. It adds a run of equal ids that begins in the piece to its row of
 * dweight, which no other block of the launch touches. The sum of a run that began before the piece goes to
 * the piece's row of `partial`; a second kernel adds the partial rows of a run in a fixed order. So a token
 * that fills most of the text costs no more than others. At least M C elements of dout are read, and 8 C
 * bytes moved for each distinct id. */
#include "rows.cuh"

enum { U = 4 }; /* vectors per thread in the forward */

/* V is 16, 4 or 2 bytes, and a row has C of them. 7fff7fff is NaN in every dtype. */
template <class V> static __device__ __forceinline__ V not_a_number() {
    unsigned words[4] = { 0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff };
    V v;
    memcpy(&v, words, sizeof v);
    return v;
}

template <class V> __global__ void __launch_bounds__(BLOCK)
    forward_kernel(V *out, int64_t out_row, const V *weight, int64_t weight_row, const int32_t *ids,
                   int64_t rows, int64_t M, int64_t C, unsigned shift) {
    Part p = part<1, U>(shift);
    for (int64_t m = p.m; m < M; m += p.rows) {
        int32_t id = ids[m];
        V v[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int64_t c = p.c + u * p.step;
            v[u] = not_a_number<V>();
            if (c < C && id >= 0 && id < rows) v[u] = weight[id * weight_row + c];
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int64_t c = p.c + u * p.step;
            if (c < C) out[m * out_row + c] = v[u];
        }
    }
}

extern "C" int embedding_forward_cuda(const void *args, const CudaCall *call) {
    const EmbeddingForward *a = (const EmbeddingForward *)args;
    int64_t M = a->out.shape[0], C = a->out.shape[1], size = size_of(a->out.dtype);
    auto run = [&](auto v) {
        using V = typename decltype(v)::is;
        int64_t per = (int64_t)sizeof(V) / size;
        Deal d = deal<1, U>(M, C / per);
        return launch(call, forward_kernel<V>, d.grid, BLOCK, 0, (V *)a->out.data, a->out.stride[0] / per,
                      (const V *)a->weight.data, a->weight.stride[0] / per, (const int32_t *)a->ids.data,
                      a->weight.shape[0], M, C / per, d.shift);
    };
    auto fit = [&](int64_t bytes) { return aligned((int)(bytes / size), C, &a->out, &a->weight); };
    return fit(16)               ? run(type<uint4>())
           : size == 4 || fit(4) ? run(type<unsigned>())
                                 : run(type<unsigned short>());
}

/* ---- backward -------------------------------------------------------------------------------- */

enum {
    N = EMBEDDING_COLUMNS,
    AT_ONCE = 4,
    CHUNK = 64
}; /* columns per thread; rows loaded at once; ids in shared memory */

/* The id of the token at place i of the order, negative if it is invalid, and that token. -1 if there is
 * none. */
static __device__ __forceinline__ int32_t id_at(const int32_t *ids, const int32_t *order, int64_t i,
                                                int64_t M, int64_t rows, int32_t *token) {
    int32_t m = i >= 0 && i < M ? order[i] : -1, id = m >= 0 && m < M ? ids[m] : -1;
    *token = m;
    return id < rows ? id : -1;
}

/* Sums piece blockIdx.y. carried[piece]: the id of the run that continues into the piece, or -1. */
template <class T, bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    runs_kernel(float *dweight, int64_t dweight_row, float *partial, int64_t pitch, int32_t *carried,
                const T *dout, int64_t dout_row, const int32_t *ids, const int32_t *order, int64_t rows,
                int64_t M, int64_t C, int64_t piece) {
    __shared__ int32_t token[CHUNK + 2], id[CHUNK + 2];
    int64_t begin = blockIdx.y * piece, end = least(begin + piece, M);
    int64_t c = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    float sum[N] = {};
    bool from_before = false;
    for (int64_t first = begin; first < end; first += CHUNK) {
        int n = (int)least(end - first, CHUNK);
        __syncthreads();
        for (int i = threadIdx.x; i < n + 2; i += blockDim.x)
            id[i] = id_at(ids, order, first - 1 + i, M, rows, &token[i]);
        __syncthreads();
        if (first == begin) {
            from_before = id[0] >= 0 && id[0] == id[1];
            if (blockIdx.x == 0 && threadIdx.x == 0) carried[blockIdx.y] = from_before ? id[0] : -1;
        }
        for (int i = 1; i <= n; i += AT_ONCE) {
            Raw<T, N> ds[AT_ONCE];
            Raw<float, N> ws[AT_ONCE];
            /* Bit g: a run ends at place i+g. */
            unsigned ends = 0;
            bool before = from_before;
#pragma unroll
            for (int g = 0; g < AT_ONCE; g++) {
                int32_t here = i + g <= n ? id[i + g] : -1;
                bool last = here >= 0 && (here != id[i + g + 1] || first + i + g == end);
                get<ALIGNED>(ds[g], dout + (here >= 0 ? token[i + g] : 0) * dout_row, c, here >= 0 ? C : 0);
                get<ALIGNED>(ws[g], (const float *)dweight + (last ? here : 0) * dweight_row, c,
                             last && !before ? C : 0);
                if (last) ends |= 1u << g, before = false;
            }
#pragma unroll
            for (int g = 0; g < AT_ONCE; g++) {
                float d[N], w[N];
                widen<T>(d, ds[g]);
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] += d[j];
                if (!(ends >> g & 1)) continue;
                widen<float>(w, ws[g]);
#pragma unroll
                for (int j = 0; j < N; j++) w[j] += sum[j], sum[j] = 0;
                Raw<float, N> raw;
                narrow<float>(raw, w);
                if (from_before) put<true>(partial + blockIdx.y * pitch, raw, c, pitch);
                else put<ALIGNED>(dweight + id[i + g] * dweight_row, raw, c, C);
                from_before = false;
            }
        }
    }
}

/* Sums the run that began in piece blockIdx.y - 1 and continues into this one and perhaps into further ones.
 * Each warp sums a share of the run's partial rows for WARP vectors of columns, then the sums of the warps
 * are added in order. */
template <bool ALIGNED> __global__ void __launch_bounds__(BLOCK)
    carry_kernel(float *dweight, int64_t dweight_row, const float *partial, int64_t pitch,
                 const int32_t *carried, int pieces, int64_t C) {
    enum { WARPS = BLOCK / WARP };
    __shared__ float sums[WARPS][WARP][N];
    int32_t first = (int32_t)blockIdx.y, id = carried[first];
    if (id < 0 || (first && carried[first - 1] == id)) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = 0;
    /* Counts the run's rows: whole warps of them, then the rest. */
    for (unsigned all = ~0u; all == ~0u; n += WARP) {
        int i = first + n + lane;
        all = __ballot_sync(0xffffffffu, i < pieces && carried[i] == id);
        if (all != ~0u) {
            while (all & 1) all >>= 1, n++;
            break;
        }
    }
    int from = (int)((int64_t)n * warp / WARPS), to = (int)((int64_t)n * (warp + 1) / WARPS);
    for (int64_t base = (int64_t)blockIdx.x * WARP * N; base < C; base += (int64_t)gridDim.x * WARP * N) {
        int64_t c = base + lane * N;
        float sum[N] = {};
#pragma unroll 8
        for (int i = from; i < to; i++) {
            Raw<float, N> raw;
            float x[N];
            get<true>(raw, partial + (first + i) * pitch, c, pitch);
            widen<float>(x, raw);
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += x[j];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < N; j++) sums[warp][lane][j] = sum[j];
        __syncthreads();
        if (warp) continue;
        Raw<float, N> raw;
        float w[N];
        get<ALIGNED>(raw, (const float *)dweight + id * dweight_row, c, C);
        widen<float>(w, raw);
        for (int i = 1; i < WARPS; i++)
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += sums[i][lane][j];
#pragma unroll
        for (int j = 0; j < N; j++) w[j] += sum[j];
        narrow<float>(raw, w);
        put<ALIGNED>(dweight + id * dweight_row, raw, c, C);
    }
}

extern "C" int embedding_backward_cuda(const void *args, const CudaCall *call) {
    const EmbeddingBackward *a = (const EmbeddingBackward *)args;
    int64_t M = a->dout.shape[0], C = a->dout.shape[1];
    if (!M || !C) return 0;
    EmbeddingPieces p = embedding_pieces(a);
    float *dweight = (float *)a->dweight.data, *partial = (float *)call->workspace;
    int32_t *carried = (int32_t *)((char *)partial + p.carried);
    int64_t vectors = p.pitch / N;
    unsigned threads = (unsigned)least(ceil_div(vectors, WARP) * WARP, BLOCK);
    int status = for_dtype(a->dout.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        return launch(call,
                      aligned(N, C, &a->dout, &a->dweight) ? runs_kernel<T, true> : runs_kernel<T, false>,
                      dim3((unsigned)ceil_div(vectors, threads), (unsigned)p.count), threads, 0, dweight,
                      a->dweight.stride[0], partial, p.pitch, carried, (const T *)a->dout.data,
                      a->dout.stride[0], (const int32_t *)a->ids.data, (const int32_t *)a->order.data,
                      a->dweight.shape[0], M, C, p.length);
    });
    if (status) return status;
    return launch(call, aligned(N, C, &a->dweight) ? carry_kernel<true> : carry_kernel<false>,
                  dim3((unsigned)least(ceil_div(vectors, WARP), 4), (unsigned)p.count), BLOCK, 0, dweight,
                  a->dweight.stride[0], (const float *)partial, p.pitch, (const int32_t *)carried,
                  (int)p.count, C);
}
