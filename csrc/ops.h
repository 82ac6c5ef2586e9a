/* ops.h --- every op: what it computes, on which shapes, what it adds to. The table of ops is in ops.c.
 *
 * The letters, the same everywhere:
 *
 *   B  batch                          H  query heads                       C  features in
 *   T  tokens of a sequence           K  key/value heads; K divides H      N  features out
 *   M  rows, mostly B*T               D  head size                         F  feed-forward size
 *   V  vocabulary                     R  rank of LoRA                      G  group of shifted attention
 *
 * An op is one C function for each device. It takes one struct: tensors first, outputs before inputs, then
 * numbers. Their order is that of the op's spec, which is a row of the table, for example:
 *
 *     "out[M,C] rstd[M]:f32 <- x[M,C] weight[C] bias[C]? | eps group_size:int"
 *      outputs                 inputs                      numbers
 *
 *   [M,C]   The shape. A letter has one size throughout a call; a digit is that size. A leading M may come as
 *           several axes, [B,T,C] for [M,C], if they lie in memory as one.
 *   :f32    The dtype, likewise :f64 and :i32. :any is a float dtype of its own. Tensors without it share one
 *           dtype: float32, bfloat16 or float16.
 *   ?       May be None.
 *   +       Is added to, or updated in place. Other outputs are overwritten.
 *   ~       An input that may be the same memory as an output.
 *   *       May have any strides. Without it the last axis is dense and the strides of the others are free.
 *
 * Python's binding reads the spec, checks each call against it and fills the struct, so kernels meet correct
 * shapes only. Rules that a spec cannot express are functions in checks.c.
 *
 * All ops keep these promises. Arithmetic is float32 whatever the dtype. Gradients of parameters are float32
 * and are added to (+=); gradients of activations are overwritten (=). Equal inputs give equal bits, for any
 * number of threads. Sizes may be 0. Nothing that an op allocates outlives the call.
 *
 * A GPU is not waited for, so the contents of arrays cannot be refused there. Instead: an id outside 0..V-1
 * gives a row of NaN and no gradient; a target outside 0..V-1 gives a loss of NaN; a position outside the
 * tables gives NaN; a row or length outside the cache gives NaN and writes no key; a document whose length
 * does not suit wrap or swap gives NaN. Document boundaries are clamped to 0..T, and tokens that belong to no
 * document are not written. */
#ifndef LONGLORA_OPS_H
#define LONGLORA_OPS_H

#include "longlora.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- how an op is declared ------------------------------------------------------------------- */

/* The instruction sets that the CPU kernels are built for: the same sources with other compiler flags (see
 * setup.py). Portable C comes first; the others must agree with it. */
#define FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_bf16) X(amx)
enum { ISA_COUNT = 5 };

/* What a call takes on the CPU while it runs: the bytes of the blocks that it holds at one time, in the order
 * in which it takes them; then zeros. Matrix products within an op run one after the other, each with a block
 * that it gives back, so only the largest of these is listed. */
enum { SCRATCH_BLOCKS = 3 };
typedef struct {
    int64_t bytes[SCRATCH_BLOCKS];
} Scratch;

/* On the CPU: csrc/cpu/<stem>.c. An op that takes scratch says how much. The answer follows from shapes,
 * strides, dtypes and the number of threads; no array is read. */
#define DECLARE_ISA(name, isa) int name##_##isa(const void *args, void *stream);
#define DECLARE_SCRATCH_ISA(name, isa) Scratch name##_scratch_##isa(const void *args);
/* On a GPU: cuda/<stem>.cu. An op that needs workspace says how many bytes, or -1 after fail() if its
 * arguments are wrong: workspace.c, which is in every build. The caller provides it. */
#define DECLARE_CUDA(name) int name##_cuda(const void *args, const CudaCall *call);
#define DECLARE_WORKSPACE(name) int64_t name##_cuda_workspace(const void *args);

#ifdef LONGLORA_X86
#define DECLARE_FOR_EACH_ISA(declare, name)                                                      \
    declare(name, portable) declare(name, avx2) declare(name, avx512) declare(name, avx512_bf16) \
        declare(name, amx)
#else
#define DECLARE_FOR_EACH_ISA(declare, name) declare(name, portable)
#endif
#define DECLARE_OP(name) DECLARE_CUDA(name) DECLARE_FOR_EACH_ISA(DECLARE_ISA, name)
#define DECLARE_SCRATCH(name) DECLARE_FOR_EACH_ISA(DECLARE_SCRATCH_ISA, name)

/* ---- arrays ---------------------------------------------------------------------------------- */

/* cast: out = x, rounded to nearest even, between any two of float32, bfloat16 and float16. */
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

/* sum_squares: out[0] += the sum of x^2, in float64 and in a fixed order. The square root of the sum over all
 * gradients is the global gradient norm. */
typedef struct {
    Tensor out, x;
} SumSquares;
DECLARE_OP(sum_squares)
DECLARE_SCRATCH(sum_squares)
DECLARE_WORKSPACE(sum_squares)

/* matmul: out = alpha a b + beta out. out is not read when beta is 0. */
typedef struct {
    Tensor out, a, b;
    double alpha, beta;
} Matmul;
DECLARE_OP(matmul)
DECLARE_SCRATCH(matmul)
DECLARE_WORKSPACE(matmul)

/* ---- the layers of a model, from the tokens to the loss --------------------------------------- */

/* embedding: out[m] = weight[ids[m]].
 * Backward: dweight[ids[m]] += dout[m]. `order` is the stable argsort of ids; it fixes the order in which the
 * rows of one id are summed. */
typedef struct {
    Tensor out, weight, ids;
} EmbeddingForward;
typedef struct {
    Tensor dweight, dout, ids, order;
} EmbeddingBackward;
DECLARE_OP(embedding_forward)
DECLARE_OP(embedding_backward)
DECLARE_WORKSPACE(embedding_backward)

/* rms_norm, over the last axis: sum = x + residual (sum = x without a residual), rstd = 1/sqrt(mean(sum^2) +
 * eps), out = sum * rstd * weight. `sum` is written where it is given, and must be given with a residual.
 * Backward, where x is the input that was normalised (`sum`): dx = dresidual + the gradient of the norm;
 * dweight += where it is given. */
typedef struct {
    Tensor out, rstd, sum, x, residual, weight;
    double eps;
} RmsNormForward;
typedef struct {
    Tensor dx, dweight, dout, x, rstd, weight, dresidual;
} RmsNormBackward;
DECLARE_OP(rms_norm_forward)
DECLARE_OP(rms_norm_backward)
DECLARE_SCRATCH(rms_norm_backward)
DECLARE_WORKSPACE(rms_norm_backward)

/* rope, rotary embedding in its rotate-half form. With E = D/2 and row positions[b,t] of the float32 tables
 * cos and sin (row t without positions):
 *   out[e]   = x[e]   cos[e] - x[E+e] sin[e]
 *   out[E+e] = x[E+e] cos[e] + x[e]   sin[e]
 * Backward is the inverse rotation. */
typedef struct {
    Tensor out, x, cos, sin, positions;
} Rope;
DECLARE_OP(rope_forward)
DECLARE_OP(rope_backward)

/* lora_linear, a linear layer with LoRA: u = x a^T, out = x weight^T + bias + scale u b^T + residual.
 * Without a and b it is a plain linear layer.
 * Backward, with du = scale dout b, each of these where it is given:
 *   dx       = dout weight + du a
 *   da      += du^T x
 *   db      += scale dout^T u       (u may be given, or is computed again from x)
 *   dweight += dout^T x
 *   dbias   += the column sums of dout */
typedef struct {
    Tensor out, u, x, weight, bias, a, b, residual;
    double scale;
} LoraLinearForward;
typedef struct {
    Tensor dx, da, db, dweight, dbias, dout, x, weight, a, b, u;
    double scale;
} LoraLinearBackward;
DECLARE_OP(lora_linear_forward)
DECLARE_SCRATCH(lora_linear_forward)
DECLARE_WORKSPACE(lora_linear_forward)
DECLARE_OP(lora_linear_backward)
DECLARE_SCRATCH(lora_linear_backward)
DECLARE_WORKSPACE(lora_linear_backward)

/* The values of `boundary` and of `shift` below. */
enum { SPLIT, WRAP, SWAP };
enum { HALF, NONE, ALL };

/* s2_attention, shifted sparse attention (LongLoRA section 3.2, Algorithm 1 and appendix B.3), causal. With
 * h = G/2, a query at t sees the keys start(t) .. t of its sequence of length L:
 *   plain heads:    start(t) = (t / G) * G
 *   shifted heads:  start(t) = t < h ? 0 : h + ((t - h) / G) * G
 * shift     0 "half": query heads 0 .. H/2-1 are plain, the others shifted. 1 "none": all plain. 2 "all": all
 *           shifted.
 * boundary  0 "split": just that. 1 "wrap": shifted queries t < h also see all keys L-h .. L-1, so they leak
 *           the future. 2 "swap": shifted queries t >= L-h also see keys 0 .. h-1.
 *           wrap and swap need L % G == 0.
 * cu_seqlens (0, ..., T), with B = 1, packs documents: everything above starts again in each of them.
 * lse is the natural logarithm of the sum of the exponentials of the scaled scores. */
typedef struct {
    Tensor out, lse, q, k, v, cu_seqlens;
    double group_size, boundary, shift, scale;
} S2AttentionForward;
typedef struct {
    Tensor dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens;
    double group_size, boundary, shift, scale;
} S2AttentionBackward;
DECLARE_OP(s2_attention_forward)
DECLARE_SCRATCH(s2_attention_forward)
DECLARE_OP(s2_attention_backward)
DECLARE_SCRATCH(s2_attention_backward)
DECLARE_WORKSPACE(s2_attention_backward)

/* cached_attention, dense causal attention of S new tokens over a cache of keys and values, which has P
 * places in each of its N rows. Sequence b has row rows[b] (b without rows), and no two sequences have the
 * same one. Its row holds lengths[b] keys before the call. Where k and v are given, they are first written
 * behind these, at places lengths[b] .. lengths[b]+S-1; else the caller has written them. Query s then sees
 * places 0 .. lengths[b]+s. A sequence's results depend on its own queries, keys and length alone, not on B,
 * N or P. */
typedef struct {
    Tensor out, k_cache, v_cache, q, k, v, rows, lengths;
    double scale;
} CachedAttention;
DECLARE_OP(cached_attention)
DECLARE_SCRATCH(cached_attention)
DECLARE_WORKSPACE(cached_attention)

/* swiglu: out = silu(gate) * up. Backward may write dgate and dup over gate and up. */
typedef struct {
    Tensor out, gate, up;
} SwigluForward;
typedef struct {
    Tensor dgate, dup, dout, gate, up;
} SwigluBackward;
DECLARE_OP(swiglu_forward)
DECLARE_OP(swiglu_backward)

/* linear_cross_entropy, the output layer and the loss in one: the logits never exist as a whole.
 * losses[m] = logsumexp(x[m] weight^T) - (x[m] weight^T)[targets[m]], or 0 where targets[m] == ignore_index.
 * Backward: dx[m] = dlosses[m] (softmax - onehot) weight, and dweight += where it is given. It returns the
 * losses too, because it computes them anyway: a training step calls backward alone. */
typedef struct {
    Tensor losses, lse, x, weight, targets;
    double ignore_index;
} LinearCrossEntropyForward;
typedef struct {
    Tensor losses, dx, dweight, x, weight, targets, dlosses;
    double ignore_index;
} LinearCrossEntropyBackward;
DECLARE_OP(linear_cross_entropy_forward)
DECLARE_SCRATCH(linear_cross_entropy_forward)
DECLARE_WORKSPACE(linear_cross_entropy_forward)
DECLARE_OP(linear_cross_entropy_backward)
DECLARE_SCRATCH(linear_cross_entropy_backward)
DECLARE_WORKSPACE(linear_cross_entropy_backward)

/* ---- the optimizer --------------------------------------------------------------------------- */

/* adamw, with decoupled weight decay, on float32 masters: g = grad_scale * grad; m, v and param are updated
 * in place; `copy` receives the new value in the model's dtype. step counts from 1. */
typedef struct {
    Tensor param, m, v, copy, grad;
    double lr, beta1, beta2, eps, weight_decay, step, grad_scale;
} Adamw;
DECLARE_OP(adamw)

/* ---- the table ------------------------------------------------------------------------------- */

typedef int (*OpFunction)(const void *args, void *stream);
typedef Scratch (*ScratchFunction)(const void *args);
typedef int (*CudaFunction)(const void *args, const CudaCall *call);
typedef int64_t (*WorkspaceFunction)(const void *args);
typedef int (*CheckFunction)(const char *op, const void *args);

/* All that the binding knows of an op. */
typedef struct {
    const char *name, *spec;
    CheckFunction check;                /* in checks.c: 0, or -1 after fail(); NULL if the spec says it all */
    OpFunction cpu[ISA_COUNT];          /* in the order of FOR_EACH_ISA */
    ScratchFunction scratch[ISA_COUNT]; /* NULL if the op takes none */
    CudaFunction cuda;                  /* NULL in a build without CUDA */
    WorkspaceFunction workspace;        /* NULL if the op needs none */
    int64_t args_size; /* sizeof the struct, compared with the spec when the module is loaded */
} Op;

extern const Op ops[];
extern const int op_count;

int check_rms_norm_forward(const char *op, const void *args);
int check_rope(const char *op, const void *args);
int check_lora_linear_forward(const char *op, const void *args);
int check_lora_linear_backward(const char *op, const void *args);
int check_s2_attention_forward(const char *op, const void *args);
int check_s2_attention_backward(const char *op, const void *args);
int check_cached_attention(const char *op, const void *args);
int check_adamw(const char *op, const void *args);

/* The machine's peak, for profiles: n rounds of multiply-adds in registers -> floating point operations. */
#define DECLARE_PEAK(isa) double peak_##isa(int64_t n, float *out);
FOR_EACH_ISA(DECLARE_PEAK)
extern double (*const peaks[ISA_COUNT])(int64_t n, float *out);

extern const char *const isa_names[ISA_COUNT];
int isa_supported(int isa);
/* The instruction set to begin with: what LONGLORA_ISA names if it is set, else the best that CPUID reports.
 * -1 after fail() if the variable names one that this machine or build does not have. */
int choose_isa(void);

#ifdef __cplusplus
}
#endif

#endif
