/* workspace.h --- how CUDA kernels divide the workspace of a call, and so how many bytes an op needs. Plain
 * C, because a build without CUDA plans runs on GPUs too. The kernels in cuda/ use these numbers and offsets;
 * they depend on shapes and dtypes only. */
#ifndef LONGLORA_WORKSPACE_H
#define LONGLORA_WORKSPACE_H

#include "ops.h"

#ifndef HOST_DEVICE /* set by cuda/common.cuh */
#define HOST_DEVICE
#endif

static inline HOST_DEVICE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
/* Pieces of a workspace begin at multiples of 256 bytes. */
static inline int64_t align_up(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

/* Bytes of an element. */
static inline int64_t size_of(int32_t dtype) {
    switch (dtype) {
        case F32:
        case I32: return 4;
        case F64:
        case I64: return 8;
        case U8: return 1;
        default: return 2;
    }
}

enum { WARP = 32, ROW_BLOCK = 256 }; /* threads of a warp, and of a block of the kernels of rows.cuh */

/* ---- matrix products ------------------------------------------------------------------------- */

/* The first bytes of an op's workspace belong to cuBLASLt. Their number is constant, because the choice of an
 * algorithm, and so every bit of a result, depends on it. */
enum { GEMM_WORKSPACE = 32 << 20 };

static inline int64_t rank_of_lora(const Tensor *a) { return given(a) ? a->shape[0] : 0; }

/* u, behind the workspace of cuBLASLt, where the caller does not take it. */
static inline int64_t lora_forward_bytes(const LoraLinearForward *f) {
    return GEMM_WORKSPACE + (given(&f->u) ? 0 : align_up(4 * f->x.shape[0] * rank_of_lora(&f->a)));
}

/* Sums over M: the pieces that the rows are cut into. */
static inline int64_t lora_pieces(int64_t M) {
    enum { PIECES = 16, PIECE_ROWS = 256 };
    return least(ceil_div(M, PIECE_ROWS), PIECES);
}

/* Offsets of the parts of the backward's workspace, and their end. */
typedef struct {
    int64_t du, u, partial, bytes;
} LoraParts;
static inline LoraParts lora_parts(const LoraLinearBackward *f) {
    int64_t M = f->dout.shape[0], N = f->dout.shape[1], C = f->weight.shape[1], R = rank_of_lora(&f->a);
    int64_t sums = given(&f->da) ? R * C : 0;
    if (given(&f->db) && R * N > sums) sums = R * N;
    if (given(&f->dbias) && N > sums) sums = N;
    LoraParts p;
    p.du = GEMM_WORKSPACE;
    p.u = p.du + (given(&f->dx) || given(&f->da) ? align_up(4 * M * R) : 0);
    p.partial = p.u + (given(&f->db) && !given(&f->u) ? align_up(4 * M * R) : 0);
    p.bytes = p.partial + align_up(4 * lora_pieces(M) * sums);
    return p;
}

/* ---- linear_cross_entropy -------------------------------------------------------------------- */

enum { SCALARS = 256 }; /* bytes between the workspace of cuBLASLt and the logits */

/* The floats of a row of logits, and the rows of a chunk: as many as fit, in chunks of about equal length. */
static inline int64_t logits_stride(int64_t V) { return ceil_div(V, 8) * 8; }
static inline int64_t logits_rows(int64_t M, int64_t V) {
    enum { MAX_ROWS = 2048, ROUND = 64, LOGITS_BYTES = 448 << 20 };
    int64_t fit = V ? LOGITS_BYTES / (4 * logits_stride(V)) : (int64_t)MAX_ROWS;
    if (fit > MAX_ROWS) fit = MAX_ROWS;
    if (fit >= ROUND) fit -= fit % ROUND;
    if (fit < 1) fit = 1;
    if (M <= fit) return M;
    int64_t rows = ceil_div(ceil_div(M, ceil_div(M, fit)), ROUND) * ROUND;
    return rows < fit ? rows : fit;
}
static inline int64_t logits_bytes(int64_t M, int64_t V) {
    return GEMM_WORKSPACE + SCALARS + align_up(4 * logits_rows(M, V) * logits_stride(V));
}

/* ---- embedding ------------------------------------------------------------------------------- */

/* Pieces of at least 32 tokens, and at most 1024 of them, so that there are few partial rows. A row has
 * `pitch` floats, whole vectors of EMBEDDING_COLUMNS. The ids that pieces carry on lie behind the rows. */
enum { EMBEDDING_COLUMNS = 4 };
typedef struct {
    int64_t length, count, pitch, carried, bytes;
} EmbeddingPieces;
static inline EmbeddingPieces embedding_pieces(const EmbeddingBackward *a) {
    int64_t M = a->dout.shape[0], C = a->dout.shape[1], length = ceil_div(M, 1024);
    EmbeddingPieces p;
    p.length = length < 32 ? 32 : length;
    p.count = ceil_div(M, p.length);
    p.pitch = ceil_div(C, EMBEDDING_COLUMNS) * EMBEDDING_COLUMNS;
    p.carried = align_up(p.count * p.pitch * 4);
    p.bytes = p.carried + p.count * 4;
    return p;
}

/* ---- rms_norm -------------------------------------------------------------------------------- */

/* A row of C elements has `width` threads with up to `elements` each: a power of two up to a warp, then whole
 * warps up to NORM_MOST threads. A block has `rows` rows. */
enum { NORM_MOST = 512, NORM_VECTORS = 4 };
typedef struct {
    unsigned width, rows;
} NormTeam;
static inline NormTeam norm_team(int64_t C, int64_t elements) {
    NormTeam t = { 1, 1 };
    while (t.width < WARP && (int64_t)t.width * elements < C) t.width *= 2;
    if (t.width < WARP || C <= WARP * elements) t.rows = ROW_BLOCK / t.width;
    else t.width = (unsigned)least(ceil_div(C, WARP * elements) * WARP, NORM_MOST);
    return t;
}

/* The backward's number of blocks; each writes a partial row of dweight. They must be enough to keep every
 * multiprocessor of the largest GPU busy, and few, so that their partial sums are small beside the rows. It
 * depends on the shape only, because the order of the sums depends on it. */
typedef struct {
    NormTeam team;
    unsigned blocks;
    int64_t pitch;
} NormBackward;
static inline NormBackward norm_backward(const RmsNormBackward *a) {
    int64_t M = a->x.shape[0], C = a->x.shape[1];
    NormBackward b;
    b.team = norm_team(C, NORM_VECTORS * 16 / size_of(a->x.dtype));
    b.blocks = (unsigned)least(ceil_div(M, b.team.rows), b.team.width > WARP ? 65536 / b.team.width : 1024);
    b.pitch = ceil_div(C, 8) * 8;
    return b;
}

/* ---- sum_squares ----------------------------------------------------------------------------- */

/* The blocks that compute a sum in float64 each. A thread reads SQUARES_UNROLL vectors of 16 bytes at a time.
 */
enum { SQUARES_UNROLL = 4 };
static inline unsigned squares_blocks(const Tensor *x) {
    return (unsigned)least(ceil_div(x->shape[0] * size_of(x->dtype), 16 * SQUARES_UNROLL * ROW_BLOCK), 1024);
}

/* ---- s2_attention ---------------------------------------------------------------------------- */

/* The first shifted query head. */
static inline int64_t first_shifted(int64_t H, double shift) {
    return shift == HALF ? H / 2 : shift == NONE ? H : 0;
}
/* The KV head that has plain and shifted query heads, or -1. */
static inline int64_t mixed_head(int64_t H, int64_t K, double shift) {
    int64_t border = first_shifted(H, shift);
    return K && H && border % (H / K) ? border / (H / K) : -1;
}

/* What a GPU refuses, apart from what every device does. 0, or -1 after fail(). */
static inline int check_attention_on_gpu(const char *op, const Tensor *q, const Tensor *cu_seqlens) {
    int64_t T = q->shape[1], D = q->shape[3], documents = given(cu_seqlens) ? cu_seqlens->shape[0] - 1 : 0;
    if (D > 256) return fail("%s: D should be at most 256 on a GPU, got %lld", op, (long long)D);
    if (T > 1 << 28 || documents > 1 << 26)
        return fail("%s: T should be at most 2^28 and cu_seqlens at most 2^26 long on a GPU, got T=%lld", op,
                    (long long)T);
    return 0;
}

/* delta, and behind it dk and dv of the plain heads of the mixed KV head, if outputs are narrower than that.
 */
typedef struct {
    int64_t sums, bytes;
} AttentionParts;
static inline AttentionParts attention_parts(const S2AttentionBackward *a) {
    int64_t B = a->q.shape[0], T = a->q.shape[1], H = a->q.shape[2], D = a->q.shape[3], K = a->k.shape[2];
    AttentionParts p;
    p.sums = p.bytes = align_up(B * H * T * 4);
    if (mixed_head(H, K, a->shift) >= 0 && a->q.dtype != F32) p.bytes += B * T * 2 * D * 4;
    return p;
}

/* ---- cached_attention ------------------------------------------------------------------------ */

/* The parts that keys are cut into where a KV head has few query rows: of CACHE_PART_KEYS keys, where that
 * makes no more than CACHE_PARTS. */
enum { CACHE_PARTS = 64, CACHE_PART_KEYS = 256 };
static inline int64_t cache_parts(const CachedAttention *a) {
    enum { FEW = 32 };
    int64_t S = a->q.shape[1], H = a->q.shape[2], P = a->k_cache.shape[1], K = a->k_cache.shape[2];
    int64_t most = least(P, CACHE_PART_KEYS * CACHE_PARTS);
    return K && S * (H / K) <= FEW && most > CACHE_PART_KEYS ? ceil_div(most, CACHE_PART_KEYS) : 1;
}
/* For each part, its sums for each query row: D of them, their maximum and their total. */
static inline int64_t cache_bytes(const CachedAttention *a) {
    int64_t B = a->q.shape[0], S = a->q.shape[1], H = a->q.shape[2], D = a->q.shape[3];
    int64_t K = a->k_cache.shape[2], parts = cache_parts(a);
    return parts == 1 ? 0 : 4 * B * parts * K * (S * (H / K)) * (D + 2);
}

#endif
