/* What a CPU runs: products of many rows with their experts' matrices, and what stands between and after them (see cpu_tiles.py).

   Numbers are bfloat16 and are added up in float32. A pair is a token and one of its experts.

   An Entry says where a piece of an expert's matrix is: its address, rows (-1: there is none), columns, the numbers from one row to the next,
   and its place. Pieces of a left factor are multiplied in one go, each with the columns of a pair's row that begin at its place, and what they
   give is added up (`across`); the first one's rows decide whether anything is written. Pieces of a right factor are products of their own,
   whose answers begin at their place. Before a piece there may be an identity, of as many rows, which takes the first columns. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
enum {
  FEW = 6,       /* rows that pass a matrix at once, as numbers stand; their sums fill the registers */
  NEAR = 32768,  /* numbers of a part of a matrix that stays in the second cache meanwhile */
  MANY = 16,     /* from so many rows an expert on, bringing matrices and rows into pairs of columns pays */
  BLOCK = 12,    /* rows that then pass 32 of the matrix at once */
  PART = 240,    /* rows of a task, which stay in the second cache */
  LONG = 1024,   /* columns up to which they do; longer sums cost little to finish otherwise */
  HEIGHT = 512,  /* rows of a matrix in a task, at most */
  SHARES = 4,    /* tasks for each thread, where they would have more rows than 32 and fewer than that */
  LITTLE = 65536 /* multiplications, or numbers, that are not worth waking another thread */
};
typedef uint16_t bf16;
typedef struct { const bf16 *weight; int64_t rows, columns, stride, place; } Entry; /* as `_Table` writes them */
/* What one product multiplies with: so many pieces, each `apart` entries after the one before. */
typedef struct { const Entry *entry; int pieces; int64_t apart; int identity; } Matrix;
typedef struct { const bf16 *x; int64_t x_stride; const int32_t *row; bf16 *y; int64_t y_stride; } Rows;

INLINE const bf16 *read_at(const Rows *of, int64_t pair) { return of->x + of->x_stride * (of->row ? of->row[pair] : pair); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t all, int64_t each) { return (all + each - 1) / each; }
INLINE int64_t before_expert(const int32_t *end, int64_t expert) { return expert ? end[expert - 1] : 0; } /* pairs of earlier ones */
INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? 0xffffffffu : ((uint32_t)1 << count) - 1; }
INLINE __m512 widened(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE __m512 low_half(__m512i h) { return widened(_mm512_castsi512_si256(h)); }
INLINE __m512 high_half(__m512i h) { return widened(_mm512_extracti64x4_epi64(h, 1)); }

#ifdef __AVX512BF16__
INLINE __m512 plus_dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else /* the same in float32 */
INLINE __m512 odd(__m512i h) { return _mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32((int)0xffff0000u))); }
INLINE __m512 even(__m512i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(h, 16)); }
INLINE __m512 plus_dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum));
}
INLINE __m256i half_rounded(__m512 v) {
  __m512i bits = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
INLINE __m512i rounded(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(half_rounded(low)), half_rounded(high), 1);
}
#endif

/* Which columns of a pair's row a piece begins with. */
INLINE int64_t first_column(const Matrix *own, const Entry *piece) {
  return own->identity ? piece->rows : own->pieces > 1 ? piece->place : 0;
}

/* The sums of four vectors. */
INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Q rows times H rows of a matrix, of which `valid` exist, as numbers stand; the H rows after them are fetched meanwhile. */
INLINE void multiply_few(int Q, int H, const Rows *of, int64_t pair, const Matrix *own, int64_t n, int valid, int64_t at) {
  __m512 sum[FEW][8];
  for (int q = 0; q < Q; q++)
    for (int h = 0; h < H; h++) sum[q][h] = _mm512_setzero_ps();
  for (int s = 0; s < own->pieces; s++) {
    const Entry *piece = own->entry + s * own->apart;
    if (piece->rows < 0) continue;
    const bf16 *w[8], *x[FEW];
    for (int h = 0; h < H; h++) w[h] = piece->weight + (n + (h < valid ? h : valid - 1)) * piece->stride;
    for (int q = 0; q < Q; q++) x[q] = read_at(of, pair + q) + first_column(own, piece);
    int64_t k = 0;
    for (; k + 32 <= piece->columns; k += 32) {
      __m512i a[8];
      for (int h = 0; h < H; h++) {
        a[h] = _mm512_loadu_si512(w[h] + k);
        _mm_prefetch((const char *)(w[h] + H * piece->stride + k), _MM_HINT_T1);
      }
      for (int q = 0; q < Q; q++) {
        __m512i b = _mm512_loadu_si512(x[q] + k);
        for (int h = 0; h < H; h++) sum[q][h] = plus_dot(sum[q][h], a[h], b);
      }
    }
    if (k < piece->columns) {
      __mmask32 rest = first_of_32(piece->columns - k);
      __m512i a[8];
      for (int h = 0; h < H; h++) a[h] = _mm512_maskz_loadu_epi16(rest, w[h] + k);
      for (int q = 0; q < Q; q++) {
        __m512i b = _mm512_maskz_loadu_epi16(rest, x[q] + k);
        for (int h = 0; h < H; h++) sum[q][h] = plus_dot(sum[q][h], a[h], b);
      }
    }
  }
  for (int q = 0; q < Q; q++)
    for (int h = 0; h < H && h < valid; h += 4) {
      __mmask32 there = first_of_32(valid - h < 4 ? valid - h : 4);
      __m512 all = _mm512_castps128_ps512(sums(sum[q][h], sum[q][h + 1], sum[q][h + 2], sum[q][h + 3]));
      if (own->identity) {
        __m512i beside = _mm512_maskz_loadu_epi16(there, read_at(of, pair + q) + n + h);
        all = _mm512_add_ps(all, low_half(beside));
      }
      _mm512_mask_storeu_epi16(of->y + of->y_stride * (pair + q) + at + h, there, rounded(all, all));
    }
}

#define ROWS_AT_ONCE(Q, H) \
  case Q: \
    for (; n < N; n += H) multiply_few(Q, H, of, pair, own, n, (int)least(N - n, H), begin + n); \
    break;

/* A few rows times rows n to N of a matrix. */
static void multiply_rows(int count, const Rows *of, int64_t pair, const Matrix *own, int64_t n, int64_t N, int64_t begin) {
  switch (count) {
    ROWS_AT_ONCE(1, 8) ROWS_AT_ONCE(2, 8) ROWS_AT_ONCE(3, 8) ROWS_AT_ONCE(4, 4) ROWS_AT_ONCE(5, 4) ROWS_AT_ONCE(6, 4)
  }
}

/* Up to 16 rows of up to 32 numbers: pairs of columns one after the other, each with all rows. */
INLINE void turn(const bf16 *const *row, int rows, int64_t at, int64_t left, uint32_t *out, int64_t step) {
  __m512i r[16], t[16];
  __mmask32 there = first_of_32(left);
  for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_maskz_loadu_epi16(there, row[i] + at) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int c = 0; c < 4; c++) { /* a quarter of r[4g + c] holds one column of rows 4g to 4g + 3 */
    __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
  int64_t pairs = least(16, parts(left, 2));
  for (int i = 0; i < pairs; i++) _mm512_store_si512(out + i * step, t[i]);
}

/* A block of rows times 32 rows of a matrix, both in pairs of columns. Meanwhile the 32 rows that begin at `next` are fetched, if any. */
INLINE void multiply_block(int Q, const uint32_t *x, const uint32_t *w, int64_t pairs, const Rows *of, int64_t pair, int rows,
                           const Matrix *own, int64_t n, int64_t at, int valid, const bf16 *next) {
  __m512 sum[BLOCK][2];
  for (int q = 0; q < Q; q++) sum[q][0] = sum[q][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++) {
    __m512i low = _mm512_load_si512(w + 32 * k), high = _mm512_load_si512(w + 32 * k + 16);
    if (next) { /* two of their lines for each pair of columns make all */
      const bf16 *line = next + k % 32 * own->entry->stride + k / 32 * 64;
      _mm_prefetch((const char *)line, _MM_HINT_T1);
      _mm_prefetch((const char *)(line + 32), _MM_HINT_T1);
    }
    for (int q = 0; q < Q; q++) {
      __m512i both = _mm512_set1_epi32((int)x[16 * k + q]);
      sum[q][0] = plus_dot(sum[q][0], low, both);
      sum[q][1] = plus_dot(sum[q][1], high, both);
    }
  }
  __mmask32 there = first_of_32(valid);
  for (int q = 0; q < Q && q < rows; q++) {
    if (own->identity) {
      __m512i beside = _mm512_maskz_loadu_epi16(there, read_at(of, pair + q) + n);
      sum[q][0] = _mm512_add_ps(sum[q][0], low_half(beside));
      sum[q][1] = _mm512_add_ps(sum[q][1], high_half(beside));
    }
    _mm512_mask_storeu_epi16(of->y + of->y_stride * (pair + q) + at, there, rounded(sum[q][0], sum[q][1]));
  }
}

/* Pairs of columns of all pieces. */
INLINE int64_t column_pairs(const Matrix *own) {
  int64_t pairs = 0;
  for (int s = 0; s < own->pieces; s++) {
    const Entry *piece = own->entry + s * own->apart;
    if (piece->rows >= 0) pairs += parts(piece->columns, 2);
  }
  return pairs;
}

/* Many rows of one expert, start to stop, times rows n to N of its matrix. */
static void multiply_many(const Rows *of, int64_t start, int64_t stop, const Matrix *own, int64_t n, int64_t N, int64_t begin,
                          uint32_t *memory) {
  int64_t pairs = column_pairs(own), blocks = parts(stop - start, BLOCK);
  uint32_t *w = memory, *x = memory + 32 * pairs;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t pair = start + b * BLOCK;
    int rows = (int)least(stop - pair, BLOCK);
    uint32_t *out = x + b * 16 * pairs;
    for (int s = 0; s < own->pieces; s++) {
      const Entry *piece = own->entry + s * own->apart;
      if (piece->rows < 0) continue;
      const bf16 *row[16];
      for (int q = 0; q < rows; q++) row[q] = read_at(of, pair + q) + first_column(own, piece);
      for (int64_t k = 0; k < piece->columns; k += 32) turn(row, rows, k, piece->columns - k, out + 8 * k, 16);
      out += 16 * parts(piece->columns, 2);
    }
  }
  for (; n < N; n += 32) {
    int valid = (int)least(N - n, 32);
    uint32_t *out = w;
    for (int s = 0; s < own->pieces; s++) {
      const Entry *piece = own->entry + s * own->apart;
      if (piece->rows < 0) continue;
      const bf16 *row[32];
      for (int i = 0; i < valid; i++) row[i] = piece->weight + (n + i) * piece->stride;
      for (int64_t k = 0; k < piece->columns; k += 32) {
        turn(row, valid, k, piece->columns - k, out + 16 * k, 32);
        turn(row + 16, valid - 16, k, piece->columns - k, out + 16 * k + 16, 32);
      }
      out += 32 * parts(piece->columns, 2);
    }
    for (int64_t b = 0; b < blocks; b++) {
      int64_t pair = start + b * BLOCK;
      int rows = (int)least(stop - pair, BLOCK);
      const uint32_t *in = x + b * 16 * pairs;
      const Entry *entry = own->entry;
      const bf16 *next = b == 0 && own->pieces == 1 && n + 64 <= entry->rows ? entry->weight + (n + 32) * entry->stride : 0;
      if (rows > 8) multiply_block(12, in, w, pairs, of, pair, rows, own, n, begin + n, valid, next);
      else if (rows > 4) multiply_block(8, in, w, pairs, of, pair, rows, own, n, begin + n, valid, next);
      else multiply_block(4, in, w, pairs, of, pair, rows, own, n, begin + n, valid, next);
    }
  }
}

/* Every pair's row times its expert's matrix, see `CpuTiles.multiply`; 1: memory is short. Of `across`, a product has all pieces, else one. */
int multiply(const bf16 *x, int64_t x_stride, const int32_t *row, const Entry *entry, int pieces, int across, int identity,
             const int32_t *end, int64_t experts, bf16 *y, int64_t y_stride, int threads) {
  Rows of = {x, x_stride, row, y, y_stride};
  int failed = 0;
  int64_t products = (across ? 1 : pieces) * experts, rows = 0, cost = 0, most = 0, next = 0;
  int64_t *before = malloc((products + 1) * sizeof *before); /* tasks before each product's */
  if (!before) return 1;
  for (int64_t i = 0; i < products; i++) {
    Matrix own = {entry + i, across ? pieces : 1, experts, identity};
    int64_t e = i % experts, count = end[e] - before_expert(end, e), pairs = column_pairs(&own);
    if (count <= 0 || entry[i].rows <= 0) continue;
    rows += entry[i].rows * parts(count, PART);
    cost += entry[i].rows * count * 2 * pairs;
    if (pairs > most && 2 * pairs <= LONG) most = pairs;
  }
  if (cost < LITTLE) threads = 1;
  int64_t share = parts(rows / (SHARES * threads), 32) * 32, height = share < 32 ? 32 : least(share, HEIGHT);
  before[0] = 0;
  for (int64_t i = 0; i < products; i++) {
    int64_t e = i % experts, count = end[e] - before_expert(end, e);
    before[i + 1] = before[i] + (entry[i].rows > 0 ? parts(count, PART) * parts(entry[i].rows, height) : 0);
  }
#pragma omp parallel num_threads(threads)
  {
    uint32_t *memory = 0;
    for (int64_t i = 0;;) {
      int64_t task;
#pragma omp atomic capture
      task = next++;
      if (task >= before[products]) break;
      while (before[i + 1] <= task) i++;
      Matrix own = {entry + i, across ? pieces : 1, experts, identity};
      int64_t e = i % experts, first = before_expert(end, e), shares = parts(end[e] - first, PART);
      int64_t size = parts(parts(end[e] - first, shares), BLOCK) * BLOCK;
      int64_t start = first + (task - before[i]) % shares * size, stop = least(start + size, end[e]);
      int64_t n = (task - before[i]) / shares * height, N = least(entry[i].rows, n + height), begin = across ? 0 : entry[i].place;
      if (stop - start >= MANY && 2 * column_pairs(&own) <= LONG) {
        if (!memory) memory = aligned_alloc(64, (most + 1) * sizeof *memory * (32 + 16 * (PART / BLOCK)));
        if (memory) multiply_many(&of, start, stop, &own, n, N, begin, memory);
        else {
#pragma omp atomic write
          failed = 1;
        }
      } else { /* all rows pass a part of the matrix before the next part is read */
        int64_t turns = parts(stop - start, FEW), each = parts(stop - start, turns);
        int64_t part = NEAR / (2 * column_pairs(&own) + 1) / 8 * 8;
        if (part < 8) part = 8;
        for (; n < N; n += part)
          for (int64_t pair = start; pair < stop; pair += each)
            multiply_rows((int)least(stop - pair, each), &of, pair, &own, n, least(N, n + part), begin);
      }
    }
    free(memory);
  }
  free(before);
  return failed;
}

/* Rows times one matrix; 1: memory is short. */
int times(const bf16 *x, int64_t rows, int64_t x_stride, const bf16 *weight, int64_t height, int64_t columns, int64_t stride, bf16 *y,
          int threads) {
  Entry entry = {weight, height, columns, stride, 0};
  int32_t end = (int32_t)rows;
  return multiply(x, x_stride, 0, &entry, 1, 0, 0, &end, 1, y, height, threads);
}

/* Pairs by expert, in the router's order within each; 1: it named an expert that there is not. */
int arrange(const int64_t *index, int64_t pairs, int64_t active, int64_t experts, int32_t *expert, int32_t *token, int32_t *place,
            int32_t *end) {
  for (int64_t e = 0; e < experts; e++) end[e] = 0;
  for (int64_t p = 0; p < pairs; p++) {
    if (index[p] < 0 || index[p] >= experts) return 1;
    end[index[p]]++;
  }
  for (int32_t e = 0, begin = 0; e < experts; e++) {
    int32_t count = end[e];
    end[e] = begin;
    begin += count;
  }
  for (int64_t p = 0; p < pairs; p++) {
    int32_t at = end[index[p]]++;
    expert[at] = (int32_t)index[p];
    token[at] = (int32_t)(p / active);
    place[p] = at;
  }
  return 0;
}

/* exp of 16 numbers, to the last digits that bfloat16 has and many more. */
INLINE __m512 exponential(__m512 v) {
  __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  const float next[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
  for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(next[i]));
  return _mm512_scalef_ps(sum, whole);
}

/* SiLU(gate) times what it lets up. */
INLINE __m512 let_up(__m512 gate, __m512 up) {
  __m512 beside = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, beside), up);
}

/* Every pair's row in its expert's order of columns, see `CpuTiles.in_order`; 1: memory is short. */
int in_order(const bf16 *x, int64_t x_stride, const int32_t *row, const int32_t *expert, const int32_t *order, bf16 *y, int64_t pairs,
             int64_t columns, int gated, int threads) {
  Rows of = {x, x_stride, row, y, columns};
  int failed = 0;
  if (pairs * columns < LITTLE) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    bf16 *own = gated && order ? malloc((columns + 1) * sizeof *own) : 0;
    if (gated && order && !own) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for
    for (int64_t p = 0; p < pairs; p++) {
      const bf16 *from = read_at(&of, p);
      bf16 *to = y + p * columns;
      if (gated) {
        bf16 *made = order ? own : to;
        for (int64_t c = 0; made && c < columns; c += 32) {
          __mmask32 there = first_of_32(columns - c);
          __m512i g = _mm512_maskz_loadu_epi16(there, from + c), u = _mm512_maskz_loadu_epi16(there, from + columns + c);
          __m512 low = let_up(low_half(g), low_half(u));
          __m512 high = let_up(high_half(g), high_half(u));
          _mm512_mask_storeu_epi16(made + c, there, rounded(low, high));
        }
        from = made;
      }
      if (order && from) {
        const int32_t *place = order + expert[p] * columns;
        for (int64_t c = 0; c < columns; c++) to[c] = from[place[c]];
      }
    }
    free(own);
  }
  return failed;
}

/* Each token's sum of its pairs' rows by weights (null: all count fully). */
void combine(const bf16 *y, int64_t y_stride, const int32_t *place, const float *weight, bf16 *out, int64_t tokens, int64_t active,
             int64_t columns, int threads) {
  if (tokens * active * columns < LITTLE) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < columns; c += 32) {
      __mmask32 there = first_of_32(columns - c);
      __m512 low = _mm512_setzero_ps(), high = low;
      for (int64_t i = t * active; i < (t + 1) * active; i++) {
        __m512i own = _mm512_maskz_loadu_epi16(there, y + y_stride * place[i] + c);
        __m512 share = _mm512_set1_ps(weight ? weight[i] : 1);
        low = _mm512_fmadd_ps(share, low_half(own), low);
        high = _mm512_fmadd_ps(share, high_half(own), high);
      }
      _mm512_mask_storeu_epi16(out + t * columns + c, there, rounded(low, high));
    }
}
