/* gemm.c --- a product from its plan: takes the memory and runs the way that plan.c chose. */
#include "plan.h"

int64_t CPU(gemm_scratch)(const Gemm *g) {
    Plan plan, of_u;
    if (g->M == 0 || g->N == 0) return 0;
    CPU(gemm_plan)(g, &plan, &of_u);
    Gemm u = CPU(gemm_of_u)(g);
    int64_t first =
        plan.swapped && g->R ? CPU(gemm_scratch)(&u) : 0; /* given back before the product begins */
    return max64(first, CPU(gemm_plan_bytes)(&plan));
}

int CPU(gemm)(const Gemm *g) {
    Plan plan, plan_u;
    if (g->M == 0 || g->N == 0) return 0;
    CPU(gemm_plan)(g, &plan, &plan_u);
    Gemm of_u = CPU(gemm_of_u)(g);
    if (plan.swapped && g->R && CPU(gemm)(&of_u)) return -1;
    Job job = { .g = g, .plan = &plan }, job_u = { .g = &of_u, .plan = &plan_u };
    if (plan.way == SWEEP) return CPU(gemm_sweep)(&job);
    float *memory = scratch(CPU(gemm_plan_bytes)(&plan));
    if (!memory) return -1;
    job.packed_b = memory;
    job_u.packed_b = job.packed_b + plan.floats.b;
    job.packed_a2 = job_u.packed_b + plan.floats.u;
    job.packed_a = job_u.packed_a = job.packed_a2 + plan.floats.a2;
    if (plan.keeps_sums) job.sums = job.packed_a + plan.floats.a;
    if (plan.R && !plan.swapped) job.of_u = &job_u;
    int status = plan.way == NARROW  ? CPU(gemm_narrow)(&job)
                 : plan.way == UNITS ? CPU(gemm_unit)(&job)
                                     : CPU(gemm_blocks)(&job);
    scratch_free(memory);
    return status;
}
