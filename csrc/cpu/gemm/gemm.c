/* gemm.c --- a product from its plan: takes the memory and runs the way that plan.c chose. */
#include "plan.h"

int64_t CPU(gemm_scratch)(const Gemm *g) {
    Plan plan, of_u;
    if (g->M == 0 || g->N == 0) return 0;
    int64_t pieces = CPU(gemm_pieces)(g), most = 0;
    Gemm u = CPU(gemm_of_u)(g);
    CPU(gemm_plan)(g, &plan, &of_u);
    /* The memory of one product is given back before the next begins. */
    if (g->R && g->a2.data && (pieces > 1 || !CPU(gemm_makes_u)(g, &plan))) most = CPU(gemm_scratch)(&u);
    if (pieces == 1) return max64(most, CPU(gemm_plan_bytes)(&plan));
    for (int64_t i = 0; i < pieces; i++) {
        Gemm piece = CPU(gemm_piece)(g, i, pieces);
        most = max64(most, CPU(gemm_scratch)(&piece));
    }
    return most;
}

int CPU(gemm)(const Gemm *g) {
    Plan plan, plan_u;
    if (g->M == 0 || g->N == 0) return 0;
    int64_t pieces = CPU(gemm_pieces)(g);
    Gemm of_u = CPU(gemm_of_u)(g);
    CPU(gemm_plan)(g, &plan, &plan_u);
    int u_before = g->R && g->a2.data && (pieces > 1 || !CPU(gemm_makes_u)(g, &plan));
    if (u_before && CPU(gemm)(&of_u)) return -1;
    for (int64_t i = 0; i < pieces && pieces > 1; i++) {
        Gemm piece = CPU(gemm_piece)(g, i, pieces);
        if (CPU(gemm)(&piece)) return -1;
    }
    if (pieces > 1) return 0;
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
