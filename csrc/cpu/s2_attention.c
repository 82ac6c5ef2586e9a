/* s2_attention.c --- shifted sparse attention, forward and backward. The rule is in ops.h, the shift is index
 * arithmetic (s2_attention.h), and products and scores of a block are in s2_block.h. Measurements:
 * docs/tuning/s2_attention.md.
 *
 * Forward: tasks are independent of each other (s2_forward.h; s2_unit.h for bfloat16 on a matrix unit).
 *
 * Backward: a segment is cut into chunks of at most CHUNK rows. A task is a pair of chunks: queries of chunk
 * i and keys of chunk i - phase. Within a phase no two tasks share a row of dq, dk or dv, so they run side by
 * side. They add to float32 sums, phase after phase: to the outputs themselves, or to scratch if the outputs
 * are narrower. Plain heads come first, then shifted heads, which may share a KV head with plain ones. No sum
 * depends on the number of threads. */
#include "s2_attention.h"
#include "s2_unit.h"

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
        attention_task(f->a, &f->w.tasks[i], f->memory + index * f->floats);
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
    f.floats = attention_floats(a);
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
    transpose(m->qt, m->q, BQ, pitch);
    transpose(m->gt, m->g, BQ, pitch);
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

/* Whether dk and dv of the task's keys have sums already. */
static int adds_to_keys(const Backward *b, const Task *task) {
    int64_t plain_from, plain_to;
    heads_of(&b->p, task->kv_head, 0, &plain_from, &plain_to);
    return b->phase > 0 || (b->shifted && plain_from < plain_to);
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
    int add = adds_to_keys(b, task);
    for (int64_t j = 0; j < keys; j++) {
        add_row(sum_at(b, &a->dk, task, key0 + j, task->kv_head, each), m.dk + j * pitch, 1, D, add);
        add_row(sum_at(b, &a->dv, task, key0 + j, task->kv_head, each + 1), m.dv + j * pitch, 1, D, add);
    }
}

#if MATRIX_UNIT
/* ---- backward on the matrix unit: bfloat16 ------------------------------------------------------ */

/* A thread's memory. Keys and values have CHUNK rows of `wide` elements, kt is k transposed; q_rows and
 * g_rows are BQ rows in pairs of rows, qt and gt those rows transposed, in pairs of elements; dqt is dq
 * transposed. p16 and ds16 are [BK,BQ] in bfloat16, ds_pairs ds in pairs of keys. */
typedef struct {
    uint16_t *k, *v, *kt, *q_rows, *g_rows, *p16, *ds16, *ds_pairs;
    float *dk, *dv, *qt, *gt, *dqt, *rows, *p, *ds, *lse, *delta;
} UnitBuffers;

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
        m->lse[i] = i < rows ? *lse_at(&a->lse, s, row + i, h) : 0;
        if (m->lse[i] == -INFINITY) m->lse[i] = 0; /* all scores are -inf: the weights are exp(-inf - 0) */
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
                e[n] = vf_exp_below(scale * vf_load(m->p + at) - vf_load(m->lse + i * VW));
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
    int64_t D = b->p.D, wide = unit_width(D), each = b->p.H / b->p.K, pair = s->b * b->p.K + task->kv_head;
    int64_t key0 = task->first - b->phase * chunk_of(s), keys = min64(chunk_of(s), task->last - key0);
    float scale = (float)a->scale;
    if (key0 < 0 || s->shifted != b->shifted || pair < b->begin || pair >= b->end) return;
    int64_t padded = round_up(keys, UNIT_K);
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
                Block block = { s, row, rows, key0 + key,
                                min64(min64(BK, keys - key), row + rows - key0 - key) };
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
            for (int64_t i = 0; i < rows; i++)
                add_row(sum_at(b, &a->dq, task, row + i, h, h - task->kv_head * each), m.rows + i * wide,
                        scale, D, b->phase > 0);
        }
    unit_end();
    int add = adds_to_keys(b, task);
    for (int64_t j = 0; j < keys; j++) {
        add_row(sum_at(b, &a->dk, task, key0 + j, task->kv_head, each), m.dk + j * wide, scale, D, add);
        add_row(sum_at(b, &a->dv, task, key0 + j, task->kv_head, each + 1), m.dv + j * wide, 1, D, add);
    }
}

static int in_bfloat16(const S2AttentionBackward *a) {
    return a->q.dtype == BF16 && a->k.dtype == BF16 && a->v.dtype == BF16 && a->out.dtype == BF16 &&
           a->dout.dtype == BF16;
}
#endif

/* Elements of a row in memory, whichever way a task goes. */
static int64_t widest(int64_t D) { return round_up(D, MATRIX_UNIT ? 2 * VW : VW); }

static int backward_thread(int64_t index, void *context) {
    Backward *b = context;
    for (int64_t i; (i = atomic_fetch_add(&b->next, 1)) < b->w.count;) {
        float *memory = b->memory + index * b->floats;
#if MATRIX_UNIT
        if (in_bfloat16(b->a)) unit_backward_task(b, &b->w.tasks[i], memory);
        else
#endif
            backward_task(b, &b->w.tasks[i], memory);
    }
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
    b.floats = attention_thread_scratch(widest(b.p.D)) / (int64_t)sizeof(float);
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
    return (Scratch){ { get_threads() * attention_floats(a) * (int64_t)sizeof(float) } };
}

Scratch CPU(s2_attention_backward_scratch)(const void *args) {
    const S2AttentionBackward *a = args;
    int64_t B = a->q.shape[0], T = a->q.shape[1], H = a->q.shape[2], K = a->k.shape[2], D = a->q.shape[3];
    if (H == 0) return (Scratch){ 0 };
    int64_t sums =
        a->q.dtype == F32 ? 0 : attention_heads_at_once(B, T, H, K, D) * attention_head_sums(T, H, K, D);
    return (Scratch){ { get_threads() * attention_thread_scratch(widest(D)), sums } };
}
