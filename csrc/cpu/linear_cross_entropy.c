/* linear_cross_entropy.c --- the head's matrix product and the loss, a chunk of rows and a stretch of the
 * vocabulary at a time.
 *
 * Weight passes once for a chunk of rows, as keys and values pass in attention: a stretch of it gives logits,
 * their exponentials from the largest so far, and at once what these add to the sums of dx, while the stretch
 * is in the cache. The target is left out of that sum and added at the end, where its probability less 1 is
 * known to full precision. Logits are held transposed, [stretch, rows]: then weight is the side of the first
 * product that is read where it lies, and the softmax runs down columns in whole vectors. Only the gradient
 * of weight needs the exponentials of the whole vocabulary again, when the sums are known: then they are
 * kept, and a chunk has as many rows as there is room for.
 *
 * The ladder, times the speed of chunks with the logits of the whole vocabulary and dx after them, two cores
 * of a Zen 3, medians in turn, V = 128256 with M = 512, C = 2048, and V = 49152 with M = 2048, C = 576:
 *   weight frozen, seven comparisons, 0.97 to 1.16, the middle one 1.09; four, 0.99 to 1.06; trained 1.01
 * to 1.03; five, 0.91 to 0.99 frozen, stretches of 512, 1024, 4096 rows of weight against 2048: 0.95, 0.98,
 * 0.97; chunks of 256, 1024 rows against 512: 1.00, 0.92 trained, V = 128256: 112 rows, and the products
 * (logits, dx, dweight) run at 131, 112, 115 GF/s, where with 512 rows they do at 156, 140, 148; by these
 * rates, to keep a part only, have more rows, and multiply the rest again would cost what it gains (computed,
 * not tried); 128 rows, and the products of few rows as gemm.c has them now, 1.19 to 1.23 in two comparisons;
 * stretches of 1024, 4096 then 0.93, 0.97 to 1.04 trained, bfloat16, two cores of a Zen 5: exponentials kept
 * in bfloat16 instead of float32, so that a chunk has 176 rows instead of 112, 416 instead of 256: 1.12, 1.09
 */
#include "gemm/gemm.h"
#include "scratch.h"

enum {
    STRETCH = HEAD_STRETCH,
    BLOCK = HEAD_BLOCK, /* rows of V that one task reduces, in fixed order */
    SLACK = 8,          /* logits may be above what exponentials are taken from by so much */
};

typedef struct { /* a chunk of rows, a stretch v0..v1 of the vocabulary */
    const Tensor *x, *weight, *targets, *dlosses, *dx; /* dlosses NULL in forward */
    int64_t V, row0, rows, stride, v0, v1, ignore;
    int keep;              /* the exponentials of all stretches, one behind the other */
    float *memory, *froms; /* where logits and from of the first stretch are */
    void *exps;            /* and its exponentials, where they are not float32 */
    float *logits;         /* of v0..v1, [v1 - v0, stride] */
    void *e;               /* their exponentials, in their place if float32, then the gradients */
    int32_t dtype;         /* of those */
    float *max, *sum;      /* [BLOCKs of a stretch, stride] each */
    float *from, *total, *picked, *own,
        *sums; /* [stride]; sum of exp(logit - from); the target's logit and gradient; [rows, sums_row] */
    int64_t sums_row;
} Chunk;

static inline int64_t target(const Chunk *c, int64_t i) {
    return ((const int32_t *)c->targets->data)[(c->row0 + i) * c->targets->stride[0]];
}
static inline float dloss(const Chunk *c,
                          int64_t i) { /* 0 where the target is ignored, whatever dlosses has there */
    if (target(c, i) == c->ignore) return 0;
    return ((const float *)c->dlosses->data)[(c->row0 + i) * c->dlosses->stride[0]];
}
static inline int64_t end_of_block(const Chunk *c, int64_t v) {
    return v + BLOCK < c->v1 ? v + BLOCK : c->v1;
}

/* The maximum of BLOCK rows, per column, and the targets' logits among them. */
static int max_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = c->v0 + block * BLOCK, v1 = end_of_block(c, v0);
    float *max = c->max + block * c->stride;
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t >= v0 && t < v1) c->picked[i] = c->logits[(t - c->v0) * c->stride + i];
    }
    memcpy(max, c->logits + (v0 - c->v0) * c->stride, (size_t)c->stride * 4);
    for (int64_t v = v0 + 1; v < v1; v++) {
        const float *x = c->logits + (v - c->v0) * c->stride;
        for (int64_t i = 0; i < c->stride; i += VW)
            vf_store(max + i, vf_max(vf_load(x + i), vf_load(max + i)));
    }
    return 0;
}

/* What exponentials are taken from: the maximum of the first stretch, and of a later one that is more than
 * SLACK above; then what was summed before shrinks. */
static void raise_from(const Chunk *c) {
    int64_t blocks = (c->v1 - c->v0 + BLOCK - 1) / BLOCK, C = c->x->shape[1];
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < c->stride; i += VW)
            vf_store(c->max + i, vf_max(vf_load(c->max + block * c->stride + i), vf_load(c->max + i)));
    for (int64_t i = 0; i < c->stride; i++) {
        if (c->v0 > 0 && !(c->max[i] > c->from[i] + SLACK)) continue;
        float shrink = expf(c->from[i] - c->max[i]);
        c->from[i] = c->max[i];
        if (c->v0 == 0) continue;
        c->total[i] *= shrink;
        for (int64_t j = 0; c->dlosses && i < c->rows && j < C; j++) c->sums[i * c->sums_row + j] *= shrink;
    }
}

/* Exponentials of BLOCK rows, and their sum per column. */
static int exp_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = c->v0 + block * BLOCK, v1 = end_of_block(c, v0), size = dtype_size(c->dtype);
    float *sum = c->sum + block * c->stride;
    memset(sum, 0, (size_t)c->stride * 4);
    for (int64_t v = v0; v < v1; v++) {
        const float *x = c->logits + (v - c->v0) * c->stride;
        char *out = (char *)c->e + (v - c->v0) * c->stride * size;
        for (int64_t i = 0; i < c->stride; i += VW) {
            vf e = vf_exp_below(vf_load(x + i) - vf_load(c->from + i));
            vf_store(sum + i, vf_load(sum + i) + e);
            if (!c->dlosses) continue;
            vf_store_any(out + i * size, c->dtype, e);
        }
    }
    for (int64_t i = 0; c->dlosses && i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t >= v0 && t < v1) store1((char *)c->e + ((t - c->v0) * c->stride + i) * size, c->dtype, 0);
    }
    return 0;
}

/* Kept exponentials to gradients, by the factors in `max`, and that of the target. */
static int gradient_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = c->v0 + block * BLOCK, v1 = end_of_block(c, v0), size = dtype_size(c->dtype);
    for (int64_t v = v0; v < v1; v++) {
        char *e = (char *)c->e + (v - c->v0) * c->stride * size;
        for (int64_t i = 0; i < c->stride; i += VW)
            vf_store_any(e + i * size, c->dtype, vf_load_any(e + i * size, c->dtype) * vf_load(c->max + i));
    }
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t >= v0 && t < v1 && t != c->ignore)
            store1((char *)c->e + ((t - c->v0) * c->stride + i) * size, c->dtype, c->own[i]);
    }
    return 0;
}

/* A row of dx: its sum, and the target's row of weight. */
static int dx_row(int64_t i, void *context) {
    const Chunk *c = context;
    int64_t C = c->x->shape[1], size = dtype_size(c->weight->dtype), t = target(c, i);
    float *sums = c->sums + i * c->sums_row, others = dloss(c, i) / c->total[i];
    char *out = at(c->dx, (c->row0 + i) * c->dx->stride[0]);
    if (t == c->ignore) {
        memset(out, 0, (size_t)(C * dtype_size(c->dx->dtype)));
        return 0;
    }
    const char *w = at(c->weight, t * c->weight->stride[0]);
    int64_t j = 0;
    for (; j + VW <= C; j += VW)
        vf_store_any(out + j * size, c->dx->dtype,
                     vf_load(sums + j) * others + vf_load_any(w + j * size, c->weight->dtype) * c->own[i]);
    for (; j < C; j++)
        store1(out + j * size, c->dx->dtype,
               sums[j] * others + load1(w + j * size, c->weight->dtype) * c->own[i]);
    return 0;
}

static void set_stretch(Chunk *c, int64_t v0) {
    c->v0 = v0, c->v1 = v0 + STRETCH < c->V ? v0 + STRETCH : c->V;
    int64_t kept = c->keep ? v0 * c->stride : 0;
    c->logits = c->memory + (c->dtype == F32 ? kept : 0),
    c->from = c->froms + (c->keep ? v0 / STRETCH * c->stride : 0);
    c->e = c->dtype == F32 ? (char *)c->logits : (char *)c->exps + kept * dtype_size(c->dtype);
}

/* The whole vocabulary: sums of exponentials, and of dx. */
static int sum_chunk(Chunk *c) {
    int64_t C = c->x->shape[1];
    Matrix x = rows_from(matrix(c->x), c->row0);
    memset(c->picked, 0, (size_t)c->stride * 4);
    memset(c->total, 0, (size_t)c->stride * 4);
    for (int64_t v0 = 0; v0 < c->V; v0 = c->v1) {
        set_stretch(c, v0);
        if (c->keep && v0) memcpy(c->from, c->from - c->stride, (size_t)c->stride * 4);
        int64_t n = c->v1 - v0, blocks = (n + BLOCK - 1) / BLOCK;
        Matrix weight = rows_from(matrix(c->weight), v0), e = { c->e, c->stride, 1, c->dtype };
        if (CPU(gemm)(&(Gemm){ .M = n,
                               .N = c->rows,
                               .K = C,
                               .a = weight,
                               .b = transposed(x),
                               .alpha = 1,
                               .c = c->logits,
                               .c_row = c->stride,
                               .c_dtype = F32 }))
            return -1;
        if (parallel_for(blocks, BLOCK * c->stride / 16, max_block, c)) return -1;
        raise_from(c);
        if (parallel_for(blocks, BLOCK * c->stride / 4, exp_block, c)) return -1;
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t i = 0; i < c->stride; i++) c->total[i] += c->sum[block * c->stride + i];
        if (c->dlosses && CPU(gemm)(&(Gemm){ .M = c->rows,
                                             .N = C,
                                             .K = n,
                                             .a = transposed(e),
                                             .b = weight,
                                             .alpha = 1,
                                             .beta = v0 > 0,
                                             .c = c->sums,
                                             .c_row = c->sums_row,
                                             .c_dtype = F32 }))
            return -1;
    }
    return 0;
}

static int weight_gradient(Chunk *c, const Tensor *dweight) {
    Matrix x = rows_from(matrix(c->x), c->row0);
    const float *last = c->from;
    for (int64_t v0 = 0; v0 < c->V; v0 = c->v1) {
        set_stretch(c, v0);
        for (int64_t i = 0; i < c->stride; i++)
            c->max[i] = i < c->rows ? dloss(c, i) * expf(c->from[i] - last[i]) / c->total[i] : 0;
        if (parallel_for((c->v1 - v0 + BLOCK - 1) / BLOCK, BLOCK * c->stride / 8, gradient_block, c))
            return -1;
        Matrix gradients = { c->e, c->stride, 1, c->dtype };
        if (CPU(gemm)(&(Gemm){ .M = c->v1 - v0,
                               .N = c->x->shape[1],
                               .K = c->rows,
                               .a = gradients,
                               .b = x,
                               .alpha = 1,
                               .beta = 1,
                               .c = at(dweight, v0 * dweight->stride[0]),
                               .c_row = dweight->stride[0],
                               .c_dtype = F32 }))
            return -1;
    }
    return 0;
}

static int run(const char *op, const Tensor *losses, const Tensor *lse, const Tensor *dweight, Chunk c) {
    int64_t M = c.x->shape[0], C = c.x->shape[1];
    for (int64_t m = 0; m < M; m++) {
        int64_t t = target(&c, m);
        if (t != c.ignore && (t < 0 || t >= c.V))
            return fail("%s: targets[%lld] should be 0..%lld or ignore_index=%lld, got %lld", op,
                        (long long)m, (long long)c.V - 1, (long long)c.ignore, (long long)t);
    }
    if (M == 0) return 0;
    int narrow = c.x->dtype != F32; /* dx is summed in float32 */
    c.keep = dweight && given(dweight);
    c.dtype = F32;
    if (c.x->dtype == BF16 && (DOTS || c.keep))
        c.dtype = BF16; /* products at twice the speed; twice the rows at once */
    int kept = c.keep ? (int)dtype_size(c.dtype) : 0;
    int64_t rows = head_rows(M, C, c.V, narrow, kept), chunks = head_chunks(M, C, c.V, narrow, kept);
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND, blocks = STRETCH / BLOCK;
    if (!(c.memory = scratch(head_scratch(M, C, c.V, narrow, kept)))) return -1;
    c.froms = c.memory + head_logits(c.V, kept) * rows;
    c.max = c.froms + head_stretches(c.V, kept) * rows, c.sum = c.max + blocks * rows,
    c.total = c.sum + blocks * rows;
    c.picked = c.total + rows, c.own = c.picked + rows;
    if (narrow) c.exps = c.own + rows * (1 + C);
    int status = 0;
    for (int64_t chunk = 0; chunk < chunks && !status; chunk++) {
        c.row0 = chunk * units / chunks * HEAD_ROUND;
        c.stride = (chunk + 1) * units / chunks * HEAD_ROUND - c.row0;
        c.rows = M - c.row0 < c.stride ? M - c.row0 : c.stride;
        if (c.dlosses)
            c.sums = narrow ? c.own + rows : at(c.dx, c.row0 * c.dx->stride[0]),
            c.sums_row = narrow ? C : c.dx->stride[0];
        if ((status = sum_chunk(&c))) break;
        for (int64_t i = 0; i < c.rows; i++) {
            int64_t m = c.row0 + i;
            float log_sum = c.V ? logf(c.total[i]) : -INFINITY,
                  loss = c.V ? log_sum - (c.picked[i] - c.from[i]) : 0;
            ((float *)losses->data)[m * losses->stride[0]] = target(&c, i) == c.ignore ? 0 : loss;
            if (lse) ((float *)lse->data)[m * lse->stride[0]] = c.V ? c.from[i] + log_sum : log_sum;
            if (c.dlosses) c.own[i] = dloss(&c, i) * expm1f(-loss);
        }
        if (c.dlosses) status = parallel_for(c.rows, C / 4, dx_row, &c);
        if (c.keep && !status) status = weight_gradient(&c, dweight);
    }
    scratch_free(c.memory);
    return status;
}

int CPU(linear_cross_entropy_forward)(const void *args, void *stream) {
    const LinearCrossEntropyForward *f = args;
    (void)stream;
    return run("linear_cross_entropy_forward", &f->losses, &f->lse, NULL,
               (Chunk){ .x = &f->x,
                        .weight = &f->weight,
                        .targets = &f->targets,
                        .V = f->weight.shape[0],
                        .ignore = (int64_t)f->ignore_index });
}

int CPU(linear_cross_entropy_backward)(const void *args, void *stream) {
    const LinearCrossEntropyBackward *f = args;
    (void)stream;
    return run("linear_cross_entropy_backward", &f->losses, NULL, &f->dweight,
               (Chunk){ .x = &f->x,
                        .weight = &f->weight,
                        .targets = &f->targets,
                        .dlosses = &f->dlosses,
                        .dx = &f->dx,
                        .V = f->weight.shape[0],
                        .ignore = (int64_t)f->ignore_index });
}
