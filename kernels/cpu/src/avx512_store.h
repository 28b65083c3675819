// Results of the prefill path: lanes are rows of x, memory is rows of y.
#pragma once
#include "avx512_scales.h"
#include "avx512_transpose.h"

namespace qfunc {
namespace {

constexpr int kMicro = 12;        // rows of w in registers: 12 x 2 accumulators, 2 vectors of x, 1 broadcast
constexpr int64_t kBlockRows = 192;  // rows of w that meet one piece of x while it stays in the second-level cache

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// How many rows of w are worked on at once. A small x stays in the cache whole, and the weights are then best read row by row to their
// ends, as the hardware likes to run ahead; a large one is cut along K, and every piece must meet many rows before the next one comes.
inline int64_t block_rows(int64_t x_rows, int64_t x_bytes, int64_t count, int64_t row_floats) {
  if (x_bytes <= (int64_t{320} << 10)) return kMicro;
  if (x_rows <= 64) return 4 * kMicro;     // one or two panels stay in the first-level cache, if only their results do too
  const int64_t scales = (int64_t{128} << 10) / (4 * row_floats);
  const int64_t most = scales < 48 ? 48 : scales < kBlockRows ? scales : kBlockRows, blocks = (count + most - 1) / most;
  const int64_t even = round_up((count + blocks - 1) / blocks, kMicro);
  return even < kBlockRows ? even : kBlockRows;
}

// The packed bytes that are decoded one block of rows later, so far ahead that they can be asked for in the order of their addresses:
// the many rows of a block, read side by side, are more streams than the hardware follows, and its own prefetching ends with every page.
class NextBlock {
 public:
  // Blocks of `rows` rows of w, of which [n, end) remain.
  NextBlock(const Weight& w, int64_t n, int64_t rows, int64_t end)
      : from_(w.codes + (n + rows) * w.row_bytes), bytes_(n + rows < end ? (end - n - rows < rows ? end - n - rows : rows) * w.row_bytes : 0) {}
  // Whether a whole block fits into the second-level cache besides x and the tile.
  static bool fits(const Weight& w, int64_t rows) { return rows * w.row_bytes <= (int64_t{320} << 10); }
  // The first block has none before it during which it could be asked for: the beginning of it, at once.
  static void start(const Weight& w, int64_t n, int64_t rows, int64_t end) { NextBlock(w, n - rows, rows, end).ask(0, int64_t{16} << 10); }
  // Bytes [at, at + count) of the block.
  inline void ask(int64_t at, int64_t count) const {
    const int64_t end = at + count < bytes_ ? at + count : bytes_;
    for (int64_t i = at; i < end; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from_ + i), _MM_HINT_T1);
  }

 private:
  const uint8_t* from_;
  int64_t bytes_;
};

inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet));
}

// sums [count rows of w, stride] holds columns m0 .. m0 + rows; y[m, n0 + i] = sums[i, m] * scale[m] + bias[n0 + i].
inline void store_columns(const Output& out, const float* sums, int64_t stride, int64_t count, int64_t n0, int64_t m0, int64_t rows,
                          const float* scale) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t live = count - i < 16 ? count - i : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << live) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (out.bias) {
      alignas(64) float b[16] = {};
      convert_numbers(out.bias, out.bias_type, n0 + i, live, b);
      bias = _mm512_load_ps(b);
    }
    for (int64_t m = 0; m < rows; m += 16) {
      __m512 v[16];
      const __m512 factor = scale ? _mm512_loadu_ps(scale + m) : _mm512_set1_ps(1);
      for (int j = 0; j < 16; ++j) v[j] = j < live ? _mm512_mul_ps(_mm512_loadu_ps(sums + (i + j) * stride + m), factor) : _mm512_setzero_ps();
      transpose16(v);
      const int lanes = static_cast<int>(rows - m < 16 ? rows - m : 16);
      for (int j = 0; j < lanes; ++j) {
        const __m512 y = _mm512_add_ps(v[j], bias);
        const int64_t at = (m0 + m + j) * out.n + n0 + i;
        if (out.type == Number::F32) _mm512_mask_storeu_ps(static_cast<float*>(out.y) + at, mask, y);
        else
          _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + at, mask,
                                   out.type == Number::BF16 ? to_bf16(y) : _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
      }
    }
  }
}

}  // namespace
}  // namespace qfunc
