/* workspace.c --- the bytes of workspace that each op needs on a GPU, or -1 after fail(): see workspace.h. */
#include "workspace.h"

int64_t sum_squares_cuda_workspace(const void *args) {
    return squares_blocks(&((const SumSquares *)args)->x) * (int64_t)sizeof(double);
}

int64_t matmul_cuda_workspace(const void *args) {
    (void)args;
    return GEMM_WORKSPACE;
}

int64_t embedding_backward_cuda_workspace(const void *args) { return embedding_pieces(args).bytes; }

int64_t rms_norm_backward_cuda_workspace(const void *args) {
    const RmsNormBackward *a = args;
    NormBackward b = norm_backward(a);
    return given(&a->dweight) ? b.blocks * b.pitch * (int64_t)sizeof(float) : 0;
}

int64_t lora_linear_forward_cuda_workspace(const void *args) { return lora_forward_bytes(args); }
int64_t lora_linear_backward_cuda_workspace(const void *args) { return lora_parts(args).bytes; }

int64_t s2_attention_backward_cuda_workspace(const void *args) {
    const S2AttentionBackward *a = args;
    if (check_attention_on_gpu("s2_attention_backward", &a->q, &a->cu_seqlens)) return -1;
    return attention_parts(a).bytes;
}

int64_t linear_cross_entropy_forward_cuda_workspace(const void *args) {
    const LinearCrossEntropyForward *a = args;
    return logits_bytes(a->x.shape[0], a->weight.shape[0]);
}
int64_t linear_cross_entropy_backward_cuda_workspace(const void *args) {
    const LinearCrossEntropyBackward *a = args;
    return logits_bytes(a->x.shape[0], a->weight.shape[0]);
}

int64_t cached_attention_cuda_workspace(const void *args) { return cache_bytes(args); }
