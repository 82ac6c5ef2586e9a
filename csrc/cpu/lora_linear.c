/* lora_linear.c --- a linear layer with LoRA (arXiv 2106.09685 section 4.1), forward and backward.
 *
 * LoRA is a property of one product: u continues x along C as b continues weight, so the second half costs R
 * more steps of the same sums and no pass over out, and u is made of the rows of x that the same task
 * multiplies. The frozen weight gets no gradient unless it is asked for. */
#include "gemm/gemm.h"

int CPU(lora_linear_forward)(const void *args, void *stream) {
    const LoraLinearForward *f = args;
    (void)stream;
    int64_t M = f->x.shape[0], C = f->x.shape[1], N = f->weight.shape[0],
            R = given(&f->a) ? f->a.shape[0] : 0;
    float *memory = NULL;
    if (R && !given(&f->u) && !(memory = scratch(4 * M * R))) return -1;
    int status = CPU(gemm)(&(Gemm){ .M = M,
                                    .N = N,
                                    .K = C,
                                    .R = R,
                                    .a = matrix(&f->x),
                                    .b = transposed(matrix(&f->weight)),
                                    .a2 = R ? transposed(matrix(&f->a)) : (Matrix){ 0 },
                                    .b2 = R ? transposed(matrix(&f->b)) : (Matrix){ 0 },
                                    .u = memory ? memory : f->u.data,
                                    .u_row = memory ? R : f->u.stride[0],
                                    .scale2 = (float)f->scale,
                                    .alpha = 1,
                                    .c = f->out.data,
                                    .c_row = f->out.stride[0],
                                    .c_dtype = f->out.dtype,
                                    .bias = given(&f->bias) ? f->bias.data : NULL,
                                    .residual = given(&f->residual) ? f->residual.data : NULL,
                                    .residual_row = f->residual.stride[0] });
    scratch_free(memory);
    return status;
}

/* dbias[n] += sum over m of dout[m,n], for one block of columns. */
enum { COLUMNS = 128 };
static int dbias_block(int64_t block, void *context) {
    const LoraLinearBackward *f = context;
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], n0 = block * COLUMNS,
            n = N - n0 < COLUMNS ? N - n0 : COLUMNS;
    float sum[COLUMNS] = { 0 }, row[COLUMNS];
    for (int64_t m = 0; m < M; m++) {
        load_row(row, at(&f->dout, m * f->dout.stride[0] + n0), f->dout.dtype, n);
        for (int64_t i = 0; i < n; i++) sum[i] += row[i];
    }
    for (int64_t i = 0; i < n; i++) ((float *)f->dbias.data)[(n0 + i) * f->dbias.stride[0]] += sum[i];
    return 0;
}

int CPU(lora_linear_backward)(const void *args, void *stream) {
    const LoraLinearBackward *f = args;
    (void)stream;
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], C = f->weight.shape[1];
    int accumulate = f->accumulate != 0;
    int64_t R = given(&f->a) ? f->a.shape[0] : 0;
    int needs_du = R && (given(&f->dx) || given(&f->da)), needs_u = R && given(&f->db) && !given(&f->u);
    Matrix dout = matrix(&f->dout), x = given(&f->x) ? matrix(&f->x) : (Matrix){ 0 };
    float *memory = NULL;
    if ((needs_du || needs_u) && !(memory = scratch(4 * M * R * (needs_du + needs_u)))) return -1;
    Matrix du = { memory, R, 1, F32 },
           u = given(&f->u) ? matrix(&f->u) : (Matrix){ memory + needs_du * M * R, R, 1, F32 };
    float scale = (float)f->scale;
    int status = 0;
    if (given(&f->dx))
        status = CPU(gemm)(&(Gemm){ .M = M,
                                    .N = C,
                                    .K = N,
                                    .R = R,
                                    .a = dout,
                                    .b = matrix(&f->weight),
                                    .a2 = R ? matrix(&f->b) : (Matrix){ 0 },
                                    .b2 = R ? matrix(&f->a) : (Matrix){ 0 },
                                    .u = memory,
                                    .u_row = R,
                                    .scale2 = scale,
                                    .alpha = 1,
                                    .beta = (float)accumulate,
                                    .c = f->dx.data,
                                    .c_row = f->dx.stride[0],
                                    .c_dtype = f->dx.dtype });
    else if (needs_du)
        status = CPU(gemm)(&(Gemm){ .M = M,
                                    .N = R,
                                    .K = N,
                                    .a = dout,
                                    .b = matrix(&f->b),
                                    .alpha = 1,
                                    .c = memory,
                                    .c_row = R,
                                    .c_dtype = F32 });
    if (!status && R && given(&f->da))
        status = CPU(gemm)(&(Gemm){ .M = R,
                                    .N = C,
                                    .K = M,
                                    .a = transposed(du),
                                    .b = x,
                                    .alpha = scale,
                                    .beta = 1,
                                    .c = f->da.data,
                                    .c_row = f->da.stride[0],
                                    .c_dtype = F32 });
    if (!status && needs_u)
        status = CPU(gemm)(&(Gemm){ .M = M,
                                    .N = R,
                                    .K = C,
                                    .a = x,
                                    .b = transposed(matrix(&f->a)),
                                    .alpha = 1,
                                    .c = (void *)u.data,
                                    .c_row = R,
                                    .c_dtype = F32 });
    if (!status && R && given(&f->db))
        status = CPU(gemm)(&(Gemm){ .M = N,
                                    .N = R,
                                    .K = M,
                                    .a = transposed(dout),
                                    .b = u,
                                    .alpha = scale,
                                    .beta = 1,
                                    .c = f->db.data,
                                    .c_row = f->db.stride[0],
                                    .c_dtype = F32 });
    if (!status && given(&f->dweight))
        status = CPU(gemm)(&(Gemm){ .M = N,
                                    .N = C,
                                    .K = M,
                                    .a = transposed(dout),
                                    .b = x,
                                    .alpha = 1,
                                    .beta = 1,
                                    .c = f->dweight.data,
                                    .c_row = f->dweight.stride[0],
                                    .c_dtype = F32 });
    if (!status && given(&f->dbias))
        status = parallel_for((N + COLUMNS - 1) / COLUMNS, M * COLUMNS / 8, dbias_block, (void *)f);
    scratch_free(memory);
    return status;
}
