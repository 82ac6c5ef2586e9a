/* parallel.c --- the one place that starts threads and takes memory.
 *
 * OpenMP runtimes keep a pool of threads that does not survive fork(): a child that enters a parallel region after its
 * parent did waits for ever for threads that do not exist. So a forked child runs its loops on the calling thread only. */
#define _DEFAULT_SOURCE                /* madvise */
#include "cpu.h"

#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

static atomic_int threads;             /* 0: what OpenMP says (OMP_NUM_THREADS, else the processors) */
static atomic_int forked;

static void in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(NULL, NULL, in_child); }

void set_threads(int n) { threads = n; }
int get_threads(void) { return forked ? 1 : threads ? threads : omp_get_max_threads(); }

int parallel_for(int64_t n, int (*body)(int64_t i, void *context), void *context) {
    int count = get_threads();
    if (count > n) count = (int)n;
    if (count <= 1) {
        for (int64_t i = 0; i < n; i++) if (body(i, context)) return -1;
        return 0;
    }
    atomic_int failed = 0;
    char first[512] = "";
#pragma omp parallel for num_threads(count) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) {
        if (failed) continue;
        if (body(i, context)) {
#pragma omp critical
            if (!failed) { failed = 1; strncpy(first, last_error(), sizeof first - 1); }
        }
    }
    return failed ? fail("%s", first) : 0;
}

/* Large blocks in huge pages: a thousandth of the page faults, which would cost as much as packing a matrix. */
void *scratch(int64_t bytes) {
    const size_t huge = 2 << 20, align = bytes < (int64_t)huge ? 64 : huge;
    void *p = bytes < 0 ? NULL : aligned_alloc(align, ((size_t)bytes + align) / align * align);        /* whole units, never 0 */
#ifdef MADV_HUGEPAGE
    if (p && align == huge) madvise(p, (size_t)bytes, MADV_HUGEPAGE);
#endif
    if (!p) fail("out of memory: %lld bytes of scratch", (long long)bytes);
    return p;
}

void scratch_free(void *p) { free(p); }
