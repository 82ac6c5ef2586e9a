/* matmul.c --- out = alpha a b + beta out. */
#include "gemm/gemm.h"

int CPU(matmul)(const void *args, void *stream) {
    const Matmul *m = args;
    (void)stream;
    return CPU(gemm)(&(Gemm){
        .M = m->a.shape[0],
        .N = m->b.shape[1],
        .K = m->a.shape[1],
        .a = matrix(&m->a),
        .b = matrix(&m->b),
        .c = m->out.data,
        .c_row = m->out.stride[0],
        .c_dtype = m->out.dtype,
        .alpha = (float)m->alpha,
        .beta = (float)m->beta,
    });
}
