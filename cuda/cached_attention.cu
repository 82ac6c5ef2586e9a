/* cached_attention.cu --- attention of new tokens over a cache of keys and values.
 *
 * Three kernels. One writes the new keys and values. One attends: a block takes ROWS query rows of a KV head
 * and a part of the keys, BLOCK keys at a time. A thread multiplies one key with all rows, which it finds in
 * shared memory; then a warp takes the softmax of some rows; then a thread sums a few columns of the values.
 * With few query rows the keys of a sequence are cut into parts, which follow from its length alone, and the
 * third kernel adds them up in their order.
 *
 * Decoding is bound by memory: each key and value is read once for all query heads of its KV head. A chunk of
 * a prompt is bound by arithmetic, which is plain float32 here, without tensor cores. */
#include "rows.cuh"

enum {
    THREADS = 128,
    ROWS = 8,   /* query rows of a block */
    MOST = 256, /* D at most */
};

/* [N,T,H,D] and its strides. */
template <class T> struct Array {
    T *data;
    int64_t b, t, h;
};
template <class T> static Array<T> array_of(const Tensor *t) {
    return { (T *)t->data, t->stride[0], t->stride[1], t->stride[2] };
}

struct Shape {
    int64_t B, S, H, K, D, N, P;
    const int32_t *rows, *lengths; /* rows may be null */
    int parts;                     /* in the grid */
    float scale;
    __host__ __device__ int64_t each() const { return H / K; }
    __host__ __device__ int64_t count() const { return S * each(); } /* query rows of a KV head */
};

/* A sequence's place in the cache; `there` is false if it is outside. */
struct Place {
    int64_t row, length;
    bool there;
};
static __device__ __forceinline__ Place place_of(const Shape &s, int64_t b) {
    int64_t row = s.rows ? s.rows[b] : b, length = s.lengths[b];
    return { row, length, row >= 0 && row < s.N && length >= 0 && length + s.S <= s.P };
}

static __device__ int64_t part_keys(int64_t keys) {
    int64_t parts = ceil_div(keys, (int64_t)CACHE_PART_KEYS * CACHE_PARTS);
    return CACHE_PART_KEYS * (parts > 1 ? parts : 1);
}

template <class T, class C>
__global__ void append_kernel(Shape s, Array<C> k_cache, Array<C> v_cache, Array<const T> k,
                              Array<const T> v) {
    int64_t b = blockIdx.y, n = s.S * s.K * s.D;
    Place place = place_of(s, b);
    if (!place.there) return;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        int64_t t = i / (s.K * s.D), h = i / s.D % s.K, d = i % s.D;
        int64_t from_k = b * k.b + t * k.t + h * k.h + d, from_v = b * v.b + t * v.t + h * v.h + d;
        int64_t at = place.length + t;
        k_cache.data[place.row * k_cache.b + at * k_cache.t + h * k_cache.h + d] =
            from_float<C>(to_float(k.data[from_k]));
        v_cache.data[place.row * v_cache.b + at * v_cache.t + h * v_cache.h + d] =
            from_float<C>(to_float(v.data[from_v]));
    }
}

/* What a block keeps in shared memory: queries [ROWS,pitch], weights [ROWS,THREADS], sums of groups of
 * threads [THREADS / columns, ROWS, columns], and the maximum, the sum and the factor of each row. */
static __host__ __device__ int64_t pitch_of(int64_t D) { return ceil_div(D, 8) * 8; }
static __device__ int columns_of(int64_t D) {
    int columns = 8;
    while (columns < THREADS && columns < D) columns *= 2;
    return columns;
}
static size_t shared_bytes(int64_t D) {
    return sizeof(float) * (size_t)(ROWS * pitch_of(D) + ROWS * THREADS + THREADS * ROWS + 3 * ROWS);
}

/* COLUMNS: columns of a thread, those that are THREADS apart. out: with parts == 1 the result, else unused,
 * and partial [B, parts, K, rows, D + 2] receives weighted values, maximum and sum. */
template <class T, class C, bool ALIGNED, int COLUMNS> __global__ void __launch_bounds__(THREADS)
    attend_kernel(Shape s, Array<T> out, float *partial, Array<const T> q, Array<const C> k,
                  Array<const C> v) {
    constexpr int N = 16 / sizeof(C);
    DYNAMIC_SHARED(float, memory);
    int64_t pitch = pitch_of(s.D), each = s.each(), rows = s.count();
    float *queries = memory, *p = queries + ROWS * pitch, *groups = p + ROWS * THREADS,
          *maximum = groups + THREADS * ROWS, *sum = maximum + ROWS, *less = sum + ROWS;
    int64_t b = blockIdx.z, kv_head = blockIdx.y, part = blockIdx.x % s.parts,
            row0 = (int64_t)(blockIdx.x / s.parts) * ROWS;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Place place = place_of(s, b);
    int64_t keys = place.there ? place.length + s.S : 0;
    int64_t step = s.parts > 1 ? part_keys(keys) : keys, first = part * step;
    int64_t last = least(keys, first + step);
    if (s.parts > 1 && first >= keys) return; /* add_kernel does not read this part */
    if (s.parts == 1)                         /* the last row of the block sees no key behind its own place */
        last = least(last, place.length + (row0 + ROWS - 1) / each + 1);
    for (int64_t i = threadIdx.x; i < ROWS * pitch; i += THREADS) {
        int64_t r = row0 + i / pitch, d = i % pitch;
        bool there = r < rows && d < s.D;
        queries[i] =
            there
                ? s.scale * to_float(q.data[b * q.b + r / each * q.t + (kv_head * each + r % each) * q.h + d])
                : 0.0f;
    }
    if (threadIdx.x < ROWS) maximum[threadIdx.x] = -INFINITY, sum[threadIdx.x] = 0.0f;
    int columns = columns_of(s.D), group = threadIdx.x / columns, column = threadIdx.x % columns;
    float total[ROWS][COLUMNS] = {};
    k.data += place.there ? place.row * k.b + kv_head * k.h : 0;
    v.data += place.there ? place.row * v.b + kv_head * v.h : 0;
    for (int64_t key = first; key < last; key += THREADS) {
        int n = (int)least(THREADS, last - key);
        __syncthreads();
        float score[ROWS] = {};
        if ((int)threadIdx.x < n)
            for (int64_t d = 0; d < s.D; d += N) {
                const C *row = k.data + (key + threadIdx.x) * k.t + d;
                float x[N];
                if (ALIGNED) load<N>(x, row);
                else
#pragma unroll
                    for (int j = 0; j < N; j++) x[j] = d + j < s.D ? to_float(row[j]) : 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < N; j++) score[r] += queries[r * pitch + d + j] * x[j];
            }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool seen = (int)threadIdx.x < n && key + threadIdx.x <= place.length + (row0 + r) / each;
            p[r * THREADS + threadIdx.x] = seen ? score[r] : -INFINITY;
        }
        __syncthreads();
        for (int r = warp; r < ROWS; r += THREADS / WARP) {
            float top = maximum[r], all = 0.0f;
            for (int j = lane; j < THREADS; j += WARP) top = fmaxf(top, p[r * THREADS + j]);
            top = warp_max(top);
            float base = top == -INFINITY ? 0.0f : top; /* a row that has seen no key */
            for (int j = lane; j < THREADS; j += WARP) {
                float e = expf(p[r * THREADS + j] - base);
                p[r * THREADS + j] = e;
                all += e;
            }
            all = warp_sum(all);
            __syncwarp();
            if (lane == 0) {
                less[r] = expf(maximum[r] - base);
                sum[r] = sum[r] * less[r] + all;
                maximum[r] = top;
            }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) total[r][c] *= less[r];
        for (int j = group; j < n; j += THREADS / columns)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int64_t d = column + c * THREADS;
                float x = d < s.D ? to_float(v.data[(key + j) * v.t + d]) : 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; r++) total[r][c] += p[r * THREADS + j] * x;
            }
    }
#pragma unroll 1
    for (int c = 0; c < COLUMNS; c++) {
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++) groups[(group * ROWS + r) * columns + column] = total[r][c];
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * columns; i += THREADS) {
            int64_t r = i / columns, d = i % columns + c * THREADS;
            if (row0 + r >= rows || d >= s.D) continue;
            float x = 0.0f;
            for (int g = 0; g < THREADS / columns; g++) x += groups[(g * ROWS + r) * columns + i % columns];
            if (s.parts == 1) {
                int64_t t = (row0 + r) / each, h = kv_head * each + (row0 + r) % each;
                float y = !place.there ? NAN : sum[r] == 0.0f ? 0.0f : x / sum[r];
                out.data[b * out.b + t * out.t + h * out.h + d] = from_float<T>(y);
            } else {
                float *to = partial + (((b * s.parts + part) * s.K + kv_head) * rows + row0 + r) * (s.D + 2);
                to[d] = x;
                if (d == 0) to[s.D] = maximum[r], to[s.D + 1] = sum[r];
            }
        }
    }
}

/* A block adds up the parts of one query row. */
template <class T> __global__ void add_kernel(Shape s, Array<T> out, const float *partial) {
    int64_t rows = s.count(), each = s.each(), r = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
    Place place = place_of(s, b);
    int64_t keys = place.length + s.S, parts = place.there ? ceil_div(keys, part_keys(keys)) : 0;
    int64_t step = s.K * rows * (s.D + 2);
    partial += b * s.parts * step + (kv_head * rows + r) * (s.D + 2);
    float most = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < parts; i++) most = fmaxf(most, partial[i * step + s.D]);
    if (most == -INFINITY) most = 0.0f;
    for (int64_t i = 0; i < parts; i++)
        total += expf(partial[i * step + s.D] - most) * partial[i * step + s.D + 1];
    T *to = out.data + b * out.b + r / each * out.t + (kv_head * each + r % each) * out.h;
    for (int64_t d = threadIdx.x; d < s.D; d += THREADS) {
        float x = 0.0f;
        for (int64_t i = 0; i < parts; i++) x += expf(partial[i * step + s.D] - most) * partial[i * step + d];
        to[d] = from_float<T>(!place.there ? NAN : total == 0.0f ? 0.0f : x / total);
    }
}

static Shape shape_of(const CachedAttention *a) {
    Shape s = { a->q.shape[0],
                a->q.shape[1],
                a->q.shape[2],
                a->k_cache.shape[2],
                a->q.shape[3],
                a->k_cache.shape[0],
                a->k_cache.shape[1],
                given(&a->rows) ? (const int32_t *)a->rows.data : nullptr,
                (const int32_t *)a->lengths.data,
                1,
                (float)a->scale };
    s.parts = (int)cache_parts(a);
    return s;
}

extern "C" int cached_attention_cuda(const void *args, const CudaCall *call) {
    const CachedAttention *a = (const CachedAttention *)args;
    Shape s = shape_of(a);
    if (s.D > MOST)
        return fail("cached_attention: D should be at most %d on a GPU, got %lld", (int)MOST, (long long)s.D);
    if (a->k_cache.dtype != a->v_cache.dtype)
        return fail("cached_attention: k_cache and v_cache should have one dtype on a GPU");
    if (s.B > 65535 || s.K > 65535)
        return fail("cached_attention: B and K should be at most 65535 on a GPU, got %lld and %lld",
                    (long long)s.B, (long long)s.K);
    return for_dtype(a->q.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        return for_dtype(a->k_cache.dtype, [&](auto c) {
            using C = typename decltype(c)::is;
            if (given(&a->k)) {
                unsigned blocks = (unsigned)least(ceil_div(s.S * s.K * s.D, THREADS), 4096);
                if (launch(call, append_kernel<T, C>, dim3(blocks, (unsigned)s.B), THREADS, 0, s,
                           array_of<C>(&a->k_cache), array_of<C>(&a->v_cache), array_of<const T>(&a->k),
                           array_of<const T>(&a->v)))
                    return -1;
            }
            if (!s.K || !s.count() || !s.D) return 0;
            bool fit = aligned(16 / sizeof(C), s.D, &a->k_cache);
            auto kernel = s.D > THREADS
                              ? (fit ? attend_kernel<T, C, true, 2> : attend_kernel<T, C, false, 2>)
                              : (fit ? attend_kernel<T, C, true, 1> : attend_kernel<T, C, false, 1>);
            dim3 grid((unsigned)(ceil_div(s.count(), ROWS) * s.parts), (unsigned)s.K, (unsigned)s.B);
            if (launch(call, kernel, grid, THREADS, shared_bytes(s.D), s, array_of<T>(&a->out),
                       (float *)call->workspace, array_of<const T>(&a->q), array_of<const C>(&a->k_cache),
                       array_of<const C>(&a->v_cache)))
                return -1;
            if (s.parts == 1) return 0;
            return launch(call, add_kernel<T>, dim3((unsigned)s.count(), (unsigned)s.K, (unsigned)s.B),
                          THREADS, 0, s, array_of<T>(&a->out), (const float *)call->workspace);
        });
    });
}
