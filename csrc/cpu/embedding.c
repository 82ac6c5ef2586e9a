/* embedding.c --- rows of a table by token id, and the sum of their gradients without atomics: `order` sorts
 * the ids, so one task sums each row of the table, in the order of the tokens. */
#include "cpu.h"

enum {
    ROWS = 16,     /* tokens of a task */
    PIECE = 128,   /* tokens of one id per partial sum, so that sums of frequent ids stay exact */
    COLUMNS = 512, /* columns of a partial sum at a time */
};

static int check_ids(const char *op, const Tensor *ids, int64_t rows) {
    for (int64_t m = 0; m < ids->shape[0]; m++) {
        int32_t id = ((const int32_t *)ids->data)[m];
        if (id < 0 || id >= rows)
            return fail("%s: ids[%lld] should be in 0..%lld, got %d", op, (long long)m, (long long)rows - 1,
                        id);
    }
    return 0;
}

static int forward_rows(int64_t task, void *context) {
    const EmbeddingForward *a = context;
    int64_t first = task * ROWS, last = first + ROWS, C = a->out.shape[1];
    if (last > a->ids.shape[0]) last = a->ids.shape[0];
    for (int64_t m = first; m < last; m++)
        memcpy(at(&a->out, m * a->out.stride[0]),
               at(&a->weight, ((const int32_t *)a->ids.data)[m] * a->weight.stride[0]),
               (size_t)(C * dtype_size(a->out.dtype)));
    return 0;
}

int CPU(embedding_forward)(const void *args, void *stream) {
    const EmbeddingForward *a = args;
    (void)stream;
    if (check_ids("embedding_forward", &a->ids, a->weight.shape[0])) return -1;
    return parallel_for((a->ids.shape[0] + ROWS - 1) / ROWS, ROWS * (a->out.shape[1] / 4 + 1), forward_rows,
                        (void *)a);
}

/* row[c] += dout[order[i], c0 + c] for i = first .. last-1 and c = 0 .. n-1. */
static inline void add_rows(float *row, const EmbeddingBackward *a, int64_t first, int64_t last, int64_t c0,
                            int64_t n) {
    const int32_t *order = a->order.data;
    int64_t size = dtype_size(a->dout.dtype);
    for (int64_t i = first; i < last; i++) {
        const char *dout = at(&a->dout, order[i] * a->dout.stride[0] + c0);
        int64_t c = 0;
        for (; c + VW <= n; c += VW)
            vf_store(row + c, vf_load(row + c) + vf_load_any(dout + c * size, a->dout.dtype));
        for (; c < n; c++) row[c] += load1(dout + c * size, a->dout.dtype);
    }
}

/* A task owns the runs of equal ids that begin in its ROWS elements of `order`, up to their ends. */
static int backward_runs(int64_t task, void *context) {
    const EmbeddingBackward *a = context;
    const int32_t *ids = a->ids.data, *order = a->order.data;
    int64_t first = task * ROWS, last = first + ROWS, M = a->ids.shape[0], C = a->dout.shape[1];
    if (last > M) last = M;
    if (first)
        while (first < last && ids[order[first]] == ids[order[first - 1]]) first++;
    for (int64_t i = first, end; i < last; i = end) {
        float *row = at(&a->dweight, ids[order[i]] * a->dweight.stride[0]);
        for (end = i + 1; end < M && ids[order[end]] == ids[order[i]]; end++) {}
        if (end - i <= PIECE) {
            add_rows(row, a, i, end, 0, C);
            continue;
        }
        for (int64_t c0 = 0; c0 < C; c0 += COLUMNS)
            for (int64_t start = i; start < end; start += PIECE) {
                float sum[COLUMNS] = { 0 };
                int64_t n = C - c0 < COLUMNS ? C - c0 : COLUMNS;
                add_rows(sum, a, start, start + PIECE < end ? start + PIECE : end, c0, n);
                for (int64_t c = 0; c < n; c++) row[c0 + c] += sum[c];
            }
    }
    return 0;
}

int CPU(embedding_backward)(const void *args, void *stream) {
    const EmbeddingBackward *a = args;
    (void)stream;
    const int32_t *ids = a->ids.data, *order = a->order.data;
    if (check_ids("embedding_backward", &a->ids, a->dweight.shape[0])) return -1;
    for (int64_t i = 0; i < a->order.shape[0]; i++) {
        if (order[i] < 0 || order[i] >= a->ids.shape[0])
            return fail("embedding_backward: order[%lld] should be in 0..%lld, got %d", (long long)i,
                        (long long)a->ids.shape[0] - 1, order[i]);
        if (i && (ids[order[i - 1]] > ids[order[i]] ||
                  (ids[order[i - 1]] == ids[order[i]] && order[i - 1] >= order[i])))
            return fail(
                "embedding_backward: order should be the stable argsort of ids, but is not at index %lld",
                (long long)i);
    }
    return parallel_for((a->ids.shape[0] + ROWS - 1) / ROWS, ROWS * (a->dout.shape[1] / 2 + 1), backward_runs,
                        (void *)a);
}
