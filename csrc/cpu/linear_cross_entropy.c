/* linear_cross_entropy.c --- the head's matrix product and the loss, a chunk of rows at a time.
 *
 * A chunk of logits is held transposed, [V, rows]: then weight is read where it lies (it is the broadcast side of the
 * product, too big to pack again for every chunk), the softmax runs down columns in whole vectors, and both gradients
 * read the same chunk where it lies, a few thousand rows of weight at a time. One exponential per logit: a block of V
 * keeps exp(logit - the block's maximum), and the gradient is that times one factor per block and column. */
#include "gemm.h"
#include "scratch.h"

enum {
    BLOCK = HEAD_BLOCK,                /* rows of V that one task reduces, in fixed order */
    VECTORS = 3 * HEAD_ROUND / VW,     /* of columns that are reduced together, at most */
    WEIGHT_BYTES = 4 << 20,            /* of float32 weight that one step of the backward works on, while it is in the cache */
};

typedef struct {
    const Tensor *x, *weight, *targets, *dlosses;                      /* dlosses NULL in forward */
    int64_t V, row0, rows, stride, block0, ignore;
    float *logits, *max, *sum;         /* [V, stride], [blocks, stride] each */
    float *lse, *picked;               /* [stride]; the target's logit */
    int32_t dtype;                     /* of the gradient of the logits, written over them */
} Chunk;

static inline int64_t target(const Chunk *c, int64_t i) {
    return ((const int32_t *)c->targets->data)[(c->row0 + i) * c->targets->stride[0]];
}

static inline __attribute__((always_inline)) void reduce_columns(const Chunk *c, int64_t block, int64_t v0, int64_t v1, int64_t i,
                                                                 int vectors) {
    float *x = c->logits + i;
    vf max[VECTORS], sum[VECTORS];
    for (int j = 0; j < vectors; j++) max[j] = vf_load(x + v0 * c->stride + j * VW), sum[j] = (vf){0};
    for (int64_t v = v0 + 1; v < v1; v++)
        for (int j = 0; j < vectors; j++) max[j] = vf_max(vf_load(x + v * c->stride + j * VW), max[j]);
    for (int64_t v = v0; v < v1; v++)
        for (int j = 0; j < vectors; j++) {
            vf e = vf_exp_below(vf_load(x + v * c->stride + j * VW) - max[j]);
            if (c->dlosses) vf_store(x + v * c->stride + j * VW, e);
            sum[j] += e;
        }
    for (int j = 0; j < vectors; j++) {
        vf_store(c->max + block * c->stride + i + j * VW, max[j]);
        vf_store(c->sum + block * c->stride + i + j * VW, sum[j]);
    }
}

/* Maximum and sum of exponentials of BLOCK rows, per column; the logits become exponentials. */
static int reduce_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = block * BLOCK, v1 = v0 + BLOCK < c->V ? v0 + BLOCK : c->V;
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t >= v0 && t < v1) c->picked[i] = c->logits[t * c->stride + i];
    }
    int64_t i = 0;
    for (; i + VECTORS * VW <= c->stride; i += VECTORS * VW) reduce_columns(c, block, v0, v1, i, VECTORS);
    for (; i < c->stride; i += HEAD_ROUND) reduce_columns(c, block, v0, v1, i, HEAD_ROUND / VW);
    return 0;
}

/* Exponentials to gradients: e exp(max - lse) dloss, less dloss at the target. */
static int gradient_block(int64_t index, void *context) {
    const Chunk *c = context;
    int64_t block = c->block0 + index;
    int64_t v0 = block * BLOCK, v1 = v0 + BLOCK < c->V ? v0 + BLOCK : c->V, size = dtype_size(c->dtype);
    const float *factor = c->sum + block * c->stride;
    for (int64_t v = v0; v < v1; v++) {
        const float *e = c->logits + v * c->stride;
        char *out = (char *)c->logits + v * c->stride * 4;
        for (int64_t i = 0; i < c->stride; i += VW)
            vf_store_any(out + i * size, c->dtype, vf_load(e + i) * vf_load(factor + i));
    }
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t < v0 || t >= v1 || t == c->ignore) continue;
        float dloss = ((const float *)c->dlosses->data)[(c->row0 + i) * c->dlosses->stride[0]];
        char *out = (char *)c->logits + t * c->stride * 4 + i * size;
        store1(out, c->dtype, dloss * expm1f(c->picked[i] - c->lse[i]));
    }
    return 0;
}

static int run(const char *op, const Tensor *losses, const Tensor *lse, const Tensor *dx, const Tensor *dweight, Chunk c) {
    int64_t M = c.x->shape[0], C = c.x->shape[1], blocks = (c.V + BLOCK - 1) / BLOCK;
    for (int64_t m = 0; m < M; m++) {
        int64_t t = target(&c, m);
        if (t != c.ignore && (t < 0 || t >= c.V))
            return fail("%s: targets[%lld] should be 0..%lld or ignore_index=%lld, got %lld", op, (long long)m,
                        (long long)c.V - 1, (long long)c.ignore, (long long)t);
    }
    if (M == 0) return 0;
    int narrow = c.x->dtype != F32, keep = c.dlosses && narrow;        /* dx is summed in float32 */
    int64_t rows = head_rows(M, C, c.V, narrow), chunks = head_chunks(M, C, c.V, narrow), units = (M + HEAD_ROUND - 1) / HEAD_ROUND;
    c.dtype = F32;
#if defined __AVX512BF16__
    if (c.x->dtype == BF16) c.dtype = BF16;                            /* then its products run at twice the speed */
#endif
    float *memory = scratch(head_scratch(M, C, c.V, narrow));
    if (!memory) return -1;
    c.logits = memory, c.max = c.logits + c.V * rows, c.sum = c.max + blocks * rows;
    c.lse = c.sum + blocks * rows, c.picked = c.lse + rows;
    int64_t step = WEIGHT_BYTES / 4 / (C > 0 ? C : 1) / BLOCK;
    if (step < 1) step = 1;
    Matrix x = matrix(c.x), weight = matrix(c.weight);
    int status = 0;
    for (int64_t chunk = 0; chunk < chunks && !status; chunk++) {
        c.row0 = chunk * units / chunks * HEAD_ROUND;
        c.stride = (chunk + 1) * units / chunks * HEAD_ROUND - c.row0;
        c.rows = M - c.row0 < c.stride ? M - c.row0 : c.stride;
        Matrix xc = rows_from(x, c.row0);
        memset(c.picked, 0, (size_t)c.stride * 4);
        if ((status = CPU(gemm)(&(Gemm){ .M = c.V, .N = c.rows, .K = C, .a = weight, .b = transposed(xc), .alpha = 1,
                                         .c = c.logits, .c_row = c.stride, .c_dtype = F32 }))) break;
        if ((status = parallel_for(blocks, BLOCK * c.stride / 2, reduce_block, &c))) break;
        for (int64_t i = 0; i < c.stride; i++) {
            float max = -INFINITY, sum = 0;
            for (int64_t b = 0; b < blocks; b++) max = c.max[b * c.stride + i] > max ? c.max[b * c.stride + i] : max;
            for (int64_t b = 0; b < blocks; b++) sum += c.sum[b * c.stride + i] * expf(c.max[b * c.stride + i] - max);
            c.lse[i] = max + logf(sum);
            int64_t m = c.row0 + i;
            int used = i < c.rows && target(&c, i) != c.ignore;
            float dloss = used && c.dlosses ? ((const float *)c.dlosses->data)[m * c.dlosses->stride[0]] : 0;
            for (int64_t b = 0; c.dlosses && b < blocks; b++)
                c.sum[b * c.stride + i] = used ? dloss * expf(c.max[b * c.stride + i] - c.lse[i]) : 0;
            if (i >= c.rows) continue;
            ((float *)losses->data)[m * losses->stride[0]] = used ? c.lse[i] - c.picked[i] : 0;
            if (lse) ((float *)lse->data)[m * lse->stride[0]] = c.lse[i];
        }
        if (!c.dlosses) continue;
        float *sums = keep ? c.picked + rows : at(dx, c.row0 * dx->stride[0]);
        int64_t sums_row = keep ? C : dx->stride[0];
        if (c.V == 0) for (int64_t i = 0; i < c.rows; i++) memset(sums + i * sums_row, 0, (size_t)(4 * C));
        for (c.block0 = 0; c.block0 < blocks && !status; c.block0 += step) {
            int64_t v0 = c.block0 * BLOCK, v1 = v0 + step * BLOCK < c.V ? v0 + step * BLOCK : c.V;
            Matrix dlogits = { c.logits + v0 * c.stride, c.stride * 4 / dtype_size(c.dtype), 1, c.dtype };   /* [v1 - v0, rows] */
            if ((status = parallel_for((v1 - v0 + BLOCK - 1) / BLOCK, BLOCK * c.stride / 8, gradient_block, &c))) break;
            if ((status = CPU(gemm)(&(Gemm){
                .M = c.rows, .N = C, .K = v1 - v0, .a = transposed(dlogits), .b = rows_from(weight, v0), .alpha = 1,
                .beta = v0 > 0, .c = sums, .c_row = sums_row, .c_dtype = F32 }))) break;
            if (given(dweight))
                status = CPU(gemm)(&(Gemm){
                    .M = v1 - v0, .N = C, .K = c.rows, .a = dlogits, .b = xc, .alpha = 1, .beta = 1,
                    .c = at(dweight, v0 * dweight->stride[0]), .c_row = dweight->stride[0], .c_dtype = F32 });
        }
        for (int64_t i = 0; keep && i < c.rows; i++)
            store_row(at(dx, (c.row0 + i) * dx->stride[0]), dx->dtype, sums + i * C, C);
    }
    scratch_free(memory);
    return status;
}

int CPU(linear_cross_entropy_forward)(const void *args, void *stream) {
    const LinearCrossEntropyForward *f = args;
    (void)stream;
    return run("linear_cross_entropy_forward", &f->losses, &f->lse, NULL, NULL,
               (Chunk){ .x = &f->x, .weight = &f->weight, .targets = &f->targets, .V = f->weight.shape[0],
                        .ignore = (int64_t)f->ignore_index });
}

int CPU(linear_cross_entropy_backward)(const void *args, void *stream) {
    const LinearCrossEntropyBackward *f = args;
    (void)stream;
    return run("linear_cross_entropy_backward", &f->losses, NULL, &f->dx, &f->dweight,
               (Chunk){ .x = &f->x, .weight = &f->weight, .targets = &f->targets, .dlosses = &f->dlosses,
                        .V = f->weight.shape[0], .ignore = (int64_t)f->ignore_index });
}
