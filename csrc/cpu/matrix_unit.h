/* matrix_unit.h --- products on the processor's matrix unit (AMX): eight registers of 16 rows of 64 bytes. A
 * register holds 16 x 32 bfloat16 of a left factor, as many of a right factor in pairs (row k has elements 2k
 * and 2k + 1 of 16 columns), or 16 x 16 sums in float32.
 *
 * One instruction adds 16 x 32 by 32 x 16 to the sums of a register: the products of even k and those of odd
 * k are added up apart, then together, then to the sum. Subnormal numbers count as 0. In a WIDE=2 build (see
 * setup.py) plain C replaces the instructions, so any processor can test the code that uses them.
 *
 * float32 and float16 are multiplied in parts. A float32 is the exact sum of three bfloat16, of 8 bits each.
 * A float16 is the sum of two. The product of two numbers is the sum of the products of their parts: part i
 * of one and part j of the other, counted from 0, for all i + j < UNIT_PARTS. The products that are left out
 * are at most about 2^-22 of the whole. The unit also rounds sums less often than multiply-adds do, so
 * results are at least as exact. A float32 takes six products of bfloat16. That is still faster than one
 * product in vectors, because the unit multiplies bfloat16 16 times as fast as vectors multiply float32. */
#ifndef LONGLORA_MATRIX_UNIT_H
#define LONGLORA_MATRIX_UNIT_H

#include "cpu.h"

#if defined __AMX_BF16__ || WIDE == 2
#define MATRIX_UNIT 1
#else
#define MATRIX_UNIT 0
#endif

#if MATRIX_UNIT
enum {
    UNIT = 16,            /* rows and columns of the sums of a register */
    UNIT_K = 32,          /* elements along k of a register */
    UNIT_BYTES = 16 * 64, /* of a register */
    UNIT_PARTS = 3,       /* of a float32 */
};

/* The parts of an element. */
static inline int parts_of_dtype(int32_t dtype) { return dtype == F32 ? UNIT_PARTS : dtype == F16 ? 2 : 1; }

typedef uint16_t halves __attribute__((vector_size(64), may_alias));

/* Two vectors, rounded to bfloat16, one behind the other. Subnormal numbers may become 0. */
static inline halves round_two(vf a, vf b) {
#if defined __AVX512BF16__
    return (halves)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    uint16_t x[2 * VW];
    vf_store_any(x, BF16, a);
    vf_store_any(x + VW, BF16, b);
    halves both;
    memcpy(&both, x, sizeof both);
    return both;
#endif
}

/* out[p] = part p of two vectors, as pairs of their elements. The first part is truncated. If it
 * were rounded, the largest numbers would become infinities. The first part of an infinity or a NaN is the
 * number itself. Its other parts may be anything. */
static inline __attribute__((always_inline)) void split(vu out[UNIT_PARTS], vf a, vf b, int parts) {
    UNROLLED
    for (int p = 0; p < UNIT_PARTS; p++) {
        out[p] = (vu){ 0 };
        if (p >= parts) continue;
        vu x = (vu)a + (p ? 0x8000 : 0), y = ((vu)b + (p ? 0x8000 : 0)) & 0xffff0000;
        out[p] = x >> 16 | y;
        a -= (vf)(x & 0xffff0000), b -= (vf)y;
    }
}

/* Every thread does this before its first product, and unit_end() after its last one: a thread that holds
 * registers of the unit is slower to switch. */
static inline void unit_begin(void) {
#if defined __AMX_BF16__
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16]; /* of a row, by register */
        uint8_t rows[16];
    } all = { .palette = 1 };
    _Static_assert(sizeof all == 64, "as the instruction reads it");
    for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
    _tile_loadconfig(&all);
#endif
}
static inline void unit_end(void) {
#if defined __AMX_BF16__
    _tile_release();
#endif
}

/* Where registers of one factor lie: the first row or column of 16, the bytes to the next 16, from row to row
 * of a register, to the register of the next 32 k, and to the next part of the same numbers. */
typedef struct {
    const char *data;
    int64_t next, row, step, part;
    int parts;
    int fetch; /* the next rows that will be read are far from the cache */
} UnitFactor;

/* Memory that unit_multiply() fetches for later use: two lines of each row, and `row` bytes from row to row.
 * It fetches nothing if `next` is NULL. */
typedef struct {
    char *next;
    int64_t row;
} UnitFetch;

/* Which part of a left factor is multiplied by which part of a right one. Each step changes only one of the
 * two, so only that one is loaded. */
enum { UNIT_STEPS = 6 };
static const int unit_steps[UNIT_STEPS][2] = { { 2, 0 }, { 1, 0 }, { 1, 1 }, { 0, 1 }, { 0, 0 }, { 0, 2 } };

#if !defined __AMX_BF16__
/* What unit_multiply() does, a row of 16 sums at a time. */
static void unit_multiply_row(float *c, const char *a, UnitFactor of_a, const char *b, UnitFactor of_b,
                              int64_t count, int add) {
    vf sum = add ? vf_load(c) : (vf){ 0 };
    for (int64_t i = 0; i < count; i++)
        for (int step = 0; step < UNIT_STEPS; step++) {
            int p = unit_steps[step][0], q = unit_steps[step][1];
            if (p >= of_a.parts || q >= of_b.parts) continue;
            vf even = { 0 }, odd = { 0 };
            for (int64_t k = 0; k < UNIT; k++) {
                uint16_t x[2];
                vu y;
                memcpy(x, a + i * of_a.step + p * of_a.part + 4 * k, sizeof x);
                memcpy(&y, b + i * of_b.step + q * of_b.part + k * of_b.row, sizeof y);
                even += bf16_to_float(x[0]) * (vf)(y << 16);
                odd += bf16_to_float(x[1]) * (vf)(y & 0xffff0000);
            }
            sum += even + odd;
        }
    vf_store(c, sum);
}
#endif

/* c[16 rows, 16 cols] (+)= a b over `count` registers along k. rows and cols are 1 or 2. Rows of c lie c_row
 * floats apart. */
static inline __attribute__((always_inline)) void unit_multiply(float *c, int64_t c_row, UnitFactor a,
                                                                UnitFactor b, int64_t count, int rows,
                                                                int cols, int add, UnitFetch fetch) {
#if !defined __AMX_BF16__
    (void)fetch;
    for (int64_t r = 0; r < rows * UNIT; r++)
        for (int64_t j = 0; j < cols; j++)
            unit_multiply_row(c + r * c_row + j * UNIT, a.data + r / UNIT * a.next + r % UNIT * a.row, a,
                              b.data + j * b.next, b, count, add);
#else
    int64_t c_bytes = c_row * 4;
    float *c1 = c + 16 * c_row;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if (cols == 2) _tile_loadd(1, c + 16, c_bytes);
        if (rows == 2) _tile_loadd(2, c1, c_bytes);
        if (rows == 2 && cols == 2) _tile_loadd(3, c1 + 16, c_bytes);
    } else {
        _tile_zero(0);
        if (cols == 2) _tile_zero(1);
        if (rows == 2) _tile_zero(2);
        if (rows == 2 && cols == 2) _tile_zero(3);
    }
    for (int64_t i = 0; i < count; i++) {
        const char *pa = a.data + i * a.step, *pb = b.data + i * b.step;
        if (a.fetch) UNROLLED
        for (int64_t r = 0; r < UNIT; r++) {
            __builtin_prefetch(pa + rows * a.next + r * a.row);
            if (rows == 2) __builtin_prefetch(pa + 3 * a.next + r * a.row);
        }
        if (fetch.next && i < rows * UNIT / 2) UNROLLED
        for (int r = 0; r < 2; r++, fetch.next += fetch.row) {
            __builtin_prefetch(fetch.next, 1);
            if (cols == 2) __builtin_prefetch(fetch.next + 64, 1);
        }
        UNROLLED
        for (int step = 0, p = -1, q = -1; step < UNIT_STEPS; step++) {
            int new_p = unit_steps[step][0] != p, new_q = unit_steps[step][1] != q;
            if (unit_steps[step][0] >= a.parts || unit_steps[step][1] >= b.parts) continue;
            p = unit_steps[step][0], q = unit_steps[step][1];
            const char *x = pa + p * a.part, *y = pb + q * b.part;
            if (new_q) _tile_loadd(6, y, b.row);
            if (new_p) _tile_loadd(4, x, a.row);
            _tile_dpbf16ps(0, 4, 6);
            if (rows == 2) {
                if (new_p) _tile_loadd(5, x + a.next, a.row);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (cols == 2) {
                if (new_q) _tile_loadd(7, y + b.next, b.row);
                _tile_dpbf16ps(1, 4, 7);
                if (rows == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, c_bytes);
    if (cols == 2) _tile_stored(1, c + 16, c_bytes);
    if (rows == 2) _tile_stored(2, c1, c_bytes);
    if (rows == 2 && cols == 2) _tile_stored(3, c1 + 16, c_bytes);
#endif
}
#endif

#endif
