/* s2_attention.h --- which rows of shifted sparse attention work together: patterns, and their segments and
 * tasks. Index arithmetic alone; the rule is in ops.h.
 *
 * Every pattern is a list of segments. With wrap and swap, one segment of each document has two runs of
 * tokens, one after the other: Z F for wrap and F Z for swap, where F is the first and Z the last segment of
 * a shifted head. So only the diagonal needs a mask, and dense attention is one long segment. With an odd G,
 * Z has h + 1 tokens, and its first token and F do not see each other: `low` of a segment says so. */
#ifndef LONGLORA_S2_ATTENTION_H
#define LONGLORA_S2_ATTENTION_H

#include "s2_block.h"

/* ---- patterns -------------------------------------------------------------------------------- */

typedef struct {
    int64_t G;
    int boundary, shift;
    int64_t B, T, H, K, D;
    int32_t
        *starts; /* of the documents, and T: the caller's cu_seqlens may change. NULL without cu_seqlens */
    int64_t documents;
} Pattern;

/* The query heads first .. last-1 of KV head k that are shifted, or those that are not. */
static void heads_of(const Pattern *p, int64_t k, int shifted, int64_t *first, int64_t *last) {
    int64_t each = p->H / p->K, from = k * each, to = from + each;
    int64_t first_shifted = p->shift == HALF ? p->H / 2 : p->shift == NONE ? p->H : 0;
    first_shifted = min64(max64(first_shifted, from), to);
    *first = shifted ? first_shifted : from;
    *last = shifted ? to : first_shifted;
}

/* Returns -1 after fail() if there are no such documents, or the boundary does not allow them. */
static int check_documents(const char *op, const Pattern *p) {
    const int32_t *starts = p->starts;
    if (starts[0] != 0 || starts[p->documents] != p->T)
        return fail("%s: cu_seqlens should begin with 0 and end with T=%lld", op, (long long)p->T);
    for (int64_t i = 0; i < p->documents; i++) {
        int64_t L = (int64_t)starts[i + 1] - starts[i];
        if (L < 0)
            return fail("%s: cu_seqlens should not decrease, got %d after %d at index %lld", op,
                        starts[i + 1], starts[i], (long long)i + 1);
        if (p->boundary != SPLIT && p->shift != NONE && L % p->G)
            return fail("%s: boundary %s needs document lengths that are a multiple of group_size=%lld, "
                        "got %lld",
                        op, p->boundary == WRAP ? "wrap" : "swap", (long long)p->G, (long long)L);
    }
    return 0;
}

/* Freed by free_work(). Returns -1 after fail() if cu_seqlens does not describe documents that the boundary
 * allows, or if there is no memory. */
static int make_pattern(const char *op, Pattern *p, const Tensor *q, const Tensor *k,
                        const Tensor *cu_seqlens, double group_size, double boundary, double shift) {
    *p = (Pattern){ (int64_t)group_size, (int)boundary, (int)shift,  q->shape[0], q->shape[1],
                    q->shape[2],         k->shape[2],   q->shape[3], NULL,        0 };
    if (!given(cu_seqlens)) return 0;
    p->documents = cu_seqlens->shape[0] - 1;
    p->starts = scratch((p->documents + 1) * (int64_t)sizeof *p->starts);
    for (int64_t i = 0; p->starts && i <= p->documents; i++) p->starts[i] = index_at(cu_seqlens, i);
    return p->starts ? check_documents(op, p) : -1;
}

/* Appends the segments of a document of L tokens that begins at `origin` to list, unless that is NULL.
 * Returns how many segments there are. */
static int64_t document_segments(const Pattern *p, Segment *list, int64_t b, int64_t origin, int64_t L) {
    int64_t count = 0, G = min64(p->G, L ? L : 1), half = p->G / 2;
    if (p->shift != ALL && L)
        for (int64_t at = 0; at < L; at += G, count++)
            if (list) list[count] = (Segment){ b, { origin + at, 0 }, { min64(G, L - at), 0 }, 0, 0, 0, 0 };
    if (p->shift == NONE || !L) return count;
    int joined = p->boundary != SPLIT && half;
    int64_t first = min64(half, L), tail = joined ? L - p->G + half : L; /* where the last segment begins */
    if (first && !joined) {
        if (list) list[count] = (Segment){ b, { origin, 0 }, { first, 0 }, 0, 0, 0, 1 };
        count++;
    }
    for (int64_t at = first; at < tail; at += p->G, count++)
        if (list) list[count] = (Segment){ b, { origin + at, 0 }, { min64(p->G, tail - at), 0 }, 0, 0, 0, 1 };
    if (joined) {
        int64_t last = L - tail; /* h, or h + 1 for an odd G */
        if (list && p->boundary == WRAP)
            list[count] =
                (Segment){ b, { origin + tail, origin }, { last, half }, last, last + half, last - half, 1 };
        if (list && p->boundary == SWAP)
            list[count] = (Segment){ b, { origin, origin + tail }, { half, last }, half, last, half, 1 };
        count++;
    }
    return count;
}

static int64_t all_segments(const Pattern *p, Segment *list) {
    int64_t count = 0;
    if (p->starts) {
        for (int64_t i = 0; i < p->documents; i++)
            count += document_segments(p, list ? list + count : NULL, 0, p->starts[i],
                                       p->starts[i + 1] - p->starts[i]);
    } else {
        for (int64_t b = 0; b < p->B; b++)
            count += document_segments(p, list ? list + count : NULL, b, 0, p->T);
    }
    return count;
}

/* ---- tasks ----------------------------------------------------------------------------------- */

typedef struct {
    Segment *segments;
    Task *tasks;
    int64_t segment_count, count;
} Work;

/* Writes the tasks to `tasks`, unless that is NULL, and returns how many there are. */
typedef int64_t ListTasks(const Pattern *p, const Segment *segments, int64_t segment_count, Task *tasks);

static int64_t forward_tasks(const Pattern *p, const Segment *segments, int64_t segment_count, Task *tasks) {
    int64_t count = 0, rows = rows_of_tasks(p->T, p->H, p->D);
    for (int64_t i = 0; i < segment_count; i++)
        for (int64_t k = 0; k < p->K; k++) {
            const Segment *s = &segments[i];
            int64_t from, to, n = rows_of(s);
            heads_of(p, k, s->shifted, &from, &to);
            for (int64_t h = from, heads; h < to; h += heads) {
                heads = min64(to - h, rows / BQ);
                int64_t size = rows / heads / BQ * BQ;
                /* The last rows see the most keys, so they go first. */
                for (int64_t first = (n - 1) / size * size; first >= 0; first -= size, count++)
                    if (tasks) tasks[count] = (Task){ s, k, h, h + heads, first, min64(first + size, n) };
            }
        }
    return count;
}

/* Rows of each chunk of a segment. There are as few chunks as CHUNK allows, all but the last equally long. */
static inline int64_t chunk_of(const Segment *s) {
    int64_t n = rows_of(s), chunks = (n + CHUNK - 1) / CHUNK;
    return round_up((n + chunks - 1) / chunks, BQ);
}

static int64_t backward_tasks(const Pattern *p, const Segment *segments, int64_t segment_count, Task *tasks) {
    int64_t count = 0;
    for (int64_t i = 0; i < segment_count; i++)
        for (int64_t k = 0; k < p->K; k++) {
            const Segment *s = &segments[i];
            int64_t from, to, n = rows_of(s), size = chunk_of(s);
            heads_of(p, k, s->shifted, &from, &to);
            if (from < to)
                for (int64_t first = 0; first < n; first += size, count++)
                    if (tasks) tasks[count] = (Task){ s, k, from, to, first, min64(first + size, n) };
        }
    return count;
}

/* Freed by free_work(); -1 after fail() if there is no memory. */
static int make_work(const Pattern *p, ListTasks *list, Work *w) {
    w->segment_count = all_segments(p, NULL);
    w->segments = scratch(w->segment_count * (int64_t)sizeof(Segment));
    if (!w->segments) return -1;
    all_segments(p, w->segments);
    w->count = list(p, w->segments, w->segment_count, NULL);
    w->tasks = scratch(w->count * (int64_t)sizeof(Task));
    if (!w->tasks) return -1;
    list(p, w->segments, w->segment_count, w->tasks);
    return 0;
}

/* Frees what make_pattern() and make_work() took, also where one of them failed. */
static void free_work(const Pattern *p, const Work *w) {
    scratch_free(w->tasks);
    scratch_free(w->segments);
    scratch_free(p->starts);
}

/* Nanoseconds that one core needs for all tasks: the multiply-adds of two products, 32 per nanosecond. */
static int64_t work_of(const Work *w, int64_t D) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < w->count; i++)
        pairs +=
            (w->tasks[i].to - w->tasks[i].from) * (w->tasks[i].last - w->tasks[i].first) * w->tasks[i].last;
    return pairs / 16 * (D + 1);
}

#endif
