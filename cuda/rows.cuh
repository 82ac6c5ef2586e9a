/* rows.cuh --- what the kernels bound by memory share: rows read and written in vectors of 16 bytes, and how the vectors of a
 * matrix are dealt to threads without a division.
 *
 * Every such kernel has two instances: ALIGNED, where data, row strides and row lengths are multiples of a vector, and one that
 * moves the same elements by the same threads one by one. So a view gives the bits of its dense copy. */
#ifndef LONGLORA_ROWS_CUH
#define LONGLORA_ROWS_CUH

#include "common.cuh"

enum { BLOCK = 256 };

/* Elements c .. c+N-1 of a row of C; zeros past its end. */
template<bool ALIGNED, class T, int N> static __device__ __forceinline__ void get(Vector<T, N> &v, const T *row, int64_t c, int64_t C) {
    if (ALIGNED && c < C) v = *(const Vector<T, N> *)(row + c);
    else
#pragma unroll
        for (int j = 0; j < N; j++) v.x[j] = !ALIGNED && c + j < C ? row[c + j] : from_float<T>(0.0f);
}
template<bool ALIGNED, class T, int N> static __device__ __forceinline__ void put(T *row, const Vector<T, N> &v, int64_t c, int64_t C) {
    if (ALIGNED) { if (c < C) *(Vector<T, N> *)(row + c) = v; }
    else
#pragma unroll
        for (int j = 0; j < N; j++) if (c + j < C) row[c + j] = v.x[j];
}

/* Whether rows of C elements of each tensor can be moved ALIGNED in vectors of N. Absent tensors can. */
template<class... R> bool aligned(int N, int64_t C, const R *...tensors) {
    if (C % N) return false;
    for (const Tensor *t : { tensors... }) {
        int64_t size = size_of(t->dtype), bytes = N * size < 16 ? N * size : 16;
        if (!given(t)) continue;
        if ((uintptr_t)t->data % (uintptr_t)bytes) return false;
        for (int i = 0; i < t->ndim - 1; i++) if (t->shape[i] > 1 && t->stride[i] * size % bytes) return false;
    }
    return true;
}

/* The rows of a matrix follow each other without gaps. */
static inline bool dense(const Tensor *t) { return t->shape[0] <= 1 || t->stride[0] == t->shape[1]; }

/* M rows of C elements. When all tensors are dense they are one row. */
struct Matrix { int64_t M, C; };
template<class... R> Matrix flatten(const Tensor *first, const R *...rest) {
    bool flat = dense(first);
    for (const Tensor *t : { first, rest... }) flat = flat && dense(t);
    int64_t M = first->shape[0], C = first->shape[1];
    return flat ? Matrix { M && C, M * C } : Matrix { M, C };
}

/* A block of BLOCK threads is BLOCK >> shift rows by 1 << shift vectors, and a thread takes U vectors of its row, 1 << shift
 * apart. Blocks go along the rows first; where the grid ends, a block goes on with further rows. */
struct Deal { dim3 grid; unsigned shift; };
template<int N, int U> Deal deal(int64_t M, int64_t C) {
    int64_t vectors = ceil_div(C, N);
    unsigned shift = 0;
    while (1 << shift < BLOCK && (int64_t)U << shift < vectors) shift++;
    int64_t down = ceil_div(M, BLOCK >> shift);
    return { dim3((unsigned)ceil_div(vectors, (int64_t)U << shift), (unsigned)(down < 65535 ? down : 65535)), shift };
}

/* A thread's part of a Deal: rows m, m + rows, ... below M, and of each the vectors at column c + u * step, u < U. */
struct Part { int64_t m, rows, c; unsigned step; };
template<int N, int U> static __device__ __forceinline__ Part part(unsigned shift) {
    unsigned lane = threadIdx.x & ((1u << shift) - 1);
    return { (int64_t)blockIdx.y * (BLOCK >> shift) + (threadIdx.x >> shift), (int64_t)gridDim.y * (BLOCK >> shift),
             (((int64_t)blockIdx.x * U << shift) + lane) * N, (unsigned)N << shift };
}

#endif
