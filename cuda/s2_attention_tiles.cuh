/* s2_attention_tiles.cuh --- what the S2-Attn kernels of 16 bits (mma.sync) and of float32 (multiply-adds)
 * share: tiles in shared memory and products of them. s2_attention.cuh says which rows a tile has. */
#ifndef LONGLORA_S2_ATTENTION_TILES_CUH
#define LONGLORA_S2_ATTENTION_TILES_CUH

#include "s2_attention.cuh"

enum { THREADS = 128, WARPS = THREADS / WARP };
static const float LOG2E = 1.44269504088896341f;

/* ---- tiles in shared memory ------------------------------------------------------------------ */

/* The place of a piece in a tile. A tile has rows of D elements of 16 bits, cut into pieces of 16 bytes. The
 * order of a row's pieces depends on the row, so that neither one piece of eight rows nor eight pieces of one
 * row share a bank. The order repeats every eight rows. */
template <int D> __device__ __forceinline__ int place(int row, int piece) {
    return row * D + 8 * (piece ^ (D % 64 ? row / 2 % 4 : row % 8));
}
/* place(row, piece + 2 k), given place(row, piece) of piece 0 or 1. */
template <int D> __device__ __forceinline__ int along(int place, int k) {
    constexpr int turn = D % 64 ? 2 : 4;
    return (place ^ k % turn * 16) + k / turn * turn * 16;
}

/* Queues the loads of rows first .. first+ROWS-1 of the segment. Rows behind its end and columns from
 * `columns` on become zero. */
template <int D, int ROWS, class T> __device__ __forceinline__ void
load_tile(T *tile, const Rows &x, int head, const Work &w, int first, int columns) {
    constexpr int PIECES = D / 8, STEP = THREADS / PIECES / 4 * 4; /* rows at a time */
    static_assert(ROWS % STEP == 0, "a tile is loaded in whole steps");
    int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const Segment &s = w.s;
    const T *from = head_of<const T>(x, w.batch, head);
    if (!x.vectors) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            int r = i / D, d = i % D;
            bool there = first + r < s.rows && d < columns;
            tile[place<D>(r, d / 8) + d % 8] =
                there ? from[token(s, first + r) * x.token + d] : from_float<T>(0);
        }
        return;
    }
    if (row >= STEP) return;
    bool there = piece * 8 < columns;
    if (first + ROWS <= s.rows &&
        (s.turn <= first || s.turn >= first + ROWS)) { /* all rows exist and belong to one run */
        const T *at = from + token(s, first + row) * x.token + piece * 8;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP, at += STEP * x.token)
            cp_async_16(tile + place<D>(row + i, piece), at, there);
    } else {
#pragma unroll 1
        for (int i = row; i < ROWS; i += STEP)
            cp_async_16(tile + place<D>(i, piece), from + token(s, first + i) * x.token + piece * 8,
                        there && first + i < s.rows);
    }
}

/* Queues the tiles of step n of two tensors. Each tensor has two tiles: one is used while the other one
 * arrives. */
template <int D, int ROWS, class T> __device__ __forceinline__ void load_step(T *one, T *two, int n,
                                                                              const Rows &x, const Rows &y,
                                                                              int head, const Work &w,
                                                                              int first, int columns) {
    load_tile<D, ROWS>(one + n % 2 * ROWS * D, x, head, w, first, columns);
    load_tile<D, ROWS>(two + n % 2 * ROWS * D, y, head, w, first, columns);
    cp_async_commit();
}

/* Stores a warp's 16 M rows, which are the segment's from `row` on, in COLUMNS columns from `column` on. They
 * pass through the warp's rows of a tile, so that the stores are whole pieces. */
template <int D, int COLUMNS, int M, class T> __device__ __forceinline__ void
store_rows(const Rows &x, int head, const Work &w, int row, int column, int columns,
           const float (&sum)[M][COLUMNS / 8][4], T *tile) {
    constexpr int PIECES = COLUMNS / 8;
    int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4 * 2;
    T *to = head_of<T>(x, w.batch, head);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < PIECES; j++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                store(tile + place<D>(16 * m + 8 * r + group, j) + pair,
                      { sum[m][j][2 * r], sum[m][j][2 * r + 1] });
    __syncwarp();
    for (int i = lane; i < 16 * M * PIECES; i += WARP) {
        int r = row + i / PIECES, d = column + i % PIECES * 8;
        if (r >= w.s.rows) return;
        Vector<T, 8> v = *(const Vector<T, 8> *)(tile + place<D>(i / PIECES, i % PIECES));
        T *at = to + token(w.s, r) * x.token + d;
        if (x.vectors && d < columns) *(Vector<T, 8> *)at = v;
        else
            for (int j = 0; j < 8 && d + j < columns; j++) at[j] = v.x[j];
    }
}

/* ---- products -------------------------------------------------------------------------------- */

/* One warp: sum[16 M,8 N] += a b^T, where a and b are rows of D elements in tiles. Fragments are laid out as
 * in common.cuh. */
template <int D, int M, int N, class T> __device__ __forceinline__ void
multiply_rows(float (&sum)[M][N][4], const T *a, const T *b) {
    int lane = threadIdx.x % WARP;
    int at_a = place<D>(lane % 16, lane / 16), at_b = place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(x[m], a + 16 * m * D + along<D>(at_a, k));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned y[4];
            ldmatrix_x4(y, b + 8 * n * D + along<D>(at_b, k));
            unsigned left[2] = { y[0], y[1] }, right[2] = { y[2], y[3] };
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sum[m][n], x[m], left);
                mma_16816<T>(sum[m][n + 1], x[m], right);
            }
        }
    }
}

/* One warp: sum[16 M,8 C] += p[16 M,8 N] b. p holds the sums of another product and is rounded to T here. b
 * points to the first column of 8 N rows of a tile. */
template <int D, int M, int N, int C, class T> __device__ __forceinline__ void
multiply_columns(float (&sum)[M][C][4], const float (&p)[M][N][4], const T *b) {
    int lane = threadIdx.x % WARP, at_b = place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[m][i] = pack<T>(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            unsigned y[4];
            ldmatrix_x4_trans(y, b + 8 * n * D + along<D>(at_b, c / 2));
            unsigned left[2] = { y[0], y[1] }, right[2] = { y[2], y[3] };
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sum[m][c], x[m], left);
                mma_16816<T>(sum[m][c + 1], x[m], right);
            }
        }
    }
}

/* Sets x to `value` for the keys that a query does not see. Rows are queries from `row` on and columns are
 * keys from `key` on; both are those of this lane's first element. */
template <int M, int N> static __device__ __forceinline__ void
hide_keys(float (&x)[M][N][4], const Segment &s, int row, int key, float value) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = row + 16 * m + 8 * r, low = first_key(s, at);
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if ((unsigned)(key - low + 8 * j + i) > (unsigned)(at - low)) x[m][j][2 * r + i] = value;
        }
}

/* Pieces of 16 rows that a warp has where rows are queries. */
template <int D> constexpr int row_pieces = D <= 128 ? 2 : 1;
/* Keys in a step of the forward kernel and of dq, and queries in a step of dk and dv. */
template <int D> constexpr int forward_step = D <= 64 ? 64 : 32;
template <int D> constexpr int dq_step = D <= 128 ? 32 : 16;
template <int D> constexpr int dkdv_step = D <= 64 ? 64 : dq_step<D>;

/* ---- float32 --------------------------------------------------------------------------------- */

/* The float32 kernels multiply squares of 64 rows and 64 columns in shared memory, for any D up to 256. Of
 * the 16 by 16 threads, thread (x,y) has rows 4 y .. 4 y + 3 of every product. Rows of D columns are moved in
 * squares. */
enum { SIDE = 64, PITCH = SIDE + 4, SQUARE = SIDE * PITCH, FLOAT_THREADS = 256, MOST_SQUARES = 4 };

static __device__ __forceinline__ void load_square(float *square, const Rows &x, int head, const Work &w,
                                                   int first, int column, int columns) {
    const float *from = head_of<const float>(x, w.batch, head);
    for (int i = threadIdx.x; i < SIDE * SIDE; i += FLOAT_THREADS) {
        int r = i / SIDE, d = i % SIDE;
        bool there = first + r < w.s.rows && column + d < columns;
        square[r * PITCH + d] = there ? from[token(w.s, first + r) * x.token + column + d] : 0;
    }
}

/* sum[i][j] += row 4 y + i of one tensor times row x + 16 j of the other, over D columns. The rows pass
 * through the squares a and b. This function and add_rows begin with a barrier and have another one before
 * they read, so the caller needs none between them. */
static __device__ __forceinline__ void dot_rows(float (&sum)[4][4], float *a, float *b, const Rows &rows_a,
                                                int head_a, int first_a, const Rows &rows_b, int head_b,
                                                int first_b, const Work &w, int D) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int column = 0; column < D; column += SIDE) {
        __syncthreads();
        load_square(a, rows_a, head_a, w, first_a, column, D);
        load_square(b, rows_b, head_b, w, first_b, column, D);
        __syncthreads();
        if (first_a + 4 * y < w.s.rows)
            for (int d = 0; d < min_of(SIDE, D - column); d += 4) {
                float u[4][4], v[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    load(u[i], a + (4 * y + i) * PITCH + d);
                    load(v[i], b + (x + 16 * i) * PITCH + d);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[i][j] += u[i][e] * v[j][e];
            }
    }
}

/* sum[c][i][j] += row 4 y + i of the square p times column 64 c + 4 x + j of SIDE rows of a tensor. These
 * rows pass through the square b. */
static __device__ __forceinline__ void add_rows(float (&sum)[MOST_SQUARES][4][4], const float *p, float *b,
                                                const Rows &rows, int head, int first, const Work &w, int D) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int c = 0; c < MOST_SQUARES; c++) {
        if (c * SIDE >= D) break;
        __syncthreads();
        load_square(b, rows, head, w, first, c * SIDE, D);
        __syncthreads();
        if (c * SIDE + 4 * x < D)
            for (int k = 0; k < min_of(SIDE, w.s.rows - first); k += 4) {
                float u[4][4], v[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    load(u[i], p + (4 * y + i) * PITCH + k);
                    load(v[i], b + (k + i) * PITCH + 4 * x);
                }
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[c][i][j] += u[i][e] * v[e][j];
            }
    }
}

static __device__ __forceinline__ void store_sums(const Rows &rows, int head, const Work &w,
                                                  const float (&sum)[MOST_SQUARES][4][4], int D) {
    float *to = head_of<float>(rows, w.batch, head);
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int c = 0; c < MOST_SQUARES; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = w.first + 4 * y + i, d = c * SIDE + 4 * x + j;
                if (row < w.s.rows && d < D) to[token(w.s, row) * rows.token + d] = sum[c][i][j];
            }
}

/* f(columns<D rounded up>()): the widths of tiles that kernels of 16 bits are compiled for. */
template <int D> struct columns {
    static constexpr int value = D;
};
template <class F> static int for_columns(int D, F f) {
    if (D <= 64) return f(columns<64>());
    if (D <= 96) return f(columns<96>());
    if (D <= 128) return f(columns<128>());
    return f(columns<256>());
}

#endif
