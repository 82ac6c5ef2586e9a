/* s2_attention.cuh --- which rows a block of the S2-Attn kernels works on: index arithmetic alone; the rule
 * is in csrc/ops.h.
 *
 * Every pattern is a list of segments, each a causal attention of its own, as on the CPU: a run of tokens, or
 * (wrap, swap) two runs one after the other. So a shifted group is addressed, and nothing is masked but the
 * diagonal (and, with an odd G, the one token by which the two runs differ: `low`). Segments are cut into
 * tiles of rows that begin where the segment begins.
 *
 * Blocks find their tile themselves: what cu_seqlens holds is known on the device only. A document of L
 * tokens has at most L/tile + L/G + 2 tiles, so document d, which begins at token t, gets the slots from
 * t/tile + t/G + 4 d on: they never overlap, and a search by halves finds d. Slots without a tile are blocks
 * that end at once. Whatever cu_seqlens holds, borders are taken as 0 .. T, so nothing outside of the tensors
 * is touched. */
#ifndef LONGLORA_S2_ATTENTION_CUH
#define LONGLORA_S2_ATTENTION_CUH

#include "common.cuh"

/* Rows are those of a segment, tokens those of the sequence. */
struct Pattern {
    int G, boundary, border; /* query heads from `border` on are shifted */
    int B, T, H, K, D, documents;
    const int32_t *cu_seqlens; /* NULL: each sequence of the batch is one document */
};

struct Segment {
    int rows, turn, start, next; /* row r is token start + r before `turn`, next + r from there on */
    int low_from, low_to, low;   /* rows low_from .. low_to-1 see no key below `low` */
    bool wrong;                  /* of a document that wrap or swap cannot take: its results are NaN */
};

static __host__ __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
static __host__ __device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }
static __host__ __device__ __forceinline__ int tiles_in(int rows, int tile) {
    return (rows + tile - 1) / tile;
}

static __device__ __forceinline__ int64_t token(const Segment &s, int row) {
    return row + (row < s.turn ? s.start : s.next);
}

/* The first key that a row sees; the last one is the row's own. */
static __device__ __forceinline__ int first_key(const Segment &s, int row) {
    return row >= s.low_from && row < s.low_to ? s.low : 0;
}
/* Whether any of `keys` keys from `key` on is hidden from any of `rows` rows from `row` on. */
static __device__ __forceinline__ bool any_hidden(const Segment &s, int row, int rows, int key, int keys) {
    return key + keys - 1 > row || (key < s.low && s.low_from < row + rows && s.low_to > row);
}

/* Tile i of a document at tokens origin .. origin+L-1: its segment and its first row there. False: there is
 * no such tile. */
static __device__ bool find_tile(const Pattern &p, bool shifted, int origin, int L, int i, int tile,
                                 Segment *s, int *first) {
    int half = shifted ? p.G / 2 : 0;
    bool joined = half && p.boundary != SPLIT, wrong = joined && L % p.G;
    *s = Segment{ min_of(half, L), INT32_MAX, origin, 0, 0, 0, 0, wrong };
    joined = joined && !wrong;
    if (!joined) { /* the half group at the beginning */
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
    int at = (int)begin, last = L - at; /* of the joined segment: h tokens, h + 1 for an odd G */
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

/* What a block works on. In shared memory, that its threads need not keep it in registers. */
struct Work {
    Segment s;
    int first, batch, kv_head, head, to_head;
}; /* first: row of the tile, -1 when there is none */

/* The tile of a slot: find_tile in its document. */
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

/* Of blocks with a tile of queries of one head: head by head, the last tiles first, since they see most keys.
 * False: the block has none, and all its threads hear so. */
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

/* Of blocks with a tile of keys of one KV head, for the query heads head .. to_head-1 of one kind. `mixed` is
 * the KV head that has both kinds: its plain ones, and in the second launch, which is about it alone, its
 * shifted ones. */
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

/* Slots of one head in tiles of so many rows. */
static int64_t slots_of(const Pattern *p, int tile) {
    if (p->cu_seqlens) return p->T / tile + p->T / p->G + 4 * (int64_t)p->documents;
    int64_t plain = p->border > 0 ? tiles_of_document(p, false, tile) : 0;
    int64_t shifted = p->border < p->H ? tiles_of_document(p, true, tile) : 0;
    return plain > shifted ? plain : shifted;
}

/* x: the arguments of forward or backward. */
template <class Args> static int make_pattern(const char *op, Pattern *p, const Args *x) {
    const Tensor *q = &x->q, *k = &x->k, *cu_seqlens = &x->cu_seqlens;
    double boundary = x->boundary, shift = x->shift;
    int64_t B = q->shape[0], T = q->shape[1], H = q->shape[2], D = q->shape[3], K = k->shape[2];
    int64_t G = (int64_t)x->group_size, documents = given(cu_seqlens) ? cu_seqlens->shape[0] - 1 : 0;
    if (D > 256) return fail("%s: D should be at most 256 on a GPU, got %lld", op, (long long)D);
    if (T > 1 << 28 || documents > 1 << 26)
        return fail("%s: T should be at most 2^28 and cu_seqlens at most 2^26 long on a GPU, got T=%lld", op,
                    (long long)T);
    int64_t most = 2 * T + 1; /* from there on every G means the same */
    int border = (int)(shift == HALF ? H / 2 : shift == NONE ? H : 0);
    *p = Pattern{ (int)(G < most ? G : most),
                  (int)boundary,
                  border,
                  (int)B,
                  (int)T,
                  (int)H,
                  (int)K,
                  (int)D,
                  (int)documents,
                  given(cu_seqlens) ? (const int32_t *)cu_seqlens->data : nullptr };
    return 0;
}

#endif
