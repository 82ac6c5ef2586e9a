/* linear_cross_entropy.c --- the output layer's matrix product and the loss, for a chunk of rows and a
 * stretch of the vocabulary at a time.
 *
 * Weight passes once for each chunk of rows, as keys and values pass in attention. A stretch of it gives
 * logits; their exponentials are taken from the largest logit so far; and what they add to the sums of dx is
 * added while the stretch is in the cache. The target is left out of that sum and added at the end, where its
 * probability less 1 is known to full precision. Logits are held transposed, [stretch, rows]: then the first
 * product reads weight where it lies, and the softmax runs down columns in whole vectors. Only the gradient
 * of weight needs the exponentials of the whole vocabulary again, once the sums are known. They are kept
 * then, and a chunk has as many rows as there is room for. What was tried:
 * docs/tuning/linear_cross_entropy.md. */
#include "gemm/gemm.h"

#include <float.h>

/* A chunk holds, with what its matrix products pack, CHUNK_BYTES and CHUNK_ROWS at most, or NARROW_BYTES
 * where products convert rows of weight as well: less than 64 MiB in all. */
enum {
    STRETCH = 2048, /* rows of weight */
    BLOCK = 128,    /* rows of a stretch that one task reduces, in a fixed order */
    CHUNK_BYTES = 255 << 18,
    NARROW_BYTES = 54 << 20,
    CHUNK_ROWS = 512,
    UNIT = 16, /* rows: chunks are equal but for one unit */
    SLACK = 8, /* logits may exceed the number that exponentials are taken from by this much */
};

typedef struct { /* a chunk of rows, a stretch v0 .. v1 of the vocabulary */
    const char *op;
    const Tensor *x, *weight, *targets, *dlosses, *dx, *dweight; /* forward: the three d are NULL */
    int64_t ignore;
    int keep;      /* the exponentials of all stretches are kept, one behind the other */
    int narrow;    /* x is not float32, so dx is summed in memory of its own */
    int32_t dtype; /* of exponentials and gradients */

    int64_t row0, rows, stride, v0, v1; /* stride: rows, rounded up to a unit */
    float *memory, *froms;              /* logits and `from` of the first stretch */
    void *exps;                         /* its exponentials, where they are not float32 */
    float *logits;                      /* [v1 - v0, stride] */
    void *e;          /* their exponentials, in the same place if float32; later the gradients */
    float *max, *sum; /* [blocks of a stretch, stride] each */
    float *from;      /* [stretch if they are kept, stride]: exponentials are exp(logit - from) */
    float *total;     /* [stride]: their sum */
    float *picked;    /* [stride]: the target's logit */
    float *own;       /* [stride]: the target's gradient */
    float *sums;      /* [rows, sums_row]: dx before it is scaled */
    int64_t sums_row;
} Chunk;

/* ---- sizes ----------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Rows of logits, and of `from`, that a chunk holds at one time. */
static int64_t logits_held(const Chunk *c) {
    int64_t V = c->weight->shape[0];
    return (c->keep && c->dtype == F32) || V < STRETCH ? V : STRETCH;
}
static int64_t froms_held(const Chunk *c) { return c->keep ? ceil_div(c->weight->shape[0], STRETCH) : 1; }

/* Floats of a chunk for each of its rows. In narrow dtypes with the float32 sums of dx, and exponentials in
 * 16 bits. */
static int64_t floats_of_row(const Chunk *c) {
    int64_t C = c->x->shape[1], V = c->weight->shape[0];
    int64_t in_16_bits = c->keep && c->dtype != F32 ? V : STRETCH;
    int64_t own = 2 * (STRETCH / BLOCK) + froms_held(c) + 3; /* max and sum, from, total picked own */
    return logits_held(c) + own + (c->narrow ? C + (in_16_bits + 1) / 2 : 0);
}

static int64_t units_of(const Chunk *c) { return ceil_div(c->x->shape[0], UNIT); }

static int64_t count_chunks(const Chunk *c) {
    int64_t C = c->x->shape[1], packed = C > STRETCH ? C : STRETCH;
    int64_t most = (c->narrow ? NARROW_BYTES : CHUNK_BYTES) / UNIT / (4 * (floats_of_row(c) + packed));
    if (most > CHUNK_ROWS / UNIT) most = CHUNK_ROWS / UNIT;
    return most > 1 ? ceil_div(units_of(c), most) : units_of(c);
}

/* Rows of the largest chunk, as a multiple of UNIT. */
static int64_t rows_of_chunk(const Chunk *c) { return ceil_div(units_of(c), count_chunks(c)) * UNIT; }

/* ---- the softmax ----------------------------------------------------------------------------- */

static inline int64_t target(const Chunk *c, int64_t i) {
    return index_at(c->targets, (c->row0 + i) * c->targets->stride[0]);
}
/* 0, or -1 after fail() if the target t of row i is neither a row of weight nor ignored. */
static inline int check_target(const Chunk *c, int64_t i, int64_t t) {
    int64_t V = c->weight->shape[0];
    if (t == c->ignore || (t >= 0 && t < V)) return 0;
    return fail("%s: targets[%lld] should be 0..%lld or ignore_index=%lld, got %lld", c->op,
                (long long)(c->row0 + i), (long long)V - 1, (long long)c->ignore, (long long)t);
}
/* 0 where the target is ignored, whatever dlosses has there. */
static inline float dloss(const Chunk *c, int64_t i) {
    if (target(c, i) == c->ignore) return 0;
    return ((const float *)c->dlosses->data)[(c->row0 + i) * c->dlosses->stride[0]];
}
static inline int64_t end_of_block(const Chunk *c, int64_t v) {
    return v + BLOCK < c->v1 ? v + BLOCK : c->v1;
}

/* The maximum of each column of a block, and the targets' logits that are in the block. */
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

/* Sets `from` to the maximum of the first stretch, and raises it to that of a later one that is more than
 * SLACK above it. Then what was summed before shrinks. */
static void raise_from(const Chunk *c) {
    int64_t blocks = ceil_div(c->v1 - c->v0, BLOCK), C = c->x->shape[1];
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < c->stride; i += VW)
            vf_store(c->max + i, vf_max(vf_load(c->max + block * c->stride + i), vf_load(c->max + i)));
    for (int64_t i = 0; i < c->stride; i++) {
        if (c->v0 > 0 && !(c->max[i] > c->from[i] + SLACK)) continue;
        float shrink = expf(c->from[i] - c->max[i]);
        c->from[i] = c->max[i] == -INFINITY ? -FLT_MAX : c->max[i]; /* -inf - -inf is NaN */
        if (c->v0 == 0) continue;
        c->total[i] *= shrink;
        for (int64_t j = 0; c->dlosses && i < c->rows && j < C; j++) c->sums[i * c->sums_row + j] *= shrink;
    }
}

/* The exponentials of a block, and the sum of each column. */
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

/* Turns kept exponentials into gradients by the factors in `max`, and sets that of the target. */
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

/* A row of dx: its sum, scaled, and the target's row of weight. */
static int dx_row(int64_t i, void *context) {
    const Chunk *c = context;
    int64_t C = c->x->shape[1], size = dtype_size(c->weight->dtype), t = target(c, i);
    float *sums = c->sums + i * c->sums_row, others = dloss(c, i) / c->total[i];
    char *out = at(c->dx, (c->row0 + i) * c->dx->stride[0]);
    if (check_target(c, i, t)) return -1;
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
    int64_t V = c->weight->shape[0], kept = c->keep ? v0 * c->stride : 0;
    c->v0 = v0, c->v1 = v0 + STRETCH < V ? v0 + STRETCH : V;
    c->logits = c->memory + (c->dtype == F32 ? kept : 0);
    c->from = c->froms + (c->keep ? v0 / STRETCH * c->stride : 0);
    c->e = c->dtype == F32 ? (char *)c->logits : (char *)c->exps + kept * dtype_size(c->dtype);
}

/* ---- the products ---------------------------------------------------------------------------- */

/* logits[v1 - v0, rows] = weight x^T */
static Gemm product_of_logits(const Chunk *c) {
    return (Gemm){ .M = c->v1 - c->v0,
                   .N = c->rows,
                   .K = c->x->shape[1],
                   .a = rows_from(matrix(c->weight), c->v0),
                   .b = transposed(rows_from(matrix(c->x), c->row0)),
                   .alpha = 1,
                   .c = c->logits,
                   .c_row = c->stride,
                   .c_dtype = F32 };
}

/* sums[rows, C] += e^T weight */
static Gemm product_of_sums(const Chunk *c) {
    return (Gemm){ .M = c->rows,
                   .N = c->x->shape[1],
                   .K = c->v1 - c->v0,
                   .a = transposed((Matrix){ c->e, c->stride, 1, c->dtype }),
                   .b = rows_from(matrix(c->weight), c->v0),
                   .alpha = 1,
                   .beta = c->v0 > 0,
                   .c = c->sums,
                   .c_row = c->sums_row,
                   .c_dtype = F32 };
}

/* dweight[v1 - v0, C] += gradients x */
static Gemm product_of_dweight(const Chunk *c) {
    return (Gemm){ .M = c->v1 - c->v0,
                   .N = c->x->shape[1],
                   .K = c->rows,
                   .a = { c->e, c->stride, 1, c->dtype },
                   .b = rows_from(matrix(c->x), c->row0),
                   .alpha = 1,
                   .beta = 1,
                   .c = at(c->dweight, c->v0 * c->dweight->stride[0]),
                   .c_row = c->dweight->stride[0],
                   .c_dtype = F32 };
}

/* ---- a chunk --------------------------------------------------------------------------------- */

/* Goes through the whole vocabulary: sums of exponentials, and of dx. */
static int sum_chunk(Chunk *c) {
    memset(c->picked, 0, (size_t)c->stride * 4);
    memset(c->total, 0, (size_t)c->stride * 4);
    for (int64_t v0 = 0; v0 < c->weight->shape[0]; v0 = c->v1) {
        set_stretch(c, v0);
        if (c->keep && v0) memcpy(c->from, c->from - c->stride, (size_t)c->stride * 4);
        int64_t blocks = ceil_div(c->v1 - v0, BLOCK);
        Gemm logits = product_of_logits(c);
        if (CPU(gemm)(&logits)) return -1;
        if (parallel_for(blocks, BLOCK * c->stride / 16, max_block, c)) return -1;
        raise_from(c);
        if (parallel_for(blocks, BLOCK * c->stride / 4, exp_block, c)) return -1;
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t i = 0; i < c->stride; i++) c->total[i] += c->sum[block * c->stride + i];
        if (!c->dlosses) continue;
        Gemm sums = product_of_sums(c);
        if (CPU(gemm)(&sums)) return -1;
    }
    return 0;
}

static int weight_gradient(Chunk *c) {
    const float *last = c->from;
    for (int64_t v0 = 0; v0 < c->weight->shape[0]; v0 = c->v1) {
        set_stretch(c, v0);
        for (int64_t i = 0; i < c->stride; i++)
            c->max[i] = i < c->rows ? dloss(c, i) * expf(c->from[i] - last[i]) / c->total[i] : 0;
        if (parallel_for(ceil_div(c->v1 - v0, BLOCK), BLOCK * c->stride / 8, gradient_block, c)) return -1;
        Gemm dweight = product_of_dweight(c);
        if (CPU(gemm)(&dweight)) return -1;
    }
    return 0;
}

static int run_chunk(Chunk *c, const Tensor *losses, const Tensor *lse) {
    int64_t V = c->weight->shape[0];
    if (sum_chunk(c)) return -1;
    for (int64_t i = 0; i < c->rows; i++) {
        int64_t m = c->row0 + i;
        float log_sum = V ? logf(c->total[i]) : -INFINITY,
              loss = V ? log_sum - (c->picked[i] - c->from[i]) : 0;
        ((float *)losses->data)[m * losses->stride[0]] = target(c, i) == c->ignore ? 0 : loss;
        if (lse) ((float *)lse->data)[m * lse->stride[0]] = V ? c->from[i] + log_sum : log_sum;
        if (c->dlosses) c->own[i] = dloss(c, i) * expm1f(-loss);
    }
    if (c->dlosses && parallel_for(c->rows, c->x->shape[1] / 4, dx_row, c)) return -1;
    return c->keep ? weight_gradient(c) : 0;
}

/* ---- the ops --------------------------------------------------------------------------------- */

static Chunk forward_chunk(const LinearCrossEntropyForward *f) {
    return (Chunk){ .x = &f->x,
                    .weight = &f->weight,
                    .targets = &f->targets,
                    .narrow = f->x.dtype != F32,
                    .dtype = f->x.dtype == BF16 && DOTS ? BF16 : F32,
                    .ignore = (int64_t)f->ignore_index };
}

static Chunk backward_chunk(const LinearCrossEntropyBackward *f) {
    int keep = given(&f->dweight);
    return (Chunk){ .x = &f->x,
                    .weight = &f->weight,
                    .targets = &f->targets,
                    .dlosses = &f->dlosses,
                    .dx = &f->dx,
                    .dweight = keep ? &f->dweight : NULL,
                    .keep = keep,
                    .narrow = f->x.dtype != F32,
                    /* bfloat16: products at twice the speed, or twice the rows at once */
                    .dtype = f->x.dtype == BF16 && (DOTS || keep) ? BF16 : F32,
                    .ignore = (int64_t)f->ignore_index };
}

/* Without lse, ignored rows need no logits: the chunk loses whole units of them at both ends, and their
 * losses and rows of dx become 0. An answer after a long question leaves little of a chunk. */
static void leave_out_ignored(Chunk *c, const Tensor *losses) {
    int64_t first = 0, last = c->rows, row0 = c->row0, rows = c->rows;
    while (first < rows && target(c, first) == c->ignore) first++;
    while (last > first && target(c, last - 1) == c->ignore) last--;
    int64_t begin = first / UNIT * UNIT, end = ceil_div(last, UNIT) * UNIT;
    if (first == last) begin = end = rows;
    for (int64_t i = 0; i < rows; i++) {
        if (i >= begin && i < end) continue;
        ((float *)losses->data)[(row0 + i) * losses->stride[0]] = 0;
        memset(at(c->dx, (row0 + i) * c->dx->stride[0]), 0,
               (size_t)(c->dx->shape[1] * dtype_size(c->dx->dtype)));
    }
    c->row0 += begin, c->stride = end - begin;
    c->rows = rows - begin < c->stride ? rows - begin : c->stride;
}

static int run(const char *op, const Tensor *losses, const Tensor *lse, Chunk c) {
    int64_t M = c.x->shape[0], C = c.x->shape[1];
    c.op = op;
    for (int64_t m = 0; m < M; m++)
        if (check_target(&c, m, target(&c, m))) return -1;
    if (M == 0) return 0;
    int64_t rows = rows_of_chunk(&c), chunks = count_chunks(&c), units = units_of(&c),
            blocks = STRETCH / BLOCK;
    if (!(c.memory = scratch(4 * rows * floats_of_row(&c)))) return -1;
    c.froms = c.memory + logits_held(&c) * rows;
    c.max = c.froms + froms_held(&c) * rows, c.sum = c.max + blocks * rows;
    c.total = c.sum + blocks * rows, c.picked = c.total + rows, c.own = c.picked + rows;
    if (c.narrow) c.exps = c.own + rows * (1 + C);
    int status = 0;
    for (int64_t chunk = 0; chunk < chunks && !status; chunk++) {
        c.row0 = chunk * units / chunks * UNIT;
        c.stride = (chunk + 1) * units / chunks * UNIT - c.row0;
        c.rows = M - c.row0 < c.stride ? M - c.row0 : c.stride;
        if (c.dlosses) {
            leave_out_ignored(&c, losses);
            if (c.rows <= 0) continue;
            c.sums = c.narrow ? c.own + rows : at(c.dx, c.row0 * c.dx->stride[0]);
            c.sums_row = c.narrow ? C : c.dx->stride[0];
        }
        status = run_chunk(&c, losses, lse);
    }
    scratch_free(c.memory);
    return status;
}

/* The chunk's own block, and the largest of a product of the first stretch of a full chunk. */
static Scratch scratch_of(Chunk c) {
    int64_t M = c.x->shape[0], V = c.weight->shape[0];
    if (M == 0) return (Scratch){ 0 };
    c.stride = rows_of_chunk(&c), c.rows = M < c.stride ? M : c.stride;
    c.v1 = V < STRETCH ? V : STRETCH;
    if (c.dlosses) c.sums_row = c.narrow ? c.x->shape[1] : c.dx->stride[0];
    Gemm list[3] = { product_of_logits(&c) };
    int count = 1;
    if (c.dlosses) list[count++] = product_of_sums(&c);
    if (c.keep) list[count++] = product_of_dweight(&c);
    Scratch s = { { 4 * c.stride * floats_of_row(&c) } };
    for (int i = 0; i < count; i++) {
        int64_t bytes = CPU(gemm_scratch)(&list[i]);
        if (bytes > s.bytes[1]) s.bytes[1] = bytes;
    }
    return s;
}

int CPU(linear_cross_entropy_forward)(const void *args, void *stream) {
    const LinearCrossEntropyForward *f = args;
    (void)stream;
    return run("linear_cross_entropy_forward", &f->losses, &f->lse, forward_chunk(f));
}
Scratch CPU(linear_cross_entropy_forward_scratch)(const void *args) {
    return scratch_of(forward_chunk(args));
}

int CPU(linear_cross_entropy_backward)(const void *args, void *stream) {
    const LinearCrossEntropyBackward *f = args;
    (void)stream;
    return run("linear_cross_entropy_backward", &f->losses, NULL, backward_chunk(f));
}
Scratch CPU(linear_cross_entropy_backward_scratch)(const void *args) {
    return scratch_of(backward_chunk(args));
}
