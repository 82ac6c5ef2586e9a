/* s2_attention.c --- shifted sparse attention, forward and backward: which tasks run, and when. The rule is
 * in ops.h, the shift is index arithmetic (s2_attention.h), and products and scores of a block are in
 * s2_block.h. A task is in s2_forward.h and s2_backward.h, and for bfloat16 on a matrix unit in
 * s2_unit_forward.h and s2_unit_backward.h. Measurements: docs/tuning/s2_attention.md.
 *
 * Forward: tasks are independent of each other.
 *
 * Backward: a segment is cut into chunks of at most CHUNK rows. A task is a pair of chunks: queries of chunk
 * i and keys of chunk i - phase. Within a phase no two tasks share a row of dq, dk or dv, so they run side by
 * side. They add to float32 sums, phase after phase: to the outputs themselves, or to scratch if the outputs
 * are narrower. Plain heads come first, then shifted heads, which may share a KV head with plain ones. No sum
 * depends on the number of threads. */
#include "s2_unit_backward.h"
#include "s2_unit_forward.h"

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

static int backward_thread(int64_t index, void *context) {
    Backward *b = context;
    for (int64_t i; (i = atomic_fetch_add(&b->next, 1)) < b->w.count;)
        attention_backward_task(b, &b->w.tasks[i], b->memory + index * b->floats);
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

/* Sets dk or dv to zero: there is no query that sees the keys. */
static void clear(const Pattern *p, const Tensor *x) {
    for (int64_t i = 0; i < p->B * p->T * p->K; i++)
        memset(
            at(x, i / p->K / p->T * x->stride[0] + i / p->K % p->T * x->stride[1] + i % p->K * x->stride[2]),
            0, (size_t)(p->D * dtype_size(x->dtype)));
}

int CPU(s2_attention_backward)(const void *args, void *stream) {
    const S2AttentionBackward *a = args;
    (void)stream;
    Backward b = { .a = a };
    const Pattern *p = &b.p;
    if (make_pattern("s2_attention_backward", &b.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary,
                     a->shift))
        return free_work(p, &b.w), -1;
    if (!p->H) return clear(p, &a->dk), clear(p, &a->dv), free_work(p, &b.w), 0;
    if (make_work(p, backward_tasks, &b.w)) return free_work(p, &b.w), -1;
    int narrow = a->q.dtype != F32, status = 0;
    int64_t threads = min64(get_threads(), b.w.count), pairs = p->B * p->K;
    int64_t at_once = narrow ? attention_heads_at_once(p->B, p->T, p->H, p->K, p->D) : pairs;
    b.floats = attention_backward_floats(a);
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
    return (Scratch){ { get_threads() * attention_backward_floats(a) * (int64_t)sizeof(float), sums } };
}
