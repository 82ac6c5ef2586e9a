/* emulation.cpp --- the fibers, barriers and warp functions of emulation.h, and its CUDA runtime. */
#include "emulation.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

enum { WARP = 32, MAX_THREADS = 1024, STACK = 128 << 10, GUARD = 4096, SHARED = 99 << 10, CANARY = 0xA5 };

static void *map(size_t bytes) {
    void *p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

/* ---- switching fibers ------------------------------------------------------------------------ */

/* switch_stack(&mine, theirs) keeps what a call must preserve on this stack, its pointer in mine, and goes on
 * where `theirs` was kept; first_stack makes a stack that begins in entry(), which never returns. */
#if defined __x86_64__
typedef void *Fiber;
extern "C" void emulation_switch_stack(Fiber *mine, Fiber theirs) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .type emulation_switch_stack, @function
emulation_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch_stack, .-emulation_switch_stack
)");
static void switch_stack(Fiber *mine, Fiber *theirs) { emulation_switch_stack(mine, *theirs); }
static void first_stack(Fiber *fiber, char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK) - 8; /* six registers, entry, and entry's return address */
    for (int i = 0; i < 8; i++) top[i] = nullptr;
    top[6] = (void *)entry;
    *fiber = top;
}
#elif defined __aarch64__
typedef void *Fiber;
extern "C" void emulation_switch_stack(Fiber *mine, Fiber theirs) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .type emulation_switch_stack, %function
emulation_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size emulation_switch_stack, .-emulation_switch_stack
)");
static void switch_stack(Fiber *mine, Fiber *theirs) { emulation_switch_stack(mine, *theirs); }
static void first_stack(Fiber *fiber, char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK) - 20;
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = (void *)entry; /* x30 */
    *fiber = top;
}
#else
}
#include <ucontext.h>
namespace emulation {
typedef ucontext_t Fiber;
static void switch_stack(Fiber *mine, Fiber *theirs) { swapcontext(mine, theirs); }
static void first_stack(Fiber *fiber, char *stack, void (*entry)()) {
    getcontext(fiber);
    fiber->uc_stack.ss_sp = stack;
    fiber->uc_stack.ss_size = STACK;
    fiber->uc_link = nullptr;
    makecontext(fiber, entry, 0);
}
#endif

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
    const void *row; /* the operands of what it waits for ... */
    float *d;
    const unsigned *a, *b;
    unsigned *r;
    uint64_t value, result; /* ... and what came of it */
    int from;
    const char *name;
    Copy *copies; /* a queue, oldest first; kept from launch to launch */
    int copies_made, copies_room, group;
};

static Thread threads[MAX_THREADS];
static struct Warp {
    unsigned live, waiting; /* bits of lanes: not at their end; at a warp function */
    bool alike;             /* all that wait do so for what the first does */
    Kind kind;
    unsigned mask;
    int line;
} warps[MAX_THREADS / WARP];
static Thread *current;
static Fiber outside;             /* run()'s own stack */
static char *stacks[MAX_THREADS]; /* those that no thread has */
static int free_stacks;
static int ready[MAX_THREADS], ready_count; /* a stack: a warp goes as far as it can before the next begins */
static int thread_count, exited, at_barrier;
static void (*the_body)(const void *);
static const void *the_context;
static bool failed;
static char *shared_end; /* of all dynamic shared memory: a page that nobody may touch */
static size_t shared_size;

static enum Order { FORWARD, REVERSED, SHUFFLED } order;
static uint64_t random_state;
static unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((random_state >> 33) % n);
}

static void entry();

/* The next thread to run: its stack holds it, or it is new. NULL: nobody can run. */
static Thread *next_ready() {
    if (!ready_count) return nullptr;
    if (order == SHUFFLED) {
        int i = (int)random_below((unsigned)ready_count), chosen = ready[i];
        ready[i] = ready[ready_count - 1];
        ready[ready_count - 1] = chosen;
    }
    return &threads[ready[--ready_count]];
}

/* The lanes `which` of the warp that begins with thread `warp` may run; those that the order names first are
 * taken first. */
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
        /* Stacks lie whole pages apart: their tops begin at different offsets, so that they do not fight for
         * one set of the cache. */
        first_stack(&next->fiber, next->stack - (uintptr_t)next->stack / (STACK + GUARD) * 5 % 61 * 64,
                    entry);
    }
    current = next;
    threadIdx = next->index;
    switch_stack(mine, &next->fiber);
}

/* This thread waits until make_ready names it; if nobody else can run, run() hears of it. */
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
    abort(); /* nobody comes back */
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
    for (int m = 0; m < 16; m += 4) { /* four sums side by side, each in order */
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

/* The lanes of `mask` in t's warp wait for the same thing: it is done for all of them. Not yet: nothing
 * happens. */
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

/* A thread has ended: those who waited for it go on. */
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

/* A fiber: one thread after another, as long as the next one is new; so kernels in which nobody waits need
 * one stack. */
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
    for (int i = 0; i < thread_count; i++) /* of those that were left waiting */
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
        return fail("emulation: a block has 1 to %d threads, not %llu", MAX_THREADS,
                    (unsigned long long)count);
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return fail("emulation: a grid of (%u,%u,%u) is too large", grid.x, grid.y, grid.z);
    if (shared > SHARED)
        return fail("emulation: a block has at most %d bytes of shared memory, not %zu", SHARED, shared);
    if (make_stacks()) return -1;
    const char *wanted = getenv("LONGLORA_EMULATION_ORDER");
    order = !wanted || !strcmp(wanted, "forward") ? FORWARD
            : !strcmp(wanted, "reversed")         ? REVERSED
                                                  : SHUFFLED;
    if (order == SHUFFLED && strcmp(wanted, "shuffled"))
        return fail("LONGLORA_EMULATION_ORDER: wanted forward, reversed or shuffled, got %s", wanted);
    random_state = 1;
    gridDim = grid;
    blockDim = block;
    thread_count = (int)count;
    shared_size = shared;
    the_body = body;
    the_context = context;
    failed = false;
    uint64_t step = 1; /* shuffled: a stride without a common factor with their number */
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

/* A thread touched memory that is not there, its stack's guard page included. It stays in this handler for
 * ever, as other threads that a failed launch leaves behind. */
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

uint64_t shuffle(unsigned mask, uint64_t value, int from, const char *, Place place) {
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

/* Done when it is waited for and not before; until then the target is NaN: who reads it too early, or has not
 * read it yet, sees it. */
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

/* ---- what the compiler's checks find --------------------------------------------------------- */

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

/* ---- the CUDA runtime ------------------------------------------------------------------------ */

/* A capture is a number that a test writes into a stream: work is done nevertheless, what a capture forbids
 * is refused. */
struct EmulatedStream {
    int device, capture;
};
struct EmulatedEvent {
    bool recorded, captured;
};
static int capture_in(cudaStream_t stream) {
    return (uintptr_t)stream > (uintptr_t)cudaStreamPerThread ? stream->capture : 0;
}

namespace {

enum { MAX_DEVICES = 8, PAGE = 4096 };
struct Block {
    char *memory, *mapping;
    size_t bytes, mapped;
    int device;
    Block *next;
}; /* `memory` ends where nobody may read */
Block *allocated, *pinned;
size_t used[MAX_DEVICES];
thread_local int the_device;
thread_local cudaError_t last_error_;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
struct Locked {
    Locked() { pthread_mutex_lock(&lock); }
    ~Locked() { pthread_mutex_unlock(&lock); }
};

cudaError_t note(cudaError_t error) {
    if (error != cudaSuccess) last_error_ = error;
    return error;
}

size_t number(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? (size_t)strtoull(text, nullptr, 10) : otherwise;
}
int devices() { return (int)number("LONGLORA_EMULATION_DEVICES", 1); }
size_t memory_of_device() { return number("LONGLORA_EMULATION_MEMORY", (size_t)8 << 30); }
int compute_capability() { return (int)number("LONGLORA_EMULATION_SM", 86); }
cudaError_t lost() {
    return number("LONGLORA_EMULATION_LOST", 0) ? note(cudaErrorIllegalAddress) : cudaSuccess;
}

Block **find(Block **list, const void *p) {
    for (; *list; list = &(*list)->next)
        if ((const char *)p >= (*list)->memory && (const char *)p < (*list)->memory + (*list)->bytes)
            return list;
    return nullptr;
}

cudaError_t take(Block **list, void **p, size_t bytes, bool poison) {
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    size_t rounded = (bytes + 255) / 256 * 256, mapped = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    char *mapping = (char *)emulation::map(mapped);
    Block *block = mapping ? (Block *)malloc(sizeof *block) : nullptr;
    if (!block) return note(cudaErrorMemoryAllocation);
    mprotect(mapping + mapped - PAGE, PAGE, PROT_NONE);
    char *memory = mapping + mapped - PAGE - rounded;
    if (poison && bytes <= (size_t)1 << 30) memset(memory, 0xff, rounded);
    *block = { memory, mapping, bytes, mapped, the_device, *list };
    *list = block;
    *p = memory;
    return cudaSuccess;
}

cudaError_t give(Block **list, void *p) {
    if (!p) return cudaSuccess;
    Block **found = find(list, p);
    if (!found || (*found)->memory != p) return note(cudaErrorInvalidValue);
    Block *block = *found;
    *found = block->next;
    munmap(block->mapping, block->mapped);
    if (list == &allocated) used[block->device] -= block->bytes;
    free(block);
    return cudaSuccess;
}

}  // namespace

cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    if (number("LONGLORA_EMULATION_DRIVER", 13000) < 13000) return note(cudaErrorInsufficientDriver);
    return *count ? cudaSuccess : note(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) {
    *device = the_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices() || device >= MAX_DEVICES) return note(cudaErrorInvalidDevice);
    the_device = device;
    return cudaSuccess;
}
/* Compute capability 8.6, whose 99 KiB of shared memory is the least among those built for, with few
 * processors, so that grids made from their number stay small. */
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrClockRate:
        case cudaDevAttrMemoryClockRate: *value = 1000000; break;
        case cudaDevAttrMultiProcessorCount: *value = 4; break;
        case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
        case cudaDevAttrComputeCapabilityMajor: *value = compute_capability() / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = compute_capability() % 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 100 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 99 << 10; break;
        default: return note(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    *properties = { "emulation on the CPU", memory_of_device(), 48 << 10, 99 << 10, 8, 6, 4, 40 << 20, 32 };
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    if (device < 0 || device >= devices()) return note(cudaErrorInvalidDevice);
    snprintf(id, (size_t)length, "0000:%02x:00.0", device);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = (int)number("LONGLORA_EMULATION_DRIVER", 13000);
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void **p, size_t bytes) {
    Locked locked;
    if (used[the_device] + bytes > memory_of_device()) return *p = nullptr, note(cudaErrorMemoryAllocation);
    cudaError_t error = take(&allocated, p, bytes, true);
    if (error == cudaSuccess) used[the_device] += bytes;
    return error;
}
cudaError_t cudaFree(void *p) {
    Locked locked;
    return give(&allocated, p);
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    Locked locked;
    return take(&pinned, p, bytes, false);
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return cudaMallocHost(p, bytes); }
cudaError_t cudaFreeHost(void *p) {
    Locked locked;
    return give(&pinned, p);
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    Locked locked;
    *total = memory_of_device();
    *free = *total - used[the_device];
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p) {
    Locked locked;
    Block **found = find(&allocated, p), **host = found ? nullptr : find(&pinned, p);
    *attributes = { found  ? cudaMemoryTypeDevice
                    : host ? cudaMemoryTypeHost
                           : cudaMemoryTypeUnregistered,
                    found ? (*found)->device : -1, found ? (void *)p : nullptr, found ? nullptr : (void *)p };
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    if (bytes) memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
    if (width > to_pitch || width > from_pitch) return note(cudaErrorInvalidValue);
    for (size_t i = 0; i < height; i++)
        cudaMemcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t) {
    if (to_device < 0 || to_device >= devices() || from_device < 0 || from_device >= devices())
        return note(cudaErrorInvalidDevice);
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    if (bytes) memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    return cudaMemset(p, value, bytes);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = (cudaStream_t)malloc(sizeof **stream);
    if (!*stream) return note(cudaErrorMemoryAllocation);
    **stream = { the_device, 0 };
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return lost(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return lost(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) {
    *device = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread
                  ? the_device
                  : stream->device;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *number) {
    *number = (unsigned long long)capture_in(stream);
    *status = *number ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = (cudaEvent_t)malloc(sizeof **event);
    if (!*event) return note(cudaErrorMemoryAllocation);
    **event = { false, false };
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *event = { true, capture_in(stream) != 0 };
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return event->captured ? note(cudaErrorCapturedEvent) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->recorded || !to->recorded) return note(cudaErrorInvalidResourceHandle);
    *milliseconds = 0.001f;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error_;
    last_error_ = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error_; }
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotReady: return "cudaErrorNotReady";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorCapturedEvent:
            return "operation not permitted on an event last recorded in a capturing stream";
    }
    return "unrecognized error code";
}
