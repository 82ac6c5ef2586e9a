/* parallel.c --- the one place that starts threads and takes memory.
 *
 * OpenMP runtimes keep a pool of threads that does not survive fork(): a child that enters a parallel region
 * after its parent did waits for ever for threads that do not exist. So a forked child runs its loops on the
 * calling thread only.
 *
 * The ladder, on two cores of a Zen 5 in a virtual machine:
 *   to start a second thread that sleeps costs 5 us: rms_norm of 64x256 3.0 us alone, 8.3 in two; matmul
 * 64x64x64 2.9, 7.9 a step of SmolLM2, T 4096, bfloat16: with scratch from malloc 8,480 page faults, 0.11 to
 * 0.28 s of system time; with large blocks kept none, 0.02 to 0.09 s memory that the host has to find first
 * costs 2 s a GiB there, memory used a moment ago 0.06 in huge pages, 0.6 in small */
#define _DEFAULT_SOURCE /* madvise, MAP_ANONYMOUS */
#include "cpu.h"

#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- threads --------------------------------------------------------------------------------- */

static atomic_int threads; /* 0: what OpenMP says (OMP_NUM_THREADS, else the processors) */
static atomic_int forked;
static atomic_llong grain =
    20000; /* nanoseconds of work that are worth a thread: four times what it costs to wake one */

void set_threads(int n) { threads = n; }
int get_threads(void) { return forked ? 1 : threads ? threads : omp_get_max_threads(); }
void set_grain(int64_t nanoseconds) { grain = nanoseconds; }
int64_t get_grain(void) { return grain; }

int parallel_for(int64_t n, int64_t cost, int (*body)(int64_t i, void *context), void *context) {
    int64_t count = get_threads(), work, worth = grain;
    if (__builtin_mul_overflow(n, cost, &work)) work = INT64_MAX;
    if (count > n) count = n;
    if (worth && count > work / worth) count = work / worth;
    if (count <= 1) {
        for (int64_t i = 0; i < n; i++)
            if (body(i, context)) return -1;
        return 0;
    }
    atomic_int failed = 0;
    char first[512] = "";
#pragma omp parallel for num_threads((int)count) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) {
        if (failed) continue;
        if (body(i, context)) {
#pragma omp critical
            if (!failed) {
                failed = 1;
                strncpy(first, last_error(), sizeof first - 1);
            }
        }
    }
    return failed ? fail("%s", first) : 0;
}

/* ---- memory ---------------------------------------------------------------------------------- */

enum { LINE = 64, HUGE_PAGE = 2 << 20 };

/* Straight from the system, in huge pages where it has them (a thousandth of the page faults), and so aligned
 * that the first of them is whole. Pages are committed when first touched and all go back at once when they
 * are unmapped. */
void *map_memory(int64_t bytes) {
    size_t size = (size_t)bytes, spare = bytes < HUGE_PAGE ? 0 : HUGE_PAGE;
    char *p = bytes < 0
                  ? MAP_FAILED
                  : mmap(NULL, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!spare) return p;
    size_t before = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE, page = (size_t)sysconf(_SC_PAGESIZE);
    size_t end = (before + size + page - 1) / page * page;
    if (before) munmap(p, before);
    if (end < size + spare) munmap(p + end, size + spare - end);
#ifdef MADV_HUGEPAGE
    madvise(p + before, size, MADV_HUGEPAGE);
#endif
    return p + before;
}

void unmap_memory(void *p, int64_t bytes) { munmap(p, (size_t)bytes); }

/* A block begins with its size. Freed blocks of LARGE bytes and more are kept, touched as they are, for the
 * next call: fresh pages would have to be faulted in and cleared each time, which costs as much as packing a
 * matrix. A request takes the smallest block that is large enough; where there is none, all go back to the
 * system before a larger one is mapped, so a run of equal steps soon lives on a few blocks that fit its
 * largest calls. KEEP bytes at most are kept. */
enum { LARGE = 1 << 20, SLOTS = 16 };
static const int64_t KEEP = (int64_t)128 << 20;
typedef struct {
    int64_t bytes;
} Block;
static Block *kept[SLOTS];
static int64_t kept_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the two above */

static void take_lock(void) { pthread_mutex_lock(&lock); }
static void drop_lock(void) { pthread_mutex_unlock(&lock); }
static void in_child(void) {
    forked = 1;
    drop_lock();
}
__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(take_lock, drop_lock, in_child); }

static Block *from_kept(int64_t bytes) {
    Block *found = NULL, *gone[SLOTS] = { NULL };
    int best = -1;
    take_lock();
    for (int i = 0; i < SLOTS; i++)
        if (kept[i] && kept[i]->bytes >= bytes && (best < 0 || kept[i]->bytes < kept[best]->bytes)) best = i;
    if (best >= 0) {
        found = kept[best];
        kept[best] = NULL;
        kept_bytes -= found->bytes;
    } else {
        memcpy(gone, kept, sizeof gone);
        memset(kept, 0, sizeof kept);
        kept_bytes = 0;
    }
    drop_lock();
    for (int i = 0; i < SLOTS; i++)
        if (gone[i]) unmap_memory(gone[i], gone[i]->bytes);
    return found;
}

void *scratch(int64_t bytes) {
    int64_t size = bytes < 0 || bytes > INT64_MAX - 2 * HUGE_PAGE ? -1 : (bytes + 2 * LINE - 1) / LINE * LINE;
    Block *block = NULL;
    if (size >= LARGE) {
        size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        if ((block = from_kept(size))) return (char *)block + LINE;
        block = map_memory(size);
    } else if (size >= 0) block = aligned_alloc(LINE, (size_t)size);
    if (!block) {
        fail("out of memory: %lld bytes of scratch", (long long)bytes);
        return NULL;
    }
    block->bytes = size;
    return (char *)block + LINE;
}

void scratch_free(void *p) {
    if (!p) return;
    Block *block = (Block *)((char *)p - LINE);
    if (block->bytes < LARGE) {
        free(block);
        return;
    }
    take_lock();
    for (int i = 0; i < SLOTS && block && kept_bytes + block->bytes <= KEEP; i++)
        if (!kept[i]) {
            kept[i] = block;
            kept_bytes += block->bytes;
            block = NULL;
        }
    drop_lock();
    if (block) unmap_memory(block, block->bytes);
}
