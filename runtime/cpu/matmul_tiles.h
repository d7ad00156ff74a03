/* matmul_tiles.h - weights as tiles, for matmul_avx2.c and matmul_avx512.c: the product, and the walk over a matrix.
 *
 * A tile is OUTS outputs by 32 inputs, a dword lane for each output, so that no sum ever crosses lanes:
 *
 *   code[g]             byte 4*o + i = code of weight 4g + i of output o      g < 8, o < OUTS, i < 4
 *   scale[h], base[h]   lane o: weight = scale * (code - zero) + base, h = half of the 32 inputs (one scale: h = 0)
 *
 * A format is one `fill` function, which makes the tiles of one of its blocks, and a few facts about its codes: see
 * matmul_formats.h. The tiles of 256 inputs (in L1) serve all activation rows, or become floats.
 *
 * Each output is the same sequence of operations whatever n_rows, first and last are: for each block of 32 inputs,
 * ascending: for each scale acc = fma(dot, scale * x_scale, acc); then, where base' = base - scale * zero is not 0,
 * acc = fma(base'[last], x_sum, acc), and with two scales acc = fma(base'[0] - base'[1], x_sum16, acc). As floats, the
 * weights are bit for bit what kvm_dtypes[].decode gives.
 *
 * Loads stay inside the blocks of the rows asked for. With one activation row the bound is reading the weights once,
 * 0.2 to 1.06 bytes a MAC (4 with F32), so the next rows are prefetched while these are used.
 *
 * Each includes the file once, behind
 *
 *   OUTS               outputs of a tile
 *   ROWS, ROW_BLOCK    activation rows in registers, and in L2 while the weights pass by
 *   ZERO_8BIT          what a signed code of 8 bits gets added: 128, or 0 where the product takes signed codes
 *
 * and defines the functions that are only declared here.
 */
#ifndef KVM_CPU_MATMUL_TILES_H
#define KVM_CPU_MATMUL_TILES_H

#define INLINE static inline __attribute__((always_inline))

enum {
    TILE = 32,       /* inputs of a tile */
    CHUNK_TILES = 8, /* tiles unpacked at a time: 256 inputs, one block of the K formats */
    CACHE_LINE = 64,
};

_Static_assert((int)TILE == (int)KVM_Q8_BLOCK, "a tile takes one scale of the activations");
_Static_assert(TILE * CHUNK_TILES == (int)KVM_TILE_IN, "a chunk of tiles is one tile of floats");

typedef uint32_t lanes __attribute__((vector_size(4 * OUTS)));
typedef uint8_t bytes __attribute__((vector_size(4 * OUTS)));
typedef int32_t ints __attribute__((vector_size(4 * OUTS)));
typedef float floats __attribute__((vector_size(4 * OUTS)));

typedef struct {
    lanes code[8];
    floats scale[2], base[2];
} tile;

/* where OUTS rows of a matrix start: first, first + stride.. */
typedef struct {
    const uint8_t *first;
    size_t stride;
} rows;

typedef struct {
    /* the block at `at` in each of OUTS rows -> its tiles */
    void (*fill)(const rows *from, size_t at, tile *out);
    int32_t block_values, block_bytes, max_code, n_scales, zero;
    bool has_base, is_signed;
} format;

/* ---- what an instruction set brings ------------------------------------------------------------------------- */

/* 16 bytes of each row -> out[g]: lane o = dword g of row o */
INLINE void load_transposed(const rows *from, size_t at, lanes out[4]);
/* the low 16 bits of each lane, an f16, as floats; both halves of each lane, low and high */
INLINE floats halves(lanes v);
INLINE void split_halves(lanes v, floats *low, floats *high);
/* byte i of each lane: bit `place` is bit 4g + i of the lane, the others 0 */
INLINE lanes spread_bits(lanes v, int32_t g, int32_t place);
/* 16 bytes, over and over; and byte i of the result: byte (byte i of index) of such a table */
INLINE lanes repeated(const int8_t bytes[16]);
INLINE lanes look_up(lanes table, lanes index);
/* table[index] of each lane */
INLINE lanes gather(const uint32_t *table, lanes index);
/* a * b + c, rounded once */
INLINE floats fused(floats a, floats b, floats c);
/* dot[r], lane o = sum of code * activation over n_groups groups of four inputs; x: n rows, their inputs from i0 on */
INLINE void dot_products(format f, const lanes *code, int32_t n_groups, const kvm_q8_row *x, int32_t n, int32_t i0,
                         ints dot[ROWS]);

/* ---- fields --------------------------------------------------------------------------------------------------- */

INLINE lanes in_each_byte(uint32_t byte) { return (lanes){0} + byte * 0x01010101u; }
INLINE floats in_each_lane(float x) { return x - (floats){0}; }
INLINE lanes low_nibbles(lanes v) { return v & 0x0f0f0f0fu; }
INLINE lanes high_nibbles(lanes v) { return v >> 4 & 0x0f0f0f0fu; }

/* n bits of each lane from bit `at` on, and byte i (0 the lowest), as numbers */
INLINE lanes bits(lanes v, int32_t at, int32_t n) { return v >> (uint32_t)at & ((1u << n) - 1u); }
INLINE ints unsigned_byte(lanes v, int32_t i) { return (ints)bits(v, 8 * i, 8); }
INLINE ints signed_byte(lanes v, int32_t i) { return (ints)(v << (uint32_t)(24 - 8 * i)) >> 24; }
INLINE floats as_floats(ints v) { return __builtin_convertvector(v, floats); }

INLINE void load_transposed_32(const rows *from, size_t at, lanes out[8]) {
    load_transposed(from, at, out);
    load_transposed(from, at + 16, out + 4);
}

#include "matmul_formats.h"

/* ---- the product -------------------------------------------------------------------------------------------- */

/* Adds the products of n_tiles tiles with inputs from 32 * b0 on to OUTS outputs of n activation rows.
 * acc: [n], lane o = output o. */
INLINE void multiply(format f, const tile *tiles, int32_t n_tiles, const kvm_q8_row *x, int32_t n, int32_t b0,
                     floats acc[ROWS]) {
    const int32_t part = TILE / f.n_scales;
    for (int32_t b = b0; b < b0 + n_tiles; b++, tiles++) {
        floats base[2];
        for (int32_t s = 0; s < f.n_scales; s++) {
            ints dot[ROWS];
            dot_products(f, tiles->code + part / 4 * s, part / 4, x, n, TILE * b + part * s, dot);
#pragma GCC unroll 8
            for (int32_t r = 0; r < n; r++) {
                acc[r] = fused(as_floats(dot[r]), tiles->scale[s] * x[r].scale[b], acc[r]);
            }
            base[s] = f.has_base ? tiles->base[s] : tiles->scale[s] * (float)-f.zero;
        }
        if (!f.has_base && f.zero == 0) continue;
#pragma GCC unroll 8
        for (int32_t r = 0; r < n; r++) {
            acc[r] = fused(base[f.n_scales - 1], in_each_lane(x[r].sum[b]), acc[r]);
            if (f.n_scales == 2) acc[r] = fused(base[0] - base[1], in_each_lane(x[r].sum16[b]), acc[r]);
        }
    }
}

/* ---- the walk over a matrix --------------------------------------------------------------------------------- */

/* OUTS outputs lie in the lanes of a tile; where fewer are left they are taken alone, each in all lanes of a tile. */
INLINE int32_t outputs_from(int32_t o, int32_t last) { return o + OUTS <= last ? OUTS : 1; }

INLINE rows rows_from(const kvm_matrix *w, int32_t o, int32_t n_out) {
    size_t row_bytes = kvm_dtype_row_bytes(w->type, w->n_in);
    return (rows){(const uint8_t *)w->data + (size_t)o * row_bytes, n_out == OUTS ? row_bytes : 0};
}

INLINE floats load_outputs(const float *src, int32_t n_out) {
    floats v = {src[0]};
    if (n_out == OUTS) memcpy(&v, src, sizeof v);
    return v;
}

INLINE void store_outputs(float *dst, floats v, int32_t n_out) {
    if (n_out == OUTS) memcpy(dst, &v, sizeof v);
    else dst[0] = v[0];
}

/* n_bytes of each of OUTS rows into L1 (near) or L2; what lies at `at` may be no part of the matrix any more */
INLINE void prefetch(const rows *from, size_t at, size_t n_bytes, const bool near) {
    for (size_t line = at; line < at + n_bytes; line += CACHE_LINE) {
#pragma GCC unroll 16
        for (size_t o = 0; o < OUTS; o++) {
            const char *address = (const char *)((uintptr_t)from->first + o * from->stride + line);
            if (near) _mm_prefetch(address, _MM_HINT_T0);
            else _mm_prefetch(address, _MM_HINT_T1);
        }
    }
}

/* the tiles of OUTS rows from input i on, at most a chunk; returns how many */
INLINE int32_t fill_chunk(format f, const rows *from, int32_t i, int32_t n_in, tile *tiles) {
    const int32_t tiles_per_block = f.block_values / TILE;
    int32_t n = kvm_min(CHUNK_TILES, (n_in - i) / TILE);
    size_t block_bytes = (size_t)f.block_bytes, at = (size_t)(i / f.block_values) * block_bytes;
    size_t n_bytes = (size_t)(n / tiles_per_block) * block_bytes;
    prefetch(from, at + n_bytes, n_bytes, true);
    prefetch(from, at + OUTS * from->stride, n_bytes, false); /* the rows behind these */
    for (int32_t t = 0; t < n; t += tiles_per_block, at += block_bytes) f.fill(from, at, tiles + t);
    return n;
}

/* multiply() for rows of y, which has the sums so far */
INLINE void multiply_rows(format f, const tile *tiles, int32_t n_tiles, const kvm_q8_row *x, int32_t n, int32_t b0,
                          float *y, int32_t ldy, int32_t n_out) {
    floats acc[ROWS];
    for (int32_t r = 0; r < n; r++) {
        acc[r] = b0 == 0 ? (floats){0} : load_outputs(y + (size_t)r * (size_t)ldy, n_out);
    }
    multiply(f, tiles, n_tiles, x, n, b0, acc);
    for (int32_t r = 0; r < n; r++) store_outputs(y + (size_t)r * (size_t)ldy, acc[r], n_out);
}

/* y[r][o] for n_out outputs, y pointing at the first one */
INLINE void multiply_outputs(format f, const rows *from, int32_t n_in, const kvm_q8_row *x, int32_t n_rows, float *y,
                             int32_t ldy, int32_t n_out) {
    for (int32_t b0 = 0; b0 < n_in / TILE; b0 += CHUNK_TILES) {
        tile tiles[CHUNK_TILES];
        int32_t n_tiles = fill_chunk(f, from, TILE * b0, n_in, tiles), r = 0;
        for (; r + ROWS <= n_rows; r += ROWS) {
            multiply_rows(f, tiles, n_tiles, x + r, ROWS, b0, y + (size_t)r * (size_t)ldy, ldy, n_out);
        }
        for (; r + ROWS / 2 <= n_rows; r += ROWS / 2) {
            multiply_rows(f, tiles, n_tiles, x + r, ROWS / 2, b0, y + (size_t)r * (size_t)ldy, ldy, n_out);
        }
        for (; r < n_rows; r++) {
            multiply_rows(f, tiles, n_tiles, x + r, 1, b0, y + (size_t)r * (size_t)ldy, ldy, n_out);
        }
    }
}

INLINE void matmul(format f, const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                   float *y, int32_t ldy) {
    for (int32_t r = 0; r < n_rows; r += ROW_BLOCK) {
        for (int32_t o = first, n_out; o < last; o += n_out) {
            n_out = outputs_from(o, last);
            rows from = rows_from(w, o, n_out);
            multiply_outputs(f, &from, w->n_in, x + r, kvm_min(ROW_BLOCK, n_rows - r),
                             y + (size_t)r * (size_t)ldy + o, ldy, n_out);
        }
    }
}

/* ---- tiles of floats ---------------------------------------------------------------------------------------- */

/* out: [inputs][KVM_TILE_OUT], its first n_out columns */
INLINE void decode_tiles(format f, const rows *from, int32_t i, int32_t n_in, float *out, int32_t n_out) {
    tile tiles[CHUNK_TILES];
    int32_t n_tiles = fill_chunk(f, from, i, n_in, tiles);
    for (const tile *t = tiles; t < tiles + n_tiles; t++) {
#pragma GCC unroll 8
        for (int32_t g = 0; g < 8; g++) {
            const int32_t s = g * f.n_scales / 8;
#pragma GCC unroll 4
            for (int32_t j = 0; j < 4; j++, out += KVM_TILE_OUT) {
                ints code = f.is_signed ? signed_byte(t->code[g], j) : unsigned_byte(t->code[g], j);
                floats weight = t->scale[s] * as_floats(code - f.zero);
                store_outputs(out, f.has_base ? weight + t->base[s] : weight, n_out);
            }
        }
    }
}

/* The same for n inputs of plain numbers, of 4 or 2 bytes */
INLINE void decode_numbers(const kvm_dtype type, const rows *from, int32_t i, int32_t n, float *out, int32_t n_out) {
    const int32_t bytes = type == KVM_DTYPE_F32 ? 4 : 2, step = 16 / bytes;
    size_t at = (size_t)i * (size_t)bytes;
    int32_t l = 0;
    prefetch(from, at + OUTS * from->stride, (size_t)(n * bytes), false);
    for (; l + step <= n; l += step, at += 16, out += step * KVM_TILE_OUT) {
        lanes v[4];
        load_transposed(from, at, v);
#pragma GCC unroll 4
        for (int32_t g = 0; g < 4; g++) {
            float *to = out + g * (step / 4) * KVM_TILE_OUT;
            if (type == KVM_DTYPE_F16) {
                floats low, high;
                split_halves(v[g], &low, &high);
                store_outputs(to, low, n_out);
                store_outputs(to + KVM_TILE_OUT, high, n_out);
            } else if (type == KVM_DTYPE_BF16) {
                store_outputs(to, (floats)(v[g] << 16), n_out);
                store_outputs(to + KVM_TILE_OUT, (floats)(v[g] & 0xffff0000u), n_out);
            } else {
                store_outputs(to, (floats)v[g], n_out);
            }
        }
    }
    for (; l < n; l++, at += (size_t)bytes, out += KVM_TILE_OUT) {
        for (int32_t o = 0; o < n_out; o++) {
            kvm_dtypes[type].decode(from->first + (size_t)o * from->stride + at, out + o, 1);
        }
    }
}

INLINE void load_floats(const kvm_dtype type, format f, const kvm_matrix *w, int32_t first, int32_t last, int32_t i,
                        float *out) {
    for (int32_t o = first, n_out; o < last; o += n_out, out += n_out) {
        n_out = outputs_from(o, last);
        rows from = rows_from(w, o, n_out);
        if (f.fill != NULL) decode_tiles(f, &from, i, w->n_in, out, n_out);
        else decode_numbers(type, &from, i, kvm_min(KVM_TILE_IN, w->n_in - i), out, n_out);
    }
}

/* ---- an instance of each for each format -------------------------------------------------------------------- */

#define X(id, name, gguf, values, bytes) values_##id = values, bytes_##id = bytes,
enum { KVM_DTYPE_LIST(X) };
#undef X

typedef void matmul_fn(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows, float *y,
                       int32_t ldy);
typedef void load_fn(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out);

#define LOAD(id, ...)                                                                                                  \
    static void load_##id(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out) {                   \
        load_floats(KVM_DTYPE_##id, (format){__VA_ARGS__}, w, first, last, i, out);                                    \
    }
#define X(id, ...)                                                                                                     \
    LOAD(id, fill_##id, values_##id, bytes_##id, __VA_ARGS__)                                                          \
    static void matmul_##id(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,     \
                            float *y, int32_t ldy) {                                                                   \
        matmul((format){fill_##id, values_##id, bytes_##id, __VA_ARGS__}, w, first, last, x, n_rows, y, ldy);          \
    }
FORMAT_LIST(X)
LOAD(F32, NULL)
LOAD(F16, NULL)
LOAD(BF16, NULL)
#undef X

/* kvm_cpu_kernels.matmul_q8 and .load_weights of each type */
#define X(id, ...) [KVM_DTYPE_##id] = matmul_##id,
static matmul_fn *const matmul_of[KVM_DTYPE_COUNT] = {FORMAT_LIST(X)};
#undef X
#define X(id, ...) [KVM_DTYPE_##id] = load_##id,
static load_fn *const load_of[KVM_DTYPE_COUNT] = {FORMAT_LIST(X) X(F32, ) X(F16, ) X(BF16, )};
#undef X

#endif
