/* linear_cross_entropy.c --- the head's matrix product and the loss, a chunk of rows at a time.
 *
 * A chunk of logits is held transposed, [V, rows]: then weight is read where it lies (it is the broadcast side of the
 * product, too big to pack again for every chunk), the softmax runs down columns in whole vectors, and dweight reads the
 * same chunk where it lies. One exponential per logit: a block of V keeps exp(logit - the block's maximum), and
 * the gradient is that times one factor per block and column. */
#include "gemm.h"

enum {
    CHUNK_BYTES = 48 << 20,            /* of logits; with what gemm packs, below 64 MiB */
    BLOCK = 256,                       /* rows of V that one task reduces, in fixed order */
    ROUND = 48,                        /* rows of a chunk come in whole tiles of gemm */
};

typedef struct {
    const Tensor *x, *weight, *targets, *dlosses;                      /* dlosses NULL in forward */
    int64_t V, row0, rows, stride, ignore;
    float *logits, *max, *sum;         /* [V, stride], [blocks, stride] each */
    float *lse, *picked;               /* [stride]; the target's logit */
    int32_t dtype;                     /* of the gradient of the logits, written over them */
} Chunk;

static inline int64_t target(const Chunk *c, int64_t i) {
    return ((const int32_t *)c->targets->data)[(c->row0 + i) * c->targets->stride[0]];
}

/* Maximum and sum of exponentials of BLOCK rows, per column; the logits become exponentials. */
static int reduce_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = block * BLOCK, v1 = v0 + BLOCK < c->V ? v0 + BLOCK : c->V;
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t >= v0 && t < v1) c->picked[i] = c->logits[t * c->stride + i];
    }
    for (int64_t i = 0; i < c->stride; i += VW) {
        float *x = c->logits + i;
        vf max = vf_load(x + v0 * c->stride), sum = {0};
        for (int64_t v = v0 + 1; v < v1; v++) max = vf_max(vf_load(x + v * c->stride), max);
        for (int64_t v = v0; v < v1; v++) {
            vf e = vf_exp(vf_load(x + v * c->stride) - max);
            if (c->dlosses) vf_store(x + v * c->stride, e);
            sum += e;
        }
        vf_store(c->max + block * c->stride + i, max);
        vf_store(c->sum + block * c->stride + i, sum);
    }
    return 0;
}

/* Exponentials to gradients: e exp(max - lse) dloss, less dloss at the target. */
static int gradient_block(int64_t block, void *context) {
    const Chunk *c = context;
    int64_t v0 = block * BLOCK, v1 = v0 + BLOCK < c->V ? v0 + BLOCK : c->V, size = dtype_size(c->dtype);
    const float *factor = c->sum + block * c->stride;
    for (int64_t v = v0; v < v1; v++) {
        const float *e = c->logits + v * c->stride;
        char *out = (char *)c->logits + v * c->stride * 4;
        for (int64_t i = 0; i < c->stride; i += VW) vf_store_any(out + i * size, c->dtype, vf_load(e + i) * vf_load(factor + i));
    }
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t t = target(c, i);
        if (t < v0 || t >= v1 || t == c->ignore) continue;
        float dloss = ((const float *)c->dlosses->data)[(c->row0 + i) * c->dlosses->stride[0]];
        char *out = (char *)c->logits + t * c->stride * 4 + i * size;
        store1(out, c->dtype, dloss * (expf(c->picked[i] - c->lse[i]) - 1));
    }
    return 0;
}

static int run(const char *op, const Tensor *losses, const Tensor *lse, const Tensor *dx, const Tensor *dweight, Chunk c) {
    int64_t M = c.x->shape[0], C = c.x->shape[1], blocks = (c.V + BLOCK - 1) / BLOCK;
    for (int64_t m = 0; m < M; m++) {
        int64_t t = target(&c, m);
        if (t != c.ignore && (t < 0 || t >= c.V))
            return fail("%s: targets[%lld] should be 0..%lld or ignore_index=%lld, got %lld", op, (long long)m, (long long)c.V - 1,
                        (long long)c.ignore, (long long)t);
    }
    if (M == 0) return 0;
    int64_t most = CHUNK_BYTES / 4 / (c.V > 0 ? c.V : 1) / ROUND * ROUND;
    if (most < ROUND) most = ROUND;
    int64_t chunks = (M + most - 1) / most, rows = (M + chunks - 1) / chunks;
    c.stride = (rows + ROUND - 1) / ROUND * ROUND;
    c.dtype = F32;
#if defined __AVX512BF16__
    if (c.x->dtype == BF16) c.dtype = BF16;                            /* then its products run at twice the speed */
#endif
    float *memory = scratch(4 * c.stride * (c.V + 2 * blocks + 2));
    if (!memory) return -1;
    c.logits = memory, c.max = c.logits + c.V * c.stride, c.sum = c.max + blocks * c.stride;
    c.lse = c.sum + blocks * c.stride, c.picked = c.lse + c.stride;
    Matrix x = matrix(c.x), weight = matrix(c.weight);
    int status = 0;
    for (c.row0 = 0; c.row0 < M && !status; c.row0 += rows) {
        c.rows = M - c.row0 < rows ? M - c.row0 : rows;
        Matrix xc = rows_from(x, c.row0);
        memset(c.picked, 0, (size_t)c.stride * 4);
        if ((status = CPU(gemm)(&(Gemm){ .M = c.V, .N = c.rows, .K = C, .a = weight, .b = transposed(xc), .alpha = 1,
                                         .c = c.logits, .c_row = c.stride, .c_dtype = F32 }))) break;
        if ((status = parallel_for(blocks, reduce_block, &c))) break;
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
        if ((status = parallel_for(blocks, gradient_block, &c))) break;
        int64_t stride = c.stride * 4 / dtype_size(c.dtype);
        Matrix dlogits = { c.logits, stride, 1, c.dtype };             /* [V, rows] */
        if ((status = CPU(gemm)(&(Gemm){ .M = c.rows, .N = C, .K = c.V, .a = transposed(dlogits), .b = weight, .alpha = 1,
                                         .c = at(dx, c.row0 * dx->stride[0]), .c_row = dx->stride[0], .c_dtype = dx->dtype }))) break;
        if (given(dweight))
            status = CPU(gemm)(&(Gemm){ .M = c.V, .N = C, .K = c.rows, .a = dlogits, .b = xc, .alpha = 1, .beta = 1,
                                        .c = dweight->data, .c_row = dweight->stride[0], .c_dtype = F32 });
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
