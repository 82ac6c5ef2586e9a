/* gemm.c --- a product from its plan: takes the memory and runs the way that plan.c chose. */
#include "plan.h"

/* Whether u is computed first, as a product of its own. */
static int u_is_before(const Gemm *g, const Plan *plan) {
    return g->R && g->a2.data && !CPU(gemm_makes_u)(g, plan);
}

/* Products run one after the other, and each frees its memory. So the largest one counts. */
int64_t CPU(gemm_scratch)(const Gemm *g) {
    Plan plan, of_u;
    if (g->M == 0 || g->N == 0) return 0;
    int64_t pieces = CPU(gemm_pieces)(g), most = 0;
    for (int64_t i = 0; i < pieces && pieces > 1; i++) {
        Gemm piece = CPU(gemm_piece)(g, i, pieces);
        most = max64(most, CPU(gemm_scratch)(&piece));
    }
    CPU(gemm_plan)(g, &plan, &of_u);
    Gemm u = CPU(gemm_of_u)(g);
    if (pieces == 1) most = CPU(gemm_plan_bytes)(&plan);
    return u_is_before(g, &plan) ? max64(most, CPU(gemm_scratch)(&u)) : most;
}

static int multiply_pieces(const Gemm *g, int64_t pieces) {
    for (int64_t i = 0; i < pieces; i++) {
        Gemm piece = CPU(gemm_piece)(g, i, pieces);
        if (CPU(gemm)(&piece)) return -1;
    }
    return 0;
}

int CPU(gemm)(const Gemm *g) {
    Plan plan, plan_u;
    if (g->M == 0 || g->N == 0) return 0;
    CPU(gemm_plan)(g, &plan, &plan_u);
    Gemm of_u = CPU(gemm_of_u)(g);
    if (u_is_before(g, &plan) && CPU(gemm)(&of_u)) return -1;
    int64_t pieces = CPU(gemm_pieces)(g);
    if (pieces > 1) return multiply_pieces(g, pieces);
    Job job = { .g = g, .plan = &plan }, job_u = { .g = &of_u, .plan = &plan_u };
    if (plan.way == SWEEP) return CPU(gemm_sweep)(&job);
    float *memory = scratch(CPU(gemm_plan_bytes)(&plan));
    if (!memory) return -1;
    job.packed_b = memory;
    job_u.packed_b = job.packed_b + plan.floats.b;
    job.packed_a2 = job_u.packed_b + plan.floats.u;
    job.packed_a = job_u.packed_a = job.packed_a2 + plan.floats.a2;
    if (plan.keeps_sums) job.sums = job.packed_a + plan.floats.a;
    if (CPU(gemm_makes_u)(g, &plan)) job.of_u = &job_u;
    int status = plan.way == NARROW  ? CPU(gemm_narrow)(&job)
                 : plan.way == UNITS ? CPU(gemm_unit)(&job)
                                     : CPU(gemm_blocks)(&job);
    scratch_free(memory);
    return status;
}
