/* cached_attention.c --- attention of new tokens over a cache of keys and values.
 *
 * With many query rows for a KV head, as in a chunk of a prompt, tasks are those of s2_attention's forward
 * pass: one segment, whose last S rows are the queries. With few, as in decoding, the keys take the time.
 * They are cut into parts, which follow from a sequence's length alone. A task is a run of parts for all
 * heads, and a second pass adds the parts up in their order. With very few, keys and values are multiplied
 * where they lie, and what is read later is fetched line by line on the way. Measurements:
 * docs/tuning/generate.md. */
#include "s2_unit_forward.h"

#include <stdatomic.h>

enum {
    FEW = 32,        /* query rows of a KV head up to which the keys are cut into parts */
    PARTS = 64,      /* parts at most */
    FEW_KEYS = 4096, /* a sequence with at most this many keys has parts of half a block */
    IN_PLACE = 8,    /* query rows of a KV head up to which keys and values are read where they lie */
    BLOCK = 512,     /* in place: all scores of this many keys are computed, then their values are added */
    GROUP = 4,       /* in place: query rows that share one reading of keys or values */
    KEYS = 64,       /* otherwise: keys that are converted to float32 at a time */
    RUNS = 4,        /* tasks for each thread, where there are enough parts */
    LINE = 64,       /* bytes of a cache line */
    AHEAD = 4096,    /* bytes between the end of the next VW rows and the line that is fetched */
};

typedef struct {
    const CachedAttention *a;
    int64_t S, H, K, D, each, rows; /* query heads and query rows of a KV head; row r is query r / each */
    int64_t pitch, parts;
    const int64_t *row, *length; /* [B], read once: another thread may change the arrays during the call */
    float *partial;              /* [B, parts, K, rows (pitch + 2)]: weighted values, maxima, sums */
    float *memory;               /* `floats` for each thread */
    int64_t floats, count;       /* tasks */
    int64_t run, runs;           /* few query rows: parts of a task, tasks of a sequence */
    atomic_llong next;           /* the first task that no thread has taken */
} Call;

/* ---- writing new keys and values --------------------------------------------------------------- */

static inline void convert_row(char *out, int32_t dtype, const char *x, int32_t from, int64_t D) {
    int64_t size = dtype_size(dtype), from_size = dtype_size(from), d = 0;
    for (; d + VW <= D; d += VW) vf_store_any(out + d * size, dtype, vf_load_any(x + d * from_size, from));
    for (; d < D; d++) store1(out + d * size, dtype, load1(x + d * from_size, from));
}

static int append_token(int64_t i, void *context) {
    const Call *c = context;
    int64_t b = i / c->S, s = i % c->S;
    for (int which = 0; which < 2; which++) {
        const Tensor *to = which ? &c->a->v_cache : &c->a->k_cache, *x = which ? &c->a->v : &c->a->k;
        for (int64_t h = 0; h < c->K; h++)
            convert_row(
                at(to, c->row[b] * to->stride[0] + (c->length[b] + s) * to->stride[1] + h * to->stride[2]),
                to->dtype, at(x, b * x->stride[0] + s * x->stride[1] + h * x->stride[2]), x->dtype, c->D);
    }
    return 0;
}

/* ---- few query rows: parts of the keys ---------------------------------------------------------- */

/* The number of keys in a part. A short sequence has parts of half a block, so that there is work for several
 * threads. A longer one has parts of whole blocks, because long streams of memory are read faster. */
static inline int64_t part_keys(int64_t keys) {
    if (keys <= FEW_KEYS) return BLOCK / 2;
    return BLOCK * ((keys + BLOCK * PARTS - 1) / (BLOCK * PARTS));
}
static inline int64_t parts_of(int64_t keys) { return (keys + part_keys(keys) - 1) / part_keys(keys); }

/* The most parts of a sequence of at most `keys` keys. */
static inline int64_t most_parts(int64_t keys) {
    return max64(parts_of(min64(keys, FEW_KEYS)), parts_of(min64(keys, BLOCK * PARTS)));
}

static inline float *partial_at(const Call *c, int64_t b, int64_t part, int64_t kv_head) {
    return c->partial + ((b * c->parts + part) * c->K + kv_head) * c->rows * (c->pitch + 2);
}

/* What to fetch next. One line is fetched for each line that is read, because the processor waits while many
 * are on their way. Lines are fetched in the order of memory, which the processor recognises. */
typedef struct {
    const char *line, *end, *next; /* `next` follows the lines up to `end`, which is NULL from there on */
    int64_t step;                  /* LINE, or 0 to fetch nothing new */
} Ahead;

static inline void fetch_line(Ahead *ahead) {
    /* 2: to the second cache, because the first one is full of what is read now */
    __builtin_prefetch(ahead->line, 0, 2);
    ahead->line += ahead->step;
}
static inline void after_rows(Ahead *ahead) {
    if (ahead->end && ahead->line >= ahead->end) ahead->line = ahead->next, ahead->end = NULL;
}

/* Halves the number of vectors: x[j] becomes x[j] and x[j + half], interleaved and added up in pairs. */
static inline __attribute__((always_inline)) void add_halves(vf *x, int half) {
    UNROLLED
    for (int j = 0; j < half; j++) x[j] = ZIP_LOW(x[j], x[j + half]) + ZIP_HIGH(x[j], x[j + half]);
}

/* p [rows,p_row] = scores of VW keys: queries [rows,pitch] times rows of k, which lie `step` bytes apart. A
 * key is loaded and converted once for all queries. If `shares` calls read the same keys, each of them
 * fetches one share of the lines.
 *
 * One query is multiplied by all VW keys at once. For several queries there are not enough registers, so a
 * pass takes four keys: keys `pass`, `pass` + `passes`, and so on. Each key leaves a vector of partial sums.
 * add_halves() turns two vectors into one until each pass has one vector left, and then joins the vectors of
 * the passes. In the end lane j holds the score of key j. */
static inline __attribute__((always_inline)) void dot_rows(float *p, int64_t p_row, const float *queries,
                                                           const char *k, int64_t step, int64_t pitch,
                                                           int32_t dtype, int rows, Ahead *ahead, int share,
                                                           int shares) {
    const int keys = rows == 1 ? VW : 4, passes = VW / keys, bytes = VW * (int)dtype_size(dtype);
    vf found[GROUP][VW];
    Ahead lines = *ahead; /* in registers */
    UNROLLED
    for (int pass = 0; pass < passes; pass++) {
        /* One pointer for four keys: with one for each key there would be too few registers. */
        const char *four[VW / 4];
        int64_t apart = passes * step, third = 3 * apart;
        vf sum[GROUP][VW];
        UNROLLED
        for (int i = 0; i < keys / 4; i++) four[i] = k + pass * step + 4 * i * apart;
        UNROLLED
        for (int i = 0; i < rows * keys; i++) sum[i / keys][i % keys] = (vf){ 0 };
        /* With a loop that may not run at all, the compiler keeps the sums in memory too. */
        int64_t d = 0;
        do {
            UNROLLED
            for (int j = 0; j < keys; j++) {
                if (j * bytes % LINE == 0 && j * bytes / LINE % shares == share) fetch_line(&lines);
                vf y = vf_load_any(four[j / 4] + (j % 4 == 3 ? third : j % 4 * apart), dtype);
                UNROLLED
                for (int r = 0; r < rows; r++) sum[r][j] += vf_load(queries + r * pitch + d) * y;
            }
            UNROLLED
            for (int i = 0; i < keys / 4; i++) four[i] += bytes;
        } while ((d += VW) < pitch);
        UNROLLED
        for (int r = 0; r < rows; r++) {
            UNROLLED
            for (int half = keys / 2; half > 0; half /= 2) add_halves(sum[r], half);
            found[r][pass] = sum[r][0];
        }
    }
    UNROLLED
    for (int r = 0; r < rows; r++) {
        UNROLLED
        for (int half = passes / 2; half > 0; half /= 2) add_halves(found[r], half);
        vf_store(p + r * p_row, found[r][0]);
    }
    ahead->line = lines.line;
}

/* Turns p [rows,p_row], scores of n keys from key `first` on, into exp(score - maximum), 0 where a row does
 * not see the key. Scales what the rows have summed before, out and sum, where a maximum has grown. */
static void weigh(const Call *c, float *p, int64_t p_row, int64_t length, int64_t first, int64_t n,
                  float *out, float *maximum, float *sum) {
    int64_t pitch = c->pitch, padded = round_up(n, VW);
    for (int64_t r = 0; r < c->rows; r++) {
        float *row = p + r * p_row;
        int64_t seen = max64(0, min64(n, length + r / c->each + 1 - first));
        vf top = vf_set1(maximum[r]), total = { 0 };
        for (int64_t j = 0; j < padded; j += VW) {
            for (int64_t i = max64(j, seen); i < j + VW; i++) row[i] = -INFINITY;
            top = vf_max(vf_load(row + j), top);
        }
        float most = top[0];
        for (int i = 1; i < VW; i++) most = top[i] > most ? top[i] : most;
        /* A row that has seen no key: exp(-inf - 0) is 0, exp(-inf + inf) is not. */
        float base = most == -INFINITY ? 0 : most;
        for (int64_t j = 0; j < padded; j += VW) {
            vf e = vf_exp_score(vf_load(row + j) - base);
            vf_store(row + j, e);
            total += e;
        }
        float less = vf_exp_score(vf_set1(maximum[r] - base))[0];
        if (less != 1.0f)
            for (int64_t d = 0; d < pitch; d += VW)
                vf_store(out + r * pitch + d, vf_load(out + r * pitch + d) * less);
        sum[r] = sum[r] * less + vf_sum(total);
        maximum[r] = most;
    }
}

/* out[n,pitch]: keys or values of a head in float32; zeros beyond D, and up to a whole vector of rows. */
static void load_keys(const Call *c, float *out, const Tensor *x, int64_t row, int64_t head, int64_t first,
                      int64_t n) {
    int64_t pitch = c->pitch, bytes = c->D * dtype_size(x->dtype);
    const char *start = at(x, row * x->stride[0] + head * x->stride[2] + first * x->stride[1]);
    int64_t step = x->stride[1] * dtype_size(x->dtype);
    for (int64_t i = 0; i < n; i++) {
        fetch(start + (i + FETCH) * step, bytes);
        load_row(out + i * pitch, start + i * step, x->dtype, c->D);
        for (int64_t d = c->D; d < pitch; d++) out[i * pitch + d] = 0;
    }
    memset(out + n * pitch, 0, (size_t)((round_up(n, VW) - n) * pitch) * sizeof(float));
}

/* queries [rows,pitch]: the query rows of a KV head, times the scale; zeros beyond D. */
static void load_queries(const Call *c, float *queries, int64_t b, int64_t head) {
    const Tensor *q = &c->a->q;
    for (int64_t r = 0; r < c->rows; r++) {
        float *x = queries + r * c->pitch;
        int64_t s = r / c->each, h = head * c->each + r % c->each;
        load_row(x, at(q, b * q->stride[0] + s * q->stride[1] + h * q->stride[2]), q->dtype, c->D);
        for (int64_t d = 0; d < c->pitch; d++) x[d] = d < c->D ? x[d] * (float)c->a->scale : 0;
    }
}

static void part_of_head(const Call *c, int64_t b, int64_t part, int64_t head, float *memory) {
    int64_t pitch = c->pitch, keys = c->length[b] + c->S;
    int64_t first = part * part_keys(keys), last = min64(keys, first + part_keys(keys));
    float *queries = memory, *k = queries + FEW * pitch, *v = k + KEYS * pitch, *p = v + KEYS * pitch;
    float *out = partial_at(c, b, part, head), *maximum = out + c->rows * pitch, *sum = maximum + c->rows;
    load_queries(c, queries, b, head);
    Ahead none = { .line = (const char *)k }; /* fetches nothing new */
    for (int64_t key = first; key < last; key += KEYS) {
        int64_t n = min64(KEYS, last - key);
        load_keys(c, k, &c->a->k_cache, c->row[b], head, key, n);
        load_keys(c, v, &c->a->v_cache, c->row[b], head, key, n);
        for (int64_t r = 0; r < c->rows; r++)
            for (int64_t j = 0; j < n; j += VW)
                dot_rows(p + r * KEYS + j, KEYS, queries + r * pitch, (const char *)(k + j * pitch),
                         pitch * (int64_t)sizeof(float), pitch, F32, 1, &none, 0, 1);
        weigh(c, p, KEYS, c->length[b], key, n, out, maximum, sum);
        multiply(NORMAL, out, pitch, p, KEYS, v, pitch, c->rows, pitch / VW, n, DEPTH, 1, -FAR, FAR);
    }
}

/* ---- at most IN_PLACE query rows: nothing is converted before it is multiplied -------------------- */

/* Rows of a cache, in bytes. */
typedef struct {
    const char *first;
    int64_t step, head_step;
} Rows;

static inline Rows rows_at(const Tensor *x, int64_t row, int64_t key) {
    int64_t size = dtype_size(x->dtype);
    return (Rows){ at(x, row * x->stride[0] + key * x->stride[1]), x->stride[1] * size, x->stride[2] * size };
}

/* p [rows,BLOCK] = queries [rows,pitch] times VW rows of k. */
typedef void Score(float *p, const float *queries, const char *k, int64_t step, int64_t pitch, Ahead *ahead);
/* out [rows,pitch] += p [rows,BLOCK] times n rows of v. */
typedef void AddValues(float *out, const float *p, const char *v, int64_t step, int64_t n, int64_t pitch,
                       Ahead *ahead);

/* float32 is not converted. With vectors of 16, two or three queries are faster one by one. With vectors of
 * 8, there are registers for three queries, but not for four. */
static inline __attribute__((always_inline)) void score(float *p, const float *queries, const char *k,
                                                        int64_t step, int64_t pitch, Ahead *ahead,
                                                        int32_t dtype, int rows) {
    const int alone = VW == 16 && dtype == F32 && rows < 4;
    const int shares = alone ? rows : VW == 8 && rows == 4 ? 2 : 1, together = rows / shares;
    UNROLLED
    for (int i = 0; i < shares; i++)
        dot_rows(p + i * together * BLOCK, BLOCK, queries + i * together * pitch, k, step, pitch, dtype,
                 together, ahead, i, shares);
}

static inline __attribute__((always_inline)) void add_values(float *out, const float *p, const char *v,
                                                             int64_t step, int64_t n, int64_t pitch,
                                                             Ahead *ahead, int32_t dtype, int rows) {
    enum { WIDTH = VW == 16 ? 4 : 2 }; /* vectors of a row that are summed at a time */
    for (int64_t d = 0; d < pitch; d += WIDTH * VW) {
        int vecs = (int)min64(WIDTH, (pitch - d) / VW);
        vf sum[GROUP][WIDTH];
        UNROLLED
        for (int i = 0; i < GROUP * WIDTH; i++) sum[i / WIDTH][i % WIDTH] = (vf){ 0 };
        for (int64_t j = 0; j < n; j++) {
            UNROLLED
            for (int i = 0; i < WIDTH; i++) {
                int64_t byte = (d + i * VW) * dtype_size(dtype);
                if (i >= vecs) break;
                if (byte % LINE == 0) fetch_line(ahead);
                vf y = vf_load_any(v + j * step + byte, dtype);
                UNROLLED
                for (int r = 0; r < rows; r++) sum[r][i] += vf_set1(p[r * BLOCK + j]) * y;
            }
        }
        UNROLLED
        for (int r = 0; r < rows; r++) {
            UNROLLED
            for (int i = 0; i < WIDTH; i++) {
                if (i >= vecs) continue;
                float *to = out + r * pitch + d + i * VW;
                vf_store(to, vf_load(to) + sum[r][i]);
            }
        }
    }
}

/* A copy of the loops for each dtype and number of rows. */
#define LOOPS(dtype, rows)                                                                                  \
    static void score_##dtype##_##rows(float *p, const float *queries, const char *k, int64_t step,         \
                                       int64_t pitch, Ahead *ahead) {                                       \
        score(p, queries, k, step, pitch, ahead, dtype, rows);                                              \
    }                                                                                                       \
    static void values_##dtype##_##rows(float *out, const float *p, const char *v, int64_t step, int64_t n, \
                                        int64_t pitch, Ahead *ahead) {                                      \
        add_values(out, p, v, step, n, pitch, ahead, dtype, rows);                                          \
    }
#define LOOPS_OF(dtype) LOOPS(dtype, 1) LOOPS(dtype, 2) LOOPS(dtype, 3) LOOPS(dtype, 4)
LOOPS_OF(F32)
LOOPS_OF(BF16)
LOOPS_OF(F16)
#define NAMES_OF(name, dtype) \
    [dtype] = { name##_##dtype##_1, name##_##dtype##_2, name##_##dtype##_3, name##_##dtype##_4 }
static Score *const SCORES[][GROUP] = { NAMES_OF(score, F32), NAMES_OF(score, BF16), NAMES_OF(score, F16) };
static AddValues *const VALUES[][GROUP] = { NAMES_OF(values, F32), NAMES_OF(values, BF16),
                                            NAMES_OF(values, F16) };
#undef LOOPS
#undef LOOPS_OF
#undef NAMES_OF

/* Writes the scores of n keys to p [K,rows,BLOCK]; queries [K,rows,pitch]. It takes VW keys of every head,
 * then the next VW keys, so that memory is read in one stream. */
static void scores_of(const Call *c, float *p, const float *queries, Rows k, int64_t n, Ahead *ahead,
                      float *memory) {
    int32_t dtype = c->a->k_cache.dtype;
    int64_t bytes = c->D * dtype_size(dtype);
    for (int64_t j = 0; j < n; j += VW) {
        for (int64_t head = 0; head < c->K; head++) {
            const char *x = k.first + j * k.step + head * k.head_step;
            int64_t step = k.step;
            if (n - j < VW) { /* the last rows are fewer: the sums of the others are not used */
                memset(memory, 0, (size_t)(VW * bytes));
                for (int64_t i = 0; j + i < n; i++)
                    memcpy((char *)memory + i * bytes, x + i * step, (size_t)bytes);
                x = (const char *)memory, step = bytes;
            }
            ahead->step = LINE;
            for (int64_t r = 0; r < c->rows; r += GROUP, ahead->step = 0)
                SCORES[dtype][min64(GROUP, c->rows - r) - 1](p + (head * c->rows + r) * BLOCK + j,
                                                             queries + (head * c->rows + r) * c->pitch, x,
                                                             step, c->pitch, ahead);
        }
        after_rows(ahead);
    }
}

/* out += p v, for n keys and every head of a part; p [K,rows,BLOCK]. */
static void add_values_of(const Call *c, int64_t b, int64_t part, const float *p, Rows v, int64_t n,
                          Ahead *ahead) {
    int32_t dtype = c->a->k_cache.dtype;
    for (int64_t j = 0; j < n; j += VW) {
        for (int64_t head = 0; head < c->K; head++) {
            ahead->step = LINE;
            for (int64_t r = 0; r < c->rows; r += GROUP, ahead->step = 0)
                VALUES[dtype][min64(GROUP, c->rows - r) - 1](
                    partial_at(c, b, part, head) + r * c->pitch, p + (head * c->rows + r) * BLOCK + j,
                    v.first + j * v.step + head * v.head_step, v.step, min64(VW, n - j), c->pitch, ahead);
        }
        after_rows(ahead);
    }
}

static void part_in_place(const Call *c, int64_t b, int64_t part, float *memory) {
    int64_t keys = c->length[b] + c->S, row = c->row[b];
    int64_t first = part * part_keys(keys), last = min64(keys, first + part_keys(keys));
    float *queries = memory, *p = queries + c->K * c->rows * c->pitch, *rest = p + c->K * c->rows * BLOCK;
    Rows k = rows_at(&c->a->k_cache, row, first), v = rows_at(&c->a->v_cache, row, first);
    Ahead ahead = { .line = k.first + VW * k.step + AHEAD };
    for (int64_t head = 0; head < c->K; head++) load_queries(c, queries + head * c->rows * c->pitch, b, head);
    for (int64_t key = first; key < last; key += BLOCK) {
        int64_t n = min64(BLOCK, last - key);
        ahead.end = k.first + n * k.step, ahead.next = v.first;
        scores_of(c, p, queries, k, n, &ahead, rest);
        for (int64_t head = 0; head < c->K; head++) {
            float *out = partial_at(c, b, part, head), *maximum = out + c->rows * c->pitch;
            weigh(c, p + head * c->rows * BLOCK, BLOCK, c->length[b], key, n, out, maximum,
                  maximum + c->rows);
        }
        k.first += n * k.step;
        ahead.end = v.first + n * v.step, ahead.next = k.first;
        add_values_of(c, b, part, p, v, n, &ahead);
        v.first += n * v.step;
    }
}

static void begin_part(const Call *c, int64_t b, int64_t part) {
    for (int64_t head = 0; head < c->K; head++) {
        float *out = partial_at(c, b, part, head), *maximum = out + c->rows * c->pitch;
        memset(out, 0, (size_t)(c->rows * c->pitch) * sizeof(float));
        for (int64_t r = 0; r < c->rows; r++) maximum[r] = -INFINITY, maximum[c->rows + r] = 0;
    }
}

/* The parts of a task are neighbours: the first keys of a part are fetched while the part before is read. */
static int part_thread(int64_t index, void *context) {
    Call *c = context;
    float *memory = c->memory + index * c->floats;
    for (int64_t i; (i = atomic_fetch_add(&c->next, 1)) < c->count;) {
        int64_t b = i / c->runs, first = i % c->runs * c->run;
        int64_t last = min64(first + c->run, parts_of(c->length[b] + c->S));
        for (int64_t part = first; part < last; part++) {
            begin_part(c, b, part);
            if (c->rows <= IN_PLACE && c->D == c->pitch && c->a->k_cache.dtype == c->a->v_cache.dtype)
                part_in_place(c, b, part, memory);
            else
                for (int64_t head = 0; head < c->K; head++) part_of_head(c, b, part, head, memory);
        }
    }
    return 0;
}

/* Row `i` of all sequences and KV heads: the parts, in their order, to out. */
static int add_parts(int64_t i, void *context) {
    const Call *c = context;
    const Tensor *out = &c->a->out;
    int64_t b = i / (c->K * c->rows), head = i / c->rows % c->K, r = i % c->rows;
    int64_t parts = parts_of(c->length[b] + c->S), pitch = c->pitch, last = c->rows * pitch + r;
    float most = -INFINITY, total = 0, *x = partial_at(c, b, 0, head) + r * pitch;
    for (int64_t part = 0; part < parts; part++) {
        float maximum = partial_at(c, b, part, head)[last];
        most = maximum > most ? maximum : most;
    }
    if (most == -INFINITY) most = 0;
    for (int64_t part = 0; part < parts; part++) {
        const float *from = partial_at(c, b, part, head), *y = from + r * pitch;
        float factor = vf_exp_score(vf_set1(from[last] - most))[0];
        total += factor * from[last + c->rows];
        for (int64_t d = 0; d < pitch; d += VW)
            vf_store(x + d, part ? vf_load(x + d) + factor * vf_load(y + d) : factor * vf_load(y + d));
    }
    float scale = total == 0 ? 0 : 1 / total;
    for (int64_t d = 0; d < pitch; d += VW) vf_store(x + d, vf_load(x + d) * scale);
    store_row(at(out, b * out->stride[0] + r / c->each * out->stride[1] +
                          (head * c->each + r % c->each) * out->stride[2]),
              out->dtype, x, c->D);
    return 0;
}

/* ---- many query rows: tasks of s2_attention ------------------------------------------------------ */

/* Query heads of a task, groups of them in a KV head, and rows of a task. */
static inline int64_t heads_of_task(const Call *c) {
    int64_t most = rows_of_tasks(c->S, c->H, c->D) / BQ, groups = (c->each + most - 1) / most;
    return (c->each + groups - 1) / groups;
}
static inline int64_t groups_of(const Call *c) { return (c->each + heads_of_task(c) - 1) / heads_of_task(c); }
static inline int64_t chunks_of(const Call *c) {
    int64_t most = rows_of_tasks(c->S, c->H, c->D) / heads_of_task(c) / BQ * BQ;
    return (c->S + most - 1) / most;
}
static inline int64_t rows_of_task(const Call *c) {
    return round_up((c->S + chunks_of(c) - 1) / chunks_of(c), BQ);
}

static int chunk_thread(int64_t index, void *context) {
    Call *c = context;
    const CachedAttention *a = c->a;
    int64_t B = a->q.shape[0], groups = groups_of(c), heads = heads_of_task(c), rows = rows_of_task(c);
    for (int64_t i; (i = atomic_fetch_add(&c->next, 1)) < c->count;) {
        /* The last rows see the most keys, so they go first. */
        int64_t chunk = chunks_of(c) - 1 - i / (B * c->K * groups), b = i / (c->K * groups) % B;
        int64_t kv_head = i / groups % c->K, from = kv_head * c->each + i % groups * heads;
        int64_t length = c->length[b], row = c->row[b];
        Segment s = { .length = { length + c->S, 0 } };
        Task task = { &s,
                      kv_head,
                      from,
                      min64(from + heads, (kv_head + 1) * c->each),
                      length + chunk * rows,
                      length + min64(c->S, (chunk + 1) * rows) };
        S2AttentionForward f = { a->out,         { .ndim = -1 },   a->q, a->k_cache, a->v_cache,
                                 { .ndim = -1 }, .scale = a->scale };
        /* A query's row in the segment is its place among the keys. */
        f.q.data = at(&f.q, b * f.q.stride[0] - length * f.q.stride[1]);
        f.out.data = at(&f.out, b * f.out.stride[0] - length * f.out.stride[1]);
        f.k.data = at(&f.k, row * f.k.stride[0]);
        f.v.data = at(&f.v, row * f.v.stride[0]);
        attention_task(&f, &task, c->memory + index * c->floats);
    }
    return 0;
}

/* ---- the op -------------------------------------------------------------------------------------- */

static Call call_of(const CachedAttention *a) {
    Call c = { .a = a, .S = a->q.shape[1], .H = a->q.shape[2], .K = a->k_cache.shape[2], .D = a->q.shape[3] };
    c.each = c.K ? c.H / c.K : 0;
    c.rows = c.S * c.each;
    c.pitch = round_up(max64(c.D, 1), VW);
    c.parts = most_parts(a->k_cache.shape[1]);
    S2AttentionForward f = { .q = a->q, .k = a->k_cache, .v = a->v_cache };
    int64_t converted = (FEW + 2 * KEYS) * c.pitch + FEW * KEYS;
    int64_t in_place = c.K * c.rows * (c.pitch + BLOCK) + VW * c.pitch;
    if (c.rows > FEW) c.floats = attention_floats(&f);
    else c.floats = round_up(c.rows > IN_PLACE ? converted : max64(converted, in_place), VW);
    return c;
}

/* The copies in row and length: 0 if all are inside the cache, -1 after fail(). */
static int copy_places(const CachedAttention *a, int64_t *row, int64_t *length) {
    long long B = a->q.shape[0], S = a->q.shape[1], N = a->k_cache.shape[0], P = a->k_cache.shape[1];
    for (int64_t b = 0; b < B; b++) {
        row[b] = given(&a->rows) ? ((const volatile int32_t *)a->rows.data)[b] : b;
        length[b] = ((const volatile int32_t *)a->lengths.data)[b];
        if (row[b] < 0 || row[b] >= N)
            return fail("cached_attention: rows[%lld] should be in 0..%lld, got %lld", (long long)b, N - 1,
                        (long long)row[b]);
        if (length[b] < 0 || length[b] + S > P)
            return fail("cached_attention: lengths[%lld] should be in 0..P-S=%lld, got %lld", (long long)b,
                        P - S, (long long)length[b]);
        for (int64_t i = 0; i < b; i++)
            if (row[i] == row[b])
                return fail("cached_attention: rows should differ, got %lld at %lld and %lld",
                            (long long)row[b], (long long)i, (long long)b);
    }
    return 0;
}

/* Nanoseconds of all tasks: the multiply-adds of two products, 32 in a nanosecond. Where few query rows share
 * the keys, the keys and values are what takes the time: 8 bytes in a nanosecond. */
static int64_t work_of(const Call *c, int64_t B) {
    int64_t keys = 0;
    for (int64_t b = 0; b < B; b++) keys += c->length[b] + c->S;
    int64_t reading = keys * c->K * c->D * dtype_size(c->a->k_cache.dtype) / 4;
    int64_t counting = keys * c->S * c->H / 16 * (c->D + 1);
    return c->rows <= FEW ? max64(reading, counting) : counting;
}

/* Tasks of a call. With few query rows there may be fewer. */
static inline int64_t most_tasks(const Call *c, int64_t B) {
    return c->rows <= FEW ? B * c->parts : B * c->K * groups_of(c) * chunks_of(c);
}

static int attend(Call *c, int64_t B) {
    int few = c->rows <= FEW;
    int64_t threads = min64(get_threads(), most_tasks(c, B));
    c->count = most_tasks(c, B);
    if (few) {
        int64_t used = 0; /* parts of the longest sequence */
        for (int64_t b = 0; b < B; b++) used = max64(used, parts_of(c->length[b] + c->S));
        c->run = max64(1, B * used / (RUNS * max64(threads, 1)));
        c->runs = (used + c->run - 1) / c->run;
        c->count = B * c->runs;
        c->partial = scratch(B * c->parts * c->K * c->rows * (c->pitch + 2) * (int64_t)sizeof(float));
    }
    c->memory = scratch(threads * c->floats * (int64_t)sizeof(float));
    int status = c->memory && (!few || c->partial) ? 0 : -1;
    if (!status)
        status =
            parallel_for(threads, work_of(c, B) / max64(threads, 1), few ? part_thread : chunk_thread, c);
    if (!status && few) status = parallel_for(B * c->K * c->rows, c->parts * (c->D / 8 + 8), add_parts, c);
    scratch_free(c->memory);
    scratch_free(c->partial);
    return status;
}

int CPU(cached_attention)(const void *args, void *stream) {
    const CachedAttention *a = args;
    (void)stream;
    Call c = call_of(a);
    int64_t B = a->q.shape[0], *places = scratch(2 * B * (int64_t)sizeof(int64_t));
    if (!places) return -1;
    c.row = places, c.length = places + B;
    int status = copy_places(a, places, places + B);
    if (!status && given(&a->k)) status = parallel_for(B * c.S, c.K * (c.D / 2 + 1), append_token, &c);
    if (!status && B > 0 && c.rows > 0) status = attend(&c, B);
    scratch_free(places);
    return status;
}

Scratch CPU(cached_attention_scratch)(const void *args) {
    const CachedAttention *a = args;
    Call c = call_of(a);
    int64_t B = a->q.shape[0], F = sizeof(float);
    Scratch found = { { 2 * B * (int64_t)sizeof(int64_t) } };
    if (B == 0 || c.rows == 0) return found;
    int64_t partial = c.rows <= FEW ? B * c.parts * c.K * c.rows * (c.pitch + 2) * F : 0;
    found.bytes[partial ? 2 : 1] = min64(get_threads(), most_tasks(&c, B)) * c.floats * F;
    if (partial) found.bytes[1] = partial;
    return found;
}
