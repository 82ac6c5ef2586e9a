/* unit.c --- a product on the matrix unit.
 *
 * Both factors are packed in registers of the unit, one behind the other along k, so each is read as one run
 * of memory. The parts of a register (see matrix_unit.h) follow each other. A task multiplies all of its rows
 * by 32 columns of b, then by the next 32. Meanwhile the rows stay in the second cache, and the columns in
 * the first one, or in the second if they are in parts. The unit adds up 32 products before it adds them to a
 * sum. So sums of any length are exact enough, and k is cut only for the sake of the caches.
 *
 * LoRA: u, scaled and rounded, continues the rows of a, and b2 the columns of b. What was tried, with
 * figures, is in docs/tuning/gemm.md. */
#include "pack.h"
#include "tile.h"

#if MATRIX_UNIT
#include <stdatomic.h>

enum {
    WIDE_SUMS = 2 * UNIT,   /* rows and columns of sums at a time */
    WORDS = UNIT_BYTES / 4, /* floats, or pairs, of a register */
    RUN = 4 * UNIT,         /* steps that are packed of 16 columns before the next take their turn */
};

/* Registers along k of the first product, and of both, each part counted once. */
static int64_t of_k(const Plan *p) { return ceil_div(p->K, UNIT_K); }
static int64_t of_all(const Plan *p) { return of_k(p) + ceil_div(p->R, UNIT_K); }
/* Bytes of 16 rows of a, and of 16 columns of b. */
static int64_t a_pitch(const Plan *p) { return of_all(p) * p->parts_a * UNIT_BYTES; }
static int64_t b_pitch(const Plan *p) { return of_all(p) * p->parts_b * UNIT_BYTES; }

/* ---- packing --------------------------------------------------------------------------------- */

/* The parts of up to 32 k of a line, from `p` on; zeros behind `count`. */
static inline __attribute__((always_inline)) void split_k(vu out[UNIT_PARTS], const char *p, int64_t count,
                                                          float scale, int64_t parts, int32_t dtype) {
    char part[4 * UNIT_K];
    if (count < UNIT_K) {
        memset(part, 0, sizeof part);
        memcpy(part, p, (size_t)(max64(count, 0) * dtype_size(dtype)));
        p = part;
    }
    vf low = vf_load_any(p, dtype) * scale, high = vf_load_any(p + VW * dtype_size(dtype), dtype) * scale;
    split(out, low, high, (int)parts);
}

/* What pack_parts() does where k is dense, `line` bytes from line to line. */
static inline __attribute__((always_inline)) void split_dense(float *out, const char *p, int64_t line,
                                                              int64_t K, int64_t lines, float scale,
                                                              int64_t parts, int left, int32_t dtype) {
    int64_t registers = ceil_div(K, UNIT_K), bytes = UNIT_K * dtype_size(dtype);
    vu x[UNIT_PARTS], words[UNIT_PARTS][UNIT];
    /* Rows go a line at a time, because memory gives long runs faster. */
    for (int64_t i = 0; i < UNIT && left; i++)
        for (int64_t r = 0; r < registers; r++) {
            split_k(x, p + i * line + r * bytes, i < lines ? K - r * UNIT_K : 0, scale, parts, dtype);
            for (int64_t q = 0; q < parts; q++)
                memcpy(out + (r * parts + q) * WORDS + i * UNIT, &x[q], sizeof x[q]);
        }
    for (int64_t r = 0; r < registers && !left; r++) {
        for (int64_t i = 0; i < UNIT; i++) {
            split_k(x, p + i * line + r * bytes, i < lines ? K - r * UNIT_K : 0, scale, parts, dtype);
            for (int64_t q = 0; q < parts; q++) words[q][i] = x[q];
        }
        for (int64_t q = 0; q < parts; q++, out += WORDS) {
            transpose((vf *)words[q]);
            memcpy(out, words[q], sizeof words[q]);
        }
    }
}

/* Packs the parts of 16 lines, from line n of N, each with K elements along k: rows of a left factor or
 * columns of a right one. `b` is [K,N]. Pair k of a register has elements k and k + 16, not 2k and 2k + 1:
 * that needs no shuffles, and sums are right as long as both factors have the same order. */
static void pack_parts(float *out, Matrix b, int64_t K, int64_t n, int64_t N, float scale, int64_t parts,
                       int left) {
    int64_t lines = min64(UNIT, N - n), line = b.col * dtype_size(b.dtype);
    const char *p = element(b, 0, n);
    if (b.row == 1) {
        if (b.dtype == F32) split_dense(out, p, line, K, lines, scale, parts, left, F32);
        else if (b.dtype == BF16) split_dense(out, p, line, K, lines, scale, parts, left, BF16);
        else split_dense(out, p, line, K, lines, scale, parts, left, F16);
        return;
    }
    for (int64_t r = 0; r < K; r += UNIT_K) {
        vf x[UNIT_K];
        vu words[UNIT_PARTS][UNIT];
        CPU(gemm_pack)((float *)x, b, r, UNIT_K, K, n, UNIT, N, scale, FLOATS);
        for (int64_t k = 0; k < UNIT; k++) {
            vu part[UNIT_PARTS];
            split(part, x[k], x[k + UNIT], parts);
            for (int q = 0; q < parts; q++) words[q][k] = part[q];
        }
        for (int q = 0; q < parts; q++, out += WORDS) {
            if (left) transpose((vf *)words[q]);
            memcpy(out, words[q], sizeof words[q]);
        }
    }
}

/* Registers of a right factor: columns n0 .. n1 of b[K,N]. `pitch`: floats from 16 columns to the next. */
static void pack_columns(float *out, int64_t pitch, Matrix b, int64_t K, int64_t N, int64_t n0, int64_t n1,
                         const Plan *p) {
    int64_t steps = ceil_div(K, UNIT_K) * UNIT;
    if (p->step == FLOATS) {
        for (int64_t n = n0; n < n1; n += UNIT, out += pitch) pack_parts(out, b, K, n, N, 1, p->parts_b, 0);
        return;
    }
    for (int64_t s = 0; s < steps; s += RUN)
        for (int64_t n = n0; n < n1; n += UNIT)
            CPU(gemm_pack)(out + (n - n0) / UNIT * pitch + s * UNIT, b, 2 * s, min64(RUN, steps - s), K, n,
                           UNIT, N, 1, PAIRS);
}

/* 16 rows of a[M,K] from row m, as registers of a left factor. */
static void pack_left(float *out, Matrix a, int64_t m, int64_t M, int64_t K, float scale, const Plan *p) {
    int64_t registers = ceil_div(K, UNIT_K);
    if (p->step == FLOATS) {
        pack_parts(out, transposed(a), K, m, M, scale, p->parts_a, 1);
        return;
    }
    if (a.dtype == BF16 && a.col == 1 && scale == 1) {
        int64_t whole = K / UNIT_K, rest = K % UNIT_K * 2;
        for (int64_t i = 0; i < UNIT; i++) {
            char *to = (char *)out + i * 64;
            const char *row = element(a, m + i, 0);
            vf x;
            for (int64_t r = 0; r < registers; r++, row += 64) {
                x = (vf){ 0 };
                if (m + i < M && r < whole) memcpy(&x, row, sizeof x);
                else if (m + i < M) memcpy(&x, row, (size_t)rest);
                memcpy(to + r * UNIT_BYTES, &x, sizeof x);
            }
        }
        return;
    }
    for (int64_t r = 0; r < registers; r++, out += WORDS) {
        vf x[UNIT];
        CPU(gemm_pack)((float *)x, transposed(a), r * UNIT_K, UNIT, K, m, UNIT, M, scale, PAIRS);
        transpose(x);
        memcpy(out, x, sizeof x);
    }
}

static int pack_b_task(int64_t i, void *context) {
    const Job *job = context;
    const Plan *p = job->plan;
    const Slice *at = &job->at;
    int64_t pitch = b_pitch(p) / 4, n = at->n0 + i * at->pack_n, n_end = min64(at->n1, n + at->pack_n);
    float *out = job->packed_b + (n - at->n0) / UNIT * pitch;
    pack_columns(out, pitch, p->b, p->K, p->N, n, n_end, p);
    if (p->R) pack_columns(out + of_k(p) * p->parts_b * WORDS, pitch, p->b2, p->R, p->N, n, n_end, p);
    return 0;
}

/* ---- rows ------------------------------------------------------------------------------------ */

static UnitFactor packed(const void *data, int64_t pitch, int64_t parts) {
    return (UnitFactor){ data, pitch, 64, parts * UNIT_BYTES, UNIT_BYTES, (int)parts, 0 };
}
/* `rows`: packed rows of a, from row m on. */
static UnitFactor left(const Job *job, const float *rows, int64_t m) {
    const Plan *p = job->plan;
    if (p->rows_of_a == IN_PLACE)
        return (UnitFactor){ element(p->a, m, 0), UNIT * p->a.row * 2, p->a.row * 2, 64,
                             .parts = 1,          .fetch = 1 };
    return packed(rows, a_pitch(p), p->parts_a);
}

/* unit_multiply(), compiled for each number of registers. */
static void multiply(float *c, int64_t c_row, UnitFactor a, UnitFactor b, int64_t count, int rows, int cols,
                     int add, UnitFetch fetch) {
    if (rows == 2 && cols == 2) unit_multiply(c, c_row, a, b, count, 2, 2, add, fetch);
    else if (rows == 2) unit_multiply(c, c_row, a, b, count, 2, 1, add, fetch);
    else if (cols == 2) unit_multiply(c, c_row, a, b, count, 1, 2, add, fetch);
    else unit_multiply(c, c_row, a, b, count, 1, 1, add, fetch);
}

/* Whether all of c[16 rows, 16 cols] are finite. */
static int finite(const float *c, int64_t c_row, int rows, int cols) {
    vf zeros = { 0 };
    for (int64_t i = 0; i < rows * UNIT; i++)
        for (int64_t j = 0; j < cols * UNIT; j += VW) zeros += 0 * vf_load(c + i * c_row + j);
    return vf_sum(zeros) == 0;
}

/* Mends sums that are not finite, where numbers are in parts. An infinity's lower parts are NaNs, so they
 * make its sums NaNs. The product of the first parts alone gives what float32 gives. */
static void settle(float *c, int64_t c_row, UnitFactor a, UnitFactor b, int64_t count, int rows, int cols) {
    float first[WIDE_SUMS * WIDE_SUMS] __attribute__((aligned(64)));
    if ((a.parts == 1 && b.parts == 1) || finite(c, c_row, rows, cols)) return;
    a.parts = b.parts = 1;
    multiply(first, WIDE_SUMS, a, b, count, rows, cols, 0, (UnitFetch){ 0 });
    for (int64_t i = 0; i < rows * UNIT; i++)
        for (int64_t j = 0; j < cols * UNIT; j++)
            if (!isfinite(first[i * WIDE_SUMS + j])) c[i * c_row + j] = first[i * WIDE_SUMS + j];
}

/* Packs rows m .. m_end of a to `out`, and u behind them. Computes u first if there is a product for it, with
 * the first columns only. */
static void ready_rows(const Job *job, float *out, int64_t m, int64_t m_end) {
    const Plan *p = job->plan;
    const Gemm *g = job->g;
    float u[UNIT * UNIT];
    for (; m < m_end; m += UNIT, out += a_pitch(p) / 4) {
        pack_left(out, p->a, m, p->M, p->K, 1, p);
        for (int64_t r = 0; r < p->R && job->of_u && job->at.n0 == 0; r += UNIT) {
            int64_t columns = min64(UNIT, p->R - r);
            UnitFactor a = packed(out, 0, p->parts_a),
                       a2 = packed(job->of_u->packed_b + r * of_k(p) * p->parts_b * UNIT, 0, p->parts_b);
            multiply(u, UNIT, a, a2, of_k(p), 1, 1, 0, (UnitFetch){ 0 });
            for (int64_t i = 0; i < min64(UNIT, p->M - m); i++)
                memcpy(g->u + (m + i) * g->u_row + r, u + i * UNIT, (size_t)columns * 4);
        }
        if (p->R) pack_left(out + of_k(p) * p->parts_a * WORDS, p->a2, m, p->M, p->R, g->scale2, p);
    }
}

/* ---- tasks ----------------------------------------------------------------------------------- */

/* Writes the block of the transposed product that begins at row m and column n. */
static void finish_turned(const Gemm *g, const float *x, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    float turned[WIDE_SUMS * WIDE_SUMS] __attribute__((aligned(64)));
    for (int64_t i = 0; i < WIDE_SUMS; i += UNIT)
        for (int64_t j = 0; j < WIDE_SUMS; j += UNIT) {
            vf part[UNIT];
            for (int r = 0; r < UNIT; r++) part[r] = vf_load(x + (i + r) * WIDE_SUMS + j);
            transpose(part);
            for (int r = 0; r < UNIT; r++) vf_store(turned + (j + r) * WIDE_SUMS + i, part[r]);
        }
    CPU(gemm_finish)(g, 0, turned, WIDE_SUMS, n, m, cols, rows);
}

/* c[m.., n..] = x + one addend or none, in float32 or bfloat16: what plan.c calls BY_TILES. Two vectors a
 * row. */
static inline __attribute__((always_inline)) void add_and_store(const Gemm *g, const float *x, int64_t m,
                                                                int64_t n, int64_t rows, int32_t dtype) {
    int64_t size = dtype_size(dtype), c_row = g->c_row * size, more_row = c_row;
    char *c = (char *)g->c + m * c_row + n * size;
    const char *more = g->beta == 1 ? c : NULL;
    if (g->residual)
        more_row = g->residual_row * size, more = (const char *)g->residual + m * more_row + n * size;
    for (int64_t i = 0; i < rows; i++, x += WIDE_SUMS, c += c_row) {
        vf low = vf_load(x), high = vf_load(x + VW);
        if (more) {
            low += vf_load_any(more, dtype), high += vf_load_any(more + VW * size, dtype);
            more += more_row;
        }
        if (dtype == F32) vf_store((float *)c, low), vf_store((float *)c + VW, high);
        else {
            halves both = round_two(low, high);
            memcpy(c, &both, sizeof both);
        }
    }
}

/* Writes `rows` by `cols` finished sums of the product as computed. */
static void write_sums(const Job *job, const float *x, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    const Gemm *g = job->g;
    WritesOfC writes = cols == WIDE_SUMS ? job->plan->writes_of_c : AFTER_TILES;
    if (writes == BY_TILES) add_and_store(g, x, m, n, rows, F32);
    else if (writes == BY_TILES_BF16) add_and_store(g, x, m, n, rows, BF16);
    else if (job->plan->swapped) finish_turned(g, x, m, n, rows, cols);
    else CPU(gemm_finish)(g, 0, x, WIDE_SUMS, m, n, rows, cols);
}

/* Rows m0 .. m1, packed in `packed_a`, times columns n0 .. n1. */
static void multiply_rows(const Job *job, const float *packed_a, int64_t m0, int64_t m1, int64_t n0,
                          int64_t n1) {
    const Plan *p = job->plan;
    const Gemm *g = job->g;
    int64_t all = of_all(p), blocks = ceil_div(all, UNIT_BLOCK + 2), size = dtype_size(g->c_dtype),
            c_row = g->c_row * size;
    float near[UNIT_ROWS * WIDE_SUMS] __attribute__((aligned(64)));
    for (int64_t n = n0; n < n1; n += WIDE_SUMS) {
        UnitFactor right = packed((const char *)job->packed_b + (n - job->at.n0) / UNIT * b_pitch(p),
                                  b_pitch(p), p->parts_b);
        int64_t width = min64(WIDE_SUMS, p->N - n);
        int cols = width > UNIT ? 2 : 1;
        for (int64_t block = 0, s = 0, end; block < blocks; block++, s = end) {
            end = s + ceil_div(all - s, blocks - block);
            for (int64_t m = m0; m < m1; m += WIDE_SUMS) {
                int64_t height = min64(WIDE_SUMS, p->M - m);
                int rows = height > UNIT ? 2 : 1;
                float *c = blocks == 1 ? near : near + (m - m0) * WIDE_SUMS;
                UnitFactor whole = left(job, packed_a + (m - m0) / UNIT * a_pitch(p) / 4, m), a = whole,
                           b = right;
                a.data += s * a.step, b.data += s * b.step;
                UnitFetch fetch = { 0 };
                if (end == all && !p->swapped)
                    fetch = (UnitFetch){ (char *)g->c + m * c_row + n * size, c_row };
                multiply(c, WIDE_SUMS, a, b, end - s, rows, cols, s > 0, fetch);
                if (end < all) continue;
                settle(c, WIDE_SUMS, whole, right, all, rows, cols);
                write_sums(job, c, m, n, height, width);
            }
        }
    }
}

/* ---- slices ---------------------------------------------------------------------------------- */

static int pack_a_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t m = job->at.m0 + i * 4 * UNIT;
    unit_begin();
    ready_rows(job, job->packed_a + (m - job->at.m0) / UNIT * a_pitch(job->plan) / 4, m,
               min64(job->at.m1, m + 4 * UNIT));
    unit_end();
    return 0;
}

static int multiply_task(int64_t i, void *context) {
    const Job *job = context;
    const Slice *at = &job->at;
    int64_t m = at->m0 + i / at->tiles_n * at->tile_m, n = at->n0 + i % at->tiles_n * at->tile_n;
    unit_begin();
    multiply_rows(job, job->packed_a + (m - at->m0) / UNIT * a_pitch(job->plan) / 4, m,
                  min64(at->m1, m + at->tile_m), n, min64(at->n1, n + at->tile_n));
    unit_end();
    return 0;
}

/* A product whose tasks pack their own rows of a. Each thread packs them into memory of its own, which stays
 * in the cache. */
typedef struct {
    const Job *job;
    atomic_llong next; /* the first row that no thread has taken */
} OwnRows;

static int own_rows_thread(int64_t index, void *context) {
    OwnRows *own = context;
    const Job *job = own->job;
    const Plan *p = job->plan;
    float *rows = job->packed_a + index * p->own_rows / UNIT * a_pitch(p) / 4;
    unit_begin();
    for (int64_t m; (m = atomic_fetch_add(&own->next, p->own_rows)) < p->M;) {
        int64_t m_end = min64(p->M, m + p->own_rows);
        ready_rows(job, rows, m, m_end);
        multiply_rows(job, rows, m, m_end, job->at.n0, job->at.n1);
    }
    unit_end();
    return 0;
}

static int run_slice(Job *job) {
    const Plan *p = job->plan;
    Slice *at = &job->at;
    int64_t rows = at->m1 - at->m0, cols = at->n1 - at->n0, registers = of_all(p), threads = p->threads;
    int64_t products = p->parts_a * p->parts_b; /* about as many as are computed for one */
    at->pack_n = max64(1, min64(PANELS, ceil_div(cols, 4 * threads * UNIT))) * UNIT;
    if (parallel_for(ceil_div(cols, at->pack_n), at->pack_n * registers * UNIT / 4, pack_b_task, job))
        return -1;
    if (p->own_rows) {
        OwnRows own = { .job = job };
        int64_t each = rows / threads * cols;
        return parallel_for(threads, each * registers * UNIT_K / 1024 * products, own_rows_thread, &own);
    }
    at->tile_m = min64(UNIT_ROWS, max64(1, UNIT_TASK_BYTES / (2 * a_pitch(p))) * WIDE_SUMS);
    while (at->tile_m > WIDE_SUMS && ceil_div(rows, at->tile_m) < 4 * threads)
        at->tile_m = ceil_div(at->tile_m / WIDE_SUMS, 2) * WIDE_SUMS;
    int64_t down = ceil_div(rows, at->tile_m), beside = max64(1, ceil_div(4 * threads, down));
    at->tile_n = ceil_div(ceil_div(cols, WIDE_SUMS), beside) * WIDE_SUMS;
    at->tiles_n = ceil_div(cols, at->tile_n);
    if (p->rows_of_a != IN_PLACE && at->n0 == 0 &&
        parallel_for(ceil_div(rows, 4 * UNIT), 4 * registers * UNIT, pack_a_task, job))
        return -1;
    return parallel_for(down * at->tiles_n, at->tile_m * at->tile_n * registers * UNIT_K / 1024 * products,
                        multiply_task, job);
}

int CPU(gemm_unit)(Job *job) {
    const Plan *p = job->plan;
    Slice *at = &job->at;
    if (job->of_u)
        pack_columns(job->of_u->packed_b, of_k(p) * p->parts_b * WORDS, job->g->a2, p->K, p->R, 0, p->R, p);
    for (at->m0 = 0; at->m0 < p->M; at->m0 = at->m1) {
        at->m1 = min64(p->M, at->m0 + p->wide_m);
        for (at->n0 = 0; at->n0 < p->N; at->n0 = at->n1) {
            at->n1 = min64(p->N, at->n0 + p->wide_n);
            if (run_slice(job)) return -1;
        }
    }
    return 0;
}
#else
int CPU(gemm_unit)(Job *job) {
    (void)job;
    return 0; /* no plan asks for it */
}
#endif
