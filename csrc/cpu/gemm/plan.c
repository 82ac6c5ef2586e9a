/* plan.c --- chooses how a product is computed. All that depends on shapes, strides and dtypes is decided
 * here, so the order of every sum follows from the sizes alone. Why each limit is what it is:
 * docs/tuning/gemm.md. */
#include "plan.h"

Gemm CPU(gemm_of_u)(const Gemm *g) {
    return (Gemm){ .M = g->M,
                   .N = g->R,
                   .K = g->K,
                   .a = g->a,
                   .b = g->a2,
                   .alpha = 1,
                   .c = g->u,
                   .c_row = g->u_row,
                   .c_dtype = F32 };
}

/* Tasks that multiply in parts would give u other bits than a product of its own does. Then a gradient of
 * LoRA would depend on whether dx is computed with it. */
int CPU(gemm_makes_u)(const Gemm *g, const Plan *p) {
    return g->R && g->a2.data && !p->swapped && (p->way != UNITS || p->step == PAIRS);
}

/* Columns of a panel for N of them: NR, or two vectors where N is four. */
static int64_t panel_columns(int64_t N) { return NV == 3 && ceil_div(N, VW) == 4 ? 2 * VW : NR; }

/* Few rows: the transposed product reads the larger matrix where it lies, which packing would not repay. Up
 * to 16 rows it is the narrow product for every dtype, which sums each row as if it were alone: generation
 * relies on that. Few columns and a dense along m: as rows they fill the vectors. A float32
 * product with few rows, on a matrix unit: each task packs its share of the larger matrix in the cache. */
static int swapping_pays(const Gemm *g, int32_t unit) {
#if MATRIX_UNIT
    int few = g->M > FEW_ROWS && g->M <= UNIT_FEW && g->M < g->N;
    if (few && unit == F32 && g->K >= 2 * UNIT_K) return 1;
#endif
    int few_rows = g->M <= 128 && g->M < g->N && g->b.row == 1;
    int few_columns = g->N <= 64 && g->N < g->M && g->a.row == 1;
    return (few_rows && (g->b.dtype == unit || (g->M <= 16 && g->R == 0))) || few_columns;
}

static void choose_rows_of_a(Plan *p, int32_t unit) {
    int64_t per = per_step(p);
    int floats = p->step == FLOATS, rows_dense = p->a.col == 1;
    int as_read = p->a.dtype == unit && p->K % per == 0 && p->a.row % per == 0; /* needs no conversion */
    p->rows_of_a = rows_dense && as_read ? IN_PLACE : PACKED;
    p->a_step = 1, p->a_row = p->a.row / per, p->ahead = MR * p->a_row;
    if (floats && p->a.row == 1 && p->a.dtype == F32 && p->M <= TURNED_ROWS)
        p->rows_of_a = IN_PLACE, p->a_step = p->a.col, p->ahead = AHEAD * p->a.col;
    if (floats && rows_dense && p->rows_of_a == PACKED) p->rows_of_a = CONVERTED;
    /* Rows a multiple of half a page apart fall on the same few lines of the L1 cache and push each other
     * out. So nothing is fetched ahead, and they are packed if there are enough columns to pay for it. */
    if (floats && rows_dense && p->rows_of_a != CONVERTED && p->a.row % 512 == 0) {
        p->ahead = 0;
        if (p->N > 768 || (p->panels_of_b == BY_TASK && p->M > FEW_ROWS)) p->rows_of_a = PACKED;
    }
}

static void choose_block(Plan *p) {
    int middle = p->panels_of_b == BY_TASK && p->M <= MID_ROWS;
    p->kc = p->M <= FEW_ROWS ? FEW_KC : middle ? MID_KC : p->step == PAIRS ? PAIRS_KC : KC;
    p->group = (middle ? 2 : 1) * SIDE * p->panel;
}

static Way choose_way(const Plan *p) {
    int pairs_in_rows = p->K % 2 == 0 && p->a.row % 2 == 0;
    if (p->N <= 16 && p->R == 0 && p->K && p->a.col == 1 && (p->step == FLOATS || pairs_in_rows))
        return NARROW;
    if (p->M <= FEW_ROWS && p->R == 0 && p->step == FLOATS && p->b.col == 1) return SWEEP;
    return BLOCKS;
}

/* Tiles write c if it is their sums plus at most one addend. */
static WritesOfC choose_writes_of_c(const Plan *p, const Gemm *g) {
    int one_addend = g->beta == 0 || (g->beta == 1 && !g->residual);
    if (p->swapped || g->alpha != 1 || g->bias || !one_addend) return AFTER_TILES;
    return g->c_dtype == F32 ? BY_TILES : g->c_dtype == BF16 ? BY_TILES_BF16 : AFTER_TILES;
}

static void choose_slice(Plan *p) {
    int64_t most = KS + KS / EXTRA;
    int only_b_is_packed = reads_rows(p) || p->panels_of_b == BY_TASK;
    if (only_b_is_packed && p->steps <= 2 * KS && p->steps * p->N <= PACK_BYTES / 4) most = 2 * KS;
    p->depth = max64(1, ceil_div(p->steps, max64(1, ceil_div(p->steps, most))));
    p->keeps_sums = p->writes_of_c != BY_TILES && p->depth < p->steps;
    int64_t depth_b = p->depth + p->steps2;
    p->wide_n = ceil_div(p->N, NR) * NR;
    if (p->panels_of_b == SHARED || p->keeps_sums)
        p->wide_n = min64(p->wide_n, max64(1, PACK_BYTES / 4 / depth_b / NR) * NR);
    p->wide_m = ceil_div(p->M, MR) * MR;
    if (p->rows_of_a != IN_PLACE) p->wide_m = min64(p->wide_m, max64(1, PACK_BYTES / 2 / depth_b / MR) * MR);
    if (p->keeps_sums) p->wide_m = min64(p->wide_m, max64(1, SUM_BYTES / 4 / p->wide_n / MR) * MR);
    if (p->rows_of_a == CONVERTED) p->a_row = p->depth + VW, p->ahead = MR * p->a_row;
}

/* The product that makes u shares the slices and the rows of a with its parent. */
static Plan plan_of_u(const Plan *parent, const Gemm *g) {
    Plan u = *parent;
    u.N = g->R, u.b = g->a2, u.R = u.steps2 = 0;
    u.panel = panel_columns(u.N), u.group = SIDE * u.panel;
    u.panels_of_b = SHARED, u.writes_of_c = BY_TILES, u.keeps_sums = 0;
    u.way = choose_way(&u) == NARROW ? NARROW : BLOCKS;
    return u;
}

/* The parts of a float32 take more of the cache. With a large K, few rows of a would fit. So K is cut. */
int64_t CPU(gemm_pieces)(const Gemm *g) {
#if MATRIX_UNIT
    int large = g->M > FEW_ROWS && g->N >= 2 * UNIT && g->c_dtype == F32;
    if (large && (g->a.dtype == F32 || g->b.dtype == F32)) return max64(1, ceil_div(g->K, UNIT_DEPTH));
#endif
    (void)g;
    return 1;
}

Gemm CPU(gemm_piece)(const Gemm *g, int64_t i, int64_t pieces) {
    Gemm piece = *g;
    int64_t k = i * g->K / pieces / 64 * 64, end = (i + 1) * g->K / pieces / 64 * 64; /* whole registers */
    piece.K = (i + 1 < pieces ? end : g->K) - k;
    piece.a = transposed(rows_from(transposed(g->a), k)), piece.b = rows_from(g->b, k);
    piece.a2.data = NULL;
    if (i) piece.R = 0, piece.beta = 1, piece.bias = piece.residual = NULL;
    return piece;
}

#if MATRIX_UNIT
/* Whether the matrix unit is faster than vectors. For bfloat16 it always is. float32 and float16 are
 * multiplied in parts: an element takes several products, and packing takes longer. So the unit is faster
 * only if the matrices are large. */
static int unit_pays(const Plan *p) {
    int large = p->K >= 2 * UNIT_K && p->M >= 2 * UNIT && p->N >= 2 * UNIT;
    return p->way == BLOCKS && p->K && (p->step == PAIRS || large);
}

/* Rows of a task that packs its own: at least four tasks for each thread, as many for each. 0 if they would
 * be too few to repay reading b. `bytes`: of 16 rows. */
static int64_t own_rows(const Plan *p, int64_t bytes) {
    int64_t most = min64(UNIT_ROWS, max64(2, UNIT_TASK_BYTES / bytes / 2 * 2) * UNIT);
    int64_t tasks = max64(4, ceil_div(p->M, most * p->threads)) * p->threads;
    return p->M < 16 * UNIT * p->threads ? 0 : ceil_div(p->M, tasks * 2 * UNIT) * 2 * UNIT;
}

/* Chooses the slices and the scratch of a product on the matrix unit. Every slice has all of k. */
static void plan_unit(Plan *p, const Gemm *g) {
    int64_t of_k = ceil_div(p->K, UNIT_K), all = max64(1, of_k + ceil_div(p->R, UNIT_K));
    p->parts_a = parts_of_dtype(p->a.dtype), p->parts_b = parts_of_dtype(p->b.dtype);
    if (p->R && p->step == FLOATS) p->parts_a = p->parts_b = max64(p->parts_a, p->parts_b); /* u too */
    int64_t a = all * p->parts_a * UNIT_BYTES, b = all * p->parts_b * UNIT_BYTES; /* 16 rows or columns */
    int in_place = p->step == PAIRS && p->a.col == 1 && p->K % UNIT_K == 0 && p->M % UNIT == 0 && p->R == 0 &&
                   p->N <= 128;
    p->way = UNITS, p->rows_of_a = in_place ? IN_PLACE : PACKED;
    p->threads = get_threads();
    p->own_rows = in_place ? 0 : own_rows(p, a);
    p->wide_n = min64(ceil_div(p->N, 2 * UNIT), max64(1, PACK_BYTES * p->parts_b / (2 * b))) * 2 * UNIT;
    p->wide_m = min64(ceil_div(p->M, 2 * UNIT), max64(1, PACK_BYTES * p->parts_a / a)) * 2 * UNIT;
    if (p->own_rows) p->wide_m = p->M;
    p->floats.b = p->wide_n / UNIT * b / 4;
    p->floats.a = in_place ? 0 : (p->own_rows ? p->threads * p->own_rows : p->wide_m) / UNIT * a / 4;
    p->floats.u = CPU(gemm_makes_u)(g, p) ? ceil_div(p->R, UNIT) * of_k * p->parts_b * UNIT_BYTES / 4 : 0;
}
#endif

static void count_floats(Plan *p, const Gemm *g, const Plan *of_u) {
    int64_t depth_b = p->depth + p->steps2;
    if (p->panels_of_b == SHARED) p->floats.b = depth_b * p->wide_n;
    if (CPU(gemm_makes_u)(g, p))
        p->floats.u = of_u->way == NARROW ? narrow_columns(of_u) * narrow_depth(of_u)
                                          : p->depth * ceil_div(p->R, NR) * NR;
    if (reads_rows(p)) p->floats.a2 = p->steps2 * p->wide_m + VW;
    if (p->rows_of_a == CONVERTED) p->floats.a = p->a_row * p->wide_m;
    if (p->rows_of_a == PACKED) p->floats.a = depth_b * p->wide_m + VW;
    if (p->keeps_sums) p->floats.sums = p->wide_m * p->wide_n;
}

/* Processors with a matrix unit multiply pairs in vectors at half the rate of floats, so narrow products,
 * which do not go to the unit, take floats. */
static Step choose_step(const Gemm *g) {
    int narrow = g->R == 0 && ((g->M <= 16 && g->M < g->N && g->b.row == 1) || (g->N <= 16 && g->a.col == 1));
    if (!DOTS || g->a.dtype != BF16 || g->b.dtype != BF16 || (MATRIX_UNIT && narrow)) return FLOATS;
    return PAIRS;
}

void CPU(gemm_plan)(const Gemm *g, Plan *plan, Plan *of_u) {
    Plan p = { .step = choose_step(g) };
    int32_t unit = p.step == PAIRS ? BF16 : F32; /* the dtype that is multiplied as it is stored */
    Matrix u = { g->u, g->u_row, 1, F32 };
    p.swapped = swapping_pays(g, unit);
    p.M = p.swapped ? g->N : g->M, p.N = p.swapped ? g->M : g->N, p.K = g->K, p.R = g->R;
    p.a = p.swapped ? transposed(g->b) : g->a, p.b = p.swapped ? transposed(g->a) : g->b;
    p.a2 = p.swapped ? transposed(g->b2) : u, p.b2 = p.swapped ? transposed(u) : g->b2;
    p.steps = ceil_div(p.K, per_step(&p)), p.steps2 = ceil_div(p.R, per_step(&p));
    p.panel = panel_columns(p.N);
    p.panels_of_b = p.M <= ROWS && p.N > 4 * NR && p.N >= p.M ? BY_TASK : SHARED;
    choose_rows_of_a(&p, unit);
    choose_block(&p);
    p.way = choose_way(&p);
    p.writes_of_c = choose_writes_of_c(&p, g);
#if MATRIX_UNIT
    if (unit_pays(&p)) plan_unit(&p, g);
#endif
    if (p.way == BLOCKS) {
        choose_slice(&p);
        if (CPU(gemm_makes_u)(g, &p)) *of_u = plan_of_u(&p, g);
        count_floats(&p, g, of_u);
    }
    if (p.way == NARROW) p.floats.b = narrow_columns(&p) * narrow_depth(&p);
    *plan = p;
}

int64_t CPU(gemm_plan_bytes)(const Plan *p) {
    return 4 * (p->floats.b + p->floats.u + p->floats.a2 + p->floats.a + p->floats.sums);
}

/* Columns that a packing task takes: neighbouring panels, because memory gives long runs of a row together.
 */
int64_t CPU(gemm_pack_columns)(const Plan *plan, int64_t columns, int64_t threads) {
    int64_t panels = ceil_div(columns, plan->panel);
    return plan->panel * min64(PANELS, max64(LEAST_PANELS, ceil_div(panels, 4 * threads)));
}

/* Rows of a task, from 3/4 of `most` to `most`. The choice keeps the wait for the last task short. */
static int64_t fair_rows(int64_t rows, int64_t most, int64_t threads) {
    int64_t best = most, least = INT64_MAX;
    for (int64_t tile = most; tile > 0 && tile >= most * 3 / 4; tile -= MR) {
        int64_t tasks = ceil_div(rows, tile), full = (tasks - 1) / threads * tile;
        int64_t longest = full + ((tasks - 1) % threads ? tile : rows - (tasks - 1) * tile);
        if (longest < least) least = longest, best = tile;
    }
    return best;
}

void CPU(gemm_plan_slice)(const Plan *plan, Slice *slice, int64_t threads, int packs_a) {
    int64_t rows = slice->m1 - slice->m0, cols = slice->n1 - slice->n0, steps = slice->s1 - slice->s0;
    int64_t panels = ceil_div(cols, NR);
    slice->a_row = reads_rows(plan) ? plan->a_row : steps;
    slice->tile_m = min64(ROWS, max64(1, TASK_BYTES / 4 / max64(1, steps) / MR) * MR);
    slice->tile_n = panels * NR;
    if (plan->panels_of_b == BY_TASK) { /* equal parts for all threads */
        slice->tile_m = ROWS / MR * MR;
        slice->tile_n = ceil_div(panels, ceil_div(ceil_div(cols, plan->group), threads) * threads) * NR;
        if (ceil_div(cols, slice->tile_n) % threads) slice->tile_n = ceil_div(panels, threads) * NR;
    } else { /* at least four tasks for each thread, unless they would become too small */
        slice->tile_m = fair_rows(rows, slice->tile_m, threads);
        while (slice->tile_m > 4 * MR &&
               ceil_div(rows, slice->tile_m) * ceil_div(cols, slice->tile_n) < 4 * threads)
            if (slice->tile_n > 4 * NR) slice->tile_n = ceil_div(slice->tile_n / NR, 2) * NR;
            else slice->tile_m = ceil_div(slice->tile_m / MR, 2) * MR;
    }
    slice->tiles_n = ceil_div(cols, slice->tile_n);
    slice->pack_n = CPU(gemm_pack_columns)(plan, cols, threads);
    slice->task_packs_a = !reads_rows(plan) && packs_a && slice->tiles_n == 1;
}
