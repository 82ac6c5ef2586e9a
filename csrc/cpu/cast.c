/* cast.c --- rows from one float dtype to another, scaled sums, and sums of squares for the gradient norm. */
#include "cpu.h"

enum { BLOCK = 4096 }; /* elements of a row at a time: 16 KiB in float32, a third of an L1 cache */

typedef struct {
    Tensor out, x;
    float scale;
    int add;
} Rows;

static int row_block(int64_t task, void *context) {
    const Rows *r = context;
    int64_t N = r->x.shape[1], blocks = (N + BLOCK - 1) / BLOCK, m = task / blocks,
            first = task % blocks * BLOCK;
    int64_t n = N - first < BLOCK ? N - first : BLOCK;
    void *out = at(&r->out, m * r->out.stride[0] + first);
    const void *x = at(&r->x, m * r->x.stride[0] + first);
    float row[BLOCK], sum[BLOCK];
    load_row(row, x, r->x.dtype, n);
    if (r->add) {
        load_row(sum, out, r->out.dtype, n);
        int64_t i = 0;
        for (; i + VW <= n; i += VW) vf_store(row + i, vf_load(sum + i) + r->scale * vf_load(row + i));
        for (; i < n; i++) row[i] = sum[i] + r->scale * row[i];
    } else if (r->scale != 1) {
        for (int64_t i = 0; i < n; i++) row[i] *= r->scale;
    }
    store_row(out, r->out.dtype, row, n);
    return 0;
}

static int rows(Tensor out, Tensor x, float scale, int add) {
    Rows r = { out, x, scale, add };
    int64_t N = x.shape[1];
    return parallel_for(x.shape[0] * ((N + BLOCK - 1) / BLOCK), (N < BLOCK ? N : BLOCK) / 4 + 1, row_block,
                        &r);
}

int CPU(cast)(const void *args, void *stream) {
    const Cast *a = args;
    (void)stream;
    return rows(a->out, a->x, 1, 0);
}

int CPU(accumulate)(const void *args, void *stream) {
    const Accumulate *a = args;
    (void)stream;
    return rows(a->out, a->x, (float)a->scale, 1);
}

int CPU(scale)(const void *args, void *stream) {
    const Scale *a = args;
    (void)stream;
    return rows(a->out, a->x, (float)a->scale, 0);
}

/* A block of BLOCK elements is summed in float64, in eight strands; the blocks are added in rising order. */
typedef struct {
    const SumSquares *a;
    double *partial;
} Sums;

static int sum_block(int64_t block, void *context) {
    const Sums *s = context;
    const Tensor *x = &s->a->x;
    int64_t first = block * BLOCK, n = x->shape[0] - first < BLOCK ? x->shape[0] - first : BLOCK;
    float row[BLOCK];
    load_row(row, at(x, first), x->dtype, n);
    for (int64_t i = n; i % 8; i++) row[i] = 0;
    double strand[8] = { 0 };
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) strand[j] += (double)row[i + j] * row[i + j];
    s->partial[block] = ((strand[0] + strand[4]) + (strand[2] + strand[6])) +
                        ((strand[1] + strand[5]) + (strand[3] + strand[7]));
    return 0;
}

int CPU(sum_squares)(const void *args, void *stream) {
    const SumSquares *a = args;
    (void)stream;
    int64_t blocks = (a->x.shape[0] + BLOCK - 1) / BLOCK;
    Sums s = { a, scratch(blocks * (int64_t)sizeof(double)) };
    if (!s.partial) return -1;
    int status = parallel_for(blocks, BLOCK / 4, sum_block, &s);
    double sum = 0;
    for (int64_t i = 0; i < blocks; i++) sum += s.partial[i];
    *(double *)a->out.data += sum;
    scratch_free(s.partial);
    return status;
}

Scratch CPU(sum_squares_scratch)(const void *args) {
    const SumSquares *a = args;
    return (Scratch){ { (a->x.shape[0] + BLOCK - 1) / BLOCK * (int64_t)sizeof(double) } };
}
