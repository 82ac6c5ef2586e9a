/* s2_unit_backward.h --- a task of the backward pass of attention on the matrix unit, where all arrays are
 * bfloat16. dq is kept transposed, as scores are. */
#ifndef LONGLORA_S2_UNIT_BACKWARD_H
#define LONGLORA_S2_UNIT_BACKWARD_H

#include "s2_backward.h"
#include "s2_unit.h"

#if MATRIX_UNIT
/* A thread's memory. Keys and values have CHUNK rows of `wide` elements, kt is k transposed; q_rows and
 * g_rows are BQ rows in pairs of rows, qt and gt those rows transposed, in pairs of elements; dqt is dq
 * transposed. p16 and ds16 are [BK,BQ] in bfloat16, ds_pairs ds in pairs of keys. */
typedef struct {
    uint16_t *k, *v, *kt, *q_rows, *g_rows, *p16, *ds16, *ds_pairs;
    float *dk, *dv, *qt, *gt, *dqt, *rows, *p, *ds, *lse, *delta;
} UnitBuffers;
_Static_assert((CHUNK / 2 + BQ) * UNIT_K >= 3 * BK * BQ / 2, "they fit attention_thread_scratch(wide)");

static UnitBuffers unit_buffers_in(float *memory, int64_t wide) {
    UnitBuffers m;
    m.dk = memory, m.dv = m.dk + CHUNK * wide, m.dqt = m.dv + CHUNK * wide, m.rows = m.dqt + BQ * wide;
    m.qt = m.rows + BQ * wide, m.gt = m.qt + BQ * wide / 2, m.p = m.gt + BQ * wide / 2, m.ds = m.p + BK * BQ;
    m.lse = m.ds + BK * BQ, m.delta = m.lse + BQ;
    m.k = (uint16_t *)(m.delta + BQ), m.v = m.k + CHUNK * wide, m.kt = m.v + CHUNK * wide;
    m.q_rows = m.kt + CHUNK * wide, m.g_rows = m.q_rows + BQ * wide, m.p16 = m.g_rows + BQ * wide;
    m.ds16 = m.p16 + BK * BQ, m.ds_pairs = m.ds16 + BK * BQ;
    return m;
}

/* BQ rows of `wide` elements from m->rows, in pairs of rows and transposed. */
static void both_forms(uint16_t *in_pairs_of_rows, float *transposed, const float *rows, int64_t wide) {
    for (int64_t i = 0; i < BQ; i += 2)
        for (int64_t d = 0; d < wide; d += VW) {
            const uint16_t *from = (const uint16_t *)rows + i * wide + d;
            vh low, high;
            memcpy(&low, from, sizeof low);
            memcpy(&high, from + wide, sizeof high);
            vu pair = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
            memcpy(in_pairs_of_rows + i * wide + 2 * d, &pair, sizeof pair);
        }
    transpose(transposed, rows, BQ, wide / 2);
}

static float dot_halves(const uint16_t *a, const uint16_t *b, int64_t n) {
    vf sum = { 0 };
    for (int64_t i = 0; i < n; i += VW) sum += vf_load_any(a + i, BF16) * vf_load_any(b + i, BF16);
    return vf_sum(sum);
}

static void unit_load_queries(const Backward *b, const Segment *s, int64_t h, int64_t row, int64_t rows,
                              const UnitBuffers *m) {
    const S2AttentionBackward *a = b->a;
    int64_t wide = unit_width(b->p.D);
    uint16_t *halves_of_rows = (uint16_t *)m->rows, *out = halves_of_rows + BQ * wide;
    load_halves(halves_of_rows, wide, &a->dout, s, h, row, rows, BQ);
    load_halves(out, wide, &a->out, s, h, row, rows, BQ);
    for (int64_t i = 0; i < BQ; i++) {
        m->delta[i] = dot_halves(halves_of_rows + i * wide, out + i * wide, wide);
        m->lse[i] = i < rows ? finite_lse(a, s, row + i, h) : 0;
    }
    both_forms(m->g_rows, m->gt, m->rows, wide);
    load_halves(halves_of_rows, wide, &a->q, s, h, row, rows, BQ);
    both_forms(m->q_rows, m->qt, m->rows, wide);
}

/* As score_gradients(), of two keys at a time, to bfloat16. */
static void unit_score_gradients(const Block *block, float scale, const UnitBuffers *m) {
    for (int64_t j = 0; j < round_up(block->keys, UNIT_K); j += 2)
        for (int64_t i = 0; i < BQ / VW; i++) {
            vf e[2], d[2];
            UNROLLED
            for (int n = 0; n < 2; n++) {
                int64_t at = (j + n) * BQ + i * VW;
                e[n] = d[n] = (vf){ 0 };
                if (j + n >= block->keys) continue;
                e[n] = vf_exp_score(scale * vf_load(m->p + at) - vf_load(m->lse + i * VW));
                d[n] = e[n] * (vf_load(m->ds + at) - vf_load(m->delta + i * VW));
                if (!any_hidden(block, j + n, i)) continue;
                vi mask = hidden(block, j + n, i);
                e[n] = vf_select(mask, (vf){ 0 }, e[n]);
                d[n] = vf_select(mask, (vf){ 0 }, d[n]);
            }
            halves p = round_two(e[0], e[1]), ds = round_two(d[0], d[1]), pairs = in_pairs(ds);
            int64_t at = j * BQ + i * VW;
            memcpy(m->p16 + at, &p, VW * 2);
            memcpy(m->p16 + at + BQ, (char *)&p + VW * 2, VW * 2);
            memcpy(m->ds16 + at, &ds, VW * 2);
            memcpy(m->ds16 + at + BQ, (char *)&ds + VW * 2, VW * 2);
            memcpy(m->ds_pairs + j * BQ + 2 * i * VW, &pairs, sizeof pairs);
        }
}

static void unit_backward_task(const Backward *b, const Task *task, float *memory) {
    const S2AttentionBackward *a = b->a;
    const Segment *s = task->segment;
    int64_t wide = unit_width(b->p.D), key0, keys = keys_in_phase(b, task, &key0);
    int64_t padded = round_up(keys, UNIT_K);
    float scale = (float)a->scale;
    if (!keys) return;
    const UnitBuffers m = unit_buffers_in(memory, wide);
    load_halves(m.k, wide, &a->k, s, task->kv_head, key0, keys, padded);
    load_halves(m.v, wide, &a->v, s, task->kv_head, key0, keys, padded);
    transpose_halves(m.kt, CHUNK, m.k, wide, padded, wide);
    memset(m.dk, 0, (size_t)(padded * wide) * sizeof(float));
    memset(m.dv, 0, (size_t)(padded * wide) * sizeof(float));
    unit_begin();
    for (int64_t h = task->from; h < task->to; h++)
        for (int64_t row = task->first; row < task->last; row += BQ) {
            int64_t rows = min64(BQ, task->last - row);
            unit_load_queries(b, s, h, row, rows, &m);
            for (int64_t key = 0; key < keys && key0 + key < row + rows; key += BK) {
                Block block = block_at(s, row, rows, key0, keys, key);
                int64_t n = round_up(block.keys, UNIT_K), offset = key * wide;
                unit_product(m.p, BQ, rows_of_16(m.k + offset, wide), words_of_16(m.qt, BQ), n, BQ,
                             wide / UNIT_K, 0);
                unit_product(m.ds, BQ, rows_of_16(m.v + offset, wide), words_of_16(m.gt, BQ), n, BQ,
                             wide / UNIT_K, 0);
                unit_score_gradients(&block, scale, &m);
                unit_product(m.dv + offset, wide, rows_of_16(m.p16, BQ), words_of_16(m.g_rows, wide), n, wide,
                             BQ / UNIT_K, 1);
                unit_product(m.dk + offset, wide, rows_of_16(m.ds16, BQ), words_of_16(m.q_rows, wide), n,
                             wide, BQ / UNIT_K, 1);
                unit_product(m.dqt, BQ, rows_of_16(m.kt + key, CHUNK), words_of_16(m.ds_pairs, BQ), wide, BQ,
                             n / UNIT_K, key > 0);
            }
            transpose(m.rows, m.dqt, wide, BQ);
            add_queries(b, task, h, row, rows, m.rows, wide);
        }
    unit_end();
    add_keys(b, task, key0, keys, m.dk, m.dv, wide, scale);
}

static int in_bfloat16(const S2AttentionBackward *a) {
    return a->q.dtype == BF16 && a->k.dtype == BF16 && a->v.dtype == BF16 && a->out.dtype == BF16 &&
           a->dout.dtype == BF16;
}
#endif

/* What a backward task takes, in floats, whichever way it goes; and the task. */
static inline int64_t attention_backward_floats(int64_t D) {
    int64_t pitch = round_up(D, VW);
#if MATRIX_UNIT
    pitch = unit_width(D);
#endif
    return attention_thread_scratch(pitch) / (int64_t)sizeof(float);
}
static inline void attention_backward_task(const Backward *b, const Task *task, float *memory) {
#if MATRIX_UNIT
    if (in_bfloat16(b->a)) {
        unit_backward_task(b, task, memory);
        return;
    }
#endif
    backward_task(b, task, memory);
}

#endif
