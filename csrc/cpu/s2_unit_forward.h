/* s2_unit_forward.h --- a task of the forward pass of attention on the matrix unit, where q, k and v are
 * bfloat16; and which tasks run there. The output is kept transposed, as scores are: out^T [D,queries] is
 * v^T p^T. */
#ifndef LONGLORA_S2_UNIT_FORWARD_H
#define LONGLORA_S2_UNIT_FORWARD_H

#include "s2_forward.h"
#include "s2_unit.h"

#if MATRIX_UNIT
/* Floats that a task of `rows` query rows takes. */
static inline int64_t unit_forward_floats(int64_t D, int64_t rows) {
    int64_t wide = unit_width(D);
    return rows * wide / 2 + rows * wide + 2 * rows + BQ + BQ * wide + BK * wide + BK * BQ + BK * BQ / 2;
}

static void unit_forward_task(const S2AttentionForward *a, const Task *task, float *memory) {
    const Segment *s = task->segment;
    int64_t wide = unit_width(a->q.shape[3]), n = task->last - task->first, size = round_up(n, BQ);
    int64_t all = (task->to - task->from) * size;
    float *qt = memory, *out = qt + all * wide / 2, *maximum = out + all * wide, *sum = maximum + all,
          *shrink = sum + all, *rows_memory = shrink + BQ;
    uint16_t *k = (uint16_t *)(rows_memory + BQ * wide), *vt = k + BK * wide, *pairs = vt + BK * wide;
    float *p = (float *)(pairs + BK * BQ);
    unit_begin();
    for (int64_t i = 0; i < all; i += BQ) {
        int64_t first = i % size;
        load_halves((uint16_t *)rows_memory, wide, &a->q, s, task->from + i / size, task->first + first,
                    min64(BQ, n - first), BQ);
        transpose(qt + i * wide / 2, rows_memory, BQ, wide / 2);
    }
    begin_rows(out, all * wide, maximum, sum, all);
    for (int64_t key = 0; key < task->last; key += BK) {
        int64_t keys = min64(BK, task->last - key);
        load_halves(k, wide, &a->v, s, task->kv_head, key, keys, BK);
        transpose_halves(vt, BK, k, wide, BK, wide);
        load_halves(k, wide, &a->k, s, task->kv_head, key, keys, BK);
        for (int64_t i = 0; i < all; i += BQ) {
            int64_t row = task->first + i % size, rows = min64(BQ, task->last - row);
            Block b = { s, row, rows, key, min64(keys, row + rows - key) };
            if (b.keys <= 0) continue;
            int64_t padded = round_up(b.keys, UNIT_K);
            unit_product(p, BQ, rows_of_16(k, wide), words_of_16(qt + i * wide / 2, BQ), padded, BQ,
                         wide / UNIT_K, 0);
            int shrinks = softmax(p, &b, (float)a->scale, maximum + i, sum + i, shrink);
            pair_keys(pairs, p, keys_of(&b, 0, BQ / VW));
            float *o = out + i * wide;
            for (int64_t d = 0; d < wide && shrinks; d++)
                for (int64_t r = 0; r < BQ; r += VW)
                    vf_store(o + d * BQ + r, vf_load(o + d * BQ + r) * vf_load(shrink + r));
            unit_product(o, BQ, rows_of_16(vt, BK), words_of_16(pairs, BQ), wide, BQ, padded / UNIT_K, 1);
        }
    }
    unit_end();
    for (int64_t i = 0; i < all; i++) {
        int64_t row = task->first + i % size, head = task->from + i / size;
        if (i % BQ == 0) transpose(rows_memory, out + i * wide, wide, BQ);
        if (row >= task->last) continue;
        finish_row(a, s, row, head, rows_memory + i % BQ * wide, wide, maximum[i], sum[i]);
    }
}
#endif

/* What a forward task of `rows` query rows takes, in floats, whichever way it goes; and the task. */
static inline int64_t attention_floats(int64_t D, int64_t rows) {
    int64_t floats = forward_floats(round_up(D, VW), rows);
#if MATRIX_UNIT
    floats = max64(floats, round_up(unit_forward_floats(D, rows), VW));
#endif
    return floats;
}
static inline void attention_task(const S2AttentionForward *a, const Task *task, float *memory) {
#if MATRIX_UNIT
    if (a->q.dtype == BF16 && a->k.dtype == BF16 && a->v.dtype == BF16 && a->scale > 0) {
        unit_forward_task(a, task, memory);
        return;
    }
#endif
    forward_task(a, task, memory);
}

#endif
