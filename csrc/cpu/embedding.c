/* embedding.c --- rows of a table by token id, and the sum of their gradients without atomics: `order` sorts
 * the ids, so one task sums each row of the table, in the order of the tokens. */
#include "cpu.h"

enum {
    ROWS = 16,     /* tokens of a task */
    PIECE = 128,   /* tokens of one id per partial sum, so that sums of frequent ids stay exact */
    COLUMNS = 512, /* columns of a partial sum at a time */
};

static int bad_id(const char *op, int64_t m, int64_t rows, int32_t id) {
    return fail("%s: ids[%lld] should be in 0..%lld, got %d", op, (long long)m, (long long)rows - 1, id);
}

static int check_ids(const char *op, const Tensor *ids, int64_t rows) {
    for (int64_t m = 0; m < ids->shape[0]; m++) {
        int32_t id = index_at(ids, m);
        if (id < 0 || id >= rows) return bad_id(op, m, rows, id);
    }
    return 0;
}

static int forward_rows(int64_t task, void *context) {
    const EmbeddingForward *a = context;
    int64_t first = task * ROWS, last = first + ROWS, C = a->out.shape[1];
    if (last > a->ids.shape[0]) last = a->ids.shape[0];
    for (int64_t m = first; m < last; m++) {
        int32_t id = index_at(&a->ids, m);
        if (id < 0 || id >= a->weight.shape[0]) return bad_id("embedding_forward", m, a->weight.shape[0], id);
        memcpy(at(&a->out, m * a->out.stride[0]), at(&a->weight, id * a->weight.stride[0]),
               (size_t)(C * dtype_size(a->out.dtype)));
    }
    return 0;
}

int CPU(embedding_forward)(const void *args, void *stream) {
    const EmbeddingForward *a = args;
    (void)stream;
    if (check_ids("embedding_forward", &a->ids, a->weight.shape[0])) return -1;
    return parallel_for((a->ids.shape[0] + ROWS - 1) / ROWS, ROWS * (a->out.shape[1] / 4 + 1), forward_rows,
                        (void *)a);
}

/* The token at place i of the order; -1 after fail() if there is no such token. */
static inline int32_t token_at(const EmbeddingBackward *a, int64_t i) {
    int32_t token = index_at(&a->order, i);
    if (token >= 0 && token < a->ids.shape[0]) return token;
    return fail("embedding_backward: order[%lld] should be in 0..%lld, got %d", (long long)i,
                (long long)a->ids.shape[0] - 1, token);
}
/* Its id; -1 after fail() if there is no such id. */
static inline int32_t id_at(const EmbeddingBackward *a, int64_t i) {
    int32_t token = token_at(a, i), id = token < 0 ? -1 : index_at(&a->ids, token);
    if (token < 0 || (id >= 0 && id < a->dweight.shape[0])) return id;
    return bad_id("embedding_backward", token, a->dweight.shape[0], id);
}

/* row[c] += dout[order[i], c0 + c] for i = first .. last-1 and c = 0 .. n-1. 0, or -1 after fail(). */
static inline int add_rows(float *row, const EmbeddingBackward *a, int64_t first, int64_t last, int64_t c0,
                           int64_t n) {
    int64_t size = dtype_size(a->dout.dtype);
    for (int64_t i = first; i < last; i++) {
        int32_t token = token_at(a, i);
        if (token < 0) return -1;
        const char *dout = at(&a->dout, token * a->dout.stride[0] + c0);
        int64_t c = 0;
        for (; c + VW <= n; c += VW)
            vf_store(row + c, vf_load(row + c) + vf_load_any(dout + c * size, a->dout.dtype));
        for (; c < n; c++) row[c] += load1(dout + c * size, a->dout.dtype);
    }
    return 0;
}

/* Adds the rows of places first .. last-1, which have one id, to the id's row of dweight. */
static int add_run(const EmbeddingBackward *a, int32_t id, int64_t first, int64_t last) {
    float *row = at(&a->dweight, id * a->dweight.stride[0]);
    int64_t C = a->dout.shape[1];
    if (last - first <= PIECE) return add_rows(row, a, first, last, 0, C);
    for (int64_t c0 = 0; c0 < C; c0 += COLUMNS)
        for (int64_t start = first; start < last; start += PIECE) {
            float sum[COLUMNS] = { 0 };
            int64_t n = C - c0 < COLUMNS ? C - c0 : COLUMNS;
            if (add_rows(sum, a, start, start + PIECE < last ? start + PIECE : last, c0, n)) return -1;
            for (int64_t c = 0; c < n; c++) row[c0 + c] += sum[c];
        }
    return 0;
}

/* A task owns the runs of equal ids that begin in its ROWS elements of `order`, up to their ends. */
static int backward_runs(int64_t task, void *context) {
    const EmbeddingBackward *a = context;
    int64_t i = task * ROWS, M = a->ids.shape[0], last = i + ROWS < M ? i + ROWS : M, end;
    int32_t before = i ? id_at(a, i - 1) : -1, id = id_at(a, i);
    if (i && before < 0) return -1;
    while (id == before && id >= 0 && ++i < last) id = id_at(a, i);
    for (int32_t next = id; i < last && id >= 0; i = end, id = next) {
        for (end = i + 1; end < M && (next = id_at(a, end)) == id; end++) {}
        if (add_run(a, id, i, end)) return -1;
    }
    return id < 0 ? -1 : 0;
}

int CPU(embedding_backward)(const void *args, void *stream) {
    const EmbeddingBackward *a = args;
    int32_t token = -1, id = -1;
    (void)stream;
    if (check_ids("embedding_backward", &a->ids, a->dweight.shape[0])) return -1;
    for (int64_t i = 0; i < a->order.shape[0]; i++) {
        int32_t token_before = token, id_before = id;
        if ((token = token_at(a, i)) < 0) return -1;
        id = index_at(&a->ids, token);
        if (id_before > id || (id_before == id && token_before >= token))
            return fail(
                "embedding_backward: order should be the stable argsort of ids, but is not at index %lld",
                (long long)i);
    }
    return parallel_for((a->ids.shape[0] + ROWS - 1) / ROWS, ROWS * (a->dout.shape[1] / 2 + 1), backward_runs,
                        (void *)a);
}
