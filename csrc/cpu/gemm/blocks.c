/* blocks.c --- the usual way of a product: slices are packed, tasks run tiles over them (as in BLIS).
 *
 * SIDE panels of b stay in the second cache while the rows of a task pass by, and MR of these rows in the
 * first cache while the panels do. So c is written along its rows. Where the steps of a slice are few, as
 * many panels as there is room for take the place of SIDE. What is read only once is not packed.
 *
 * LoRA: tasks make u, a few columns, from the rows of a that they are about to multiply; then u and b2
 * continue the sums of a and b. */
#include "pack.h"
#include "tile.h"

/* One block: steps s .. next of the columns n0 .. n1, and where its tiles find b and leave sums. */
typedef struct {
    int64_t s, next, n0, n1;
    int64_t of_rows;  /* the steps that tiles read from rows of a; the others multiply packed u */
    int64_t m_begin;  /* the task's first row */
    const float *b;   /* the task's own panels; NULL where they are shared */
    float *near;      /* the task's own sums */
    int64_t near_row; /* floats from row to row of them; of one tile where no sums are kept between blocks */
    int one_block;    /* the slice is a single block */
} Block;

/* MR rows of a from row m, as this block's tiles read them, and of u. */
static inline __attribute__((always_inline)) void rows_of_a(const Job *job, const Block *block, int64_t m,
                                                            int64_t rows, Rows *a, Rows *u) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    *a = (Rows){ .step = plan->a_step, .ahead = plan->ahead }, *u = (Rows){ 0 };
    if (!reads_rows(plan)) {
        a->data = job->packed_a + (m - at->m0) * at->a_row + (block->s - at->s0) * MR;
        return;
    }
    a->data = plan->rows_of_a == CONVERTED
                  ? job->packed_a + (m - at->m0) * at->a_row + block->s - at->s0
                  : (const float *)plan->a.data + m * at->a_row + block->s * plan->a_step;
    for (int64_t r = 0; r < MR; r++) a->row[r] = min64(r, rows - 1) * at->a_row;
    u->data =
        job->packed_a2 + (m - at->m0) * plan->steps2 + (max64(block->s, plan->steps) - plan->steps) * MR;
}

/* Multiplies one tile of a block: row m, of `rows`, column n. `onward` is g for a slice that finds its own
 * sums in c. */
static inline __attribute__((always_inline)) void run_tile(const Job *job, const Gemm *onward,
                                                           const Block *block, const Rows *a, const Rows *u,
                                                           int64_t m, int64_t n, int64_t rows) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    const Gemm *g = job->g;
    int64_t width = panel_width(job, n), cols = min64(width, block->n1 - n), steps = at->s1 - at->s0;
    int low = rows <= FEW, tall = low ? FEW : MR;
    const float *b = block->b ? block->b + (n - block->n0) * (block->next - block->s)
                              : job->packed_b + (n - at->n0) * steps + (block->s - at->s0) * width;
    int first = block->s == (job->sums ? 0 : at->s0);
    int last = block->next == (job->sums ? plan->steps + plan->steps2 : at->s1);
    int entire = cols == width && rows == tall; /* the tile does not reach beyond c */
    int by_tile = plan->writes_of_c == BY_TILES && entire;
    int in_bf16 = plan->writes_of_c == BY_TILES_BF16 && entire && last;
    int64_t sums_row = job->sums ? plan->wide_n : block->near_row;
    float *sums = job->sums          ? job->sums + (m - at->m0) * plan->wide_n + n - at->n0
                  : block->one_block ? block->near
                                     : block->near + (m - block->m_begin) * block->near_row + n - block->n0;
    Out out = { .sums = sums, .row = sums_row };
    if (!first) out.add = sums, out.add_row = sums_row;
    if (by_tile) {
        float *c = (float *)g->c + m * g->c_row + n;
        int adds_to_c = block->s > 0 || g->beta == 1;
        if (first && adds_to_c) out.add = c, out.add_row = g->c_row;
        else if (first && g->residual)
            out.add = (const float *)g->residual + m * g->residual_row + n, out.add_row = g->residual_row;
        if (last) out.sums = c, out.row = g->c_row;
    }
    if (in_bf16) {
        out.bf16 = (uint16_t *)g->c + m * g->c_row + n, out.bf16_row = g->c_row;
        if (g->beta == 1) out.more = out.bf16, out.more_row = g->c_row;
        else if (g->residual)
            out.more = (const uint16_t *)g->residual + m * g->residual_row + n,
            out.more_row = g->residual_row;
    }
    Tile *run = CPU(gemm_tiles)[plan->step][reads_rows(plan)][low][width / VW - 1];
    run(block->of_rows, a, b, block->next - block->s - block->of_rows, u, &out);
    if (!by_tile && !in_bf16 && last) {
        const Gemm *rest = plan->writes_of_c == BY_TILES && at->s0 > 0 ? onward : g;
        CPU(gemm_finish)(rest, plan->swapped, sums, sums_row, m, n, rows, cols);
    }
}

/* Rows m_begin .. m_end and columns n_begin .. n_end of the slice. */
static void run_tiles(const Job *job, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    Gemm onward = *job->g; /* c has all but these sums already */
    onward.beta = 1, onward.residual = NULL;
    int64_t steps = at->s1 - at->s0, longest = plan->kc + plan->kc / EXTRA, group = plan->group;
    int own_b = plan->panels_of_b == BY_TASK, one_block = !own_b && !job->sums && steps <= longest;
    if (one_block) group = plan->panel * max64(SIDE, SIDE * KC / max64(1, steps));
    float near[NEAR] __attribute__((aligned(64))), near_b[NEAR_B] __attribute__((aligned(64)));
    Block block = { .m_begin = m_begin,
                    .b = own_b ? near_b : NULL,
                    .near = near,
                    .near_row = one_block ? plan->panel : group,
                    .one_block = one_block };
    for (int64_t n0 = n_begin; n0 < n_end; n0 += group) {
        block.n0 = n0, block.n1 = min64(n_end, n0 + group), block.s = at->s0;
        do { /* once even without steps: c is written */
            int64_t left = at->s1 - block.s, blocks = max64(1, ceil_div(left, longest));
            block.next = block.s + ceil_div(left, blocks);
            block.of_rows = block.next - block.s;
            if (reads_rows(plan)) block.of_rows = max64(0, min64(block.next, plan->steps) - block.s);
            if (own_b) CPU(gemm_pack_panels)(job, near_b, block.s, block.next, n0, block.n1);
            for (int64_t m = m_begin; m < m_end; m += MR) {
                int64_t rows = min64(MR, m_end - m);
                Rows a, u;
                rows_of_a(job, &block, m, rows, &a, &u);
                for (int64_t n = n0; n < block.n1; n += plan->panel)
                    run_tile(job, &onward, &block, &a, &u, m, n, rows);
            }
        } while ((block.s = block.next) < at->s1);
    }
}

/* ---- the rows of a task ---------------------------------------------------------------------- */

/* Makes ready what tiles need of rows of a: packs or converts them, adds this slice's part to u, and packs u
 * once it is whole. The rows are in the cache then, so memory gives them once for both products. */
static void ready_rows(const Job *job, int64_t m_begin, int64_t m_end) {
    const Plan *plan = job->plan;
    const Slice *at = &job->at;
    const Job *u = job->of_u;
    if (at->task_packs_a) CPU(gemm_pack_rows)(job, m_begin, m_end);
    for (int64_t m = m_begin; m < m_end && plan->rows_of_a == CONVERTED; m++)
        load_row(job->packed_a + (m - at->m0) * at->a_row, element(plan->a, m, at->s0), plan->a.dtype,
                 steps_of_a(job));
    if (u && at->n0 == 0 && u->plan->way == BLOCKS) run_tiles(u, m_begin, m_end, 0, u->plan->N);
    else if (u && at->n0 == 0 && at->s0 == 0) CPU(gemm_narrow_rows)(u, m_begin, m_end);
    for (int64_t m = m_begin; m < m_end && plan->R && at->s1 > plan->steps; m += MR)
        CPU(gemm_pack)(reads_rows(plan) ? job->packed_a2 + (m - at->m0) * plan->steps2
                                        : job->packed_a + (m - at->m0) * at->a_row + steps_of_a(job) * MR,
                       transposed(plan->a2), 0, plan->steps2, plan->R, m, MR, plan->M, job->g->scale2,
                       plan->step);
}

static int ready_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t m = job->at.m0 + i * MR * PANELS;
    ready_rows(job, m, min64(job->at.m1, m + MR * PANELS));
    return 0;
}

static int tile_task(int64_t i, void *context) {
    const Job *job = context;
    const Slice *at = &job->at;
    int64_t m = at->m0 + i / at->tiles_n * at->tile_m, m_end = min64(at->m1, m + at->tile_m);
    int64_t n = at->n0 + i % at->tiles_n * at->tile_n, n_end = min64(at->n1, n + at->tile_n);
    if (at->tiles_n == 1) ready_rows(job, m, m_end);
    run_tiles(job, m, m_end, n, n_end);
    return 0;
}

/* ---- slices ---------------------------------------------------------------------------------- */

/* Packs b for the slice of the product that makes u. */
static int pack_for_u(Job *job, int64_t threads) {
    Job *u = job->of_u;
    u->at = (Slice){ .m0 = job->at.m0,
                     .m1 = job->at.m1,
                     .n1 = u->plan->N,
                     .s0 = job->at.s0,
                     .s1 = min64(job->at.s1, job->plan->steps),
                     .a_row = job->at.a_row,
                     .pack_n = CPU(gemm_pack_columns)(u->plan, u->plan->N, threads) };
    if (job->at.n0 || u->plan->way == NARROW) return 0;
    return CPU(gemm_pack_slice)(u, 0);
}

/* Packs the slice and multiplies it. `packs_a`: its rows of a are not packed yet. */
static int run_slice(Job *job, int64_t threads, int packs_a) {
    const Plan *plan = job->plan;
    Slice *at = &job->at;
    CPU(gemm_plan_slice)(plan, at, threads, packs_a);
    int64_t rows = at->m1 - at->m0, cols = at->n1 - at->n0, steps = at->s1 - at->s0;
    if (CPU(gemm_pack_slice)(job, packs_a && !reads_rows(plan) && !at->task_packs_a)) return -1;
    if (job->of_u && pack_for_u(job, threads)) return -1;
    if ((plan->R || plan->rows_of_a == CONVERTED) && at->tiles_n > 1 &&
        parallel_for(ceil_div(rows, MR * PANELS), MR * PANELS * (plan->R + 8) * steps / 64, ready_task, job))
        return -1;
    int64_t tasks = ceil_div(rows, at->tile_m) * at->tiles_n;
    int64_t packing =
        plan->panels_of_b == BY_TASK ? 32 : 0; /* each task's packing costs as much as 32 more rows */
    return parallel_for(tasks, (rows + packing) * cols * steps / 64 / tasks, tile_task, job);
}

/* All steps of columns n .. n_end of the rows of the slice. */
static int run_columns(Job *job, int64_t threads, int64_t n, int64_t n_end) {
    const Plan *plan = job->plan;
    Slice *at = &job->at;
    int64_t all = plan->steps + plan->steps2;
    at->s0 = 0;
    do {
        at->s1 = at->s0 + plan->depth < plan->steps ? at->s0 + plan->depth : all;
        for (at->n0 = n; at->n0 < n_end; at->n0 = at->n1) {
            at->n1 = min64(n_end, at->n0 + plan->wide_n);
            if (run_slice(job, threads, at->n0 == n)) return -1;
        }
    } while ((at->s0 = at->s1) < all);
    return 0;
}

int CPU(gemm_blocks)(Job *job) {
    const Plan *plan = job->plan;
    Slice *at = &job->at;
    int64_t threads = get_threads();
    if (job->of_u && job->of_u->plan->way == NARROW && CPU(gemm_narrow_pack)(job->of_u)) return -1;
    for (at->m0 = 0; at->m0 < plan->M; at->m0 = at->m1) {
        at->m1 = min64(plan->M, at->m0 + plan->wide_m);
        for (int64_t n = 0, n_end; n < plan->N; n = n_end) {
            /* kept sums have room for a slice's columns only; c keeps them for all */
            n_end = plan->keeps_sums ? min64(plan->N, n + plan->wide_n) : plan->N;
            if (run_columns(job, threads, n, n_end)) return -1;
        }
    }
    return 0;
}
