/* s2_attention.c --- shifted sparse attention, forward and backward; the rule is in ops.h. The shift is index arithmetic.
 *
 * Every pattern is a list of segments, each a causal attention of its own: a run of tokens, or (wrap, swap) two runs one
 * after the other, Z F for wrap and F Z for swap, F the first and Z the last segment of a shifted head. So nothing is
 * masked but the diagonal, and dense attention is one long segment. (With an odd G the last segment is one token longer
 * than h; `low` of a row keeps that token out of the other run's sight.)
 *
 * Forward: a task is a chunk of a segment's query rows, for all query heads of one KV head that have the segment; it walks
 * the keys in blocks, packs each block once (K transposed, V as rows, float32) and updates an online softmax per row.
 * Backward: a task is a whole segment of one KV head. Keys and values are packed once, query tiles walk over them, dk and
 * dv are summed in scratch in the order of heads and tiles, dq per tile. A KV head that serves plain and shifted heads
 * (there is at most one) has its plain sums kept in float32 and continued by the shifted pass. No sum depends on the
 * number of threads. */
#include "cpu.h"

enum {
    MR = VW == 16 ? 8 : 4,             /* the register tile: MR rows by NR columns */
    NR = 2 * VW,
    BQ = 64,                           /* query rows of a tile */
    BK = 128,                          /* keys of a block */
    CHUNK = 768,                       /* query rows of a forward task, all heads together */
};

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* c[MR,NR] (+)= a[MR,n] b[n,NR]; a by any strides. */
static inline void multiply_tile(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                                 int64_t n, int add) {
    vf sum[MR][2];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        sum[i][0] = add ? vf_load(c + i * ldc) : (vf){0};
        sum[i][1] = add ? vf_load(c + i * ldc + VW) : (vf){0};
    }
    for (int64_t k = 0; k < n; k++) {
        vf b0 = vf_load(b + k * ldb), b1 = vf_load(b + k * ldb + VW);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            vf x = vf_set1(a[i * a_row + k * a_col]);
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        vf_store(c + i * ldc, sum[i][0]);
        vf_store(c + i * ldc + VW, sum[i][1]);
    }
}

/* c[M,N] (+)= a[M,n] b[n,N], M and N rounded up to whole tiles: buffers are that large. A column panel of b stays in L1. */
static void multiply(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t M, int64_t N,
                     int64_t n, int add) {
    for (int64_t j = 0; j < N; j += NR) for (int64_t i = 0; i < M; i += MR)
        multiply_tile(c + i * ldc + j, ldc, a + i * lda, lda, 1, b + j, ldb, n, add);
}

/* c[M,N] += a^T b with a[n,M]. */
static void multiply_transposed(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t M,
                                int64_t N, int64_t n) {
    for (int64_t j = 0; j < N; j += NR) for (int64_t i = 0; i < M; i += MR)
        multiply_tile(c + i * ldc + j, ldc, a + i, 1, lda, b + j, ldb, n, 1);
}

/* ---- segments ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t b, start[2], length[2];    /* two runs of tokens, taken one after the other; the second is mostly empty */
    int64_t low_from, low_to, low;     /* rows low_from .. low_to-1 see no key below `low` */
    int shifted;
} Segment;

static inline int64_t rows_of(const Segment *s) { return s->length[0] + s->length[1]; }
static inline int64_t token(const Segment *s, int64_t row) {
    return row < s->length[0] ? s->start[0] + row : s->start[1] + row - s->length[0];
}
static inline int64_t low_of(const Segment *s, int64_t row) { return row >= s->low_from && row < s->low_to ? s->low : 0; }

typedef struct { int64_t G; int boundary, shift; const Tensor *cu_seqlens; int64_t B, T, H, K, D; } Pattern;
enum { SPLIT, WRAP, SWAP };
enum { HALF, NONE, ALL };

/* The query heads of kv head k that are plain (shifted=0) or shifted: first .. last-1. */
static void heads_of(const Pattern *p, int64_t k, int shifted, int64_t *first, int64_t *last) {
    int64_t each = p->H / p->K, border = p->shift == HALF ? p->H / 2 : p->shift == NONE ? p->H : 0;
    int64_t from = k * each, to = from + each;
    if (border < from) border = from;
    if (border > to) border = to;
    *first = shifted ? border : from;
    *last = shifted ? to : border;
}

static int check_pattern(const char *op, Pattern *p, const Tensor *q, const Tensor *k, const Tensor *cu_seqlens, double group_size,
                         double boundary, double shift) {
    *p = (Pattern){ (int64_t)group_size, (int)boundary, (int)shift, cu_seqlens, q->shape[0], q->shape[1], q->shape[2], k->shape[2],
                    q->shape[3] };
    if (p->G < 1) return fail("%s: group_size should be at least 1, got %lld", op, (long long)p->G);
    if (boundary < SPLIT || boundary > SWAP) return fail("%s: boundary should be 0 (split), 1 (wrap) or 2 (swap), got %g", op, boundary);
    if (shift < HALF || shift > ALL) return fail("%s: shift should be 0 (half), 1 (none) or 2 (all), got %g", op, shift);
    if (p->K ? p->H % p->K : p->H)
        return fail("%s: k axis 2 should divide H=%lld, got %lld", op, (long long)p->H, (long long)p->K);
    int64_t documents = 1;
    const int32_t *border = NULL;
    if (given(cu_seqlens)) {
        border = cu_seqlens->data;
        documents = cu_seqlens->shape[0] - 1;
        if (p->B != 1) return fail("%s: cu_seqlens should come with B=1, got B=%lld", op, (long long)p->B);
        if (documents < 0 || border[0] != 0 || border[documents] != p->T)
            return fail("%s: cu_seqlens should begin with 0 and end with T=%lld", op, (long long)p->T);
        for (int64_t i = 0; i < documents; i++) if (border[i + 1] < border[i])
            return fail("%s: cu_seqlens should not decrease, got %d after %d at %lld", op, border[i + 1], border[i], (long long)i + 1);
    }
    if (p->boundary != SPLIT && p->shift != NONE) for (int64_t i = 0; i < documents; i++) {
        int64_t L = border ? border[i + 1] - border[i] : p->T;
        if (L % p->G) return fail("%s: boundary %s needs a length that is a multiple of group_size=%lld, got %lld", op,
                                  p->boundary == WRAP ? "wrap" : "swap", (long long)p->G, (long long)L);
    }
    return 0;
}

/* Appends the segments of one document at 0 .. L-1 to list (unless it is NULL) and returns how many there are. */
static int64_t document_segments(const Pattern *p, Segment *list, int64_t b, int64_t origin, int64_t L) {
    int64_t count = 0, G = min64(p->G, L ? L : 1), half = p->G / 2;
    if (p->shift != ALL && L) for (int64_t at = 0; at < L; at += G, count++)
        if (list) list[count] = (Segment){ b, { origin + at, 0 }, { min64(G, L - at), 0 }, 0, 0, 0, 0 };
    if (p->shift == NONE || !L) return count;
    int joined = p->boundary != SPLIT && half;
    int64_t first = min64(half, L), tail = joined ? L - p->G + half : L;        /* where the last segment begins */
    if (first && !joined) {
        if (list) list[count] = (Segment){ b, { origin, 0 }, { first, 0 }, 0, 0, 0, 1 };
        count++;
    }
    for (int64_t at = first; at < tail; at += p->G, count++)
        if (list) list[count] = (Segment){ b, { origin + at, 0 }, { min64(p->G, tail - at), 0 }, 0, 0, 0, 1 };
    if (joined) {
        int64_t last = L - tail;                                                /* h, or h + 1 for an odd G */
        if (list && p->boundary == WRAP)
            list[count] = (Segment){ b, { origin + tail, origin }, { last, half }, last, last + half, last - half, 1 };
        if (list && p->boundary == SWAP)
            list[count] = (Segment){ b, { origin, origin + tail }, { half, last }, half, last, half, 1 };
        count++;
    }
    return count;
}

static int64_t all_segments(const Pattern *p, Segment *list) {
    int64_t count = 0;
    if (given(p->cu_seqlens)) {
        const int32_t *border = p->cu_seqlens->data;
        for (int64_t i = 0; i + 1 < p->cu_seqlens->shape[0]; i++)
            count += document_segments(p, list ? list + count : NULL, 0, border[i], border[i + 1] - border[i]);
    } else {
        for (int64_t b = 0; b < p->B; b++) count += document_segments(p, list ? list + count : NULL, b, 0, p->T);
    }
    return count;
}

/* A unit of parallel work: query rows first .. last-1 of a segment, for one KV head. */
typedef struct { const Segment *segment; int64_t kv_head, first, last; } Task;
typedef struct { Segment *segments; Task *tasks; int64_t count; } Work;

/* chunk 0: whole segments. Later chunks of a segment see more keys; they come first so that threads end together. */
static int64_t fill_tasks(const Pattern *p, const Segment *segments, int64_t segment_count, int64_t chunk, Task *tasks) {
    int64_t count = 0;
    for (int64_t s = 0; s < segment_count; s++) for (int64_t k = 0; k < p->K; k++) {
        int64_t from, to, n = rows_of(&segments[s]);
        heads_of(p, k, segments[s].shifted, &from, &to);
        if (from == to) continue;
        int64_t size = chunk ? round_up(chunk / (to - from) + 1, BQ) : n;
        for (int64_t first = (n - 1) / size * size; first >= 0; first -= size, count++)
            if (tasks) tasks[count] = (Task){ &segments[s], k, first, min64(first + size, n) };
    }
    return count;
}

static int make_work(const Pattern *p, int64_t chunk, Work *w) {
    int64_t segment_count = all_segments(p, NULL);
    w->segments = scratch(segment_count * (int64_t)sizeof(Segment));
    if (!w->segments) return -1;
    all_segments(p, w->segments);
    w->count = fill_tasks(p, w->segments, segment_count, chunk, NULL);
    w->tasks = scratch(w->count * (int64_t)sizeof(Task));
    if (!w->tasks) { scratch_free(w->segments); return -1; }
    fill_tasks(p, w->segments, segment_count, chunk, w->tasks);
    return 0;
}

static void free_work(Work *w) {
    scratch_free(w->tasks);
    scratch_free(w->segments);
}

/* ---- rows in and out ---------------------------------------------------------------------------------------------- */

static inline void *row_at(const Tensor *x, const Segment *s, int64_t row, int64_t head) {
    return at(x, s->b * x->stride[0] + token(s, row) * x->stride[1] + head * x->stride[2]);
}

/* Rows first .. first+n-1 of a segment as float32 [padded, pitch], times scale; what lies beyond n and D is zero. */
static void load_rows(float *out, int64_t pitch, const Tensor *x, const Segment *s, int64_t head, int64_t first, int64_t n,
                      int64_t padded, float scale) {
    int64_t D = x->shape[3];
    for (int64_t i = 0; i < n; i++) {
        float *row = out + i * pitch;
        load_row(row, row_at(x, s, first + i, head), x->dtype, D);
        if (scale != 1.0f) for (int64_t d = 0; d < D; d++) row[d] *= scale;
        for (int64_t d = D; d < pitch; d++) row[d] = 0;
    }
    memset(out + n * pitch, 0, (size_t)((padded - n) * pitch) * sizeof(float));
}

/* out[D,BK] = rows[n,pitch] transposed, zero beyond n. */
static void transpose(float *out, const float *rows, int64_t pitch, int64_t n, int64_t D) {
    for (int64_t d0 = 0; d0 < D; d0 += 16) for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * pitch;
        for (int64_t d = d0; d < d0 + 16 && d < D; d++) out[d * BK + i] = row[d];
    }
    for (int64_t d = 0; d < D && n < BK; d++) memset(out + d * BK + n, 0, (size_t)(BK - n) * sizeof(float));
}

/* Columns of a tile's row that the query may see, of a block of n keys beginning at `block`: from .. to-1. */
static inline void visible(const Segment *s, int64_t row, int64_t block, int64_t n, int64_t *from, int64_t *to) {
    *from = low_of(s, row) - block;
    *to = row + 1 - block;
    if (*from < 0) *from = 0;
    if (*to > n) *to = n;
    if (*to < *from) *to = *from;
}

/* ---- forward ------------------------------------------------------------------------------------------------------ */

typedef struct { const S2AttentionForward *a; Pattern p; Work w; } Forward;

/* One tile row: turns scores into exp(score - maximum) in place, 0 outside from .. to-1 up to width; corrects the running
 * maximum and sum and returns by how much what was summed before must shrink. */
static float softmax_row(float *row, int64_t from, int64_t to, int64_t width, float *maximum, float *sum) {
    for (int64_t j = 0; j < from; j++) row[j] = -INFINITY;
    for (int64_t j = to; j < width; j++) row[j] = -INFINITY;
    vf top = vf_set1(-INFINITY), total = {0};
    for (int64_t j = 0; j < width; j += VW) top = vf_max(vf_load(row + j), top);
    float highest = vf_hmax(top), old = *maximum;
    if (!(highest > old)) highest = old;
    if (highest == -INFINITY) {
        memset(row, 0, (size_t)width * sizeof(float));
        return 1;
    }
    for (int64_t j = 0; j < width; j += VW) {
        vf e = vf_exp(vf_load(row + j) - highest);
        vf_store(row + j, e);
        total += e;
    }
    float shrink = old == highest ? 1.0f : expf(old - highest);
    *maximum = highest;
    *sum = *sum * shrink + vf_sum(total);
    return shrink;
}

static int forward_task(int64_t index, void *context) {
    const Forward *f = context;
    const S2AttentionForward *a = f->a;
    const Task *task = &f->w.tasks[index];
    const Segment *s = task->segment;
    int64_t D = f->p.D, pitch = round_up(D ? D : 1, NR), from, to, n = task->last - task->first;
    heads_of(&f->p, task->kv_head, s->shifted, &from, &to);
    int64_t padded = round_up(n, MR), rows = (to - from) * padded;
    float *memory = scratch((2 * rows * pitch + 2 * rows + 2 * BK * pitch + BQ * BK) * (int64_t)sizeof(float));
    if (!memory) return -1;
    float *q = memory, *out = q + rows * pitch, *v = out + rows * pitch, *kt = v + BK * pitch, *tile = kt + BK * pitch;
    float *maximum = tile + BQ * BK, *sum = maximum + rows;
    memset(out, 0, (size_t)(rows * pitch) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) { maximum[i] = -INFINITY; sum[i] = 0; }
    for (int64_t h = from; h < to; h++)
        load_rows(q + (h - from) * padded * pitch, pitch, &a->q, s, h, task->first, n, padded, (float)a->scale);
    for (int64_t block = 0; block < task->last; block += BK) {
        int64_t keys = min64(BK, task->last - block);
        load_rows(v, pitch, &a->k, s, task->kv_head, block, keys, keys, 1);
        transpose(kt, v, pitch, keys, D);
        load_rows(v, pitch, &a->v, s, task->kv_head, block, keys, keys, 1);
        for (int64_t h = 0; h < to - from; h++) for (int64_t i0 = 0; i0 < n; i0 += BQ) {
            int64_t count = min64(BQ, n - i0), first = task->first + i0, at = h * padded + i0;
            int64_t seen = min64(keys, first + count - block);                  /* columns that any row of the tile sees */
            if (seen <= 0) continue;
            int64_t width = round_up(seen, NR);
            multiply(tile, BK, q + at * pitch, pitch, kt, BK, count, width, D, 0);
            for (int64_t i = 0; i < count; i++) {
                int64_t low, high;
                visible(s, first + i, block, keys, &low, &high);
                float shrink = softmax_row(tile + i * BK, low, high, width, &maximum[at + i], &sum[at + i]);
                if (shrink != 1.0f) for (int64_t d = 0; d < pitch; d++) out[(at + i) * pitch + d] *= shrink;
            }
            for (int64_t i = count; i < round_up(count, MR); i++) memset(tile + i * BK, 0, BK * sizeof(float));
            multiply(out + at * pitch, pitch, tile, BK, v, pitch, count, pitch, seen, 1);
        }
    }
    for (int64_t h = from; h < to; h++) for (int64_t i = 0; i < n; i++) {
        int64_t at_row = (h - from) * padded + i, t = token(s, task->first + i);
        float *row = out + at_row * pitch, scale = 1.0f / sum[at_row];
        for (int64_t d = 0; d < D; d++) row[d] *= scale;
        store_row(row_at(&a->out, s, task->first + i, h), a->out.dtype, row, D);
        *(float *)at(&a->lse, s->b * a->lse.stride[0] + h * a->lse.stride[1] + t) = maximum[at_row] + logf(sum[at_row]);
    }
    scratch_free(memory);
    return 0;
}

int CPU(s2_attention_forward)(const void *args, void *stream) {
    const S2AttentionForward *a = args;
    (void)stream;
    Forward f = { .a = a };
    if (check_pattern("s2_attention_forward", &f.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary, a->shift) ||
        make_work(&f.p, CHUNK, &f.w)) return -1;
    int status = parallel_for(f.w.count, forward_task, &f);
    free_work(&f.w);
    return status;
}

/* ---- backward ----------------------------------------------------------------------------------------------------- */

typedef struct { const S2AttentionBackward *a; Pattern p; Work w; float *kept; int shifted; } Backward;

/* Both kinds of query heads on this KV head: the plain pass leaves its dk and dv in `kept` [B,T,2,pitch]. */
static int mixed(const Pattern *p, int64_t kv_head) {
    int64_t from, middle, to;
    heads_of(p, kv_head, 0, &from, &middle);
    heads_of(p, kv_head, 1, &middle, &to);
    return from < middle && middle < to;
}

static int backward_task(int64_t index, void *context) {
    const Backward *b = context;
    const S2AttentionBackward *a = b->a;
    const Task *task = &b->w.tasks[index];
    const Segment *s = task->segment;
    if (s->shifted != b->shifted) return 0;
    int64_t D = b->p.D, pitch = round_up(D ? D : 1, NR), n = task->last, from, to;
    int64_t blocks = (n + BK - 1) / BK, padded = blocks * BK;
    heads_of(&b->p, task->kv_head, s->shifted, &from, &to);
    int64_t floats = (3 * padded + 3 * BQ) * pitch + 2 * padded * pitch + 2 * BQ * BK + 2 * BQ;
    float *memory = scratch(floats * (int64_t)sizeof(float));
    if (!memory) return -1;
    float *k = memory, *kt = k + padded * pitch, *vt = kt + padded * pitch, *dk = vt + padded * pitch, *dv = dk + padded * pitch;
    float *q = dv + padded * pitch, *dout = q + BQ * pitch, *dq = dout + BQ * pitch, *p = dq + BQ * pitch, *ds = p + BQ * BK;
    float *lse = ds + BQ * BK, *delta = lse + BQ;
    for (int64_t j = 0; j < blocks; j++) {
        int64_t keys = min64(BK, n - j * BK);
        load_rows(k + j * BK * pitch, pitch, &a->v, s, task->kv_head, j * BK, keys, BK, 1);
        transpose(vt + j * BK * pitch, k + j * BK * pitch, pitch, keys, D);
        load_rows(k + j * BK * pitch, pitch, &a->k, s, task->kv_head, j * BK, keys, BK, 1);
        transpose(kt + j * BK * pitch, k + j * BK * pitch, pitch, keys, D);
    }
    int is_mixed = mixed(&b->p, task->kv_head);
    memset(dk, 0, (size_t)(2 * padded * pitch) * sizeof(float));
    if (is_mixed && s->shifted) for (int64_t i = 0; i < n; i++) {
        const float *kept = b->kept + (s->b * b->p.T + token(s, i)) * 2 * pitch;
        memcpy(dk + i * pitch, kept, (size_t)pitch * sizeof(float));
        memcpy(dv + i * pitch, kept + pitch, (size_t)pitch * sizeof(float));
    }
    for (int64_t h = from; h < to; h++) for (int64_t first = 0; first < n; first += BQ) {
        int64_t count = min64(BQ, n - first), rows = round_up(count, MR);
        load_rows(q, pitch, &a->out, s, h, first, count, rows, 1);
        load_rows(dout, pitch, &a->dout, s, h, first, count, rows, 1);
        for (int64_t i = 0; i < rows; i++) {
            vf sum = {0};
            for (int64_t d = 0; d < pitch; d += VW) sum += vf_load(q + i * pitch + d) * vf_load(dout + i * pitch + d);
            delta[i] = vf_sum(sum);
            lse[i] = INFINITY;
            if (i < count) lse[i] = *(const float *)at(&a->lse, s->b * a->lse.stride[0] + h * a->lse.stride[1] + token(s, first + i));
        }
        load_rows(q, pitch, &a->q, s, h, first, count, rows, (float)a->scale);
        memset(dq, 0, (size_t)(BQ * pitch) * sizeof(float));
        for (int64_t block = 0; block < first + count; block += BK) {
            int64_t keys = min64(BK, n - block), seen = min64(keys, first + count - block), width = round_up(seen, NR);
            multiply(p, BK, q, pitch, kt + block * pitch, BK, count, width, D, 0);
            multiply(ds, BK, dout, pitch, vt + block * pitch, BK, count, width, D, 0);
            for (int64_t i = 0; i < rows; i++) {
                int64_t low = 0, high = 0;
                if (i < count) visible(s, first + i, block, keys, &low, &high);
                float *pi = p + i * BK, *dsi = ds + i * BK;
                for (int64_t j = 0; j < width; j += VW) vf_store(pi + j, vf_exp(vf_load(pi + j) - lse[i]));
                for (int64_t j = 0; j < low; j++) pi[j] = 0;
                for (int64_t j = high; j < width; j++) pi[j] = 0;
                for (int64_t j = 0; j < width; j += VW) vf_store(dsi + j, vf_load(pi + j) * (vf_load(dsi + j) - delta[i]));
            }
            multiply_transposed(dv + block * pitch, pitch, p, BK, dout, pitch, seen, pitch, count);
            multiply_transposed(dk + block * pitch, pitch, ds, BK, q, pitch, seen, pitch, count);
            multiply(dq, pitch, ds, BK, k + block * pitch, pitch, count, pitch, seen, 1);
        }
        for (int64_t i = 0; i < count; i++) {
            for (int64_t d = 0; d < D; d++) dq[i * pitch + d] *= (float)a->scale;
            store_row(row_at(&a->dq, s, first + i, h), a->dq.dtype, dq + i * pitch, D);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        if (is_mixed && !s->shifted) {
            float *kept = b->kept + (s->b * b->p.T + token(s, i)) * 2 * pitch;
            memcpy(kept, dk + i * pitch, (size_t)pitch * sizeof(float));
            memcpy(kept + pitch, dv + i * pitch, (size_t)pitch * sizeof(float));
            continue;
        }
        store_row(row_at(&a->dk, s, i, task->kv_head), a->dk.dtype, dk + i * pitch, D);
        store_row(row_at(&a->dv, s, i, task->kv_head), a->dv.dtype, dv + i * pitch, D);
    }
    scratch_free(memory);
    return 0;
}

int CPU(s2_attention_backward)(const void *args, void *stream) {
    const S2AttentionBackward *a = args;
    (void)stream;
    Backward b = { .a = a };
    if (check_pattern("s2_attention_backward", &b.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary, a->shift)) return -1;
    int any = 0;
    for (int64_t k = 0; k < b.p.K; k++) any |= mixed(&b.p, k);
    int64_t pitch = round_up(b.p.D ? b.p.D : 1, NR);
    if (any && !(b.kept = scratch(b.p.B * b.p.T * 2 * pitch * (int64_t)sizeof(float)))) return -1;
    int status = make_work(&b.p, 0, &b.w);
    if (!status) {
        for (b.shifted = 0; b.shifted < 2 && !status; b.shifted++) status = parallel_for(b.w.count, backward_task, &b);
        free_work(&b.w);
    }
    if (b.kept) scratch_free(b.kept);
    return status;
}
