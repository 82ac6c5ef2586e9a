/* scratch.h --- what the ops with the most scratch take while they run: the kernels allocate by this, and
 * plan() counts by it, so nothing here depends on the instruction set. Sizes are bytes; the letters are those
 * of ops.h. */
#ifndef LONGLORA_SCRATCH_H
#define LONGLORA_SCRATCH_H

#include <stdint.h>

/* matmul: panels of b that are packed at once, at most; twice that of a. */
enum { PACK_BYTES = 9 << 19 };

/* linear_cross_entropy: rows go in chunks, as equal as units of HEAD_ROUND rows allow. A row has the logits
 * of a stretch of the vocabulary; the maximum and sum of each HEAD_BLOCK of a stretch; what the exponentials
 * of each stretch that is kept are taken from; three numbers more; and in narrow dtypes the float32 sums of
 * dx and exponentials in 16 bits. `kept`: for the gradient of weight, the exponentials of all of the
 * vocabulary, in so many bytes each, 4 (where the logits were) or 2; 0 without. With what matmul packs of x
 * and of exponentials a chunk has HEAD_BYTES and HEAD_ROWS at most, HEAD_NARROW where it converts rows of
 * weight too: in all below 64 MiB. */
enum {
    HEAD_BYTES = 255 << 18,
    HEAD_NARROW = 54 << 20,
    HEAD_ROWS = 512,
    HEAD_ROUND = 16,
    HEAD_BLOCK = 128,
    HEAD_STRETCH = 2048
};

static inline int64_t head_stretches(int64_t V, int kept) {
    return kept ? (V + HEAD_STRETCH - 1) / HEAD_STRETCH : 1;
}
static inline int64_t head_logits(int64_t V, int kept) {
    return kept == 4 || V < HEAD_STRETCH ? V : HEAD_STRETCH;
}
static inline int64_t head_row(int64_t C, int64_t V, int narrow, int kept) {
    int64_t own = 2 * (HEAD_STRETCH / HEAD_BLOCK) + head_stretches(V, kept) + 3,
            in_16_bits = kept == 2 ? V : HEAD_STRETCH;
    return 4 * (head_logits(V, kept) + own + (narrow ? C + (in_16_bits + 1) / 2 : 0));
}
static inline int64_t head_chunks(int64_t M, int64_t C, int64_t V, int narrow, int kept) {
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND;
    int64_t row = head_row(C, V, narrow, kept) + 4 * (C > HEAD_STRETCH ? C : HEAD_STRETCH);
    int64_t most = (narrow ? HEAD_NARROW : HEAD_BYTES) / HEAD_ROUND / row;
    if (most > HEAD_ROWS / HEAD_ROUND) most = HEAD_ROWS / HEAD_ROUND;
    return most > 1 ? (units + most - 1) / most : units;
}
static inline int64_t head_rows(int64_t M, int64_t C, int64_t V, int narrow,
                                int kept) { /* of the largest chunk */
    int64_t units = (M + HEAD_ROUND - 1) / HEAD_ROUND, chunks = head_chunks(M, C, V, narrow, kept);
    return chunks ? (units + chunks - 1) / chunks * HEAD_ROUND : 0;
}
static inline int64_t head_scratch(int64_t M, int64_t C, int64_t V, int narrow, int kept) {
    return head_rows(M, C, V, narrow, kept) * head_row(C, V, narrow, kept);
}

/* s2_attention backward: each thread a chunk of keys, values and their gradients and a block of queries, in
 * rows of `pitch` floats, D rounded up to whole vectors; and for outputs narrower than float32 the sums of as
 * many KV heads at once as stay below SUM_BYTES. */
enum { BQ = 64, BK = 96, CHUNK = 1024, ATTENTION_SUM_BYTES = 64 << 20 };

static inline int64_t attention_thread_scratch(int64_t pitch) {
    return ((4 * CHUNK + 5 * BQ) * pitch + 2 * BK * BQ + 2 * BQ) * 4;
}
static inline int64_t attention_head_sums(int64_t T, int64_t H, int64_t K, int64_t D) {
    return 4 * (H / K + 2) * T * D;
}
static inline int64_t attention_heads_at_once(int64_t B, int64_t T, int64_t H, int64_t K, int64_t D) {
    int64_t each = attention_head_sums(T, H, K, D), count = each ? ATTENTION_SUM_BYTES / each : B * K;
    return count < 1 ? 1 : count > B * K ? B * K : count;
}

#endif
