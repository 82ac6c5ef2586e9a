/* s2_attention.cuh --- which rows a block of the S2-Attn kernels works on, its arguments and its grid.
 * csrc/ops.h has the rule.
 *
 * Every pattern is a list of segments, and each segment is a causal attention of its own, as on the CPU: one
 * run of tokens, or (wrap, swap) two runs one after the other. A shifted group is therefore addressed, not
 * masked: only the diagonal is masked and, if G is odd, the one token by which the two runs differ (`low`).
 * Segments are cut into tiles of rows. A segment's first tile begins where the segment begins.
 *
 * A block finds its tile itself, because only the device knows what cu_seqlens holds. A document of L tokens
 * has at most L/tile + L/G + 2 tiles. So document d, which begins at token t, gets the slots from
 * t/tile + t/G + 4 d on: slots of two documents never overlap, and a binary search finds d. A block whose
 * slot has no tile ends at once. Borders are clamped to 0 .. T, so that no content of cu_seqlens makes a
 * block touch memory outside the tensors. */
#ifndef LONGLORA_S2_ATTENTION_CUH
#define LONGLORA_S2_ATTENTION_CUH

#include "common.cuh"

/* Rows are counted in a segment, tokens in the sequence. */
struct Pattern {
    int G, boundary, border; /* query heads from `border` on are shifted */
    int B, T, H, K, D, documents;
    const int32_t *cu_seqlens; /* NULL: each sequence of the batch is one document */
};

struct Segment {
    int rows, turn, start, next; /* row r is token start + r if r < turn, else next + r */
    int low_from, low_to, low;   /* rows low_from .. low_to-1 see no key below `low` */
    bool wrong;                  /* wrap or swap cannot take the length of its document: results are NaN */
};

static __host__ __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
static __host__ __device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }
static __host__ __device__ __forceinline__ int tiles_in(int rows, int tile) {
    return (rows + tile - 1) / tile;
}

static __device__ __forceinline__ int64_t token(const Segment &s, int row) {
    return row + (row < s.turn ? s.start : s.next);
}

/* The first key that a row sees. The last one is the row itself. */
static __device__ __forceinline__ int first_key(const Segment &s, int row) {
    return row >= s.low_from && row < s.low_to ? s.low : 0;
}
/* Whether any of the `keys` keys from `key` on is hidden from any of the `rows` rows from `row` on. */
static __device__ __forceinline__ bool any_hidden(const Segment &s, int row, int rows, int key, int keys) {
    return key + keys - 1 > row || (key < s.low && s.low_from < row + rows && s.low_to > row);
}

/* Finds tile i of the document at tokens origin .. origin+L-1: its segment, and its first row in it. Returns
 * false if there is no such tile. */
static __device__ bool find_tile(const Pattern &p, bool shifted, int origin, int L, int i, int tile,
                                 Segment *s, int *first) {
    int half = shifted ? p.G / 2 : 0;
    bool joined = half && p.boundary != SPLIT, wrong = joined && L % p.G;
    *s = Segment{ min_of(half, L), INT32_MAX, origin, 0, 0, 0, 0, wrong };
    joined = joined && !wrong;
    if (!joined) { /* the half group in front */
        int tiles = tiles_in(s->rows, tile);
        *first = i * tile;
        if (i < tiles) return i >= 0;
        i -= tiles;
    }
    int each = tiles_in(min_of(p.G, L - (joined ? 0 : half)), tile);
    if (i < 0 || each <= 0) return false;
    int64_t begin = half + (int64_t)(i / each) * p.G;
    *first = i % each * tile;
    if (begin >= L) return false;
    int at = (int)begin, last = L - at; /* tokens of the joined segment here */
    s->rows = joined ? p.G : min_of(p.G, last);
    s->start = origin + at;
    if (joined && last < p.G) {
        bool wrap = p.boundary == WRAP;
        s->turn = wrap ? last : half;
        s->start = wrap ? origin + at : origin;
        s->next = wrap ? origin - last : origin + at - half;
        s->low_from = s->turn;
        s->low_to = wrap ? p.G : last;
        s->low = wrap ? last - half : half;
    }
    return *first < s->rows;
}

static __device__ __forceinline__ int border_of(const Pattern &p, int document) {
    return min_of(max_of(p.cu_seqlens[document], 0), p.T);
}
static __device__ __forceinline__ int first_slot(const Pattern &p, int document, int tile) {
    int t = border_of(p, document);
    return t / tile + t / p.G + 4 * document;
}

/* What a block works on. It lies in shared memory to save registers. */
struct Work {
    Segment s;
    int first; /* row of the tile, -1 if the slot has none */
    int batch, kv_head, head, to_head;
};

/* Finds the document and the tile of a slot. */
static __device__ void find_work(const Pattern &p, bool shifted, int slot, int tile, Work *w) {
    int from = 0, to = p.cu_seqlens ? p.documents - 1 : 0, origin = 0, L = p.T;
    while (from < to) {
        int middle = (from + to + 1) / 2;
        if (first_slot(p, middle, tile) <= slot) from = middle;
        else to = middle - 1;
    }
    if (p.cu_seqlens) {
        origin = border_of(p, from);
        L = max_of(border_of(p, from + 1) - origin, 0);
        slot -= first_slot(p, from, tile);
    }
    if (!find_tile(p, shifted, origin, L, slot, tile, &w->s, &w->first)) w->first = -1;
}

/* Finds the work of a block that takes a tile of queries of one head. Blocks go head by head; in a head the
 * last tiles come first, because they see most keys. Returns false to all threads if the block has none. */
static __device__ __forceinline__ bool find_queries(const Pattern &p, int slots, int tile, Work *w) {
    if (threadIdx.x == 0) {
        int rest = blockIdx.x / slots;
        w->batch = rest / p.H;
        w->head = rest % p.H;
        w->kv_head = w->head / (p.H / p.K);
        find_work(p, w->head >= p.border, slots - 1 - (int)(blockIdx.x % slots), tile, w);
    }
    __syncthreads();
    return w->first >= 0;
}

/* Finds the work of a block that takes a tile of keys of one KV head, for the query heads head .. to_head-1,
 * all plain or all shifted. `mixed` is the KV head that has both kinds: the first launch takes its plain
 * heads, and the second one, which has no other KV head, takes its shifted heads. */
static __device__ __forceinline__ bool find_keys(const Pattern &p, int slots, int tile, int mixed,
                                                 bool second, Work *w) {
    if (threadIdx.x == 0) {
        int rest = blockIdx.x / slots, each = p.H / p.K;
        w->batch = second ? rest : rest / p.K;
        w->kv_head = second ? mixed : rest % p.K;
        w->head = second ? p.border : w->kv_head * each;
        w->to_head = w->kv_head == mixed && !second ? p.border : (w->kv_head + 1) * each;
        find_work(p, w->head >= p.border, blockIdx.x % slots, tile, w);
    }
    __syncthreads();
    return w->first >= 0;
}

/* ---- on the host ----------------------------------------------------------------------------- */

static int64_t tiles_of_document(const Pattern *p, bool shifted, int tile) {
    int half = shifted ? p->G / 2 : 0, lead = half && p->boundary != SPLIT ? 0 : min_of(half, p->T),
        rest = p->T - lead;
    return tiles_in(lead, tile) + (int64_t)(rest / p->G) * tiles_in(p->G, tile) + tiles_in(rest % p->G, tile);
}

/* Slots of one head for tiles of `tile` rows. */
static int64_t slots_of(const Pattern *p, int tile) {
    if (p->cu_seqlens) return p->T / tile + p->T / p->G + 4 * (int64_t)p->documents;
    int64_t plain = p->border > 0 ? tiles_of_document(p, false, tile) : 0;
    int64_t shifted = p->border < p->H ? tiles_of_document(p, true, tile) : 0;
    return plain > shifted ? plain : shifted;
}

/* x: the op's arguments, forward or backward. 0, or -1 after fail(). */
template <class Args> static int make_pattern(const char *op, Pattern *p, const Args *x) {
    const Tensor *q = &x->q, *k = &x->k, *cu_seqlens = &x->cu_seqlens;
    double boundary = x->boundary, shift = x->shift;
    int64_t B = q->shape[0], T = q->shape[1], H = q->shape[2], D = q->shape[3], K = k->shape[2];
    int64_t G = (int64_t)x->group_size, documents = given(cu_seqlens) ? cu_seqlens->shape[0] - 1 : 0;
    if (check_attention_on_gpu(op, q, cu_seqlens)) return -1;
    int64_t most = 2 * T + 1; /* larger groups all mean the same */
    *p = Pattern{ (int)(G < most ? G : most),
                  (int)boundary,
                  (int)first_shifted(H, shift),
                  (int)B,
                  (int)T,
                  (int)H,
                  (int)K,
                  (int)D,
                  (int)documents,
                  given(cu_seqlens) ? (const int32_t *)cu_seqlens->data : nullptr };
    return 0;
}

/* The grid: one block per slot of `heads` heads of each sequence. 0, or -1 after fail(). */
static int blocks_of(const char *op, const Pattern *p, int heads, int tile, int *slots, dim3 *grid) {
    int64_t each = slots_of(p, tile), blocks = (int64_t)p->B * heads;
    if (each && blocks > INT32_MAX / each)
        return fail("%s: too much for one call: B=%d T=%d H=%d group_size=%d", op, p->B, p->T, p->H, p->G);
    *slots = (int)each;
    *grid = dim3((unsigned)(blocks * each));
    return 0;
}

/* ---- arguments ------------------------------------------------------------------------------- */

/* A tensor [B,T,heads,D] (lse: [B,H,T] with token stride 1). Strides are in elements. */
struct Rows {
    void *data;
    int64_t batch, token, head;
    bool vectors; /* rows are whole, aligned pieces of 16 bytes */
};

static Rows rows_of(const Tensor *t) {
    return Rows{ t->data, t->stride[0], t->stride[1], t->stride[2],
                 vectors_fit(t, (int)(16 / size_of(t->dtype))) };
}
static Rows lse_of(const Tensor *t) { return Rows{ t->data, t->stride[0], 1, t->stride[1], false }; }

template <class T> __device__ __forceinline__ T *head_of(const Rows &x, int batch, int head) {
    return (T *)x.data + batch * x.batch + head * x.head;
}

#endif
