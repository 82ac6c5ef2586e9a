/* parallel.c --- the one place that starts threads and takes memory.
 *
 * Threads wait in a pool, OpenMP's or our own, which does not survive fork(). If a parent has run a loop in
 * threads, its child would wait for ever for threads that do not exist. So a forked child runs its loops on
 * the calling thread only.
 *
 * Figures for what a thread and fresh memory cost: docs/tuning/parallel.md. */
#define _DEFAULT_SOURCE  /* madvise, MAP_ANONYMOUS */
#define _DARWIN_C_SOURCE /* the same on macOS, and _SC_NPROCESSORS_ONLN */
#include "cpu.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#ifndef LONGLORA_POOL
#include <omp.h>
#endif

/* ---- threads --------------------------------------------------------------------------------- */

/* A call of parallel_for. It lives on its caller's stack. */
typedef struct Loop {
    int64_t n;
    int (*body)(int64_t i, void *context);
    void *context;
    atomic_int failed;
    char first[512];    /* the message of the body that failed first */
    atomic_llong next;  /* the index that is taken next */
    int wanted, inside; /* of the pool: helpers that may still join, and helpers that are in it */
    struct Loop *older; /* of the pool: in the list of open loops */
} Loop;

static pthread_mutex_t errors = PTHREAD_MUTEX_INITIALIZER; /* of `first` of all loops */

static void turn(Loop *loop, int64_t i) {
    if (loop->failed || !loop->body(i, loop->context)) return;
    pthread_mutex_lock(&errors);
    if (!loop->failed) strncpy(loop->first, last_error(), sizeof loop->first - 1);
    loop->failed = 1;
    pthread_mutex_unlock(&errors);
}

static void take_turns(Loop *loop) {
    for (int64_t i; (i = atomic_fetch_add(&loop->next, 1)) < loop->n;) turn(loop, i);
}

#ifndef LONGLORA_POOL
static int default_threads(void) { return omp_get_max_threads(); }

/* All loops have teams of the same size, whatever they need. GCC's OpenMP would end the threads that a
 * smaller team leaves out, and start new ones for the next larger team. */
static void run(Loop *loop, int count) {
#pragma omp parallel num_threads(get_threads())
    if (omp_get_thread_num() < count) take_turns(loop);
}
#else
/* Where there is no OpenMP, a pool of our own: helpers sleep until a loop wants them. Loops of several
 * callers may be open at once. They share the helpers, which are never more than the largest count less the
 * caller. A loop that gets no helper is done by its caller alone, so no loop waits for another one. */
enum { STACK = 8 << 20 }; /* bytes of a helper; macOS gives half a MiB by itself */
static pthread_mutex_t pool = PTHREAD_MUTEX_INITIALIZER; /* of what follows, and of the loops' last fields */
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static Loop *loops;
static int helpers;

static int processors;
/* Like OpenMP, which reads its settings when it is loaded. */
__attribute__((constructor)) static void read_settings(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    long n = wanted ? strtol(wanted, NULL, 10) : 0;
    if (n < 1) n = sysconf(_SC_NPROCESSORS_ONLN);
    processors = n < 1 ? 1 : n > 1 << 16 ? 1 << 16 : (int)n;
}
static int default_threads(void) { return processors; }

static void *help(void *unused) {
    pthread_mutex_lock(&pool);
    for (;;) {
        Loop *loop = loops;
        while (loop && !loop->wanted) loop = loop->older;
        if (!loop) {
            pthread_cond_wait(&opened, &pool);
            continue;
        }
        loop->wanted--;
        loop->inside++;
        pthread_mutex_unlock(&pool);
        take_turns(loop);
        pthread_mutex_lock(&pool);
        if (!--loop->inside) pthread_cond_broadcast(&left);
    }
    return unused;
}

/* Signals are left to Python's threads. If no thread can be started, the loop has fewer helpers. */
static void start_helpers(int count) {
    sigset_t all, before;
    pthread_attr_t how;
    if (helpers >= count || pthread_attr_init(&how)) return;
    pthread_attr_setstacksize(&how, STACK);
    pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t made; helpers < count && !pthread_create(&made, &how, help, NULL);) helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&how);
}

static void run(Loop *loop, int count) {
    pthread_mutex_lock(&pool);
    start_helpers(count - 1);
    loop->wanted = count - 1;
    loop->older = loops;
    loops = loop;
    for (int i = 1; i < count; i++) pthread_cond_signal(&opened);
    pthread_mutex_unlock(&pool);
    take_turns(loop);
    pthread_mutex_lock(&pool);
    Loop **link = &loops;
    while (*link != loop) link = &(*link)->older;
    *link = loop->older;
    while (loop->inside) pthread_cond_wait(&left, &pool);
    pthread_mutex_unlock(&pool);
}
#endif

static atomic_int threads; /* 0: default_threads(): OMP_NUM_THREADS, else the processors */
static atomic_int forked;
static atomic_llong grain =
    20000; /* nanoseconds of work that are worth a thread: four times what it costs to wake one */

void set_threads(int n) { threads = n; }
int get_threads(void) { return forked ? 1 : threads ? threads : default_threads(); }
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
    Loop loop = { .n = n, .body = body, .context = context };
    run(&loop, (int)count);
    return loop.failed ? fail("%s", loop.first) : 0;
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

/* Scratch. Freed blocks of LARGE bytes and more are kept for the next call, with their pages touched: the
 * system would have to find and clear fresh pages each time, which costs as much as packing a matrix. A
 * request takes the smallest kept block that is large enough. If there is none, all kept blocks go back to
 * the system before a new one is mapped, so a run of equal steps soon lives on a few blocks that fit its
 * largest calls. KEEP bytes at most are kept. What a run holds in the end: for each rank, the largest block
 * of this rank in any of its calls. */
enum { LARGE = 1 << 20, SLOTS = 16 };
static const int64_t KEEP = (int64_t)128 << 20;
typedef struct { /* in front of each block */
    int64_t size, asked;
} Block;
static Block *kept[SLOTS];
static int64_t kept_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the two above */
static atomic_llong in_use, peak;                        /* bytes asked for and not given back */

static void count(int64_t bytes) {
    long long now = atomic_fetch_add(&in_use, bytes) + bytes, before = peak;
    while (now > before && !atomic_compare_exchange_weak(&peak, &before, now)) {}
}

int64_t scratch_peak(void) { return atomic_exchange(&peak, in_use); }

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
        if (kept[i] && kept[i]->size >= bytes && (best < 0 || kept[i]->size < kept[best]->size)) best = i;
    if (best >= 0) {
        found = kept[best];
        kept[best] = NULL;
        kept_bytes -= found->size;
    } else {
        memcpy(gone, kept, sizeof gone);
        memset(kept, 0, sizeof kept);
        kept_bytes = 0;
    }
    drop_lock();
    for (int i = 0; i < SLOTS; i++)
        if (gone[i]) unmap_memory(gone[i], gone[i]->size);
    return found;
}

void *scratch(int64_t bytes) {
    int64_t size = bytes < 0 || bytes > INT64_MAX - 2 * HUGE_PAGE ? -1 : (bytes + 2 * LINE - 1) / LINE * LINE;
    Block *block = NULL;
    if (size >= LARGE) {
        size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        if ((block = from_kept(size))) size = block->size;
        else block = map_memory(size);
    } else if (size >= 0) block = aligned_alloc(LINE, (size_t)size);
    if (!block) {
        fail("out of memory: %lld bytes of scratch", (long long)bytes);
        return NULL;
    }
    *block = (Block){ size, bytes };
    count(bytes);
    return (char *)block + LINE;
}

void scratch_free(void *p) {
    if (!p) return;
    Block *block = (Block *)((char *)p - LINE);
    count(-block->asked);
    if (block->size < LARGE) {
        free(block);
        return;
    }
    take_lock();
    for (int i = 0; i < SLOTS && block && kept_bytes + block->size <= KEEP; i++)
        if (!kept[i]) {
            kept[i] = block;
            kept_bytes += block->size;
            block = NULL;
        }
    drop_lock();
    if (block) unmap_memory(block, block->size);
}
