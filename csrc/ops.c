/* ops.c --- the table of ops, and the choice of an instruction set. A new op is one row here. The language of
 * the specs is explained in ops.h. */
#define _GNU_SOURCE /* syscall() */
#include "ops.h"
#include "cuda.h"

#ifdef LONGLORA_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef LONGLORA_X86
#define CPU(name) { name##_portable, name##_avx2, name##_avx512, name##_avx512_bf16, name##_amx }
#else
#define CPU(name) { name##_portable, NULL, NULL, NULL, NULL }
#endif
#ifdef LONGLORA_CUDA
#define CUDA(function) function
#else
#define CUDA(function) NULL
#endif
#define OP(op, Args, text, ...)  \
    { .name = #op,               \
      .spec = text,              \
      .cpu = CPU(op),            \
      .cuda = CUDA(op##_cuda),   \
      .args_size = sizeof(Args), \
      __VA_ARGS__ }
#define SCRATCH(op) .scratch = CPU(op##_scratch)
#define WORKSPACE(op) .workspace = op##_cuda_workspace
#define CHECK(name) .check = check_##name

/* clang-format off */
const Op ops[] = {
    OP(cast, Cast,
       "out[M,N]:any <- x[M,N]:any"),
    OP(accumulate, Accumulate,
       "out[M,N]:any+ <- x[M,N]:any | scale"),
    OP(scale, Scale,
       "out[M,N] <- x[M,N]~ | scale"),
    OP(sum_squares, SumSquares,
       "out[1]:f64+ <- x[N]:any",
       SCRATCH(sum_squares), WORKSPACE(sum_squares)),
    OP(matmul, Matmul,
       "out[M,N]:any+ <- a[M,C]:any* b[C,N]:any* | alpha beta",
       SCRATCH(matmul), WORKSPACE(matmul)),

    OP(embedding_forward, EmbeddingForward,
       "out[M,C] <- weight[V,C] ids[M]:i32"),
    OP(embedding_backward, EmbeddingBackward,
       "dweight[V,C]:f32+ <- dout[M,C] ids[M]:i32 order[M]:i32",
       WORKSPACE(embedding_backward)),

    OP(rms_norm_forward, RmsNormForward,
       "out[M,C] rstd[M]:f32 sum[M,C]? <- x[M,C] residual[M,C]?~ weight[C] | eps",
       CHECK(rms_norm_forward)),
    OP(rms_norm_backward, RmsNormBackward,
       "dx[M,C] dweight[C]:f32+? <- dout[M,C]~ x[M,C]~ rstd[M]:f32 weight[C] dresidual[M,C]?~",
       SCRATCH(rms_norm_backward), WORKSPACE(rms_norm_backward)),

    OP(rope_forward, Rope,
       "out[B,T,H,D] <- x[B,T,H,D]~ cos[P,E]:f32 sin[P,E]:f32 positions[B,T]:i32?",
       CHECK(rope)),
    OP(rope_backward, Rope,
       "dx[B,T,H,D] <- dout[B,T,H,D]~ cos[P,E]:f32 sin[P,E]:f32 positions[B,T]:i32?",
       CHECK(rope)),

    OP(lora_linear_forward, LoraLinearForward,
       "out[M,N] u[M,R]:f32? "
       "<- x[M,C] weight[N,C] bias[N]? a[R,C]? b[N,R]? residual[M,N]?~ | scale",
       SCRATCH(lora_linear_forward), WORKSPACE(lora_linear_forward), CHECK(lora_linear_forward)),
    OP(lora_linear_backward, LoraLinearBackward,
       "dx[M,C]? da[R,C]:f32+? db[N,R]:f32+? dweight[N,C]:f32+? dbias[N]:f32+? "
       "<- dout[M,N] x[M,C]? weight[N,C] a[R,C]? b[N,R]? u[M,R]:f32? | scale",
       SCRATCH(lora_linear_backward), WORKSPACE(lora_linear_backward), CHECK(lora_linear_backward)),

    OP(s2_attention_forward, S2AttentionForward,
       "out[B,T,H,D] lse[B,H,T]:f32 "
       "<- q[B,T,H,D] k[B,T,K,D] v[B,T,K,D] cu_seqlens[S]:i32? "
       "| group_size:int boundary:int shift:int scale",
       SCRATCH(s2_attention_forward), CHECK(s2_attention_forward)),
    OP(s2_attention_backward, S2AttentionBackward,
       "dq[B,T,H,D] dk[B,T,K,D] dv[B,T,K,D] "
       "<- dout[B,T,H,D] q[B,T,H,D] k[B,T,K,D] v[B,T,K,D] out[B,T,H,D] lse[B,H,T]:f32 cu_seqlens[S]:i32? "
       "| group_size:int boundary:int shift:int scale",
       SCRATCH(s2_attention_backward), WORKSPACE(s2_attention_backward), CHECK(s2_attention_backward)),

    OP(cached_attention, CachedAttention,
       "out[B,S,H,D] k_cache[N,P,K,D]:any+ v_cache[N,P,K,D]:any+ "
       "<- q[B,S,H,D] k[B,S,K,D]? v[B,S,K,D]? rows[B]:i32? lengths[B]:i32 | scale",
       SCRATCH(cached_attention), WORKSPACE(cached_attention), CHECK(cached_attention)),

    OP(swiglu_forward, SwigluForward,
       "out[M,F] <- gate[M,F]~ up[M,F]~"),
    OP(swiglu_backward, SwigluBackward,
       "dgate[M,F] dup[M,F] <- dout[M,F] gate[M,F]~ up[M,F]~"),

    OP(linear_cross_entropy_forward, LinearCrossEntropyForward,
       "losses[M]:f32 lse[M]:f32 <- x[M,C] weight[V,C] targets[M]:i32 | ignore_index:int",
       SCRATCH(linear_cross_entropy_forward), WORKSPACE(linear_cross_entropy_forward)),
    OP(linear_cross_entropy_backward, LinearCrossEntropyBackward,
       "losses[M]:f32 dx[M,C] dweight[V,C]:f32+? "
       "<- x[M,C] weight[V,C] targets[M]:i32 dlosses[M]:f32 | ignore_index:int",
       SCRATCH(linear_cross_entropy_backward), WORKSPACE(linear_cross_entropy_backward)),

    OP(adamw, Adamw,
       "param[N]:f32+ m[N]:f32+ v[N]:f32+ copy[N]:any? "
       "<- grad[N]:f32 | lr beta1 beta2 eps weight_decay step:int grad_scale",
       CHECK(adamw)),
};
/* clang-format on */
const int op_count = sizeof ops / sizeof *ops;
const CudaRuntime *const cuda = CUDA(&cuda_runtime);

double (*const peaks[ISA_COUNT])(int64_t n, float *out) = CPU(peak);

static _Thread_local char message[512];

int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return -1;
}

const char *last_error(void) { return message; }

#define NAME(isa) #isa,
const char *const isa_names[ISA_COUNT] = { FOR_EACH_ISA(NAME) };

#ifdef LONGLORA_X86
/* Whether the processor has AMX for bfloat16 and the system lets this process use it. Linux wants to be
 * asked, once for all threads of a process. */
static int matrix_unit_granted(void) {
#ifdef __linux__
    enum { REQUEST = 0x1023, TILE_DATA = 18, BF16_BIT = 1 << 22, TILE_BIT = 1 << 24 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16_BIT | TILE_BIT)) != (BF16_BIT | TILE_BIT))
        return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

int isa_supported(int isa) {
#ifdef LONGLORA_X86
    __builtin_cpu_init();
    /* Every processor with AVX2 has F16C, which clang 14 cannot ask for. */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case 0: return 1;
        case 1: return avx2;
        case 2: return avx512;
        case 3: return avx512 && __builtin_cpu_supports("avx512bf16");
        case 4: return avx512 && __builtin_cpu_supports("avx512bf16") && matrix_unit_granted();
        default: return 0;
    }
#else
    return isa == 0;
#endif
}

/* Products of bfloat16 pairs run at twice the rate of float32 on AMD (Zen 4 and 5) and at half of it on the
 * Xeons that were measured. There bfloat16 is converted while it is packed, and multiplied in float32. */
static int preferred(int isa) {
#ifdef LONGLORA_X86
    if (isa == 3) return __builtin_cpu_is("amd");
#endif
    (void)isa;
    return 1;
}

int choose_isa(void) {
    const char *wanted = getenv("LONGLORA_ISA");
    if (!wanted || !*wanted) {
        int best = 0;
        for (int i = 1; i < ISA_COUNT; i++)
            if (isa_supported(i) && preferred(i)) best = i;
        return best;
    }
    for (int i = 0; i < ISA_COUNT; i++) {
        if (strcmp(wanted, isa_names[i])) continue;
        return isa_supported(i) ? i : fail("LONGLORA_ISA: this machine or build does not have %s", wanted);
    }
    return fail("LONGLORA_ISA should be portable, avx2, avx512, avx512_bf16 or amx, got %s", wanted);
}
