/* gemm.cuh --- the matrix product on GPUs, for all ops. */
#ifndef LONGLORA_GEMM_CUH
#define LONGLORA_GEMM_CUH

#include "common.cuh"

/* A borrowed matrix with any strides, in elements: to swap row and col transposes it. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype;
} Matrix;

/* c[M,N] = alpha a[M,K] b[K,N] + beta from[M,N] + bias[N], float32 sums.
 *
 * from: NULL for c itself, or another matrix, or the memory of c with the strides of c. It is not read if
 * beta is 0. bias and from have c's dtype; rows of c and from are dense. scalars: NULL, or {alpha, 0, 1} in
 * device memory for an alpha that only the device knows; then beta must be 0 or 1. */
typedef struct {
    int64_t M, N, K;
    Matrix a, b;
    void *c;
    int64_t c_row;
    int32_t c_dtype;
    float alpha, beta;
    const float *scalars;
    const void *bias, *from;
    int64_t from_row;
} Gemm;

int gemm(const CudaCall *call, const Gemm &g);

static inline Matrix matrix(const Tensor *t) { return { t->data, t->stride[0], t->stride[1], t->dtype }; }
static inline Matrix transposed(Matrix m) { return { m.data, m.col, m.row, m.dtype }; }

#endif
