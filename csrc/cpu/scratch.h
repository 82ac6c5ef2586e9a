/* scratch.h --- what the ops with the most scratch take while they run: the kernels allocate by this, and plan() counts by it,
 * so nothing here depends on the instruction set. Sizes are bytes; the letters are those of ops.h. */
#ifndef LONGLORA_SCRATCH_H
#define LONGLORA_SCRATCH_H

#include <stdint.h>

/* matmul: panels of b that are packed at once, at most; twice that of a. */
enum { PACK_BYTES = 9 << 19 };

/* linear_cross_entropy: rows go in chunks, as equal as units of HEAD_ROUND rows allow, of HEAD_BYTES of logits at most (with what
 * matmul packs of a vocabulary of 32000 or more, below 64 MiB); beside them maximum and sum for each HEAD_BLOCK rows of V; and
 * dx, where it is narrower than its sums. */
enum { HEAD_BYTES = 56 << 20, HEAD_ROUND = 16, HEAD_BLOCK = 256 };

static inline int64_t head_chunks(int64_t M, int64_t V) {
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND, most = HEAD_BYTES / 4 / HEAD_ROUND / (V > 0 ? V : 1);
    return most > 1 ? (units + most - 1) / most : units;
}
static inline int64_t head_rows(int64_t M, int64_t V) {                /* of the largest chunk */
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND, chunks = head_chunks(M, V);
    return chunks ? (units + chunks - 1) / chunks * HEAD_ROUND : 0;
}
static inline int64_t head_scratch(int64_t M, int64_t C, int64_t V, int keep_dx) {
    return 4 * head_rows(M, V) * (V + 2 * ((V + HEAD_BLOCK - 1) / HEAD_BLOCK) + 2 + (keep_dx ? C : 0));
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
