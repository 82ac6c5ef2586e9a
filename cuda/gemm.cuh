/* gemm.cuh --- the one matrix product of the GPU side: everything that multiplies matrices calls it. */
#ifndef LONGLORA_GEMM_CUH
#define LONGLORA_GEMM_CUH

#include "common.cuh"

/* cuBLASLt's part of an op's workspace: the first bytes of it. The same on every device, so that its choice
 * of an algorithm, and with it each bit of a result, depends on nothing else that is in memory. */
enum { GEMM_WORKSPACE = 32 << 20 };

/* Borrowed; strides in elements, any of them, so a transposed matrix is the same memory with row and col
 * swapped. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype;
} Matrix;

/* c[M,N] = alpha a[M,K] b[K,N] + beta from[M,N] + bias[N], float32 sums. `from` is c itself when NULL, else
 * another matrix or the same memory as c with the same strides; it is not read when beta is 0. bias and from
 * have c's dtype. Rows of c and from are dense. scalars, where it is not NULL: {alpha, 0, 1} in device
 * memory, for an alpha that the host does not know; beta is 0 or 1 then. */
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
