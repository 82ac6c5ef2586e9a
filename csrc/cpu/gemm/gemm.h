/* gemm.h --- the matrix product of the CPU side. Everything that multiplies matrices calls it.
 *
 * Reading order of this folder: gemm.h, plan.h (vocabulary and strategy), plan.c (chooses the strategy),
 * gemm.c (takes memory and runs it), then the four ways to run: blocks.c (the usual one, on pack.c and
 * tile.c), unit.c (on a matrix unit), narrow.c (few columns), sweep.c (few rows). What was tried, with
 * figures, is in docs/tuning/gemm.md. */
#ifndef LONGLORA_GEMM_H
#define LONGLORA_GEMM_H

#include "../cpu.h"

/* Borrowed memory. Strides are in elements and may have any value: a transposed matrix is the same memory
 * with row and col exchanged. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype;
} Matrix;

/* c[M,N] = alpha (a[M,K] b[K,N] + scale2 u[M,R] b2[R,N]) + beta c + bias[N] + residual[M,N], u = a a2[K,R].
 *
 * The second product continues the sums of the first, and each task makes u from the rows of a that it
 * multiplies anyway: that is how LoRA costs no pass of its own. Where a2.data is NULL, u is made already. R
 * is 0 without it. c is not read when beta is 0. It may be the memory of residual. Arithmetic is float32,
 * with two exceptions: where the CPU multiplies bfloat16, a product of two bfloat16 matrices rounds u and b2
 * to bfloat16 before it multiplies them; and where its matrix unit multiplies float16 in parts, u is rounded
 * to 16 bits. The order of each sum depends on the sizes alone, so any number of threads gives the same bits.
 */
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

/* Returns 0, or -1 after fail(). */
int CPU(gemm)(const Gemm *g);

/* Bytes of the one block of scratch that CPU(gemm)(g) takes, with as many threads as there are now. It reads
 * sizes, strides and dtypes only. */
int64_t CPU(gemm_scratch)(const Gemm *g);

static inline Matrix matrix(const Tensor *t) {
    return (Matrix){ t->data, t->stride[0], t->stride[1], t->dtype };
}
static inline Matrix transposed(Matrix m) { return (Matrix){ m.data, m.col, m.row, m.dtype }; }
static inline Matrix rows_from(Matrix m, int64_t row) {
    m.data = (const char *)m.data + row * m.row * dtype_size(m.dtype);
    return m;
}

#endif
