/* s2_backward.h --- a task of the backward pass of attention: a chunk of a segment's queries, for all query
 * heads of one KV head, against the chunk of keys that lies `phase` chunks before it. s2_attention.c says how
 * tasks follow each other. */
#ifndef LONGLORA_S2_BACKWARD_H
#define LONGLORA_S2_BACKWARD_H

#include "s2_attention.h"

#include <stdatomic.h>

typedef struct {
    const S2AttentionBackward *a;
    Pattern p;
    Work w;
    /* What the threads work on now: */
    int shifted;        /* shifted or plain heads, */
    int64_t phase;      /* chunks of keys at this distance from the chunks of queries, */
    int64_t begin, end; /* and the pairs of batch and KV head, numbered b K + KV head */
    atomic_llong next;  /* the first task that no thread has taken */
    float *sums;        /* [pairs, H/K + 2, T, D]: dq, dk, dv; NULL if the outputs are float32 */
    float *memory;      /* `floats` for each thread */
    int64_t floats;
} Backward;

/* Where a row of dq, dk or dv is summed. slot is the head's number within its KV head for dq, H/K for dk and
 * H/K + 1 for dv. */
static inline float *sum_at(const Backward *b, const Tensor *x, const Task *task, int64_t row, int64_t head,
                            int64_t slot) {
    const Segment *s = task->segment;
    if (!b->sums) return row_at(x, s, row, head);
    int64_t pair = s->b * b->p.K + task->kv_head - b->begin;
    return b->sums + ((pair * (b->p.H / b->p.K + 2) + slot) * b->p.T + token(s, row)) * b->p.D;
}

static inline void add_row(float *to, const float *x, float scale, int64_t D, int add) {
    if (add)
        for (int64_t d = 0; d < D; d++) to[d] += scale * x[d];
    else
        for (int64_t d = 0; d < D; d++) to[d] = scale * x[d];
}

/* Adds dq of `rows` queries of head h, `pitch` floats each, to the sums. */
static void add_queries(const Backward *b, const Task *task, int64_t h, int64_t row, int64_t rows,
                        const float *dq, int64_t pitch) {
    int64_t slot = h - task->kv_head * (b->p.H / b->p.K);
    for (int64_t i = 0; i < rows; i++)
        add_row(sum_at(b, &b->a->dq, task, row + i, h, slot), dq + i * pitch, (float)b->a->scale, b->p.D,
                b->phase > 0);
}

/* Adds dk, times `scale`, and dv to the sums of the keys from key0 on. */
static void add_keys(const Backward *b, const Task *task, int64_t key0, int64_t keys, const float *dk,
                     const float *dv, int64_t pitch, float scale) {
    int64_t plain_from, plain_to, each = b->p.H / b->p.K, head = task->kv_head;
    heads_of(&b->p, head, 0, &plain_from, &plain_to);
    int add = b->phase > 0 || (b->shifted && plain_from < plain_to); /* the keys have sums already */
    for (int64_t j = 0; j < keys; j++) {
        add_row(sum_at(b, &b->a->dk, task, key0 + j, head, each), dk + j * pitch, scale, b->p.D, add);
        add_row(sum_at(b, &b->a->dv, task, key0 + j, head, each + 1), dv + j * pitch, 1, b->p.D, add);
    }
}

/* Returns how many keys the task has in this phase, 0 if it has no part in it. key0 is the first. */
static int64_t keys_in_phase(const Backward *b, const Task *task, int64_t *key0) {
    const Segment *s = task->segment;
    int64_t pair = s->b * b->p.K + task->kv_head;
    *key0 = task->first - b->phase * chunk_of(s);
    if (*key0 < 0 || s->shifted != b->shifted || pair < b->begin || pair >= b->end) return 0;
    return min64(chunk_of(s), task->last - *key0);
}

/* Query rows from `row` on and the block of keys that begins `key` keys behind key0, without the keys behind
 * the last query. */
static inline Block block_at(const Segment *s, int64_t row, int64_t rows, int64_t key0, int64_t keys,
                             int64_t key) {
    return (Block){ s, row, rows, key0 + key, min64(min64(BK, keys - key), row + rows - key0 - key) };
}

/* lse of query `row` for exp(score - lse). It is -inf where all scores are: the weights are exp(-inf - 0). */
static inline float finite_lse(const S2AttentionBackward *a, const Segment *s, int64_t row, int64_t h) {
    float lse = *lse_at(&a->lse, s, row, h);
    return lse == -INFINITY ? 0 : lse;
}

/* ---- the task on vectors ------------------------------------------------------------------------ */

/* A thread's memory. Rows have `pitch` floats; p and ds are [BK,BQ], lse and delta [BQ]. */
typedef struct {
    float *k, *v, *dk, *dv;      /* CHUNK rows each */
    float *q, *g, *dq, *qt, *gt; /* BQ rows each; g is dout, and qt and gt are q and g transposed */
    float *p, *ds, *lse, *delta; /* weights, gradients of the scores; delta is the sum of out dout */
} Buffers;

static Buffers buffers_in(float *memory, int64_t pitch) {
    Buffers m;
    m.k = memory, m.v = m.k + CHUNK * pitch, m.dk = m.v + CHUNK * pitch, m.dv = m.dk + CHUNK * pitch;
    m.q = m.dv + CHUNK * pitch, m.g = m.q + BQ * pitch, m.dq = m.g + BQ * pitch;
    m.qt = m.dq + BQ * pitch, m.gt = m.qt + BQ * pitch;
    m.p = m.gt + BQ * pitch, m.ds = m.p + BK * BQ, m.lse = m.ds + BK * BQ, m.delta = m.lse + BQ;
    return m;
}

/* `rows` queries of head h from `row` on: fills q, g, qt, gt, lse and delta. */
static void load_queries(const Backward *b, const Segment *s, int64_t h, int64_t row, int64_t rows,
                         const Buffers *m) {
    const S2AttentionBackward *a = b->a;
    int64_t pitch = round_up(b->p.D, VW);
    load_rows(m->g, pitch, &a->dout, s, h, row, rows, BQ, 1);
    load_rows(m->q, pitch, &a->out, s, h, row, rows, BQ, 1);
    for (int64_t i = 0; i < BQ; i++) {
        vf sum = { 0 };
        for (int64_t d = 0; d < pitch; d += VW)
            sum += vf_load(m->q + i * pitch + d) * vf_load(m->g + i * pitch + d);
        m->delta[i] = vf_sum(sum);
        m->lse[i] = i < rows ? finite_lse(a, s, row + i, h) : 0;
    }
    load_rows(m->q, pitch, &a->q, s, h, row, rows, BQ, (float)a->scale);
    transpose(m->qt, m->q, BQ, pitch);
    transpose(m->gt, m->g, BQ, pitch);
}

/* p holds scores and ds the products dout v. Turns them into p = exp(p - lse) and ds = p (ds - delta), which
 * are 0 where a key is hidden. */
static void score_gradients(const Block *block, const Buffers *m) {
    for (int64_t j = 0; j < block->keys; j++) {
        int any = any_hidden(block, j, 0);
        for (int64_t i = first_vector(block, j); i < BQ / VW; i++) {
            float *p = m->p + j * BQ + i * VW, *ds = m->ds + j * BQ + i * VW;
            vf e = vf_exp_score(vf_load(p) - vf_load(m->lse + i * VW)),
               d = e * (vf_load(ds) - vf_load(m->delta + i * VW));
            if (any) {
                vi mask = hidden(block, j, i);
                e = vf_select(mask, (vf){ 0 }, e);
                d = vf_select(mask, (vf){ 0 }, d);
            }
            vf_store(p, e);
            vf_store(ds, d);
        }
    }
}

static void backward_task(const Backward *b, const Task *task, float *memory) {
    const S2AttentionBackward *a = b->a;
    const Segment *s = task->segment;
    int64_t D = b->p.D, pitch = round_up(D, VW), vecs = pitch / VW;
    int64_t key0, keys = keys_in_phase(b, task, &key0);
    if (!keys) return;
    const Buffers m = buffers_in(memory, pitch);
    load_rows(m.k, pitch, &a->k, s, task->kv_head, key0, keys, keys, 1);
    load_rows(m.v, pitch, &a->v, s, task->kv_head, key0, keys, keys, 1);
    memset(m.dk, 0, (size_t)(keys * pitch) * sizeof(float));
    memset(m.dv, 0, (size_t)(keys * pitch) * sizeof(float));
    for (int64_t h = task->from; h < task->to; h++)
        for (int64_t row = task->first; row < task->last; row += BQ) {
            int64_t rows = min64(BQ, task->last - row);
            load_queries(b, s, h, row, rows, &m);
            for (int64_t key = 0; key < keys && key0 + key < row + rows; key += BK) {
                Block block = block_at(s, row, rows, key0, keys, key);
                int64_t offset = key * pitch, below = block.key - row;
                scores(m.p, &block, m.k + offset, pitch, m.qt, D);
                scores(m.ds, &block, m.v + offset, pitch, m.gt, D);
                score_gradients(&block, &m);
                multiply(NORMAL, m.dv + offset, pitch, m.p, BQ, m.g, pitch, block.keys, vecs, rows, DEPTH, 1,
                         below, FAR);
                multiply(NORMAL, m.dk + offset, pitch, m.ds, BQ, m.q, pitch, block.keys, vecs, rows, DEPTH, 1,
                         below, FAR);
                multiply(TRANSPOSED, m.dq, pitch, m.ds, BQ, m.k + offset, pitch, rows, vecs, block.keys,
                         DEPTH, key > 0, -FAR, -below);
            }
            add_queries(b, task, h, row, rows, m.dq, pitch);
        }
    add_keys(b, task, key0, keys, m.dk, m.dv, pitch, 1); /* the queries of dk were scaled */
}

#endif
