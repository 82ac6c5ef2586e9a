/* peak.c --- multiply-adds as fast as this processor runs them. Profiles and benchmarks compare with this. */
#include "cpu.h"

enum { CHAINS = VW == 16 ? 24 : 12 }; /* independent of each other, so that latency does not matter */

/* Runs n rounds of CHAINS vectors in registers -> the number of floating point operations. */
double CPU(peak)(int64_t n, float *out) {
    vf a[CHAINS], x = vf_set1(0.999f), y = vf_set1(1e-3f);
    UNROLLED
    for (int i = 0; i < CHAINS; i++) a[i] = x + (float)i;
    for (int64_t k = 0; k < n; k++) {
        UNROLLED
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * x + y;
    }
    UNROLLED
    for (int i = 1; i < CHAINS; i++) a[0] += a[i];
    *out = vf_sum(a[0]);
    return 2.0 * VW * CHAINS * (double)n;
}
