/* scratch.h --- how much the backward pass of s2_attention takes while it runs. The letters are those of
 * ops.h. */
#ifndef LONGLORA_SCRATCH_H
#define LONGLORA_SCRATCH_H

#include <stdint.h>

/* Each thread holds a chunk of keys, values and their gradients and a block of queries, in rows of `pitch`
 * floats: D rounded up to whole vectors, or to registers of the matrix unit. Outputs narrower than float32
 * also need float32 sums, for as many KV heads at a time as fit ATTENTION_SUM_BYTES, and for one at least. */
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
