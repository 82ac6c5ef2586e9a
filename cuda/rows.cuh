/* rows.cuh --- for kernels that are bound by memory: moves rows in vectors of 16 bytes, and deals the vectors
 * of a matrix to threads without a division.
 *
 * Every such kernel has two instances. ALIGNED needs addresses, row strides and row lengths that are
 * multiples of a vector. In the other one the same threads move the same elements one by one. So the results
 * of a view have the bits of its dense copy's. */
#ifndef LONGLORA_ROWS_CUH
#define LONGLORA_ROWS_CUH

#include "common.cuh"

#include <initializer_list>

enum { BLOCK = ROW_BLOCK };

/* N elements as they are in memory. They stay words until they are used: with elements of 16 bits, the
 * compiler would wait for each load to take it apart before it issues the next one. */
template <int BYTES> struct Words {
    uint4 word[BYTES / 16];
} __attribute__((may_alias));
template <> struct Words<8> {
    uint2 word[1];
} __attribute__((may_alias));
template <class T, int N> using Raw = Words<sizeof(T) * N>;

template <class T, int N> static __device__ __forceinline__ void widen(float (&x)[N], const Raw<T, N> &raw) {
    Vector<T, N> v;
    memcpy(&v, &raw, sizeof v);
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = to_float(v.x[j]);
}
template <class T, int N> static __device__ __forceinline__ void narrow(Raw<T, N> &raw, const float (&x)[N]) {
    Vector<T, N> v;
#pragma unroll
    for (int j = 0; j < N; j++) v.x[j] = from_float<T>(x[j]);
    memcpy(&raw, &v, sizeof v);
}

/* Loads and stores that are not ALIGNED are calls: inlined everywhere, they would take all registers. */
template <class T, int N> static __device__ __attribute__((noinline)) Raw<T, N> get_single(const T *from,
                                                                                           int64_t n) {
    Vector<T, N> v;
    Raw<T, N> raw;
#pragma unroll
    for (int j = 0; j < N; j++) v.x[j] = j < n ? from[j] : from_float<T>(0.0f);
    memcpy(&raw, &v, sizeof v);
    return raw;
}
template <class T, int N> static __device__ __attribute__((noinline)) void put_single(T *to, Raw<T, N> raw,
                                                                                      int64_t n) {
    Vector<T, N> v;
    memcpy(&v, &raw, sizeof v);
#pragma unroll
    for (int j = 0; j < N; j++)
        if (j < n) to[j] = v.x[j];
}

/* Moves elements c .. c+N-1 of a row of C. get() returns zeros behind its end. */
template <bool ALIGNED, class T, int BYTES>
static __device__ __forceinline__ void get(Words<BYTES> &raw, const T *row, int64_t c, int64_t C) {
    raw = {};
    if (c >= C) return;
    if (ALIGNED) raw = *(const Words<BYTES> *)(row + c);
    else raw = get_single<T, BYTES / sizeof(T)>(row + c, C - c);
}
template <bool ALIGNED, class T, int BYTES>
static __device__ __forceinline__ void put(T *row, const Words<BYTES> &raw, int64_t c, int64_t C) {
    if (c >= C) return;
    Words<BYTES> *to = (Words<BYTES> *)(row + c);
    if (ALIGNED)
#pragma unroll
        for (int k = 0; k < (int)(sizeof raw / sizeof *raw.word); k++) store_whole(to->word + k, raw.word[k]);
    else put_single<T, BYTES / sizeof(T)>(row + c, raw, C - c);
}

/* Whether rows of C elements of all given tensors can be moved ALIGNED in vectors of N. */
template <class... R> bool aligned(int N, int64_t C, const R *...tensors) {
    if (C % N) return false;
    for (const Tensor *t : { tensors... }) {
        int64_t size = size_of(t->dtype), bytes = N * size < 16 ? N * size : 16;
        if (!given(t)) continue;
        if ((uintptr_t)t->data % (uintptr_t)bytes) return false;
        for (int i = 0; i < t->ndim - 1; i++)
            if (t->shape[i] > 1 && t->stride[i] * size % bytes) return false;
    }
    return true;
}

/* Whether the rows of a matrix follow each other without gaps. */
static inline bool dense(const Tensor *t) { return t->shape[0] <= 1 || t->stride[0] == t->shape[1]; }

/* M rows of C elements. Dense tensors count as one row. */
struct Matrix {
    int64_t M, C;
};
template <class... R> Matrix flatten(const Tensor *first, const R *...rest) {
    bool flat = dense(first);
    for (const Tensor *t : { first, rest... }) flat = flat && dense(t);
    int64_t M = first->shape[0], C = first->shape[1];
    return flat ? Matrix{ M && C, M * C } : Matrix{ M, C };
}

/* A block has BLOCK threads: BLOCK >> shift rows by 1 << shift vectors. A thread takes U vectors of its row,
 * 1 << shift apart. Blocks go along the rows first. If there are more rows than the grid covers, a block
 * continues with further rows. */
struct Deal {
    dim3 grid;
    unsigned shift;
};
template <int N, int U> Deal deal(int64_t M, int64_t C) {
    int64_t vectors = ceil_div(C, N);
    unsigned shift = 0;
    while (1 << shift < BLOCK && (int64_t)U << shift < vectors) shift++;
    return { dim3((unsigned)ceil_div(vectors, (int64_t)U << shift),
                  (unsigned)least(ceil_div(M, BLOCK >> shift), 65535)),
             shift };
}

/* A thread's part of a Deal: rows m, m + rows, ... below M, and in each of them the vectors at columns c + u
 * * step for u < U. */
struct Part {
    int64_t m, rows, c;
    unsigned step;
};
template <int N, int U> static __device__ __forceinline__ Part part(unsigned shift) {
    unsigned lane = threadIdx.x & ((1u << shift) - 1);
    return { (int64_t)blockIdx.y * (BLOCK >> shift) + (threadIdx.x >> shift),
             (int64_t)gridDim.y * (BLOCK >> shift), (((int64_t)blockIdx.x * U << shift) + lane) * N,
             (unsigned)N << shift };
}

#endif
