/* s2_attention.c --- shifted sparse attention, forward and backward. The rule is in ops.h, the shift is index
 * arithmetic (s2_attention.h), and products and scores of a block are in s2_block.h. Measurements:
 * docs/tuning/s2_attention.md.
 *
 * Forward: tasks are independent of each other (s2_forward.h).
 *
 * Backward: a segment is cut into chunks of at most CHUNK rows. A task is a pair of chunks: queries of chunk
 * i and keys of chunk i - phase. Within a phase no two tasks share a row of dq, dk or dv, so they run side by
 * side. They add to float32 sums, phase after phase: to the outputs themselves, or to scratch if the outputs
 * are narrower. Plain heads come first, then shifted heads, which may share a KV head with plain ones. No sum
 * depends on the number of threads. */
#include "s2_attention.h"
#include "s2_forward.h"

#include <stdatomic.h>

/* ---- forward --------------------------------------------------------------------------------- */

typedef struct {
    const S2AttentionForward *a;
    Pattern p;
    Work w;
    atomic_llong next; /* the first task that no thread has taken */
    float *memory;     /* `floats` for each thread */
    int64_t floats;
} Forward;

static int forward_thread(int64_t index, void *context) {
    Forward *f = context;
    for (int64_t i; (i = atomic_fetch_add(&f->next, 1)) < f->w.count;)
        forward_task(f->a, &f->w.tasks[i], f->memory + index * f->floats);
    return 0;
}

int CPU(s2_attention_forward)(const void *args, void *stream) {
    const S2AttentionForward *a = args;
    (void)stream;
    Forward f = { .a = a };
    if (make_pattern("s2_attention_forward", &f.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary,
                     a->shift) ||
        make_work(&f.p, forward_tasks, &f.w))
        return free_work(&f.p, &f.w), -1;
    int64_t threads = min64(get_threads(), f.w.count);
    f.floats = forward_floats(round_up(f.p.D, VW));
    f.memory = scratch(threads * f.floats * (int64_t)sizeof(float));
    int status =
        f.memory ? parallel_for(threads, work_of(&f.w, f.p.D) / max64(threads, 1), forward_thread, &f) : -1;
    scratch_free(f.memory);
    free_work(&f.p, &f.w);
    return status;
}

/* ---- backward -------------------------------------------------------------------------------- */

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
    int64_t pitch, floats;
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
    int64_t pitch = b->pitch;
    load_rows(m->g, pitch, &a->dout, s, h, row, rows, BQ, 1);
    load_rows(m->q, pitch, &a->out, s, h, row, rows, BQ, 1);
    for (int64_t i = 0; i < BQ; i++) {
        vf sum = { 0 };
        for (int64_t d = 0; d < pitch; d += VW)
            sum += vf_load(m->q + i * pitch + d) * vf_load(m->g + i * pitch + d);
        m->delta[i] = vf_sum(sum);
        m->lse[i] = i < rows ? *lse_at(&a->lse, s, row + i, h) : 0;
        if (m->lse[i] == -INFINITY) m->lse[i] = 0; /* all scores are -inf: the weights are exp(-inf - 0) */
    }
    load_rows(m->q, pitch, &a->q, s, h, row, rows, BQ, (float)a->scale);
    transpose(m->qt, m->q, pitch);
    transpose(m->gt, m->g, pitch);
}

/* From scores in p and products dout v in ds: p = exp(p - lse), ds = p (ds - delta), both 0 where hidden. */
static void score_gradients(const Block *block, const Buffers *m) {
    for (int64_t j = 0; j < block->keys; j++) {
        int any = any_hidden(block, j, 0);
        for (int64_t i = first_vector(block, j); i < BQ / VW; i++) {
            float *p = m->p + j * BQ + i * VW, *ds = m->ds + j * BQ + i * VW;
            vf e = vf_exp_below(vf_load(p) - vf_load(m->lse + i * VW)),
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
    int64_t D = b->p.D, pitch = b->pitch, vecs = pitch / VW, each = b->p.H / b->p.K,
            pair = s->b * b->p.K + task->kv_head;
    int64_t key0 = task->first - b->phase * chunk_of(s), keys = min64(chunk_of(s), task->last - key0);
    if (key0 < 0 || s->shifted != b->shifted || pair < b->begin || pair >= b->end) return;
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
                Block block = { s, row, rows, key0 + key,
                                min64(min64(BK, keys - key), row + rows - key0 - key) };
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
            for (int64_t i = 0; i < rows; i++)
                add_row(sum_at(b, &a->dq, task, row + i, h, h - task->kv_head * each), m.dq + i * pitch,
                        (float)a->scale, D, b->phase > 0);
        }
    int64_t plain_from, plain_to;
    heads_of(&b->p, task->kv_head, 0, &plain_from, &plain_to);
    int add = b->phase > 0 || (b->shifted && plain_from < plain_to);
    for (int64_t j = 0; j < keys; j++) {
        add_row(sum_at(b, &a->dk, task, key0 + j, task->kv_head, each), m.dk + j * pitch, 1, D, add);
        add_row(sum_at(b, &a->dv, task, key0 + j, task->kv_head, each + 1), m.dv + j * pitch, 1, D, add);
    }
}

static int backward_thread(int64_t index, void *context) {
    Backward *b = context;
    for (int64_t i; (i = atomic_fetch_add(&b->next, 1)) < b->w.count;)
        backward_task(b, &b->w.tasks[i], b->memory + index * b->floats);
    return 0;
}

/* Rounds the sums of one slot of one pair into the outputs. */
static int store_sums(int64_t index, void *context) {
    const Backward *b = context;
    int64_t each = b->p.H / b->p.K, slot = index % (each + 2), pair = b->begin + index / (each + 2),
            kv_head = pair % b->p.K;
    const Tensor *x = slot < each ? &b->a->dq : slot == each ? &b->a->dk : &b->a->dv;
    int64_t head = slot < each ? kv_head * each + slot : kv_head,
            start = pair / b->p.K * x->stride[0] + head * x->stride[2];
    for (int64_t t = 0; t < b->p.T; t++)
        store_row(at(x, start + t * x->stride[1]), x->dtype, b->sums + (index * b->p.T + t) * b->p.D, b->p.D);
    return 0;
}

/* All phases of all heads of the pairs begin .. end-1. */
static int backward_pairs(Backward *b, int64_t threads) {
    int64_t phases[2] = { 0, 0 }, cost = work_of(&b->w, b->p.D) / max64(threads, 1);
    for (int64_t i = 0; i < b->w.segment_count; i++) {
        const Segment *s = &b->w.segments[i];
        phases[s->shifted] = max64(phases[s->shifted], (rows_of(s) + chunk_of(s) - 1) / chunk_of(s));
    }
    for (b->shifted = 0; b->shifted < 2; b->shifted++)
        for (b->phase = 0; b->phase < phases[b->shifted]; b->phase++) {
            b->next = 0;
            if (parallel_for(threads, cost, backward_thread, b)) return -1;
        }
    return b->sums ? parallel_for((b->end - b->begin) * (b->p.H / b->p.K + 2), b->p.T * (b->p.D / 4 + 1),
                                  store_sums, b)
                   : 0;
}

int CPU(s2_attention_backward)(const void *args, void *stream) {
    const S2AttentionBackward *a = args;
    (void)stream;
    Backward b = { .a = a };
    const Pattern *p = &b.p;
    if (make_pattern("s2_attention_backward", &b.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary,
                     a->shift))
        return free_work(p, &b.w), -1;
    for (int64_t i = 0; i < 2 && !p->H; i++) { /* no query sees these keys */
        const Tensor *x = i ? &a->dv : &a->dk;
        for (int64_t j = 0; j < p->B * p->T * p->K; j++)
            memset(at(x, j / p->K / p->T * x->stride[0] + j / p->K % p->T * x->stride[1] +
                             j % p->K * x->stride[2]),
                   0, (size_t)(p->D * dtype_size(x->dtype)));
    }
    if (!p->H) return free_work(p, &b.w), 0;
    if (make_work(p, backward_tasks, &b.w)) return free_work(p, &b.w), -1;
    int narrow = a->q.dtype != F32, status = 0;
    int64_t threads = min64(get_threads(), b.w.count), pairs = p->B * p->K;
    int64_t at_once = narrow ? attention_heads_at_once(p->B, p->T, p->H, p->K, p->D) : pairs;
    b.pitch = round_up(p->D, VW);
    b.floats = attention_thread_scratch(b.pitch) / (int64_t)sizeof(float);
    b.memory = scratch(threads * b.floats * (int64_t)sizeof(float));
    if (narrow) b.sums = scratch(at_once * attention_head_sums(p->T, p->H, p->K, p->D));
    if (!b.memory || (narrow && !b.sums)) status = -1;
    for (; b.begin < pairs && !status; b.begin = b.end) {
        b.end = min64(pairs, b.begin + at_once);
        status = backward_pairs(&b, threads);
    }
    scratch_free(b.sums);
    scratch_free(b.memory);
    free_work(p, &b.w);
    return status;
}

/* ---- scratch --------------------------------------------------------------------------------- */

/* The blocks of all threads, and the sums; not the lists of segments and tasks, which are small. */
Scratch CPU(s2_attention_forward_scratch)(const void *args) {
    const S2AttentionForward *a = args;
    int64_t floats = forward_floats(round_up(a->q.shape[3], VW));
    return (Scratch){ { get_threads() * floats * (int64_t)sizeof(float) } };
}

Scratch CPU(s2_attention_backward_scratch)(const void *args) {
    const S2AttentionBackward *a = args;
    int64_t B = a->q.shape[0], T = a->q.shape[1], H = a->q.shape[2], K = a->k.shape[2], D = a->q.shape[3];
    if (H == 0) return (Scratch){ 0 };
    int64_t sums =
        a->q.dtype == F32 ? 0 : attention_heads_at_once(B, T, H, K, D) * attention_head_sums(T, H, K, D);
    return (Scratch){ { get_threads() * attention_thread_scratch(round_up(D, VW)), sums } };
}
