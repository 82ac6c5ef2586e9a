/* pack.c --- packs rows of a and columns of b. Two inner loops: pack_turned where k is dense (blocks of
 * vectors are transposed), pack_along where the columns are (whole vectors are copied); and variants of the
 * second for several panels at a time, because memory gives long runs of a row faster than pieces of many
 * rows. */
#include "pack.h"

enum { STRIP = 64 }; /* steps that are packed of one panel before the next takes its turn */

/* Steps of `width` columns where k is dense. line: bytes from column to column. A panel narrower than a
 * vector (of a) is written in whole vectors too: each store covers the excess of the one before, and the last
 * has none. */
static inline __attribute__((always_inline)) void pack_turned(float *out, const char *p, int64_t line,
                                                              int64_t steps, int64_t n, int64_t width,
                                                              float scale, int32_t dtype) {
    int64_t size = dtype == F32 ? 4 : 2, per_line = 64 / size, blocks = ceil_div(width, VW) * per_line;
    for (int64_t s0 = 0; s0 < steps; s0 += per_line)
        for (int64_t block = 0; block < blocks; block += VW) { /* whole cache lines, VW of them */
            int64_t s = s0 + block % per_line, j = block / per_line * VW, count = min64(VW, steps - s);
            if (count <= 0) continue;
            vf x[VW];
            UNROLLED
            for (int i = 0; i < VW; i++) {
                x[i] = (vf){ 0 };
                const char *q = p + s * size + (j + i) * line;
                if (j + i >= n) continue;
                if (count == VW) x[i] = vf_load_any(q, dtype) * scale;
                else {
                    char part[4 * VW] = { 0 };
                    memcpy(part, q, (size_t)(count * size));
                    x[i] = vf_load_any(part, dtype) * scale;
                }
            }
            transpose(x);
            int64_t wide = width < VW && s + VW >= steps ? count - 1 : count;
            UNROLLED
            for (int i = 0; i < VW; i++)
                if (i < wide) vf_store(out + (s + i) * width + j, x[i]);
                else if (i < count) memcpy(out + (s + i) * width, &x[i], (size_t)width * 4);
        }
}

/* `steps` steps of n columns where those are dense; line: bytes from k to k + 1. n is a multiple of VW, or
 * less than VW if what lies behind may be read and overwritten. */
static inline __attribute__((always_inline)) void pack_along(float *out, const char *p, int64_t line,
                                                             int64_t steps, int64_t n, int64_t width,
                                                             float scale, int32_t dtype, Step step) {
    int64_t size = dtype == F32 ? 4 : 2;
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 3
        for (int64_t j = 0; j < n; j += VW) {
            vf x;
            if (step == PAIRS) {
                vh low, high;
                memcpy(&low, p + 2 * s * line + j * 2, sizeof low);
                memcpy(&high, p + (2 * s + 1) * line + j * 2, sizeof high);
                x = (vf)(__builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
            } else {
                __builtin_prefetch(p + (s + AHEAD) * line + j * size);
                x = vf_load_any(p + s * line + j * size, dtype) * scale;
            }
            vf_store(out + s * width + j, x);
        }
    }
}

/* ---- any matrix ------------------------------------------------------------------------------ */

static void turned(float *out, const char *p, int64_t line, int64_t steps, int64_t n, int64_t width,
                   float scale, int32_t dtype, Step step) {
    if (step == PAIRS || dtype == F32) { /* pairs travel as floats do */
        if (scale == 1) pack_turned(out, p, line, steps, n, width, 1, F32);
        else pack_turned(out, p, line, steps, n, width, scale, F32);
    } else if (dtype == BF16) pack_turned(out, p, line, steps, n, width, scale, BF16);
    else pack_turned(out, p, line, steps, n, width, scale, F16);
}

static void along(float *out, const char *p, int64_t line, int64_t steps, int64_t n, int64_t width,
                  float scale, int32_t dtype, Step step) {
    if (step == PAIRS) pack_along(out, p, line, steps, n, width, 1, BF16, PAIRS);
    else if (dtype == F32) pack_along(out, p, line, steps, n, width, scale, F32, FLOATS);
    else if (dtype == BF16) pack_along(out, p, line, steps, n, width, scale, BF16, FLOATS);
    else pack_along(out, p, line, steps, n, width, scale, F16, FLOATS);
}

void CPU(gemm_pack)(float *out, Matrix b, int64_t k0, int64_t steps, int64_t K, int64_t j0, int64_t width,
                    int64_t N, float scale, Step step) {
    int64_t per = step == PAIRS ? 2 : 1, n = min64(width, N - j0), whole = min64(steps, (K - k0) / per);
    int64_t rows = 0, cols = 0; /* steps and columns that go in whole vectors; the rest goes one by one */
    const char *p = element(b, k0, j0);
    if (step == FLOATS || (b.dtype == BF16 && scale == 1)) {
        if (b.row == 1) {
            cols = width, rows = whole;
            turned(out, p, b.col * dtype_size(b.dtype), rows, n, width, scale, b.dtype, step);
        } else if (b.col == 1) {
            cols = n / VW * VW, rows = whole;
            if (width < VW && n == width && j0 + VW <= N && whole > 0) cols = width, rows = whole - 1;
            along(out, p, b.row * dtype_size(b.dtype), rows, cols, width, scale, b.dtype, step);
        }
    }
    for (int64_t s = cols == width ? rows : 0; s < steps; s++)
        for (int64_t j = s < rows ? cols : 0; j < width; j++) {
            uint32_t u = step_at(b, k0 + s * per, j0 + j, K, N, scale, step);
            memcpy(out + s * width + j, &u, 4);
        }
}

/* ---- b --------------------------------------------------------------------------------------- */

/* Steps s0 .. s1 of the panel of `width` columns from j0. */
static void pack_panel(const Job *job, float *out, int64_t s0, int64_t s1, int64_t j0, int64_t width) {
    const Plan *p = job->plan;
    int64_t per = per_step(p), first = min64(s1, p->steps) - s0, from = max64(s0, p->steps);
    if (first > 0) CPU(gemm_pack)(out, p->b, s0 * per, first, p->K, j0, width, p->N, 1, p->step);
    if (s1 > from)
        CPU(gemm_pack)(out + (from - s0) * width, p->b2, (from - p->steps) * per, s1 - from, p->R, j0, width,
                       p->N, 1, p->step);
}

/* `steps` steps of n columns, a multiple of NR: row by row over all of their panels, which lie `pitch` floats
 * a column apart. */
static inline __attribute__((always_inline)) void
pack_wide(float *out, int64_t pitch, const char *p, int64_t line, int64_t steps, int64_t n, int32_t dtype) {
    int64_t size = dtype == F32 ? 4 : 2;
    for (int64_t s = 0; s < steps; s++, p += line)
        for (int64_t j = 0; j < n; j += NR) {
            __builtin_prefetch(p + AHEAD / 2 * line + j * size);
            UNROLLED
            for (int64_t i = 0; i < NR; i += VW)
                vf_store(out + j * pitch + s * NR + i, vf_load_any(p + (j + i) * size, dtype));
        }
}

void CPU(gemm_pack_panels)(const Job *job, float *out, int64_t s0, int64_t s1, int64_t n0, int64_t n1) {
    const Plan *plan = job->plan;
    Matrix b = plan->b;
    int64_t line = b.row * dtype_size(b.dtype), whole = 0, first = min64(s1, plan->steps) - s0;
    if (plan->step == FLOATS && b.col == 1 && first > 0 && plan->panel == NR) {
        whole = (n1 - n0) / NR * NR;
        if (b.dtype == F32) pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, F32);
        else if (b.dtype == BF16) pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, BF16);
        else pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, F16);
    }
    for (int64_t n = n0; n < n1; n += plan->panel) {
        int64_t s = n - n0 < whole ? s0 + first : s0, width = panel_width(job, n);
        if (s < s1) pack_panel(job, out + (n - n0) * (s1 - s0) + (s - s0) * width, s, s1, n, width);
    }
}

/* Columns n0 .. n1 of b to packed_b, all steps of the slice. */
static void pack_columns(const Job *job, int64_t n0, int64_t n1) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    int64_t steps = at->s1 - at->s0;
    float *out = job->packed_b + (n0 - at->n0) * steps;
    if (plan->b.col == 1 && plan->step == FLOATS) CPU(gemm_pack_panels)(job, out, at->s0, at->s1, n0, n1);
    else
        for (int64_t s = at->s0; s < at->s1; s += STRIP)
            for (int64_t n = n0, end = min64(at->s1, s + STRIP); n < n1; n += plan->panel) {
                int64_t width = panel_width(job, n);
                pack_panel(job, out + (n - n0) * steps + (s - at->s0) * width, s, end, n, width);
            }
}

/* ---- a --------------------------------------------------------------------------------------- */

#if VW == 16
enum { BESIDE = 2 * VW };

/* Steps of n rows of a, a multiple of BESIDE, where a line of memory holds one step of them all: each vector
 * has two panels' share. Panels lie `pitch` floats apart. */
static inline __attribute__((always_inline)) void pack_beside(float *out, int64_t pitch, const char *p,
                                                              int64_t line, int64_t steps, int64_t n,
                                                              int32_t dtype, Step step) {
    typedef uint16_t halves __attribute__((vector_size(64)));
    typedef float vf8 __attribute__((vector_size(32)));
    int64_t size = dtype == F32 ? 4 : 2, per = step == PAIRS ? 2 : 1;
    for (int64_t s = 0; s < steps; s++, p += per * line)
        for (int64_t j = 0; j < n; j += BESIDE) {
            const char *q = p + j * size;
            vf x[2];
            UNROLLED
            for (int64_t i = 0; i < per; i++) __builtin_prefetch(q + (AHEAD + i) * line);
            if (step == FLOATS) __builtin_prefetch(q + AHEAD * line + VW * size);
            if (step == PAIRS) {
                halves low, high;
                memcpy(&low, q, sizeof low);
                memcpy(&high, q + line, sizeof high);
                x[0] = (vf)__builtin_shufflevector(low, high, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38,
                                                   7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14,
                                                   46, 15, 47);
                x[1] = (vf)__builtin_shufflevector(low, high, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
                                                   22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29,
                                                   61, 30, 62, 31, 63);
            } else x[0] = vf_load_any(q, dtype), x[1] = vf_load_any(q + VW * size, dtype);
            UNROLLED
            for (int i = 0; i < 2; i++) {
                float *to = out + (j / MR + 2 * i) * pitch + s * MR;
                vf8 first = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7);
                vf8 second = __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
                memcpy(to, &first, sizeof first);
                memcpy(to + pitch, &second, sizeof second);
            }
        }
}

/* The `steps` steps of rows from m0 to m1 that go by pack_beside -> how many rows did. */
static int64_t pack_rows_beside(const Job *job, float *out, int64_t m0, int64_t m1, int64_t steps) {
    const Plan *plan = job->plan;
    if (plan->a.row != 1) return 0;
    int64_t rows = (m1 - m0) / BESIDE * BESIDE, pitch = MR * job->at.a_row;
    const char *p = element(plan->a, m0, job->at.s0 * per_step(plan));
    int64_t line = plan->a.col * dtype_size(plan->a.dtype);
    if (plan->step == PAIRS) pack_beside(out, pitch, p, line, steps, rows, BF16, PAIRS);
    else if (plan->a.dtype == F32) pack_beside(out, pitch, p, line, steps, rows, F32, FLOATS);
    else if (plan->a.dtype == BF16) pack_beside(out, pitch, p, line, steps, rows, BF16, FLOATS);
    else pack_beside(out, pitch, p, line, steps, rows, F16, FLOATS);
    return rows;
}
#else
static int64_t pack_rows_beside(const Job *job, float *out, int64_t m0, int64_t m1, int64_t steps) {
    (void)job, (void)out, (void)m0, (void)m1, (void)steps;
    return 0;
}
#endif

void CPU(gemm_pack_rows)(const Job *job, int64_t m0, int64_t m1) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    int64_t per = per_step(plan), end = at->s0 + steps_of_a(job);
    int64_t whole = min64(end, plan->K / per) - at->s0; /* steps that have all of their elements */
    float *out = job->packed_a + (m0 - at->m0) * at->a_row;
    int64_t beside = pack_rows_beside(job, out, m0, m1, whole);
    for (int64_t s = at->s0; s < end; s += STRIP)
        for (int64_t m = m0; m < m1; m += MR) {
            int64_t from = m - m0 < beside ? max64(s, at->s0 + whole) : s,
                    count = min64(end, s + STRIP) - from;
            if (count > 0)
                CPU(gemm_pack)(out + (m - m0) * at->a_row + (from - at->s0) * MR, transposed(plan->a),
                               from * per, count, plan->K, m, MR, plan->M, 1, plan->step);
        }
}

/* ---- a slice --------------------------------------------------------------------------------- */

static int64_t tasks_of_b(const Job *job) {
    return job->plan->panels_of_b == BY_TASK ? 0 : ceil_div(job->at.n1 - job->at.n0, job->at.pack_n);
}

static int pack_task(int64_t i, void *context) {
    const Job *job = context;
    const Slice *at = &job->at;
    int64_t of_b = tasks_of_b(job), n = at->n0 + i * at->pack_n, m = at->m0 + (i - of_b) * MR * PANELS;
    if (i < of_b) pack_columns(job, n, min64(at->n1, n + at->pack_n));
    else CPU(gemm_pack_rows)(job, m, min64(at->m1, m + MR * PANELS));
    return 0;
}

int CPU(gemm_pack_slice)(Job *job, int with_a) {
    const Slice *at = &job->at;
    int64_t of_a = with_a ? ceil_div(at->m1 - at->m0, MR * PANELS) : 0;
    return parallel_for(tasks_of_b(job) + of_a, (at->s1 - at->s0) * at->pack_n / 4, pack_task, job);
}
