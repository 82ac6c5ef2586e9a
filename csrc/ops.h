/* ops.h --- every op: its formula, its shapes, what it accumulates. The table itself is in ops.c.
 *
 * Vocabulary, the same everywhere:
 *   B batch   T tokens of a sequence   M rows, usually B*T   H query heads   K key/value heads (K divides H)
 * D head size C features in   N features out   R rank of LoRA   F feed-forward size   V vocabulary   G group
 * size   L any length
 *
 * Each op is a struct of Tensors, outputs first, then doubles: the fields stand in the order of the spec, and
 * the binding fills them from it. A spec reads
 *
 *     "out[M,C] rstd[M]:f32 <- x[M,C] weight[C] bias[C]? | eps group_size:int"
 *
 *   name[letters]   a letter has one size throughout the call; a number is that size. A leading M may come as
 * several axes, [B,T,C] for [M,C], where they lie as one :f32 :i32 ...   has this dtype; without it the op's
 * common dtype (float32, bfloat16 or float16); :any has its own ?               may be None
 *   +               is read and added to (or updated in place) instead of being set
 *   ~               an input that may be the very same memory as an output
 *   *               any strides; without it the last axis is dense and the others are free
 *
 * Arithmetic is float32 whatever the storage. Gradients of parameters are float32 and accumulate (+=),
 * gradients of activations are set (=). Equal inputs give equal bits, for any number of threads. Sizes may be
 * 0.
 *
 * On a GPU nothing is waited for, so what arrays contain cannot be refused there: an id outside 0..V-1 gives
 * a row of NaN and no gradient, a target outside 0..V-1 a loss of NaN, positions outside the tables NaN, a
 * document whose length wrap or swap cannot take NaN; borders of documents are taken as 0..T, and tokens of
 * no document are not written. */
#ifndef LONGLORA_OPS_H
#define LONGLORA_OPS_H

#include "longlora.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The instruction sets that the CPU kernels are built for: the same sources, other compiler flags (see
 * setup.py). The first, portable C, is the specification of all others. */
#define FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)

#define DECLARE_ISA(name, isa) int name##_##isa(const void *args, void *stream);
/* On a GPU: cuda/<stem>.cu. An op that needs workspace there says how many bytes (-1 and fail() if its
 * arguments are wrong). */
#define DECLARE_CUDA(name) int name##_cuda(const void *args, const CudaCall *call);
#define DECLARE_WORKSPACE(name) int64_t name##_cuda_workspace(const void *args);
#ifdef LONGLORA_X86
#define DECLARE_OP(name)        \
    DECLARE_CUDA(name)          \
    DECLARE_ISA(name, portable) \
    DECLARE_ISA(name, avx2) DECLARE_ISA(name, avx512) DECLARE_ISA(name, avx512_bf16)
#else
#define DECLARE_OP(name) DECLARE_CUDA(name) DECLARE_ISA(name, portable)
#endif

/* cast: out = x, rounded to nearest even, between any two of float32, bfloat16, float16. */
typedef struct {
    Tensor out, x;
} Cast;
DECLARE_OP(cast)

/* accumulate: out += scale * x. */
typedef struct {
    Tensor out, x;
    double scale;
} Accumulate;
DECLARE_OP(accumulate)

/* scale: out = scale * x. */
typedef struct {
    Tensor out, x;
    double scale;
} Scale;
DECLARE_OP(scale)

/* matmul: out = alpha a b + beta out; out is not read when beta is 0. */
typedef struct {
    Tensor out, a, b;
    double alpha, beta;
} Matmul;
DECLARE_OP(matmul)
DECLARE_WORKSPACE(matmul)

/* embedding: out[m] = weight[ids[m]].
 * Backward: dweight[ids[m]] += dout[m], the rows of one id summed in rising m. `order` is argsort(ids),
 * stable. */
typedef struct {
    Tensor out, weight, ids;
} EmbeddingForward;
typedef struct {
    Tensor dweight, dout, ids, order;
} EmbeddingBackward;
DECLARE_OP(embedding_forward)
DECLARE_OP(embedding_backward)
DECLARE_WORKSPACE(embedding_backward)

/* RMSNorm over the last axis: sum = x + residual (sum = x without one), rstd = 1/sqrt(mean(sum^2) + eps),
 * out = sum * rstd * weight. `sum` is written when it is given, and must be given with a residual.
 * Backward, x the normalised input (`sum`): dx = dresidual + the norm's own gradient; dweight += when given.
 */
typedef struct {
    Tensor out, rstd, sum, x, residual, weight;
    double eps;
} RmsNormForward;
typedef struct {
    Tensor dx, dweight, dout, x, rstd, weight, dresidual;
} RmsNormBackward;
DECLARE_OP(rms_norm_forward)
DECLARE_OP(rms_norm_backward)
DECLARE_WORKSPACE(rms_norm_backward)

/* Rotary embedding, rotate-half form, E = D/2: out[e] = x[e] cos - x[E+e] sin, out[E+e] = x[E+e] cos + x[e]
 * sin, with row positions[b,t] (t without positions) of the float32 tables cos and sin. Backward is the
 * inverse rotation. */
typedef struct {
    Tensor out, x, cos, sin, positions;
} Rope;
DECLARE_OP(rope_forward)
DECLARE_OP(rope_backward)

/* Linear with LoRA: u = x a^T, out = x weight^T + bias + scale u b^T + residual. Without a and b a plain
 * linear. Backward, with du = scale dout b: dx = dout weight + du a (dx += with accumulate=1), da += du^T x,
 * db += scale dout^T u, dweight += dout^T x, dbias += the column sums of dout: each one only when it is
 * given. u may be handed back to save its recomputation from x. */
typedef struct {
    Tensor out, u, x, weight, bias, a, b, residual;
    double scale;
} LoraLinearForward;
typedef struct {
    Tensor dx, da, db, dweight, dbias, dout, x, weight, a, b, u;
    double scale, accumulate;
} LoraLinearBackward;
DECLARE_OP(lora_linear_forward)
DECLARE_WORKSPACE(lora_linear_forward)
DECLARE_OP(lora_linear_backward)
DECLARE_WORKSPACE(lora_linear_backward)

/* boundary and shift of attention. */
enum { SPLIT, WRAP, SWAP };
enum { HALF, NONE, ALL };

/* Shifted sparse attention (LongLoRA section 3.2, Algorithm 1 and appendix B.3), causal. h = G/2. Query heads
 * 0 .. H/2-1 are plain, H/2 .. H-1 are shifted. A query at t sees keys start(t) .. t:
 *   plain:    start(t) = (t / G) * G
 *   shifted:  start(t) = t < h ? 0 : h + ((t - h) / G) * G
 * boundary 0 "split": just that. 1 "wrap": shifted queries t < h also see all keys L-h .. L-1 (they leak the
 * future). 2 "swap": shifted queries t >= L-h also see keys 0 .. h-1. Both of the latter need L % G == 0.
 * shift 0 "half": as above; 1 "none": every head plain; 2 "all": every head shifted.
 * cu_seqlens (0, ..., T), with B = 1, packs documents: everything above restarts in each of them.
 * lse is the natural logarithm of the sum of exponentials of the scaled scores, [B,H,T]. */
typedef struct {
    Tensor out, lse, q, k, v, cu_seqlens;
    double group_size, boundary, shift, scale;
} S2AttentionForward;
typedef struct {
    Tensor dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens;
    double group_size, boundary, shift, scale;
} S2AttentionBackward;
DECLARE_OP(s2_attention_forward)
DECLARE_OP(s2_attention_backward)
DECLARE_WORKSPACE(s2_attention_backward)

/* SwiGLU: out = silu(gate) * up. Backward may write dgate and dup over gate and up. */
typedef struct {
    Tensor out, gate, up;
} SwigluForward;
typedef struct {
    Tensor dgate, dup, dout, gate, up;
} SwigluBackward;
DECLARE_OP(swiglu_forward)
DECLARE_OP(swiglu_backward)

/* Linear layer and cross entropy in one, in chunks of rows: the logits never exist whole.
 * losses[m] = logsumexp(x[m] weight^T) - (x[m] weight^T)[targets[m]]; 0 where targets[m] == ignore_index.
 * Backward gives the losses too, since it computes them anyway: a training step calls it alone.
 * dx[m] = dlosses[m] (softmax - onehot) weight; dweight += when given. */
typedef struct {
    Tensor losses, lse, x, weight, targets;
    double ignore_index;
} LinearCrossEntropyForward;
typedef struct {
    Tensor losses, dx, dweight, x, weight, targets, dlosses;
    double ignore_index;
} LinearCrossEntropyBackward;
DECLARE_OP(linear_cross_entropy_forward)
DECLARE_WORKSPACE(linear_cross_entropy_forward)
DECLARE_OP(linear_cross_entropy_backward)
DECLARE_WORKSPACE(linear_cross_entropy_backward)

/* AdamW, decoupled weight decay, on float32 masters: g = grad_scale * grad; m, v, param updated in place;
 * `copy` takes the new value in the model's dtype. step counts from 1. */
typedef struct {
    Tensor param, m, v, copy, grad;
    double lr, beta1, beta2, eps, weight_decay, step, grad_scale;
} Adamw;
DECLARE_OP(adamw)

/* sum_squares: out[0] += sum of x^2, in float64 and in a fixed order: the global gradient norm is its square
 * root. */
typedef struct {
    Tensor out, x;
} SumSquares;
DECLARE_OP(sum_squares)
DECLARE_WORKSPACE(sum_squares)

/* What the binding knows of an op. cpu has one function per ISA of FOR_EACH_ISA; cuda is NULL in a build
 * without it, workspace where there needs to be none. */
enum { ISA_COUNT = 4 };
typedef int (*OpFunction)(const void *args, void *stream);
typedef int (*CudaFunction)(const void *args, const CudaCall *call);
typedef int64_t (*WorkspaceFunction)(const void *args);
typedef int (*CheckFunction)(const char *op, const void *args);
typedef struct {
    const char *name, *spec;
    CheckFunction check; /* of what the spec cannot say, in checks.c; or NULL: -1 after fail() */
    OpFunction cpu[ISA_COUNT];
    CudaFunction cuda;
    WorkspaceFunction workspace;
    int64_t args_size; /* sizeof the struct, checked against the spec when the module is loaded */
} Op;

int check_rms_norm_forward(const char *op, const void *args);
int check_rope(const char *op, const void *args);
int check_lora_linear_forward(const char *op, const void *args);
int check_lora_linear_backward(const char *op, const void *args);
int check_s2_attention_forward(const char *op, const void *args);
int check_s2_attention_backward(const char *op, const void *args);
int check_adamw(const char *op, const void *args);

extern const Op ops[];
extern const int op_count;

/* The machine's peak, for profiles: n rounds of multiply-adds in registers -> floating point operations; NULL
 * as in Op. */
#define DECLARE_PEAK(isa) double peak_##isa(int64_t n, float *out);
FOR_EACH_ISA(DECLARE_PEAK)
extern double (*const peaks[ISA_COUNT])(int64_t n, float *out);

/* The ISA in use: LONGLORA_ISA if it is set, else the best that CPUID reports. NULL and a message in fail()
 * when the variable names one that this machine or build does not have. */
extern const char *const isa_names[ISA_COUNT];
int isa_supported(int isa);
int choose_isa(void);

#ifdef __cplusplus
}
#endif

#endif
