/* emulation.cpp --- blocks and threads of emulation.h: fibers, barriers and warp functions. */
#include "emulation.h"
#include "fibers.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

enum { WARP = 32, MAX_THREADS = 1024, GUARD = 4096, CANARY = 0xA5 };

void *map(size_t bytes) {
    void *p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

/* ---- the block that runs --------------------------------------------------------------------- */

enum Kind {
    RUNS,
    SYNC_THREADS,
    SYNC_WARP,
    SHUFFLE,
    BALLOT,
    LDMATRIX,
    LDMATRIX_TRANS,
    MMA_BF16,
    MMA_F16,
    EXITED
};
static const char *const kind_names[] = {
    "nothing",     "__syncthreads",     "__syncwarp",      "a shuffle",      "a vote",
    "ldmatrix_x4", "ldmatrix_x4_trans", "mma_16816<bf16>", "mma_16816<f16>", "its end"
};

struct Copy {
    void *to;
    const void *from;
    bool there;
    int group;
};

struct Thread {
    Fiber fiber;
    char *stack; /* NULL until it runs for the first time */
    uint3 index;
    int number;
    Kind kind; /* what it waits for */
    unsigned mask;
    Place place;
    const void *row; /* the operands of the warp function that it waits for ... */
    float *d;
    const unsigned *a, *b;
    unsigned *r;
    uint64_t value, result; /* ... and its result */
    int from;
    const char *name;
    Copy *copies; /* a queue, oldest first; the memory is kept from launch to launch */
    int copies_made, copies_room, group;
};

static Thread threads[MAX_THREADS];
static struct Warp {
    unsigned live, waiting; /* bits of lanes: those that have not ended; those at a warp function */
    bool alike;             /* all waiting lanes wait for the same thing */
    Kind kind;
    unsigned mask;
    int line;
} warps[MAX_THREADS / WARP];
static Thread *current;
static Fiber outside;             /* the stack of run() */
static char *stacks[MAX_THREADS]; /* those in no thread's use */
static int free_stacks;
static int ready[MAX_THREADS], ready_count; /* last in, first out: a warp goes on as long as it can */
static int thread_count, exited, at_barrier;
static void (*the_body)(const void *);
static const void *the_context;
static bool failed;
static char *shared_end; /* dynamic shared memory ends here, before a page that nobody may touch */
static size_t shared_size;

static enum Order { FORWARD, REVERSED, SHUFFLED } order;
static uint64_t random_state;
static unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((random_state >> 33) % n);
}

static void entry();

/* The next thread to run, NULL if none can. */
static Thread *next_ready() {
    if (!ready_count) return nullptr;
    if (order == SHUFFLED) {
        int i = (int)random_below((unsigned)ready_count), chosen = ready[i];
        ready[i] = ready[ready_count - 1];
        ready[ready_count - 1] = chosen;
    }
    return &threads[ready[--ready_count]];
}

/* Lets the lanes `which` of the warp that begins with thread `warp` run, in the order that is set. */
static void make_ready(int warp, unsigned which) {
    for (int i = 0; i < WARP; i++) {
        int n = order == REVERSED ? i : WARP - 1 - i;
        if (!(which >> n & 1)) continue;
        threads[warp + n].kind = RUNS;
        ready[ready_count++] = warp + n;
    }
}

static void go_to(Thread *next, Fiber *mine) {
    if (!next) {
        switch_stack(mine, &outside);
        return;
    }
    if (!next->stack) {
        next->stack = stacks[--free_stacks];
        /* Stacks are whole pages apart. Their tops begin at different offsets, so that they do not compete
         * for one set of the cache. */
        first_stack(&next->fiber, next->stack - (uintptr_t)next->stack / (STACK + GUARD) * 5 % 61 * 64,
                    entry);
    }
    current = next;
    threadIdx = next->index;
    switch_stack(mine, &next->fiber);
}

/* This thread waits until make_ready names it. If no other thread can run, run_block() continues. */
static void wait_here() {
    Thread *self = current, *next = next_ready();
    if (next == self) {
        threadIdx = self->index;
        return;
    }
    go_to(next, &self->fiber);
}

void error(const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!current) {
        fprintf(stderr, "emulation: outside of a kernel: %s\n", text);
        abort();
    }
    fail("emulation: block (%u,%u,%u) thread (%u,%u,%u): %s", blockIdx.x, blockIdx.y, blockIdx.z,
         current->index.x, current->index.y, current->index.z, text);
    failed = true;
    switch_stack(&current->fiber, &outside);
    abort(); /* nobody switches back to this stack */
}

static void release_all() {
    for (int i = 0, n = (thread_count + WARP - 1) / WARP; i < n; i++) {
        int warp = order == REVERSED ? i : n - 1 - i;
        make_ready(warp * WARP, warps[warp].live);
    }
}

static void release_barrier() {
    if (!at_barrier || at_barrier + exited < thread_count) return;
    Place place = { nullptr, 0 };
    for (int i = 0; i < thread_count; i++) {
        Thread *t = &threads[i];
        if (t->kind != SYNC_THREADS) continue;
        if (place.file && (t->place.line != place.line || strcmp(t->place.file, place.file)))
            error("threads of one block meet at two barriers, __syncthreads at %s:%d and at %s:%d",
                  place.file, place.line, t->place.file, t->place.line);
        place = t->place;
    }
    at_barrier = 0;
    release_all();
}

static Thread *warp_of(Thread *t) { return t - t->number % WARP; }

template <bool BF16> static void halves(float *x, unsigned pair) {
    x[0] = BF16 ? __uint_as_float(pair << 16) : __half2float({ (uint16_t)pair });
    x[1] = BF16 ? __uint_as_float(pair & 0xffff0000u) : __half2float({ (uint16_t)(pair >> 16) });
}

template <bool BF16> static void do_mma(Thread *warp) {
    typedef float Row __attribute__((vector_size(32), may_alias)); /* a row of b and d */
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Thread &t = warp[lane];
        int g = lane / 4, k = lane % 4 * 2;
        float column[4];
        halves<BF16>(&a[g][k], t.a[0]);
        halves<BF16>(&a[g + 8][k], t.a[1]);
        halves<BF16>(&a[g][k + 8], t.a[2]);
        halves<BF16>(&a[g + 8][k + 8], t.a[3]);
        halves<BF16>(column, t.b[0]);
        halves<BF16>(column + 2, t.b[1]);
        b[k][g] = column[0], b[k + 1][g] = column[1], b[k + 8][g] = column[2], b[k + 9][g] = column[3];
        memcpy(&d[g][k], t.d, 8);
        memcpy(&d[g + 8][k], t.d + 2, 8);
    }
    for (int m = 0; m < 16; m += 4) { /* four independent sums at a time, each in order of k */
        Row sum[4];
        for (int i = 0; i < 4; i++) sum[i] = *(Row *)d[m + i];
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 4; i++) sum[i] += a[m + i][k] * *(Row *)b[k];
        for (int i = 0; i < 4; i++) *(Row *)d[m + i] = sum[i];
    }
    for (int lane = 0; lane < WARP; lane++) {
        int g = lane / 4, k = lane % 4 * 2;
        memcpy(warp[lane].d, &d[g][k], 8);
        memcpy(warp[lane].d + 2, &d[g + 8][k], 8);
    }
}

static void do_ldmatrix(Thread *warp, bool transposed) {
    for (int matrix = 0; matrix < 4; matrix++)
        for (int lane = 0; lane < WARP; lane++) {
            int g = lane / 4, k = lane % 4 * 2;
            uint16_t low, high;
            const uint16_t *row = (const uint16_t *)warp[8 * matrix + (transposed ? k : g)].row;
            const uint16_t *after = (const uint16_t *)warp[8 * matrix + (transposed ? k + 1 : g)].row;
            low = row[transposed ? g : k];
            high = after[transposed ? g : k + 1];
            warp[lane].r[matrix] = low | (unsigned)high << 16;
        }
}

/* Once all live lanes of t's mask wait for the same warp function, does it for all of them. */
static void try_warp(Thread *t) {
    Thread *warp = warp_of(t);
    Warp *state = &warps[t->number / WARP];
    unsigned all = state->live & t->mask;
    if ((all & state->waiting) != all) return;
    if (!state->alike)
        for (int i = 0; i < WARP; i++)
            if (all >> i & 1 && (warp[i].kind != t->kind || warp[i].mask != t->mask)) return;
    bool aligned = t->kind >= LDMATRIX;
    if (aligned) {
        if (all != 0xffffffffu) error("%s needs all 32 lanes, has %08x", kind_names[t->kind], all);
        if (!state->alike)
            for (int i = 0; i < WARP; i++)
                if (warp[i].place.line != t->place.line)
                    error("lanes of one warp meet at two places, %s at %s:%d and at %s:%d",
                          kind_names[t->kind], t->place.file, t->place.line, warp[i].place.file,
                          warp[i].place.line);
    }
    switch (t->kind) {
        case SHUFFLE:
            for (int i = 0; i < WARP; i++)
                if (all >> i & 1)
                    warp[i].result = all >> warp[i].from & 1 ? warp[warp[i].from].value : ~(uint64_t)0;
            break;
        case BALLOT: {
            unsigned bits = 0;
            for (int i = 0; i < WARP; i++)
                if (all >> i & 1 && warp[i].value) bits |= 1u << i;
            for (int i = 0; i < WARP; i++)
                if (all >> i & 1) warp[i].result = bits;
            break;
        }
        case LDMATRIX:
        case LDMATRIX_TRANS: do_ldmatrix(warp, t->kind == LDMATRIX_TRANS); break;
        case MMA_BF16:
        case MMA_F16: (t->kind == MMA_BF16 ? do_mma<true> : do_mma<false>)(warp); break;
        default: break;
    }
    state->waiting &= ~all;
    make_ready(warp->number, all);
}

static void meet(Kind kind, unsigned mask, Place place) {
    Thread *self = current;
    if (!(mask >> self->number % WARP & 1))
        error("lane %d waits for %s with mask %08x, where it is not", self->number % WARP, kind_names[kind],
              mask);
    self->kind = kind;
    self->mask = mask;
    self->place = place;
    Warp *state = &warps[self->number / WARP];
    if (!state->waiting) {
        state->alike = true;
        state->kind = kind;
        state->mask = mask;
        state->line = place.line;
    }
    state->alike = state->alike && state->kind == kind && state->mask == mask && state->line == place.line;
    state->waiting |= 1u << self->number % WARP;
    try_warp(self);
    wait_here();
}

/* Ends the thread. Threads that waited for it continue. */
static void leave() {
    Thread *self = current, *warp = warp_of(self);
    self->kind = EXITED;
    self->copies_made = 0;
    exited++;
    Warp *state = &warps[self->number / WARP];
    state->live &= ~(1u << self->number % WARP);
    for (int i = 0; state->waiting >> i; i++)
        if (state->waiting >> i & 1 && warp[i].mask >> self->number % WARP & 1) try_warp(&warp[i]);
    release_barrier();
}

/* A fiber runs one thread after another, as long as the next one is new. So a kernel in which no thread waits
 * needs one stack. */
static void entry() {
    for (;;) {
        the_body(the_context);
        leave();
        Thread *self = current, *next = next_ready();
        char *stack = self->stack;
        self->stack = nullptr;
        if (next && !next->stack) {
            next->stack = stack;
            current = next;
            threadIdx = next->index;
            continue;
        }
        stacks[free_stacks++] = stack;
        go_to(next, &self->fiber);
    }
}

static int stands_still() {
    char text[400];
    int length = 0, told[EXITED] = { 0 };
    for (int i = 0; i < thread_count && length < (int)sizeof text - 1; i++) {
        Thread *t = &threads[i];
        if (t->kind == EXITED || told[t->kind]++) continue;
        int n = 0;
        for (int j = 0; j < thread_count; j++) n += threads[j].kind == t->kind;
        length +=
            snprintf(text + length, sizeof text - (size_t)length, "%s%d at %s (thread %d: %s:%d, mask %08x)",
                     length ? ", " : "", n, kind_names[t->kind], i, t->place.file, t->place.line, t->mask);
    }
    return fail("emulation: block (%u,%u,%u) stands still: %d threads at their end, %s", blockIdx.x,
                blockIdx.y, blockIdx.z, exited, text);
}

static int make_stacks() {
    if (shared_end) return 0;
    char *memory = (char *)map((size_t)MAX_THREADS * (STACK + GUARD));
    char *shared = (char *)map(SHARED + 2 * GUARD);
    if (!memory || !shared) return fail("emulation: no memory for stacks");
    for (int i = 0; i < MAX_THREADS; i++) {
        char *guard = memory + (size_t)i * (STACK + GUARD);
        mprotect(guard, GUARD, PROT_NONE);
        stacks[free_stacks++] = guard + GUARD;
    }
    size_t size = (SHARED + GUARD - 1) / GUARD * GUARD;
    mprotect(shared + size, GUARD, PROT_NONE);
    shared_end = shared + size;
    return 0;
}

static size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }
void *dynamic_shared() { return shared_end - rounded(shared_size); }

static int run_block() {
    memset(dynamic_shared(), 0xff, shared_size);
    memset(shared_end - rounded(shared_size) + shared_size, CANARY, rounded(shared_size) - shared_size);
    exited = at_barrier = ready_count = 0;
    for (int i = 0; i < thread_count; i++) {
        Thread *t = &threads[i];
        t->number = i;
        t->index = { i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y };
        t->kind = RUNS;
        t->copies_made = t->group = 0;
    }
    for (int i = 0, n = (thread_count + WARP - 1) / WARP; i < n; i++) {
        int lanes = thread_count - i * WARP;
        warps[i] = { lanes < WARP ? (1u << lanes) - 1 : 0xffffffffu, 0, true, RUNS, 0, 0 };
    }
    release_all();
    go_to(next_ready(), &outside);
    current = nullptr;
    int result = failed ? -1 : exited < thread_count ? stands_still() : 0;
    for (int i = 0; i < thread_count; i++) /* of threads that still wait */
        if (threads[i].stack) {
            stacks[free_stacks++] = threads[i].stack;
            threads[i].stack = nullptr;
        }
    for (size_t i = shared_size; !result && i < rounded(shared_size); i++)
        if (((unsigned char *)dynamic_shared())[i] != CANARY)
            return fail("emulation: block (%u,%u,%u) wrote past the end of its %zu bytes of shared memory",
                        blockIdx.x, blockIdx.y, blockIdx.z, shared_size);
    return result;
}

static uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }

static int run_grid(dim3 grid, dim3 block, size_t shared, void (*body)(const void *), const void *context) {
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z, count = (uint64_t)block.x * block.y * block.z;
    if (count < 1 || count > MAX_THREADS)
        return fail("emulation: a block has 1 to %d threads, got %llu", MAX_THREADS,
                    (unsigned long long)count);
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return fail("emulation: a grid of (%u,%u,%u) is too large", grid.x, grid.y, grid.z);
    if (shared > SHARED)
        return fail("emulation: a block has at most %d bytes of shared memory, got %zu", SHARED, shared);
    if (make_stacks()) return -1;
    const char *wanted = getenv("LONGLORA_EMULATION_ORDER");
    order = !wanted || !strcmp(wanted, "forward") ? FORWARD
            : !strcmp(wanted, "reversed")         ? REVERSED
                                                  : SHUFFLED;
    if (order == SHUFFLED && strcmp(wanted, "shuffled"))
        return fail("LONGLORA_EMULATION_ORDER should be forward, reversed or shuffled, got %s", wanted);
    random_state = 1;
    gridDim = grid;
    blockDim = block;
    thread_count = (int)count;
    shared_size = shared;
    the_body = body;
    the_context = context;
    failed = false;
    uint64_t step = 1; /* shuffled: a stride that has no common factor with the number of blocks */
    if (order == SHUFFLED)
        for (step = blocks * 5 / 8 | 1; gcd(step, blocks) > 1; step += 2) {}
    for (uint64_t i = 0, n = blocks / 2; i < blocks; i++, n = (n + step) % blocks) {
        uint64_t b = order == FORWARD ? i : order == REVERSED ? blocks - 1 - i : n;
        blockIdx = { (unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                     (unsigned)(b / grid.x / grid.y) };
        if (run_block()) return -1;
    }
    return 0;
}

/* A thread touched memory that does not exist, or the guard page of its stack. The thread stays in this
 * handler for ever, like other threads that a failed launch leaves behind. */
static void illegal_address(int signal, siginfo_t *info, void *) {
    if (current) error("an illegal address: %p", info->si_addr);
    struct sigaction usual = {};
    usual.sa_handler = SIG_DFL;
    sigaction(signal, &usual, nullptr);
}

int run(dim3 grid, dim3 block, size_t shared, void (*body)(const void *), const void *context) {
    static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
    static char stack[64 << 10];
    pthread_mutex_lock(&one);
    stack_t mine = {}, former_stack;
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    struct sigaction action = {}, former[2];
    action.sa_sigaction = illegal_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&mine, &former_stack);
    sigaction(SIGSEGV, &action, &former[0]);
    sigaction(SIGBUS, &action, &former[1]);
    int result = run_grid(grid, block, shared, body, context);
    sigaction(SIGSEGV, &former[0], nullptr);
    sigaction(SIGBUS, &former[1], nullptr);
    sigaltstack(&former_stack, nullptr);
    pthread_mutex_unlock(&one);
    return result;
}

/* ---- what threads call ----------------------------------------------------------------------- */

void sync_threads(Place place) {
    current->kind = SYNC_THREADS;
    current->mask = 0xffffffffu;
    current->place = place;
    at_barrier++;
    release_barrier();
    wait_here();
}

void sync_warp(unsigned mask, Place place) { meet(SYNC_WARP, mask, place); }

uint64_t shuffle(unsigned mask, uint64_t value, int from, Place place) {
    Thread *self = current;
    self->value = value;
    self->from = from;
    meet(SHUFFLE, mask, place);
    return self->result;
}

unsigned ballot(unsigned mask, bool predicate, Place place) {
    Thread *self = current;
    self->value = predicate;
    meet(BALLOT, mask, place);
    return (unsigned)self->result;
}

void ldmatrix(unsigned *r, const void *row, bool transposed, Place place) {
    if ((uintptr_t)row % 16)
        error("ldmatrix: the row at %p is not 16-byte aligned (%s:%d)", row, place.file, place.line);
    current->r = r;
    current->row = row;
    meet(transposed ? LDMATRIX_TRANS : LDMATRIX, 0xffffffffu, place);
}

void mma(float *d, const unsigned *a, const unsigned *b, bool bf16, Place place) {
    current->d = d;
    current->a = a;
    current->b = b;
    meet(bf16 ? MMA_BF16 : MMA_F16, 0xffffffffu, place);
}

/* The copy is done when it is waited for, not before. Until then its target is NaN, which shows in the
 * results of a thread that reads it too early, or that still needed what was there. */
void copy_async(void *to, const void *from, bool there) {
    Thread *self = current;
    if ((uintptr_t)to % 16) error("cp_async_16: the target %p is not 16-byte aligned", to);
    if (there && (uintptr_t)from % 16) error("cp_async_16: the source %p is not 16-byte aligned", from);
    if (self->copies_made == self->copies_room) {
        self->copies_room = self->copies_room ? 2 * self->copies_room : 16;
        self->copies = (Copy *)realloc(self->copies, (size_t)self->copies_room * sizeof(Copy));
        if (!self->copies) error("cp_async_16: out of memory");
    }
    self->copies[self->copies_made++] = { to, from, there, self->group };
    memset(to, 0xff, 16);
}

void copy_commit() { current->group++; }

void copy_wait(int newest) {
    Thread *self = current;
    int done = 0;
    for (; done < self->copies_made && self->copies[done].group < self->group - newest; done++) {
        const Copy &copy = self->copies[done];
        if (copy.there) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    self->copies_made -= done;
    memmove(self->copies, self->copies + done, (size_t)self->copies_made * sizeof(Copy));
}

}  // namespace emulation

/* ---- errors found by -fsanitize --------------------------------------------------------------- */

extern "C" {
struct Location {
    const char *file;
    uint32_t line, column;
};
#define HIDDEN __attribute__((visibility("hidden"), used))
HIDDEN void __ubsan_handle_type_mismatch_v1(const Location *where, uintptr_t p) {
    emulation::error("a misaligned access to %p at %s:%u", (void *)p, where->file, where->line);
}
HIDDEN void __ubsan_handle_out_of_bounds(const Location *where, uintptr_t index) {
    emulation::error("index %lld is outside its array at %s:%u", (long long)index, where->file, where->line);
}
HIDDEN void __ubsan_handle_shift_out_of_bounds(const Location *where, uintptr_t, uintptr_t by) {
    emulation::error("a shift by %lld at %s:%u", (long long)by, where->file, where->line);
}
}
