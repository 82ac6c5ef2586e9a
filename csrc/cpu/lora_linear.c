/* lora_linear.c --- a linear layer with LoRA (arXiv 2106.09685 section 4.1), forward and backward.
 *
 * LoRA is a property of one product: u continues x along C as b continues weight. So the second half costs R
 * more steps of the same sums and no pass over out, and each task makes u from the rows of x that it
 * multiplies anyway. The frozen weight gets no gradient unless the caller asks for it. */
#include "gemm/gemm.h"

/* ---- forward --------------------------------------------------------------------------------- */

static int64_t rank_of(const Tensor *a) { return given(a) ? a->shape[0] : 0; }

/* Floats of u, where the caller does not want it. */
static int64_t floats_of_u(const LoraLinearForward *f) {
    return given(&f->u) ? 0 : f->x.shape[0] * rank_of(&f->a);
}

static Gemm forward_product(const LoraLinearForward *f, float *own_u) {
    int64_t R = rank_of(&f->a);
    return (Gemm){ .M = f->x.shape[0],
                   .N = f->weight.shape[0],
                   .K = f->x.shape[1],
                   .R = R,
                   .a = matrix(&f->x),
                   .b = transposed(matrix(&f->weight)),
                   .a2 = R ? transposed(matrix(&f->a)) : (Matrix){ 0 },
                   .b2 = R ? transposed(matrix(&f->b)) : (Matrix){ 0 },
                   .u = given(&f->u) ? f->u.data : own_u,
                   .u_row = given(&f->u) ? f->u.stride[0] : R,
                   .scale2 = (float)f->scale,
                   .alpha = 1,
                   .c = f->out.data,
                   .c_row = f->out.stride[0],
                   .c_dtype = f->out.dtype,
                   .bias = given(&f->bias) ? f->bias.data : NULL,
                   .residual = given(&f->residual) ? f->residual.data : NULL,
                   .residual_row = f->residual.stride[0] };
}

int CPU(lora_linear_forward)(const void *args, void *stream) {
    const LoraLinearForward *f = args;
    int64_t floats = floats_of_u(f);
    float *own_u = NULL;
    (void)stream;
    if (floats && !(own_u = scratch(4 * floats))) return -1;
    Gemm g = forward_product(f, own_u);
    int status = CPU(gemm)(&g);
    scratch_free(own_u);
    return status;
}

Scratch CPU(lora_linear_forward_scratch)(const void *args) {
    const LoraLinearForward *f = args;
    Gemm g = forward_product(f, NULL);
    return (Scratch){ { 4 * floats_of_u(f), CPU(gemm_scratch)(&g) } };
}

/* ---- backward -------------------------------------------------------------------------------- */

/* Floats of du / scale = dout b and of u = x a^T, where they are needed and not given. */
static int64_t floats_of_du(const LoraLinearBackward *f) {
    return given(&f->dx) || given(&f->da) ? f->dout.shape[0] * rank_of(&f->a) : 0;
}
static int64_t floats_of_own_u(const LoraLinearBackward *f) {
    return given(&f->db) && !given(&f->u) ? f->dout.shape[0] * rank_of(&f->a) : 0;
}

/* dx = dout weight + scale du a, which makes du on the way. */
static Gemm product_of_dx(const LoraLinearBackward *f, float *du) {
    int64_t R = rank_of(&f->a);
    return (Gemm){ .M = f->dout.shape[0],
                   .N = f->weight.shape[1],
                   .K = f->dout.shape[1],
                   .R = R,
                   .a = matrix(&f->dout),
                   .b = matrix(&f->weight),
                   .a2 = R ? matrix(&f->b) : (Matrix){ 0 },
                   .b2 = R ? matrix(&f->a) : (Matrix){ 0 },
                   .u = du,
                   .u_row = R,
                   .scale2 = (float)f->scale,
                   .alpha = 1,
                   .c = f->dx.data,
                   .c_row = f->dx.stride[0],
                   .c_dtype = f->dx.dtype };
}

/* out[rows of left, columns of right] = left right, in float32 and dense. */
static Gemm plain_product(float *out, Matrix left, Matrix right, int64_t M, int64_t N, int64_t K) {
    return (Gemm){
        .M = M, .N = N, .K = K, .a = left, .b = right, .alpha = 1, .c = out, .c_row = N, .c_dtype = F32
    };
}

/* d += scale left^T right over `rows` rows: the gradient of a parameter. */
static Gemm gradient(const Tensor *d, Matrix left, Matrix right, int64_t rows, float scale) {
    return (Gemm){ .M = d->shape[0],
                   .N = d->shape[1],
                   .K = rows,
                   .a = transposed(left),
                   .b = right,
                   .alpha = scale,
                   .beta = 1,
                   .c = d->data,
                   .c_row = d->stride[0],
                   .c_dtype = F32 };
}

/* The products of a backward pass, in the order in which they run. `memory` has room for du and u. */
enum { MOST_PRODUCTS = 5 };
static int backward_products(const LoraLinearBackward *f, float *memory, Gemm list[MOST_PRODUCTS]) {
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], C = f->weight.shape[1], R = rank_of(&f->a);
    float scale = (float)f->scale, *own_u = memory ? memory + floats_of_du(f) : NULL;
    Matrix dout = matrix(&f->dout), du = { memory, R, 1, F32 }, none = { 0 };
    Matrix x = given(&f->x) ? matrix(&f->x) : none;
    Matrix u = given(&f->u) ? matrix(&f->u) : (Matrix){ own_u, R, 1, F32 };
    int n = 0;
    if (given(&f->dx)) list[n++] = product_of_dx(f, memory);
    else if (floats_of_du(f)) list[n++] = plain_product(memory, dout, matrix(&f->b), M, R, N);
    if (given(&f->da)) list[n++] = gradient(&f->da, du, x, M, scale);
    if (floats_of_own_u(f)) list[n++] = plain_product(own_u, x, transposed(matrix(&f->a)), M, R, C);
    if (given(&f->db)) list[n++] = gradient(&f->db, dout, u, M, scale);
    if (given(&f->dweight)) list[n++] = gradient(&f->dweight, dout, x, M, 1);
    return n;
}

/* dbias[n] += the sum over m of dout[m,n], for one block of columns. */
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
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], floats = floats_of_du(f) + floats_of_own_u(f);
    float *memory = NULL;
    Gemm list[MOST_PRODUCTS];
    (void)stream;
    if (floats && !(memory = scratch(4 * floats))) return -1;
    int status = 0, count = backward_products(f, memory, list);
    for (int i = 0; i < count && !status; i++) status = CPU(gemm)(&list[i]);
    if (!status && given(&f->dbias))
        status = parallel_for((N + COLUMNS - 1) / COLUMNS, M * COLUMNS / 8, dbias_block, (void *)f);
    scratch_free(memory);
    return status;
}

Scratch CPU(lora_linear_backward_scratch)(const void *args) {
    const LoraLinearBackward *f = args;
    Gemm list[MOST_PRODUCTS];
    Scratch s = { { 4 * (floats_of_du(f) + floats_of_own_u(f)) } };
    for (int i = 0, count = backward_products(f, NULL, list); i < count; i++) {
        int64_t bytes = CPU(gemm_scratch)(&list[i]);
        if (bytes > s.bytes[1]) s.bytes[1] = bytes;
    }
    return s;
}
