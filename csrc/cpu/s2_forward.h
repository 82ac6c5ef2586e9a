/* s2_forward.h --- a task of the forward pass of attention: a chunk of a segment's query rows, for query
 * heads of one KV head. It walks over the keys in blocks of BK, with an online softmax. */
#ifndef LONGLORA_S2_FORWARD_H
#define LONGLORA_S2_FORWARD_H

#include "s2_block.h"

/* A running maximum grows only if a score exceeds it by more than this. So the sums of a row are seldom
 * scaled.
 */
#define SLACK 8.0f

/* Turns products [keys,BQ] of queries and keys into exp(scale product - maximum) in place, 0 where hidden,
 * and updates the running maximum and sum of each row. shrink is the factor for what the row has summed
 * before. Returns whether it differs from 1 in any row. */
static inline __attribute__((always_inline)) int softmax(float *p, const Block *b, float scale,
                                                         float *maximum, float *sum, float *shrink) {
    int shrinks = 0;
    for (int64_t v = 0; v * VW < b->rows; v += NV) {
        float *column = p + v * VW;
        int64_t keys = keys_of(b, v, NV),
                first = b->segment->low > b->key ? 0 : max64(0, b->row + v * VW + 1 - b->key);
        for (int64_t j = first; j < keys; j++)
            if (any_hidden(b, j, v))
                for (int i = 0; i < NV; i++) {
                    float *x = column + j * BQ + i * VW;
                    vf_store(x, vf_select(hidden(b, j, v + i), vf_set1(-INFINITY), vf_load(x)));
                }
        vf old[NV], top[NV], total[NV];
        for (int i = 0; i < NV; i++) {
            top[i] = old[i] = vf_load(maximum + (v + i) * VW);
            total[i] = (vf){ 0 };
        }
        for (int64_t j = 0; j < keys; j++)
            for (int i = 0; i < NV; i++) top[i] = vf_max(top[i], scale * vf_load(column + j * BQ + i * VW));
        for (int i = 0; i < NV; i++) {
            vi grown = top[i] > old[i] + SLACK;
            top[i] = vf_select(grown, top[i], old[i]);
            shrinks |= vf_any_from(vf_select(grown, vf_set1(1), (vf){ 0 }), 1);
            vf_store(maximum + (v + i) * VW, top[i]);
            /* A row that has seen no key: exp(-inf - 0) is 0, exp(-inf + inf) is not. */
            top[i] = vf_select(top[i] == -INFINITY, (vf){ 0 }, top[i]);
        }
        for (int64_t j = 0; j < keys; j++)
            for (int i = 0; i < NV; i++) {
                float *x = column + j * BQ + i * VW;
                vf e = vf_exp_score(scale * vf_load(x) - top[i]);
                vf_store(x, e);
                total[i] += e;
            }
        for (int i = 0; i < NV; i++) {
            vf less = vf_exp_score(old[i] - top[i]);
            vf_store(shrink + (v + i) * VW, less);
            vf_store(sum + (v + i) * VW, vf_load(sum + (v + i) * VW) * less + total[i]);
        }
    }
    return shrinks;
}

/* The sums of `rows` rows, before they have seen a key: `out` has `floats` floats for all of them. */
static inline void begin_rows(float *out, int64_t floats, float *maximum, float *sum, int64_t rows) {
    memset(out, 0, (size_t)floats * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        maximum[i] = -INFINITY;
        sum[i] = 0;
    }
}

/* Divides the weighted values x of a row, `pitch` floats, by the sum of the weights, and writes them. */
static inline void finish_row(const S2AttentionForward *a, const Segment *s, int64_t row, int64_t head,
                              float *x, int64_t pitch, float maximum, float sum) {
    float scale = sum == 0 ? 0 : 1.0f / sum;
    for (int64_t d = 0; d < pitch; d += VW) vf_store(x + d, vf_load(x + d) * scale);
    store_row(row_at(&a->out, s, row, head), a->out.dtype, x, a->out.shape[3]);
    if (given(&a->lse)) *lse_at(&a->lse, s, row, head) = maximum + logf(sum);
}

/* Floats that a task of `rows` query rows takes, in rows of `pitch`. */
static inline int64_t forward_floats(int64_t pitch, int64_t rows) {
    return round_up(2 * (rows + BK) * pitch + 2 * rows + BQ + BK * BQ, VW);
}

static void forward_task(const S2AttentionForward *a, const Task *task, float *memory) {
    const Segment *s = task->segment;
    int64_t D = a->q.shape[3], pitch = round_up(D, VW), n = task->last - task->first, size = round_up(n, BQ);
    int64_t all = (task->to - task->from) * size;
    float *qt = memory, *out = qt + all * pitch, *maximum = out + all * pitch, *sum = maximum + all,
          *shrink = sum + all;
    float *k = shrink + BQ, *v = k + BK * pitch, *p = v + BK * pitch;
    for (int64_t i = 0; i < all; i += BQ) {
        int64_t first = i % size;
        load_rows(out, pitch, &a->q, s, task->from + i / size, task->first + first, min64(BQ, n - first), BQ,
                  (float)a->scale);
        transpose(qt + i * pitch, out, BQ, pitch);
    }
    begin_rows(out, all * pitch, maximum, sum, all);
    for (int64_t key = 0; key < task->last; key += BK) {
        int64_t keys = min64(BK, task->last - key);
        load_rows(k, pitch, &a->k, s, task->kv_head, key, keys, keys, 1);
        load_rows(v, pitch, &a->v, s, task->kv_head, key, keys, keys, 1);
        for (int64_t i = 0; i < all; i += BQ) {
            int64_t row = task->first + i % size, rows = min64(BQ, task->last - row);
            Block b = { s, row, rows, key, min64(keys, row + rows - key) };
            if (key + BK < task->last) { /* a share of the next block, so that all of it has come in time */
                int64_t from = key + BK + i * BK / all, to = key + BK + (i + BQ) * BK / all;
                fetch_rows(&a->k, s, task->kv_head, from, to);
                fetch_rows(&a->v, s, task->kv_head, from, to);
            }
            if (b.keys <= 0) continue;
            scores(p, &b, k, pitch, qt + i * pitch, D);
            int shrinks = softmax(p, &b, 1, maximum + i, sum + i, shrink);
            for (int64_t r = 0; shrinks && r < rows; r++)
                if (shrink[r] != 1.0f) {
                    float *x = out + (i + r) * pitch;
                    for (int64_t d = 0; d < pitch; d += VW) vf_store(x + d, vf_load(x + d) * shrink[r]);
                }
            multiply(TRANSPOSED, out + i * pitch, pitch, p, BQ, v, pitch, rows, pitch / VW, b.keys, DEPTH, 1,
                     -FAR, row - key);
        }
    }
    for (int64_t i = 0; i < all; i++) {
        int64_t row = task->first + i % size, head = task->from + i / size;
        if (row >= task->last) continue;
        fetch(row_at(&a->out, s, row + FETCH, head), D * dtype_size(a->out.dtype));
        finish_row(a, s, row, head, out + i * pitch, pitch, maximum[i], sum[i]);
    }
}

#endif
