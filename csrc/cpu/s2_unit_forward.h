/* s2_unit_forward.h --- a task of the forward pass of attention on the matrix unit, and which tasks run
 * there. The output is kept transposed, as scores are: out^T [D,queries] is v^T p^T. */
#ifndef LONGLORA_S2_UNIT_FORWARD_H
#define LONGLORA_S2_UNIT_FORWARD_H

#include "s2_forward.h"
#include "s2_unit.h"

#if MATRIX_UNIT
/* The most parts that an element of q, k or v has. Where others have fewer, the rest of their parts are 0. */
static inline int forward_parts(const S2AttentionForward *a) {
    int of_q = parts_of_dtype(a->q.dtype), of_k = parts_of_dtype(a->k.dtype),
        of_v = parts_of_dtype(a->v.dtype);
    return (int)max64(of_q, max64(of_k, of_v));
}

/* A task's memory. These are factors of products, with all parts of their numbers:
 *   qt      queries, transposed, in pairs of their elements
 *   k, vt   BK keys; their values, transposed
 *   pairs   weights in pairs of keys
 * `out` is transposed. `rows` and `halves` hold rows that are not transposed yet. */
typedef struct {
    float *out, *maximum, *sum, *shrink, *rows, *p;
    uint16_t *qt, *k, *vt, *pairs, *halves;
} UnitForward;

/* Floats that it takes for `all` query rows, and pointers into `memory`. */
static int64_t unit_forward_in(UnitForward *m, float *memory, int64_t all, int64_t wide, int parts) {
    float *end = memory;
    m->out = end, end += all * wide;
    m->maximum = end, end += all;
    m->sum = end, end += all;
    m->shrink = end, end += BQ;
    m->rows = end, end += BK * wide;
    m->p = end, end += BK * BQ;
    m->qt = (uint16_t *)end, end += parts * all * wide / 2;
    m->k = (uint16_t *)end, end += parts * BK * wide / 2;
    m->vt = (uint16_t *)end, end += parts * BK * wide / 2;
    m->halves = (uint16_t *)end, end += parts * BK * wide / 2;
    m->pairs = (uint16_t *)end, end += parts * BK * BQ / 2;
    return end - memory;
}
static inline int64_t unit_forward_floats(int64_t D, int64_t rows, int parts) {
    UnitForward m;
    float none;
    return unit_forward_in(&m, &none, rows, unit_width(D), parts);
}

/* BQ rows of q from row `first` on, to qt. Returns whether they may be multiplied in parts. */
static int unit_load_q(const UnitForward *m, uint16_t *qt, const S2AttentionForward *a, const Segment *s,
                       int64_t head, int64_t first, int64_t n, int64_t wide, int parts) {
    int finite = 1;
    if (parts == 1) load_halves(m->halves, wide, &a->q, s, head, first, n, BQ);
    else {
        finite = load_finite_rows(m->rows, wide, &a->q, s, head, first, n, BQ);
        split_rows(m->halves, BQ * wide, parts, m->rows, wide, BQ);
    }
    transpose_parts(qt, BQ * wide, parts, m->halves, BQ, wide / 2);
    return finite;
}

/* Keys and values of a block, to k and vt. Returns whether they may be multiplied in parts. */
static int unit_load_keys(const UnitForward *m, const S2AttentionForward *a, const Segment *s, int64_t head,
                          int64_t key, int64_t keys, int64_t wide, int parts) {
    if (parts == 1) {
        load_halves(m->halves, wide, &a->v, s, head, key, keys, BK);
        transpose_halves(m->vt, BK, m->halves, wide, BK, wide);
        load_halves(m->k, wide, &a->k, s, head, key, keys, BK);
        return 1;
    }
    int finite = load_finite_rows(m->rows, wide, &a->v, s, head, key, keys, BK);
    split_pairs(m->halves, BK * wide, parts, m->rows, wide, BK);
    transpose_parts(m->vt, BK * wide, parts, m->halves, BK / 2, wide);
    finite &= load_finite_rows(m->rows, wide, &a->k, s, head, key, keys, BK);
    split_rows(m->k, BK * wide, parts, m->rows, wide, BK);
    return finite;
}

/* The weights of a block's first `seen` keys, to pairs; zeros up to `padded`. */
static void unit_pair_weights(const UnitForward *m, int64_t seen, int64_t padded, int parts) {
    if (parts == 1) {
        pair_keys(m->pairs, m->p, seen);
        return;
    }
    memset(m->p + seen * BQ, 0, (size_t)((padded - seen) * BQ) * sizeof(float));
    split_pairs(m->pairs, BK * BQ, parts, m->p, BQ, padded);
}

/* o^T [wide,BQ], times shrink. */
static void shrink_columns(float *o, const float *shrink, int64_t wide) {
    for (int64_t d = 0; d < wide; d++)
        for (int64_t r = 0; r < BQ; r += VW)
            vf_store(o + d * BQ + r, vf_load(o + d * BQ + r) * vf_load(shrink + r));
}

/* Returns 0, with nothing written, if numbers that would be multiplied in parts are not finite. */
static int unit_forward_task(const S2AttentionForward *a, const Task *task, float *memory, int parts) {
    const Segment *s = task->segment;
    int64_t wide = unit_width(a->q.shape[3]), n = task->last - task->first, size = round_up(n, BQ);
    int64_t all = (task->to - task->from) * size;
    int finite = 1;
    UnitForward m;
    unit_forward_in(&m, memory, all, wide, parts);
    unit_begin();
    for (int64_t i = 0; i < all; i += BQ)
        finite &= unit_load_q(&m, m.qt + parts * i * wide, a, s, task->from + i / size,
                              task->first + i % size, min64(BQ, n - i % size), wide, parts);
    begin_rows(m.out, all * wide, m.maximum, m.sum, all);
    for (int64_t key = 0; key < task->last && finite; key += BK) {
        int64_t keys = min64(BK, task->last - key);
        finite = unit_load_keys(&m, a, s, task->kv_head, key, keys, wide, parts);
        for (int64_t i = 0; i < all; i += BQ) {
            int64_t row = task->first + i % size, rows = min64(BQ, task->last - row);
            Block b = { s, row, rows, key, min64(keys, row + rows - key) };
            if (b.keys <= 0) continue;
            int64_t padded = round_up(b.keys, UNIT_K);
            float *o = m.out + i * wide;
            UnitFactor k = in_parts(rows_of_16(m.k, wide), BK * wide, parts),
                       vt = in_parts(rows_of_16(m.vt, BK), BK * wide, parts),
                       qt = in_parts(words_of_16(m.qt + parts * i * wide, BQ), BQ * wide, parts),
                       pairs = in_parts(words_of_16(m.pairs, BQ), BK * BQ, parts);
            unit_product(m.p, BQ, k, qt, padded, BQ, wide / UNIT_K, 0);
            int shrinks = softmax(m.p, &b, (float)a->scale, m.maximum + i, m.sum + i, m.shrink);
            unit_pair_weights(&m, keys_of(&b, 0, BQ / VW), padded, parts);
            if (shrinks) shrink_columns(o, m.shrink, wide);
            unit_product(o, BQ, vt, pairs, wide, BQ, padded / UNIT_K, 1);
        }
    }
    unit_end();
    for (int64_t i = 0; i < all && finite; i++) {
        int64_t row = task->first + i % size, head = task->from + i / size;
        if (i % BQ == 0) transpose(m.rows, m.out + i * wide, wide, BQ);
        if (row >= task->last) continue;
        finish_row(a, s, row, head, m.rows + i % BQ * wide, wide, m.maximum[i], m.sum[i]);
    }
    return finite;
}
#endif

/* What a forward task takes, in floats, whichever way it goes; and the task. */
static inline int64_t attention_floats(const S2AttentionForward *a) {
    int64_t D = a->q.shape[3], rows = rows_of_tasks(a->q.shape[1], a->q.shape[2], D);
    int64_t floats = forward_floats(round_up(D, VW), rows);
#if MATRIX_UNIT
    int parts = forward_parts(a);
    if (parts < UNIT_PARTS) floats = max64(floats, round_up(unit_forward_floats(D, rows, parts), VW));
#endif
    return floats;
}
static inline void attention_task(const S2AttentionForward *a, const Task *task, float *memory) {
#if MATRIX_UNIT
    int parts = forward_parts(a);
    if (parts < UNIT_PARTS && a->scale > 0 && unit_forward_task(a, task, memory, parts)) return;
#endif
    forward_task(a, task, memory);
}

#endif
