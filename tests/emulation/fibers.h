/* fibers.h --- several stacks on one thread: emulation.cpp switches between the threads of a block. */
#ifndef LONGLORA_EMULATION_FIBERS_H
#define LONGLORA_EMULATION_FIBERS_H

#if !defined __x86_64__ && !defined __aarch64__
#include <ucontext.h>
#endif

namespace emulation {

enum { STACK = 128 << 10 };

/* switch_stack(&mine, &theirs) saves the registers that a call preserves on this stack and the stack pointer
 * in `mine`, and continues where `theirs` was saved. first_stack prepares a stack that begins in entry(),
 * which must not return. */
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
    void **top = (void **)(stack + STACK) - 8; /* six registers, entry, and the return address of entry */
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

}  // namespace emulation

#endif
