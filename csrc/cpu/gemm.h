/* gemm.h --- the one matrix product of the CPU side: everything that multiplies matrices calls it. */
#ifndef LONGLORA_GEMM_H
#define LONGLORA_GEMM_H

#include "cpu.h"

/* Borrowed; strides in elements, any of them, so a transposed matrix is the same memory with row and col
 * swapped. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype;
} Matrix;

/* c[M,N] = alpha (a[M,K] b[K,N] + scale2 u[M,R] b2[R,N]) + beta c + bias[N] + residual[M,N], u = a a2[K,R].
 * The second product continues the sums of the first, and u is made where a is read: that is what LoRA is. R
 * = 0 without. c is not read when beta is 0, and may be the memory of residual. Products of two bfloat16
 * matrices may round u and b2 to bfloat16 for c (where the CPU multiplies bfloat16); everything else is
 * float32. The order of each sum depends on the sizes alone. */
typedef struct {
    int64_t M, N, K, R;
    Matrix a, b, a2, b2;
    float *u;
    void *c;
    int64_t u_row, c_row;
    int32_t c_dtype;
    float alpha, beta, scale2;
    const void *bias, *residual; /* NULL without; c's dtype */
    int64_t residual_row;
} Gemm;

int CPU(gemm)(const Gemm *g);

static inline Matrix matrix(const Tensor *t) {
    return (Matrix){ t->data, t->stride[0], t->stride[1], t->dtype };
}
static inline Matrix transposed(Matrix m) { return (Matrix){ m.data, m.col, m.row, m.dtype }; }
static inline Matrix rows_from(Matrix m, int64_t row) {
    m.data = (const char *)m.data + row * m.row * dtype_size(m.dtype);
    return m;
}

#endif
