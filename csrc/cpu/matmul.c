/* matmul.c --- out = alpha a b + beta out. */
#include "gemm/gemm.h"

static Gemm product(const Matmul *m) {
    return (Gemm){ .M = m->a.shape[0],
                   .N = m->b.shape[1],
                   .K = m->a.shape[1],
                   .a = matrix(&m->a),
                   .b = matrix(&m->b),
                   .c = m->out.data,
                   .c_row = m->out.stride[0],
                   .c_dtype = m->out.dtype,
                   .alpha = (float)m->alpha,
                   .beta = (float)m->beta };
}

int CPU(matmul)(const void *args, void *stream) {
    Gemm g = product(args);
    (void)stream;
    return CPU(gemm)(&g);
}

Scratch CPU(matmul_scratch)(const void *args) {
    Gemm g = product(args);
    return (Scratch){ { CPU(gemm_scratch)(&g) } };
}
