/* s2_attention.c --- shifted sparse attention, forward and backward; the rule is in ops.h. The shift is index
 * arithmetic.
 *
 * Every pattern is a list of segments, each a causal attention of its own: a run of tokens, or (wrap, swap)
 * two runs one after the other, Z F for wrap and F Z for swap, F the first and Z the last segment of a
 * shifted head. So nothing is masked but the diagonal, and dense attention is one long segment. (With an odd
 * G the last segment is one token longer than h; `low` of a row keeps that token out of the other run's
 * sight.)
 *
 * Scores are kept transposed, [keys, queries], the vector along the queries. Then all five products read
 * their left factor one number at a time from rows as they lie in memory and their right factor in whole
 * vectors: only q and dout are transposed, a block of BQ rows at a time; keys and values never are. The
 * softmax needs nothing across lanes.
 *
 * Forward: a task is a chunk of a segment's query rows for the query heads of one KV head; it walks the keys
 * in blocks of BK with an online softmax. Backward: a segment is cut in chunks of rows, at most CHUNK long. A
 * task is a pair of chunks (i, i - phase), queries and keys; within a phase no two tasks share a row of dq,
 * dk or dv, so they run side by side and add to float32 sums, phase after phase: the outputs themselves, or
 * scratch when those are narrower. First the plain heads, then the shifted, which may share a KV head. No sum
 * depends on the number of threads.
 *
 * The ladder, GF/s of useful FLOPs of one Zen 5 core (FMA peak 261), float32, forward / backward, D = 64, G =
 * 512 and 2048: tiles of 8x32, K and V transposed in scalar code, a whole segment per backward task   103 /
 * 148   140 / 208 scores transposed, tiles of 6x64, only q and dout transposed, in vectors; chunks of 256 135
 * / 148   179 / 177 chunks of 1024, so that a block of queries is loaded once for more keys 147 / 175   194 /
 * 221 forward tasks of 512 rows instead of 256                                              155         198
 * One Zen 3 core with other work beside it, in turn with the former, which against itself came out at 0.91
 * to 1.06 of its time: all sums in runs of 64 products instead of 128: 0.91 to 1.01; of 32: 0.93 to 1.09; of
 * 16: 0.98 to 1.24 scores alone in runs of 32, which brings lse's error from its limit to two thirds of it:
 * 0.99 to 1.11, the former 0.95 to 1.07 and one core there, forward, D = 64, times the speed of the former
 * for bfloat16 with G = 512 and 2048, float32 with 512: rows fetched 16 ahead as they are read     1.10  1.06
 * 1.06    (8 and 32 ahead the same; a block or a task ahead: nothing) four steps of a tile in one turn
 * 1.11  1.04          (two and eight: 1.12, 1.06 and 1.10, 1.03; backward 1.02) rows of out fetched as they
 * are written    1.02  1.05  1.01 no softmax of what a tile leaves out       1.03  1.04  1.00 (backward 1.01)
 *   blocks of 48x48 to 96x96, scores in runs of 64: 0.87 to 1.05: no gain
 *   and, D = 64 and 128, in turn, 60 times: ROWS from 256 to 2048, BK 192 0.98 to 1.01; 288 to 576 keys made
 * ready at once 0.96 to 0.98; two chains of maxima 0.98 to 1.01: no gain. Tiles take 80 % of the time there,
 * at 90 to 95 % of the FMA peak No gain: BK from 48 to 192, chunks of 2048 (+2 %, and fewer tasks). Not kept:
 * keys and values of float32 used where they lie (+3 %, but rows a power of two apart fall into the same
 * cache sets), prefetch between the products (+2 %). */
#include "cpu.h"
#include "scratch.h"

#include <stdatomic.h>

/* Vectors of a register tile of MR rows: 24 sums, 4 + 1 operands with 32 registers, 12 and 2 + 1 with 16. */
#if VW == 16 || defined __aarch64__
#define NV 4
#else
#define NV 2
#endif
enum {
    MR = 6,
    DEPTH = 128,
    SHORT = 32, /* products added up in registers; fewer for scores, whose errors exp() makes larger */
    FETCH = 16, /* rows ahead that are fetched */
    ROWS = 512, /* query rows of a forward task, all heads together; of a backward task CHUNK */
}; /* a block is BQ queries and BK keys */

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- products -------------------------------------------------------------------------------- */

typedef void Tile(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t n,
                  int add);

/* c[rows,vecs*VW] (+)= a b[n,vecs*VW], a[rows,n] or, `across`, a[n,rows]. */
static inline __attribute__((always_inline)) void tile(int rows, int vecs, int across, float *c, int64_t ldc,
                                                       const float *a, int64_t lda, const float *b,
                                                       int64_t ldb, int64_t n, int add) {
    vf sum[MR][NV];
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int j = 0; j < vecs; j++) sum[i][j] = (vf){ 0 };
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; k++) {
        vf x[NV];
        UNROLLED
        for (int j = 0; j < vecs; j++) x[j] = vf_load(b + k * ldb + j * VW);
        UNROLLED
        for (int i = 0; i < rows; i++) {
            vf y = vf_set1(across ? a[k * lda + i] : a[i * lda + k]);
            UNROLLED
            for (int j = 0; j < vecs; j++) sum[i][j] += y * x[j];
        }
    }
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int j = 0; j < vecs; j++) {
            if (add) sum[i][j] += vf_load(c + i * ldc + j * VW);
            vf_store(c + i * ldc + j * VW, sum[i][j]);
        }
    }
}

#define WAY(name, across, rows, vecs)                                                                      \
    static void name##_##rows##_##vecs(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, \
                                       int64_t ldb, int64_t n, int add) {                                  \
        tile(rows, vecs, across, c, ldc, a, lda, b, ldb, n, add);                                          \
    }
#define TILE(rows, vecs) WAY(down, 0, rows, vecs) WAY(across, 1, rows, vecs)
#define TILES(vecs) TILE(1, vecs) TILE(2, vecs) TILE(3, vecs) TILE(4, vecs) TILE(5, vecs) TILE(6, vecs)
#define ROW(way, vecs) \
    { way##_1_##vecs, way##_2_##vecs, way##_3_##vecs, way##_4_##vecs, way##_5_##vecs, way##_6_##vecs }
TILES(1)
TILES(2)
#if NV == 4
    TILES(3) TILES(4)
#define TABLE(way) { ROW(way, 1), ROW(way, 2), ROW(way, 3), ROW(way, 4) }
#else
#define TABLE(way) { ROW(way, 1), ROW(way, 2) }
#endif
        static Tile *const tiles[2][NV][MR] = { TABLE(down), TABLE(across) };
enum { DOWN, ACROSS };
#define FAR (INT64_MAX / 2)

/* c[M,vecs*VW] (+)= a b[n,vecs*VW]: a[M,n], or a[n,M] when ACROSS. Columns in nearly equal strips of at most
 * NV vectors. At most `depth` products are added up before c comes to it, so that long sums stay exact. A
 * triangle of a is zero and left out: row i has nothing before from + i, nothing from to + i + 1 on. */
static void multiply(int way, float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb,
                     int64_t M, int64_t vecs, int64_t n, int64_t depth, int add, int64_t from, int64_t to) {
    for (int64_t strips = (vecs + NV - 1) / NV, j = 0; strips; strips--) {
        int64_t width = (vecs - j + strips - 1) / strips;
        for (int64_t i = 0; i < M; i += MR) {
            int64_t rows = min64(MR, M - i), first = max64(0, from + i), last = min64(n, to + i + rows);
            for (int64_t k = first, more = add, step; k < last || !more; k += step, more = 1) {
                step = max64(0, last - k);
                if (step > depth)
                    step = step < 2 * depth ? (step + 1) / 2 : depth; /* a rest is not left to itself */
                tiles[way][width - 1][rows - 1](c + i * ldc + j * VW, ldc,
                                                way == ACROSS ? a + k * lda + i : a + i * lda + k, lda,
                                                b + k * ldb + j * VW, ldb, step, (int)more);
            }
        }
        j += width;
    }
}

/* ---- segments -------------------------------------------------------------------------------- */

typedef struct {
    int64_t b, start[2],
        length[2]; /* two runs of tokens, taken one after the other; the second is mostly empty */
    int64_t low_from, low_to, low; /* rows low_from .. low_to-1 see no key below `low` */
    int shifted;
} Segment;

static inline int64_t rows_of(const Segment *s) { return s->length[0] + s->length[1]; }
static inline int64_t token(const Segment *s, int64_t row) {
    return row < s->length[0] ? s->start[0] + row : s->start[1] + row - s->length[0];
}

typedef struct {
    int64_t G;
    int boundary, shift;
    const Tensor *cu_seqlens;
    int64_t B, T, H, K, D;
} Pattern;

/* The query heads of kv head k that are plain (shifted=0) or shifted: first .. last-1. */
static void heads_of(const Pattern *p, int64_t k, int shifted, int64_t *first, int64_t *last) {
    int64_t each = p->H / p->K, border = p->shift == HALF ? p->H / 2 : p->shift == NONE ? p->H : 0;
    int64_t from = k * each, to = from + each;
    if (border < from) border = from;
    if (border > to) border = to;
    *first = shifted ? border : from;
    *last = shifted ? to : border;
}

static int make_pattern(const char *op, Pattern *p, const Tensor *q, const Tensor *k,
                        const Tensor *cu_seqlens, double group_size, double boundary, double shift) {
    *p = (Pattern){ (int64_t)group_size, (int)boundary, (int)shift,  cu_seqlens, q->shape[0],
                    q->shape[1],         q->shape[2],   k->shape[2], q->shape[3] };
    if (!given(cu_seqlens)) return 0;
    int64_t documents = cu_seqlens->shape[0] - 1;
    const int32_t *border = cu_seqlens->data;
    if (border[0] != 0 || border[documents] != p->T)
        return fail("%s: cu_seqlens should begin with 0 and end with T=%lld", op, (long long)p->T);
    for (int64_t i = 0; i < documents; i++) {
        int64_t L = (int64_t)border[i + 1] - border[i];
        if (L < 0)
            return fail("%s: cu_seqlens should not decrease, got %d after %d at %lld", op, border[i + 1],
                        border[i], (long long)i + 1);
        if (p->boundary != SPLIT && p->shift != NONE && L % p->G)
            return fail(
                "%s: boundary %s needs documents of a length that is a multiple of group_size=%lld, got %lld",
                op, p->boundary == WRAP ? "wrap" : "swap", (long long)p->G, (long long)L);
    }
    return 0;
}

/* Appends the segments of one document at 0 .. L-1 to list (unless it is NULL) and returns how many there
 * are. */
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
    if (given(p->cu_seqlens)) {
        const int32_t *border = p->cu_seqlens->data;
        for (int64_t i = 0; i + 1 < p->cu_seqlens->shape[0]; i++)
            count +=
                document_segments(p, list ? list + count : NULL, 0, border[i], border[i + 1] - border[i]);
    } else {
        for (int64_t b = 0; b < p->B; b++)
            count += document_segments(p, list ? list + count : NULL, b, 0, p->T);
    }
    return count;
}

/* ---- rows in and out ------------------------------------------------------------------------- */

static inline void *row_at(const Tensor *x, const Segment *s, int64_t row, int64_t head) {
    return at(x, s->b * x->stride[0] + token(s, row) * x->stride[1] + head * x->stride[2]);
}
static inline float *lse_at(const Tensor *lse, const Segment *s, int64_t row, int64_t head) {
    return at(lse, s->b * lse->stride[0] + head * lse->stride[1] + token(s, row));
}

/* Rows of a head are too far apart for the processor to see which comes next. */
static inline void fetch(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

/* Rows first .. first+n-1 of a segment as float32 [padded,pitch], times scale; what lies beyond n and D is
 * zero. */
static void load_rows(float *out, int64_t pitch, const Tensor *x, const Segment *s, int64_t head,
                      int64_t first, int64_t n, int64_t padded, float scale) {
    int64_t D = x->shape[3], bytes = D * dtype_size(x->dtype);
    for (int64_t i = 0; i < n; i++) {
        float *row = out + i * pitch;
        fetch(row_at(x, s, first + i + FETCH, head), bytes);
        load_row(row, row_at(x, s, first + i, head), x->dtype, D);
        for (int64_t d = D; d < pitch; d++) row[d] = 0;
        if (scale != 1.0f)
            for (int64_t d = 0; d < pitch; d += VW) vf_store(row + d, vf_load(row + d) * scale);
    }
    memset(out + n * pitch, 0, (size_t)((padded - n) * pitch) * sizeof(float));
}

/* Of two vectors, element by element in turn: the first halves, the second halves. */
#if VW == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined __AVX2__
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* out[pitch,BQ] = rows[BQ,pitch] transposed, in squares of VW: dealing out the rows log2(VW) times transposes
 * a square. */
static void transpose(float *out, const float *rows, int64_t pitch) {
    for (int64_t d = 0; d < pitch; d += VW)
        for (int64_t i = 0; i < BQ; i += VW) {
            vf x[VW], y[VW];
            UNROLLED
            for (int r = 0; r < VW; r++) x[r] = vf_load(rows + (i + r) * pitch + d);
            UNROLLED
            for (int step = 0; step < (VW == 16 ? 4 : VW == 8 ? 3 : 2); step++) {
                UNROLLED
                for (int r = 0; r < VW / 2; r++) {
                    y[2 * r] = LOW(x[r], x[r + VW / 2]);
                    y[2 * r + 1] = HIGH(x[r], x[r + VW / 2]);
                }
                UNROLLED
                for (int r = 0; r < VW; r++) x[r] = y[r];
            }
            UNROLLED
            for (int r = 0; r < VW; r++) vf_store(out + (d + r) * BQ + i, x[r]);
        }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* A block of rows (queries) against a block of keys, by their numbers in the segment. */
typedef struct {
    const Segment *segment;
    int64_t row, rows, key, keys;
} Block;

/* out[keys,BQ] = k[keys,D] qt[D,BQ], less the vectors of queries that all come before the key. */
static void scores(float *out, const Block *b, const float *k, int64_t pitch, const float *qt, int64_t D) {
    int64_t vecs = (b->rows + VW - 1) / VW;
    for (int64_t j = 0; j < b->keys; j += MR) {
        int64_t skip = max64(0, b->key + j - b->row) / VW;
        multiply(DOWN, out + j * BQ + skip * VW, BQ, k + j * pitch, pitch, qt + skip * VW, BQ,
                 min64(MR, b->keys - j), vecs - skip, D, SHORT, 0, -FAR, FAR);
    }
}

/* Whether key j of the block is hidden from any of its rows from vector v on, and from which lanes of vector
 * v. */
static inline int any_hidden(const Block *b, int64_t j, int64_t v) {
    const Segment *s = b->segment;
    return b->key + j > b->row + v * VW ||
           (b->key + j < s->low && s->low_from < b->row + b->rows && s->low_to > b->row);
}
static inline vi hidden(const Block *b, int64_t j, int64_t v) {
    const Segment *s = b->segment;
    int64_t row = b->row + v * VW, key = b->key + j;
    vi lane;
    for (int i = 0; i < VW; i++) lane[i] = i;
    vi mask = lane < (int32_t)min64(max64(key - row, 0), VW);
    if (key < s->low) {
        int32_t from = (int32_t)min64(max64(s->low_from - row, 0), VW),
                to = (int32_t)min64(max64(s->low_to - row, 0), VW);
        mask |= (lane >= from) & (lane < to);
    }
    return mask;
}

/* Products leave out what the diagonal hides but for a tile: fewer than MR keys behind a row are read. So the
 * keys that the rows of `vecs` vectors from v on have need of, and the first vector that has need of key j.
 */
static inline int64_t keys_of(const Block *b, int64_t v, int64_t vecs) {
    return min64(b->keys, max64(0, b->row - b->key + (v + vecs) * VW + MR - 1));
}
static inline int64_t first_vector(const Block *b, int64_t j) {
    return max64(0, b->key - b->row + j - MR + 1) / VW;
}

/* ---- tasks ----------------------------------------------------------------------------------- */

/* Rows first .. last-1 of a segment for the query heads from .. to-1, which share a KV head. */
typedef struct {
    const Segment *segment;
    int64_t kv_head, from, to, first, last;
} Task;
typedef struct {
    Segment *segments;
    Task *tasks;
    int64_t segment_count, count;
} Work;

static int64_t forward_tasks(const Pattern *p, const Segment *segments, int64_t segment_count, Task *tasks) {
    int64_t count = 0;
    for (int64_t i = 0; i < segment_count; i++)
        for (int64_t k = 0; k < p->K; k++) {
            const Segment *s = &segments[i];
            int64_t from, to, n = rows_of(s);
            heads_of(p, k, s->shifted, &from, &to);
            for (int64_t h = from, heads; h < to; h += heads) {
                heads = min64(to - h, ROWS / BQ);
                int64_t size = ROWS / heads / BQ * BQ;
                for (int64_t first = (n - 1) / size * size; first >= 0;
                     first -= size, count++) /* those with most keys first */
                    if (tasks) tasks[count] = (Task){ s, k, h, h + heads, first, min64(first + size, n) };
            }
        }
    return count;
}

/* The rows of a segment in as many chunks as it takes, all but the last one equal. */
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

static int make_work(const Pattern *p, int64_t (*list)(const Pattern *, const Segment *, int64_t, Task *),
                     Work *w) {
    w->segment_count = all_segments(p, NULL);
    w->segments = scratch(w->segment_count * (int64_t)sizeof(Segment));
    if (!w->segments) return -1;
    all_segments(p, w->segments);
    w->count = list(p, w->segments, w->segment_count, NULL);
    w->tasks = scratch(w->count * (int64_t)sizeof(Task));
    if (!w->tasks) {
        scratch_free(w->segments);
        return -1;
    }
    list(p, w->segments, w->segment_count, w->tasks);
    return 0;
}

/* All tasks, in nanoseconds of one core: multiply-adds of two products, 32 a nanosecond. */
static int64_t work_of(const Work *w, int64_t D) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < w->count; i++)
        pairs +=
            (w->tasks[i].to - w->tasks[i].from) * (w->tasks[i].last - w->tasks[i].first) * w->tasks[i].last;
    return pairs / 16 * (D + 1);
}

static void free_work(Work *w) {
    scratch_free(w->tasks);
    scratch_free(w->segments);
}

/* ---- forward --------------------------------------------------------------------------------- */

typedef struct {
    const S2AttentionForward *a;
    Pattern p;
    Work w;
    atomic_llong next; /* task that nobody has taken yet */
    float *memory;     /* `floats` for each thread */
    int64_t pitch, floats;
} Forward;

/* Turns scores [keys,BQ] into exp(score - maximum) in place, 0 where hidden; corrects the running maximum and
 * sum of each row. shrink: by how much what was summed before must shrink. */
static void softmax(float *p, const Block *b, float *maximum, float *sum, float *shrink) {
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
            for (int i = 0; i < NV; i++) top[i] = vf_max(top[i], vf_load(column + j * BQ + i * VW));
        for (int i = 0; i < NV; i++) {
            vf_store(maximum + (v + i) * VW, top[i]);
            top[i] = vf_select(top[i] == -INFINITY, (vf){ 0 },
                               top[i]); /* nothing seen: exp(-inf - 0), not exp(-inf + inf) */
        }
        for (int64_t j = 0; j < keys; j++)
            for (int i = 0; i < NV; i++) {
                float *x = column + j * BQ + i * VW;
                vf e = vf_exp_below(vf_load(x) - top[i]);
                vf_store(x, e);
                total[i] += e;
            }
        for (int i = 0; i < NV; i++) {
            vf less = vf_exp_below(old[i] - top[i]);
            vf_store(shrink + (v + i) * VW, less);
            vf_store(sum + (v + i) * VW, vf_load(sum + (v + i) * VW) * less + total[i]);
        }
    }
}

static void forward_task(const Forward *f, const Task *task, float *memory) {
    const S2AttentionForward *a = f->a;
    const Segment *s = task->segment;
    int64_t D = f->p.D, pitch = f->pitch, n = task->last - task->first, size = round_up(n, BQ);
    int64_t all = (task->to - task->from) * size;
    float *qt = memory, *out = qt + all * pitch, *maximum = out + all * pitch, *sum = maximum + all,
          *shrink = sum + all;
    float *k = shrink + BQ, *v = k + BK * pitch, *p = v + BK * pitch;
    for (int64_t i = 0; i < all; i += BQ) {
        int64_t first = i % size;
        load_rows(out, pitch, &a->q, s, task->from + i / size, task->first + first, min64(BQ, n - first), BQ,
                  (float)a->scale);
        transpose(qt + i * pitch, out, pitch);
    }
    memset(out, 0, (size_t)(all * pitch) * sizeof(float));
    for (int64_t i = 0; i < all; i++) {
        maximum[i] = -INFINITY;
        sum[i] = 0;
    }
    for (int64_t key = 0; key < task->last; key += BK) {
        int64_t keys = min64(BK, task->last - key);
        load_rows(k, pitch, &a->k, s, task->kv_head, key, keys, keys, 1);
        load_rows(v, pitch, &a->v, s, task->kv_head, key, keys, keys, 1);
        for (int64_t i = 0; i < all; i += BQ) {
            int64_t row = task->first + i % size, rows = min64(BQ, task->last - row);
            Block b = { s, row, rows, key, min64(keys, row + rows - key) };
            if (b.keys <= 0) continue;
            scores(p, &b, k, pitch, qt + i * pitch, D);
            softmax(p, &b, maximum + i, sum + i, shrink);
            for (int64_t r = 0; r < rows; r++)
                if (shrink[r] != 1.0f) {
                    float *x = out + (i + r) * pitch;
                    for (int64_t d = 0; d < pitch; d += VW) vf_store(x + d, vf_load(x + d) * shrink[r]);
                }
            multiply(ACROSS, out + i * pitch, pitch, p, BQ, v, pitch, rows, pitch / VW, b.keys, DEPTH, 1,
                     -FAR, row - key);
        }
    }
    for (int64_t i = 0; i < all; i++) {
        int64_t row = task->first + i % size, head = task->from + i / size;
        if (row >= task->last) continue;
        fetch(row_at(&a->out, s, row + FETCH, head), D * dtype_size(a->out.dtype));
        float *x = out + i * pitch, scale = sum[i] == 0 ? 0 : 1.0f / sum[i];
        for (int64_t d = 0; d < pitch; d += VW) vf_store(x + d, vf_load(x + d) * scale);
        store_row(row_at(&a->out, s, row, head), a->out.dtype, x, D);
        *lse_at(&a->lse, s, row, head) = maximum[i] + logf(sum[i]);
    }
}

static int forward_thread(int64_t index, void *context) {
    Forward *f = context;
    for (int64_t i; (i = atomic_fetch_add(&f->next, 1)) < f->w.count;)
        forward_task(f, &f->w.tasks[i], f->memory + index * f->floats);
    return 0;
}

int CPU(s2_attention_forward)(const void *args, void *stream) {
    const S2AttentionForward *a = args;
    (void)stream;
    Forward f = { .a = a };
    if (make_pattern("s2_attention_forward", &f.p, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary,
                     a->shift) ||
        make_work(&f.p, forward_tasks, &f.w))
        return -1;
    int64_t threads = min64(get_threads(), f.w.count);
    f.pitch = round_up(f.p.D, VW);
    f.floats = round_up(2 * (ROWS + BK) * f.pitch + 2 * ROWS + BQ + BK * BQ, VW);
    f.memory = scratch(threads * f.floats * (int64_t)sizeof(float));
    int status =
        f.memory ? parallel_for(threads, work_of(&f.w, f.p.D) / max64(threads, 1), forward_thread, &f) : -1;
    scratch_free(f.memory);
    free_work(&f.w);
    return status;
}

/* ---- backward -------------------------------------------------------------------------------- */

typedef struct {
    const S2AttentionBackward *a;
    Pattern p;
    Work w;
    int shifted;        /* the heads, */
    int64_t phase;      /* the distance of key chunks from query chunks, */
    int64_t begin, end; /* and the pairs (b, KV head), b K + KV head, that are being worked on */
    atomic_llong next;
    float *sums;   /* [pairs, heads of a KV head + 2, T, D], dq dk dv; NULL: the outputs are float32 */
    float *memory; /* `floats` for each thread */
    int64_t pitch, floats;
} Backward;

/* Where a row of dq, dk or dv is summed; `slot` is the head's number within its KV head, or H/K for dk, H/K +
 * 1 for dv. */
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

static void backward_task(const Backward *b, const Task *task, float *memory) {
    const S2AttentionBackward *a = b->a;
    const Segment *s = task->segment;
    int64_t D = b->p.D, pitch = b->pitch, vecs = pitch / VW, each = b->p.H / b->p.K,
            pair = s->b * b->p.K + task->kv_head;
    int64_t key0 = task->first - b->phase * chunk_of(s), keys = min64(chunk_of(s), task->last - key0);
    if (key0 < 0 || s->shifted != b->shifted || pair < b->begin || pair >= b->end) return;
    float *k = memory, *v = k + CHUNK * pitch, *dk = v + CHUNK * pitch, *dv = dk + CHUNK * pitch;
    float *q = dv + CHUNK * pitch, *g = q + BQ * pitch, *dq = g + BQ * pitch, *qt = dq + BQ * pitch,
          *gt = qt + BQ * pitch;
    float *p = gt + BQ * pitch, *ds = p + BK * BQ, *lse = ds + BK * BQ, *delta = lse + BQ;
    load_rows(k, pitch, &a->k, s, task->kv_head, key0, keys, keys, 1);
    load_rows(v, pitch, &a->v, s, task->kv_head, key0, keys, keys, 1);
    memset(dk, 0, (size_t)(keys * pitch) * sizeof(float));
    memset(dv, 0, (size_t)(keys * pitch) * sizeof(float));
    for (int64_t h = task->from; h < task->to; h++)
        for (int64_t row = task->first; row < task->last; row += BQ) {
            int64_t rows = min64(BQ, task->last - row);
            load_rows(g, pitch, &a->dout, s, h, row, rows, BQ, 1);
            load_rows(q, pitch, &a->out, s, h, row, rows, BQ, 1);
            for (int64_t i = 0; i < BQ; i++) {
                vf sum = { 0 };
                for (int64_t d = 0; d < pitch; d += VW)
                    sum += vf_load(q + i * pitch + d) * vf_load(g + i * pitch + d);
                delta[i] = vf_sum(sum);
                lse[i] = i < rows ? *lse_at(&a->lse, s, row + i, h) : 0;
                if (lse[i] == -INFINITY) lse[i] = 0; /* all scores are -inf: weights exp(-inf - 0) */
            }
            load_rows(q, pitch, &a->q, s, h, row, rows, BQ, (float)a->scale);
            transpose(qt, q, pitch);
            transpose(gt, g, pitch);
            for (int64_t key = 0; key < keys && key0 + key < row + rows; key += BK) {
                Block block = { s, row, rows, key0 + key,
                                min64(min64(BK, keys - key), row + rows - key0 - key) };
                int64_t below = block.key - row;
                scores(p, &block, k + key * pitch, pitch, qt, D);
                scores(ds, &block, v + key * pitch, pitch, gt, D);
                for (int64_t j = 0; j < block.keys; j++) {
                    int any = any_hidden(&block, j, 0);
                    for (int64_t i = first_vector(&block, j); i < BQ / VW; i++) {
                        float *pj = p + j * BQ + i * VW, *dsj = ds + j * BQ + i * VW;
                        vf e = vf_exp_below(vf_load(pj) - vf_load(lse + i * VW)),
                           d = e * (vf_load(dsj) - vf_load(delta + i * VW));
                        if (any) {
                            vi mask = hidden(&block, j, i);
                            e = vf_select(mask, (vf){ 0 }, e);
                            d = vf_select(mask, (vf){ 0 }, d);
                        }
                        vf_store(pj, e);
                        vf_store(dsj, d);
                    }
                }
                multiply(DOWN, dv + key * pitch, pitch, p, BQ, g, pitch, block.keys, vecs, rows, DEPTH, 1,
                         below, FAR);
                multiply(DOWN, dk + key * pitch, pitch, ds, BQ, q, pitch, block.keys, vecs, rows, DEPTH, 1,
                         below, FAR);
                multiply(ACROSS, dq, pitch, ds, BQ, k + key * pitch, pitch, rows, vecs, block.keys, DEPTH,
                         key > 0, -FAR, -below);
            }
            for (int64_t i = 0; i < rows; i++)
                add_row(sum_at(b, &a->dq, task, row + i, h, h - task->kv_head * each), dq + i * pitch,
                        (float)a->scale, D, b->phase > 0);
        }
    int64_t plain_from, plain_to;
    heads_of(&b->p, task->kv_head, 0, &plain_from, &plain_to);
    int add = b->phase > 0 || (b->shifted && plain_from < plain_to);
    for (int64_t j = 0; j < keys; j++) {
        add_row(sum_at(b, &a->dk, task, key0 + j, task->kv_head, each), dk + j * pitch, 1, D, add);
        add_row(sum_at(b, &a->dv, task, key0 + j, task->kv_head, each + 1), dv + j * pitch, 1, D, add);
    }
}

static int backward_thread(int64_t index, void *context) {
    Backward *b = context;
    for (int64_t i; (i = atomic_fetch_add(&b->next, 1)) < b->w.count;)
        backward_task(b, &b->w.tasks[i], b->memory + index * b->floats);
    return 0;
}

/* Rounds the sums of one slot of one pair to the outputs. */
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

/* All phases of all heads on the pairs begin .. end-1. */
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
        return -1;
    for (int64_t i = 0; i < 2 && !p->H; i++) { /* keys that no query sees */
        const Tensor *x = i ? &a->dv : &a->dk;
        for (int64_t j = 0; j < p->B * p->T * p->K; j++)
            memset(at(x, j / p->K / p->T * x->stride[0] + j / p->K % p->T * x->stride[1] +
                             j % p->K * x->stride[2]),
                   0, (size_t)(p->D * dtype_size(x->dtype)));
    }
    if (!p->H) return 0;
    if (make_work(p, backward_tasks, &b.w)) return -1;
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
    free_work(&b.w);
    return status;
}

/* ---- scratch --------------------------------------------------------------------------------- */

/* The blocks of all threads, and the sums; not the lists of segments and tasks, which are small. */
Scratch CPU(s2_attention_forward_scratch)(const void *args) {
    const S2AttentionForward *a = args;
    int64_t pitch = round_up(a->q.shape[3], VW);
    int64_t floats = round_up(2 * (ROWS + BK) * pitch + 2 * ROWS + BQ + BK * BQ, VW);
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
