/* s2_unit_backward.h --- a task of the backward pass of attention on the matrix unit; and which tasks run
 * there. dq is kept transposed, as scores are. */
#ifndef LONGLORA_S2_UNIT_BACKWARD_H
#define LONGLORA_S2_UNIT_BACKWARD_H

#include "s2_backward.h"
#include "s2_unit.h"

#if MATRIX_UNIT
/* A thread's memory. These are factors of products, with all parts of their numbers:
 *   k, v, kt         [CHUNK,wide], and k transposed
 *   q_rows, g_rows   BQ rows of q and of dout, in pairs of rows
 *   qt, gt           the same rows transposed, in pairs of elements
 *   p16, ds16        [BK,BQ]: weights, and gradients of scores
 *   ds_pairs         the gradients in pairs of keys
 * dqt is dq transposed. `rows` and `halves` hold rows that are not transposed yet. */
typedef struct {
    uint16_t *k, *v, *kt, *q_rows, *g_rows, *qt, *gt, *p16, *ds16, *ds_pairs, *halves;
    float *dk, *dv, *dqt, *rows, *p, *ds, *lse, *delta;
} UnitBackward;

/* Returns the floats that it takes, and sets pointers into `memory`. */
static int64_t unit_backward_in(UnitBackward *m, float *memory, int64_t wide, int parts) {
    float *end = memory;
    m->dk = end, end += CHUNK * wide;
    m->dv = end, end += CHUNK * wide;
    m->dqt = end, end += BQ * wide;
    m->rows = end, end += 2 * BQ * wide;
    m->p = end, end += BK * BQ;
    m->ds = end, end += BK * BQ;
    m->lse = end, end += BQ;
    m->delta = end, end += BQ;
    uint16_t **of_chunk[] = { &m->k, &m->v, &m->kt }, **of_block[] = { &m->p16, &m->ds16, &m->ds_pairs },
             **of_rows[] = { &m->q_rows, &m->g_rows, &m->qt, &m->gt, &m->halves };
    for (int i = 0; i < 3; i++) *of_chunk[i] = (uint16_t *)end, end += parts * CHUNK * wide / 2;
    for (int i = 0; i < 3; i++) *of_block[i] = (uint16_t *)end, end += parts * BK * BQ / 2;
    for (int i = 0; i < 5; i++) *of_rows[i] = (uint16_t *)end, end += parts * BQ * wide / 2;
    return end - memory;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* Keys and values of a chunk, to k, kt and v. */
static void unit_load_chunk(const Backward *b, const Task *task, int64_t key0, int64_t keys,
                            const UnitBackward *m, int64_t wide, int parts) {
    const S2AttentionBackward *a = b->a;
    const Segment *s = task->segment;
    int64_t padded = round_up(keys, UNIT_K), part = CHUNK * wide;
    if (parts == 1) {
        load_halves(m->k, wide, &a->k, s, task->kv_head, key0, keys, padded);
        load_halves(m->v, wide, &a->v, s, task->kv_head, key0, keys, padded);
        transpose_halves(m->kt, CHUNK, m->k, wide, padded, wide);
        return;
    }
    for (int64_t j = 0; j < padded; j += UNIT_K) {
        int64_t n = min64(UNIT_K, keys - j);
        load_rows(m->rows, wide, &a->v, s, task->kv_head, key0 + j, n, UNIT_K, 1);
        split_rows(m->v + j * wide, part, parts, m->rows, wide, UNIT_K);
        load_rows(m->rows, wide, &a->k, s, task->kv_head, key0 + j, n, UNIT_K, 1);
        split_rows(m->k + j * wide, part, parts, m->rows, wide, UNIT_K);
        split_pairs(m->halves, UNIT_K * wide, parts, m->rows, wide, UNIT_K);
        for (int64_t d = 0; d < wide; d += VW)
            for (int p = 0; p < parts; p++)
                turn_register(m->kt + p * part + d * CHUNK + j, CHUNK, m->halves + p * UNIT_K * wide + 2 * d,
                              2 * wide);
    }
}

/* BQ rows of `wide` elements from `halves`, in pairs of rows and transposed. */
static void both_forms(uint16_t *in_pairs_of_rows, uint16_t *transposed, const uint16_t *halves,
                       int64_t wide) {
    for (int64_t i = 0; i < BQ; i += 2)
        for (int64_t d = 0; d < wide; d += VW) {
            const uint16_t *from = halves + i * wide + d;
            vh low, high;
            memcpy(&low, from, sizeof low);
            memcpy(&high, from + wide, sizeof high);
            vu pair = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
            memcpy(in_pairs_of_rows + i * wide + 2 * d, &pair, sizeof pair);
        }
    transpose((float *)transposed, (const float *)halves, BQ, wide / 2);
}

static float dot_halves(const uint16_t *a, const uint16_t *b, int64_t n) {
    vf sum = { 0 };
    for (int64_t i = 0; i < n; i += VW) sum += vf_load_any(a + i, BF16) * vf_load_any(b + i, BF16);
    return vf_sum(sum);
}

static void load_queries_of_bf16(const Backward *b, const Segment *s, int64_t h, int64_t row, int64_t rows,
                                 const UnitBackward *m, int64_t wide) {
    const S2AttentionBackward *a = b->a;
    uint16_t *out = (uint16_t *)m->rows;
    load_halves(m->halves, wide, &a->dout, s, h, row, rows, BQ);
    load_halves(out, wide, &a->out, s, h, row, rows, BQ);
    for (int64_t i = 0; i < BQ; i++) m->delta[i] = dot_halves(m->halves + i * wide, out + i * wide, wide);
    both_forms(m->g_rows, m->gt, m->halves, wide);
    load_halves(m->halves, wide, &a->q, s, h, row, rows, BQ);
    both_forms(m->q_rows, m->qt, m->halves, wide);
}

/* BQ rows in float32 from m->rows, in pairs of rows and transposed, both in parts. */
static void both_forms_of_parts(const UnitBackward *m, uint16_t *in_pairs_of_rows, uint16_t *transposed,
                                int64_t wide, int parts) {
    split_pairs(in_pairs_of_rows, BQ * wide, parts, m->rows, wide, BQ);
    split_rows(m->halves, BQ * wide, parts, m->rows, wide, BQ);
    transpose_parts(transposed, BQ * wide, parts, m->halves, BQ, wide / 2);
}

static void load_queries_in_parts(const Backward *b, const Segment *s, int64_t h, int64_t row, int64_t rows,
                                  const UnitBackward *m, int64_t wide, int parts) {
    const S2AttentionBackward *a = b->a;
    float *out = m->rows + BQ * wide;
    load_rows(m->rows, wide, &a->dout, s, h, row, rows, BQ, 1);
    load_rows(out, wide, &a->out, s, h, row, rows, BQ, 1);
    for (int64_t i = 0; i < BQ; i++) {
        vf sum = { 0 };
        for (int64_t d = 0; d < wide; d += VW)
            sum += vf_load(m->rows + i * wide + d) * vf_load(out + i * wide + d);
        m->delta[i] = vf_sum(sum);
    }
    both_forms_of_parts(m, m->g_rows, m->gt, wide, parts);
    load_rows(m->rows, wide, &a->q, s, h, row, rows, BQ, 1);
    both_forms_of_parts(m, m->q_rows, m->qt, wide, parts);
}

/* ---- the task -------------------------------------------------------------------------------- */

/* As score_gradients(), of one key and vector i of the queries; zeros for a key behind the block. */
static inline __attribute__((always_inline)) void
key_gradients(const Block *block, float scale, const UnitBackward *m, int64_t key, int64_t i, vf *e, vf *d) {
    int64_t at = key * BQ + i * VW;
    *e = *d = (vf){ 0 };
    if (key >= block->keys) return;
    *e = vf_exp_score(scale * vf_load(m->p + at) - vf_load(m->lse + i * VW));
    *d = *e * (vf_load(m->ds + at) - vf_load(m->delta + i * VW));
    if (!any_hidden(block, key, i)) return;
    vi mask = hidden(block, key, i);
    *e = vf_select(mask, (vf){ 0 }, *e);
    *d = vf_select(mask, (vf){ 0 }, *d);
}

/* Those of a block, rounded to bfloat16, to p16, ds16 and ds_pairs. */
static void round_gradients(const Block *block, float scale, const UnitBackward *m) {
    for (int64_t j = 0; j < round_up(block->keys, UNIT_K); j += 2)
        for (int64_t i = 0; i < BQ / VW; i++) {
            vf e[2], d[2];
            UNROLLED
            for (int n = 0; n < 2; n++) key_gradients(block, scale, m, j + n, i, &e[n], &d[n]);
            halves p = round_two(e[0], e[1]), ds = round_two(d[0], d[1]), pairs = in_pairs(ds);
            int64_t at = j * BQ + i * VW;
            memcpy(m->p16 + at, &p, VW * 2);
            memcpy(m->p16 + at + BQ, (char *)&p + VW * 2, VW * 2);
            memcpy(m->ds16 + at, &ds, VW * 2);
            memcpy(m->ds16 + at + BQ, (char *)&ds + VW * 2, VW * 2);
            memcpy(m->ds_pairs + j * BQ + 2 * i * VW, &pairs, sizeof pairs);
        }
}

/* The same in parts. */
static void split_gradients(const Block *block, float scale, const UnitBackward *m, int parts) {
    int64_t padded = round_up(block->keys, UNIT_K);
    for (int64_t j = 0; j < padded; j++)
        for (int64_t i = 0; i < BQ / VW; i++) {
            vf e, d;
            key_gradients(block, scale, m, j, i, &e, &d);
            vf_store(m->p + j * BQ + i * VW, e);
            vf_store(m->ds + j * BQ + i * VW, d);
        }
    split_rows(m->p16, BK * BQ, parts, m->p, BQ, padded);
    split_rows(m->ds16, BK * BQ, parts, m->ds, BQ, padded);
    split_pairs(m->ds_pairs, BK * BQ, parts, m->ds, BQ, padded);
}

static void unit_backward_task(const Backward *b, const Task *task, float *memory, int parts) {
    const Segment *s = task->segment;
    int64_t wide = unit_width(b->p.D), key0, keys = keys_in_phase(b, task, &key0);
    int64_t padded = round_up(keys, UNIT_K), chunk = CHUNK * wide, queries = BQ * wide, block_of = BK * BQ;
    float scale = (float)b->a->scale;
    UnitBackward m;
    if (!keys) return;
    unit_backward_in(&m, memory, wide, parts);
    unit_load_chunk(b, task, key0, keys, &m, wide, parts);
    memset(m.dk, 0, (size_t)(padded * wide) * sizeof(float));
    memset(m.dv, 0, (size_t)(padded * wide) * sizeof(float));
    unit_begin();
    for (int64_t h = task->from; h < task->to; h++)
        for (int64_t row = task->first; row < task->last; row += BQ) {
            int64_t rows = min64(BQ, task->last - row);
            if (parts == 1) load_queries_of_bf16(b, s, h, row, rows, &m, wide);
            else load_queries_in_parts(b, s, h, row, rows, &m, wide, parts);
            for (int64_t i = 0; i < BQ; i++) m.lse[i] = i < rows ? finite_lse(b->a, s, row + i, h) : 0;
            UnitFactor qt = in_parts(words_of_16(m.qt, BQ), queries, parts),
                       gt = in_parts(words_of_16(m.gt, BQ), queries, parts),
                       q_rows = in_parts(words_of_16(m.q_rows, wide), queries, parts),
                       g_rows = in_parts(words_of_16(m.g_rows, wide), queries, parts),
                       p16 = in_parts(rows_of_16(m.p16, BQ), block_of, parts),
                       ds16 = in_parts(rows_of_16(m.ds16, BQ), block_of, parts),
                       ds_pairs = in_parts(words_of_16(m.ds_pairs, BQ), block_of, parts);
            for (int64_t key = 0; key < keys && key0 + key < row + rows; key += BK) {
                Block block = block_at(s, row, rows, key0, keys, key);
                int64_t n = round_up(block.keys, UNIT_K), offset = key * wide;
                UnitFactor k = in_parts(rows_of_16(m.k + offset, wide), chunk, parts),
                           v = in_parts(rows_of_16(m.v + offset, wide), chunk, parts),
                           kt = in_parts(rows_of_16(m.kt + key, CHUNK), chunk, parts);
                unit_product(m.p, BQ, k, qt, n, BQ, wide / UNIT_K, 0);
                unit_product(m.ds, BQ, v, gt, n, BQ, wide / UNIT_K, 0);
                if (parts == 1) round_gradients(&block, scale, &m);
                else split_gradients(&block, scale, &m, parts);
                unit_product(m.dv + offset, wide, p16, g_rows, n, wide, BQ / UNIT_K, 1);
                unit_product(m.dk + offset, wide, ds16, q_rows, n, wide, BQ / UNIT_K, 1);
                unit_product(m.dqt, BQ, kt, ds_pairs, wide, BQ, n / UNIT_K, key > 0);
            }
            transpose(m.rows, m.dqt, wide, BQ);
            add_queries(b, task, h, row, rows, m.rows, wide);
        }
    unit_end();
    add_keys(b, task, key0, keys, m.dk, m.dv, wide, scale);
}

/* The parts of the widest of the inputs. */
static inline int backward_parts(const S2AttentionBackward *a) {
    const Tensor *inputs[] = { &a->q, &a->k, &a->v, &a->out, &a->dout };
    int most = 0;
    for (int i = 0; i < 5; i++) most = (int)max64(most, parts_of_dtype(inputs[i]->dtype));
    return most;
}

/* Whether rows first .. first+n-1 of a head are finite. Reads them in pieces to m->rows. */
static int rows_are_finite(const UnitBackward *m, const Tensor *x, const Segment *s, int64_t head,
                           int64_t first, int64_t n, int64_t wide) {
    for (int64_t i = 0; i < n; i += BQ)
        if (!load_finite_rows(m->rows, wide, x, s, head, first + i, min64(BQ, n - i), BQ)) return 0;
    return 1;
}

/* Whether the unit can compute the task. Numbers in parts must be finite. */
static int unit_can(const Backward *b, const Task *task, float *memory, int parts) {
    const Segment *s = task->segment;
    int64_t n = task->last - task->first, key0, keys = keys_in_phase(b, task, &key0),
            wide = unit_width(b->p.D);
    UnitBackward m;
    unit_backward_in(&m, memory, wide, parts);
    if (parts == 1) return 1;
    for (int64_t h = task->from; h < task->to; h++)
        if (!rows_are_finite(&m, &b->a->q, s, h, task->first, n, wide) ||
            !rows_are_finite(&m, &b->a->dout, s, h, task->first, n, wide))
            return 0;
    return rows_are_finite(&m, &b->a->k, s, task->kv_head, key0, keys, wide) &&
           rows_are_finite(&m, &b->a->v, s, task->kv_head, key0, keys, wide);
}
#endif

/* What a backward task takes, in floats, whichever way it goes; and the task. */
static inline int64_t attention_backward_floats(const S2AttentionBackward *a) {
    int64_t D = a->q.shape[3], floats = attention_thread_scratch(round_up(D, VW)) / (int64_t)sizeof(float);
#if MATRIX_UNIT
    UnitBackward m;
    float none;
    int parts = backward_parts(a);
    if (parts < UNIT_PARTS) floats = max64(floats, unit_backward_in(&m, &none, unit_width(D), parts));
#endif
    return floats;
}
static inline void attention_backward_task(const Backward *b, const Task *task, float *memory) {
#if MATRIX_UNIT
    int parts = backward_parts(b->a);
    if (parts < UNIT_PARTS && unit_can(b, task, memory, parts)) {
        unit_backward_task(b, task, memory, parts);
        return;
    }
#endif
    backward_task(b, task, memory);
}

#endif
