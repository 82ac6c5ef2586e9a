/* scratch.h --- what the ops with the most scratch take while they run: the kernels allocate by this, and plan() counts by it,
 * so nothing here depends on the instruction set. Sizes are bytes; the letters are those of ops.h. */
#ifndef LONGLORA_SCRATCH_H
#define LONGLORA_SCRATCH_H

#include <stdint.h>

/* matmul: panels of b that are packed at once, at most; twice that of a. */
enum { PACK_BYTES = 9 << 19 };

/* linear_cross_entropy: rows go in chunks, as equal as units of HEAD_ROUND rows allow. A row has its logits, maximum and sum of each
 * HEAD_BLOCK of them, two numbers more and, in narrow dtypes, the float32 sums of dx: of a chunk HEAD_BYTES and HEAD_ROWS at most, which
 * with what matmul packs is below 64 MiB; HEAD_NARROW, because then it converts rows of weight too. */
enum { HEAD_BYTES = 56 << 20, HEAD_NARROW = 49 << 20, HEAD_ROWS = 512, HEAD_ROUND = 16, HEAD_BLOCK = 256 };

static inline int64_t head_row(int64_t C, int64_t V, int narrow) {
    return 4 * (V + 2 * ((V + HEAD_BLOCK - 1) / HEAD_BLOCK) + 2 + (narrow ? C : 0));
}
static inline int64_t head_chunks(int64_t M, int64_t C, int64_t V, int narrow) {
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND;
    int64_t most = (narrow ? HEAD_NARROW : HEAD_BYTES) / HEAD_ROUND / head_row(C, V, narrow);
    if (most > HEAD_ROWS / HEAD_ROUND) most = HEAD_ROWS / HEAD_ROUND;
    return most > 1 ? (units + most - 1) / most : units;
}
static inline int64_t head_rows(int64_t M, int64_t C, int64_t V, int narrow) {    /* of the largest chunk */
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND, chunks = head_chunks(M, C, V, narrow);
    return chunks ? (units + chunks - 1) / chunks * HEAD_ROUND : 0;
}
static inline int64_t head_scratch(int64_t M, int64_t C, int64_t V, int narrow) {
    return head_rows(M, C, V, narrow) * head_row(C, V, narrow);
}

/* s2_attention backward: each thread a chunk of keys, values and their gradients and a block of queries, in rows of `pitch`
 * floats, D rounded up to whole vectors; and for outputs narrower than float32 the sums of as many KV heads at once as stay
 * below SUM_BYTES. */
enum { BQ = 64, BK = 96, CHUNK = 1024, ATTENTION_SUM_BYTES = 64 << 20 };

static inline int64_t attention_thread_scratch(int64_t pitch) {
    return ((4 * CHUNK + 5 * BQ) * pitch + 2 * BK * BQ + 2 * BQ) * 4;
}
static inline int64_t attention_head_sums(int64_t T, int64_t H, int64_t K, int64_t D) { return 4 * (H / K + 2) * T * D; }
static inline int64_t attention_heads_at_once(int64_t B, int64_t T, int64_t H, int64_t K, int64_t D) {
    int64_t each = attention_head_sums(T, H, K, D), count = each ? ATTENTION_SUM_BYTES / each : B * K;
    return count < 1 ? 1 : count > B * K ? B * K : count;
}

#endif
