/* plan.h --- how a product is computed: the vocabulary, the tuned sizes, and the Plan, which plan.c chooses
 * and the rest of this folder reads. Nothing else decides.
 *
 *   step    what one multiply-add takes along k, 32 bits: a float, or a pair of bfloat16 (k and k + 1)
 *   panel   up to NR columns of b, or MR rows of a, packed step after step, as a tile reads them
 *   tile    MR rows of c by one panel; its sums stay in registers
 *   block   the steps after which the sums of a tile go to memory
 *   slice   the rows, columns and steps that are packed at one time
 *   task    the rows and columns of a slice that one thread computes at a time */
#ifndef LONGLORA_GEMM_PLAN_H
#define LONGLORA_GEMM_PLAN_H

#include "gemm.h"
#include "../matrix_unit.h"

/* A tile is MR rows by NV vectors. 8 x 48 floats fill 24 of the 32 registers of AVX-512, 8 x 12 as many of
 * aarch64, 6 x 16 fill 12 of the 16 of AVX2. The others hold a row of b and one broadcast element of a. */
#if VW == 16 || defined __aarch64__
enum { MR = 8, NV = 3 };
#elif defined __AVX2__
enum { MR = 6, NV = 2 };
#else
enum { MR = 4, NV = 2 };
#endif
enum {
    NR = NV * VW, /* columns of a panel of b */
    FEW = 4, /* rows of the lower tile, for a rest of MR rows: enough sums to keep two multipliers busy */

    /* Blocks. The first of these that applies gives the number of steps. Shorter sums are more exact, and few
     * rows add them up quickly. */
    FEW_ROWS = 64,
    FEW_KC = 96, /* at most FEW_ROWS rows of c */
    MID_ROWS = 128,
    MID_KC = VW == 16 ? 144 : 288, /* at most MID_ROWS, where tasks pack b; twice as many panels then */
    PAIRS_KC = 288,                /* pairs of bfloat16: longer sums would be less exact */
    KC = VW == 16 ? 512 : 576,     /* otherwise: MR rows of a fit the L1 cache */
    SIDE = VW == 16 ? 2 : 4,       /* panels of b that stay in the L2 cache while rows of a pass by */

    /* Slices, at most. */
    KS = 1280,            /* steps; twice that where b is small */
    PACK_BYTES = 9 << 19, /* packed panels of b; twice that of a */
    SUM_BYTES = 8 << 20,  /* sums that are kept in float32 until the next slice */
    EXTRA = 8, /* a block or slice may be 1/EXTRA longer if that saves one, so LoRA's few steps cost none */

    /* Tasks, at most. */
    ROWS = 576,
    TASK_BYTES = (VW == 16 ? 320 : 240) << 10, /* rows of a: a third or half of an L2 cache */
    NEAR = ROWS * SIDE * NR,                   /* floats of sums on the stack */
    NEAR_B = (KC + KC / EXTRA) * SIDE * NR,    /* floats of its own panels of b there */
    LEAST_PANELS = 4,                          /* panels of a packing task, at least */
    PANELS = 16,                               /* and at most */

    TURNED_ROWS = VW == 16 ? 256 : FEW_ROWS, /* rows up to which a transposed a is read in place */
    AHEAD = 8,                               /* steps that strided reads are fetched ahead */
    NARROW_COLUMNS = VW / 2,                 /* columns that narrow.c multiplies at a time */

    /* On the matrix unit. */
    UNIT_BLOCK = 18,              /* registers along k in a block: 32 columns of bfloat16 fit the L1 cache */
    UNIT_ROWS = 256,              /* rows of a task, at most */
    UNIT_TASK_BYTES = 1152 << 10, /* rows of a of a task, at most */
    UNIT_DEPTH = 896,             /* largest K of a float32 product; a longer one is cut along k */
    UNIT_FEW = 512,               /* float32 products of at most this many rows are transposed */
};
_Static_assert((int)PAIRS_KC <= KC && (int)FEW_KC <= KC && 2 * (MID_KC + MID_KC / EXTRA) <= KC + KC / EXTRA,
               "the panels of b of a task fit NEAR_B");

typedef enum {
    BLOCKS, /* tiles on packed panels of b: blocks.c */
    NARROW, /* at most 16 columns: vectors along k: narrow.c */
    SWEEP,  /* at most FEW_ROWS rows: b is read once, where it lies: sweep.c */
    UNITS,  /* on the matrix unit: unit.c */
} Way;

typedef enum {
    FLOATS, /* a step is a float */
    PAIRS,  /* a step is a pair of bfloat16: both matrices are bfloat16 and the CPU multiplies them */
} Step;

typedef enum {
    PACKED,    /* in panels of MR rows */
    IN_PLACE,  /* tiles read a where it lies */
    CONVERTED, /* tiles read rows that were converted to float32 */
} RowsOfA;

typedef enum {
    SHARED,  /* packed before the tiles, for all tasks */
    BY_TASK, /* each task packs the panels that it needs, block by block, on its stack */
} PanelsOfB;

typedef enum {
    AFTER_TILES,   /* tiles leave sums; finish() applies alpha, beta, bias and residual, and converts */
    BY_TILES,      /* c is float32: tiles add to it directly */
    BY_TILES_BF16, /* c is bfloat16: tiles write it with their last block */
} WritesOfC;

typedef struct {
    Way way;
    Step step;
    RowsOfA rows_of_a;
    PanelsOfB panels_of_b;
    WritesOfC writes_of_c;
    int swapped;    /* c is computed as its transpose: the letters below are those of that product */
    int keeps_sums; /* in memory between slices of steps, because c cannot hold them */

    /* On the matrix unit. parts_a, parts_b: parts of each number. own_rows: rows of a task that packs its own
     * rows of a; 0 if all rows are packed before the tasks begin. */
    int64_t parts_a, parts_b, threads, own_rows;

    int64_t M, N, K, R;    /* K and R in elements */
    Matrix a, b, a2, b2;   /* a2 is u: the second product is a2 b2 */
    int64_t steps, steps2; /* K and R in steps */

    int64_t panel;          /* columns of a panel of b: NR, or fewer where that divides N better */
    int64_t kc, group;      /* steps and columns of a block */
    int64_t depth;          /* steps of a slice at most, without those of R */
    int64_t wide_m, wide_n; /* rows and columns of a slice at most */
    int64_t a_row, a_step;  /* floats from row to row (unless PACKED) and from step to step of a */
    int64_t ahead;          /* floats from what a tile reads of a to what it fetches; 0: nothing new */

    struct {
        int64_t b, u; /* panels of b, and those of the product that makes u */
        int64_t a2;   /* panels of u, where rows_of_a are not PACKED: else they are in a */
        int64_t a;    /* rows of a, panels or converted */
        int64_t sums;
    } floats; /* of scratch */
} Plan;

/* The slice in work. */
typedef struct {
    int64_t m0, m1, n0, n1, s0, s1; /* rows, columns, steps: s counts those of K, then those of R */
    int64_t a_row;                  /* floats from row to row of a, or of its panels */
    int64_t tile_m, tile_n;         /* rows and columns of a task, */
    int64_t tiles_n;                /* and how many tasks lie side by side */
    int64_t pack_n;                 /* columns of b that a packing task takes */
    int task_packs_a;               /* each task packs its own rows of a */
} Slice;

/* A product at work: what tasks share. */
typedef struct Job {
    const Gemm *g;
    const Plan *plan;
    struct Job *of_u; /* the product that makes u, done by the same tasks; NULL where there is none */
    Slice at;
    float *packed_a, *packed_b, *packed_a2;
    float *sums; /* NULL unless the plan keeps_sums */
} Job;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Elements of a step. */
static inline int64_t per_step(const Plan *plan) { return plan->step == PAIRS ? 2 : 1; }
/* Tiles read rows of a, not panels. */
static inline int reads_rows(const Plan *plan) { return plan->rows_of_a != PACKED; }
/* Steps of k of the slice, without those of R. */
static inline int64_t steps_of_a(const Job *job) { return min64(job->at.s1, job->plan->steps) - job->at.s0; }
/* Width of the panel of b that begins at column n: whole vectors, no more than are needed. */
static inline int64_t panel_width(const Job *job, int64_t n) {
    return min64(job->plan->panel, ceil_div(job->at.n1 - n, VW) * VW);
}

/* The columns that narrow.c computes, some of them unused; and floats of a column of b, padded to whole
 * vectors. */
static inline int64_t narrow_columns(const Plan *plan) {
    return plan->N == 1 ? 1 : ceil_div(plan->N, NARROW_COLUMNS) * NARROW_COLUMNS;
}
static inline int64_t narrow_depth(const Plan *plan) { return ceil_div(plan->steps, VW) * VW; }

/* u = a a2, the product that g needs first. */
Gemm CPU(gemm_of_u)(const Gemm *g);
/* The products that g is cut into along k, once u is made: how many, and number i, which adds to those
 * before. */
int64_t CPU(gemm_pieces)(const Gemm *g);
Gemm CPU(gemm_piece)(const Gemm *g, int64_t i, int64_t pieces);
/* Whether tasks make u along with c; else it is a product before. */
int CPU(gemm_makes_u)(const Gemm *g, const Plan *plan);
/* `of_u` is set where tasks make u along with c. */
void CPU(gemm_plan)(const Gemm *g, Plan *plan, Plan *of_u);
int64_t CPU(gemm_plan_bytes)(const Plan *plan);
/* Sizes of the tasks of a slice whose m0 .. s1 are set. `packs_a`: rows of a are not packed yet. */
void CPU(gemm_plan_slice)(const Plan *plan, Slice *slice, int64_t threads, int packs_a);
int64_t CPU(gemm_pack_columns)(const Plan *plan, int64_t columns, int64_t threads);

int CPU(gemm_blocks)(Job *job);
int CPU(gemm_narrow)(Job *job);
int CPU(gemm_sweep)(Job *job);
int CPU(gemm_unit)(Job *job);
/* Of the product that makes u, for blocks.c: packs b; computes rows m_begin .. m_end. */
int CPU(gemm_narrow_pack)(Job *job);
void CPU(gemm_narrow_rows)(const Job *job, int64_t m_begin, int64_t m_end);

#endif
