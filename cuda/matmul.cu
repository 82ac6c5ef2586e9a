/* matmul.cu --- out = alpha a b + beta out. */
#include "gemm.cuh"

extern "C" int matmul_cuda(const void *args, const CudaCall *call) {
    const Matmul *m = (const Matmul *)args;
    Gemm g = {};
    g.M = m->a.shape[0], g.N = m->b.shape[1], g.K = m->a.shape[1], g.a = matrix(&m->a), g.b = matrix(&m->b);
    g.c = m->out.data, g.c_row = m->out.stride[0], g.c_dtype = m->out.dtype;
    g.alpha = (float)m->alpha, g.beta = (float)m->beta;
    return gemm(call, g);
}
