// Prefill path (many rows of x) in AVX-512: a tile of w is decoded once into the cache and meets panels of x. The lanes of a register
// are rows of x, so that a weight is one broadcast and no sum ever crosses lanes.
#include "avx512.h"
#include "avx512_scales.h"
#include "avx512_transpose.h"

namespace qfunc {
namespace {

constexpr int kMicro = 12;        // rows of w in registers: 12 x 2 accumulators, 2 vectors of x, 1 broadcast
constexpr int64_t kTile = 48;     // rows of w in a tile
constexpr int64_t kDeepF32 = 128, kDeepI8 = 512;  // codes of K in a tile: a panel of x and 12 rows of w stay in the first-level cache
constexpr int64_t kChunk = 512;   // rows of x whose results stay in cache

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

template <int MV>
inline void float_micro(const float* tile, int64_t deep, const float* x, int64_t width, int64_t steps, float* sums, int64_t stride, bool first) {
  __m512 acc[kMicro][MV];
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) acc[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + 16 * v);
  for (int64_t k = 0; k < steps; ++k) {
    __m512 xv[MV];
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) xv[v] = _mm512_loadu_ps(x + k * width + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      const __m512 weight = _mm512_set1_ps(tile[r * deep + k]);
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_fmadd_ps(weight, xv[v], acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) _mm512_storeu_ps(sums + r * stride + 16 * v, acc[r][v]);
}

template <class Decode>
inline void float_decode(const Weight& w, Decode& decode, const Spreader<Decode::natural>& spreader, int64_t n, int64_t b0, int64_t b1, const float* scale, const float* shift, float* out) {
  alignas(64) uint8_t tail[kBlock];
  const uint8_t* row = w.codes + n * w.row_bytes;
  for (int64_t b = b0; b < b1; ++b, out += kBlock) {
    decode.load(block_at<Decode::bytes_per_block>(w, row, b, tail));
    __m512 s[8], c[8];
    spreader.all(scale, b, s);
    if (shift) spreader.all(shift, b, c);
#define QFUNC_STEP(V)                                                                             \
  {                                                                                               \
    const __m512 value = decode.template vec<V>();                                                \
    _mm512_storeu_ps(out + 16 * V, shift ? _mm512_fmadd_ps(value, s[V], c[V]) : _mm512_mul_ps(value, s[V])); \
  }
    QFUNC_STEP(0) QFUNC_STEP(1) QFUNC_STEP(2) QFUNC_STEP(3) QFUNC_STEP(4) QFUNC_STEP(5) QFUNC_STEP(6) QFUNC_STEP(7)
#undef QFUNC_STEP
  }
}

// The packed bytes of the next tile along K, or of the next rows, are asked for while this tile is computed: 48 short runs of
// memory are too many and too short for the hardware to see coming.
inline void prefetch_next(const Weight& w, int64_t n, int64_t k, int64_t deep) {
  const bool last = k + deep >= w.k;
  const int64_t row = last ? n + kTile : n, from = last ? 0 : k + deep;
  if (row >= w.n) return;
  const uint8_t* p = w.codes + row * w.row_bytes + from * w.lowbits() / 8;
  for (int64_t i = 0; i < deep * w.lowbits() / 8; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

inline int64_t panel_width(int64_t rows) { return rows <= 16 ? 16 : 32; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Decode>
void float_tile_code(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  Decode decode(w);
  const Spreader<Decode::natural> spreader(w);
  const int64_t own = scales_stride(w);
  const int64_t width = panel_width(p.x.rows), padded = round_up(p.x.rows, width);
  const int64_t stride = padded < kChunk ? padded : kChunk;
  float* tile = thread_scratch<1>().get<float>(kTile * kDeepF32);
  float* sums = thread_scratch<2>().get<float>(kTile * stride);
  float* scales = thread_scratch<0>().get<float>(static_cast<size_t>(kTile * 2 * own));
  for (int64_t n = n0; n < n1; n += kTile) {
    const int64_t count = n1 - n < kTile ? n1 - n : kTile, micro = round_up(count, kMicro);
    for (int64_t r = 0; r < count; ++r) {
      float* s = scales + r * 2 * own;
      row_scales(w, n + r, s);
      end_scales(w, s);
      if (w.zero_kind != Zero::None) row_shifts(w, n + r, s, s + own);
      end_scales(w, s + own);
    }
    if (count < micro) std::memset(tile + count * kDeepF32, 0, static_cast<size_t>((micro - count) * kDeepF32) * sizeof(float));
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      for (int64_t k = 0; k < p.x.kp; k += kDeepF32) {
        const int64_t deep = p.x.kp - k < kDeepF32 ? p.x.kp - k : kDeepF32;
        for (int64_t r = 0; r < count; ++r) {
          const float* s = scales + r * 2 * own;
          prefetch_next(w, n + r, k, deep);
          float_decode(w, decode, spreader, n + r, k / kBlock, (k + deep) / kBlock, s, w.zero_kind == Zero::None ? nullptr : s + own,
                       tile + r * kDeepF32);
        }
        for (int64_t m = 0; m < rows; m += width) {
          const float* x = p.x.f32 + (m0 + m) * p.x.kp + k * width;
          for (int64_t r = 0; r < micro; r += kMicro)
            (rows - m > 16 ? float_micro<2> : float_micro<1>)(tile + r * kDeepF32, kDeepF32, x, width, deep, sums + r * stride + m, stride, k == 0);
        }
      }
      store_columns(p.out, sums, stride, count, n, m0, rows, nullptr);
    }
  }
}

// ---- integers ---------------------------------------------------------------------------------------------------------------
template <int MV>
inline void int_dots(const uint8_t* tile, const int8_t* x, int64_t width, int64_t steps, __m512i (*acc)[MV]) {
  for (int64_t k = 0; k < steps; ++k) {
    __m512i xv[MV];
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) xv[v] = _mm512_loadu_si512(x + k * width * 4 + 64 * v);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      int32_t four;
      std::memcpy(&four, tile + r * kDeepI8 + 4 * k, 4);
      const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], weight, xv[v]);
    }
  }
}

struct IntPanel {
  const int8_t* x;       // the panel, at k = 0
  const int32_t* sums;   // [segments, width]
  const float* scale;    // [scale_step, width]
  const int32_t* zero;   // [width] or null
};

// One register tile over codes [k0, k1) of K, which may hold several segments or a part of one.
template <int MV>
void int_micro(const Product& p, const uint8_t* tile, const IntPanel& panel, int64_t width, int64_t k0, int64_t k1, const float* const* scale,
               const int32_t* const* zero, const int32_t* const* codesum, float* sums, int32_t* partial, int64_t stride) {
  const Weight& w = *p.w;
  const bool grouped_x = p.x.scale_step > 1;
  for (int64_t k = k0; k < k1;) {
    const int64_t s = p.x.sum_segments == 1 ? 0 : k / p.segment;
    const int64_t start = s * p.segment, stop = s + 1 == p.x.sum_segments ? p.x.kp : start + p.segment;
    const int64_t end = stop < k1 ? stop : k1;
    __m512i acc[kMicro][MV];
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = k == start ? _mm512_setzero_si512() : _mm512_loadu_si512(partial + r * stride + 16 * v);
    int_dots<MV>(tile + (k - k0), panel.x + k * width, width, (end - k) / 4, acc);
    if (end < stop) {
#pragma GCC unroll 12
      for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < MV; ++v) _mm512_storeu_si512(partial + r * stride + 16 * v, acc[r][v]);
    } else {
      const int64_t ws = w.segments == 1 ? 0 : start / w.group, xs = grouped_x ? start / p.x.scale_group : 0;
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) {
        const __m512i xsum = _mm512_loadu_si512(panel.sums + s * width + 16 * v);
        const __m512 sx = grouped_x ? _mm512_loadu_ps(panel.scale + xs * width + 16 * v) : _mm512_set1_ps(1);
#pragma GCC unroll 12
        for (int r = 0; r < kMicro; ++r) {
          __m512i exact = _mm512_sub_epi32(acc[r][v], _mm512_mullo_epi32(_mm512_set1_epi32(zero[r][ws]), xsum));
          if (panel.zero) exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(_mm512_set1_epi32(codesum[r][s]), _mm512_loadu_si512(panel.zero + 16 * v)));
          const __m512 value = _mm512_cvtepi32_ps(exact), sw = _mm512_set1_ps(scale[r][ws]);
          float* to = sums + r * stride + 16 * v;
          if (p.x.sum_segments == 1) {
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_mul_ps(value, _mm512_loadu_ps(panel.scale + 16 * v)), sw));
          } else {
            const __m512 before = s == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_mul_ps(sw, sx), before));
          }
        }
      }
    }
    k = end;
  }
}

template <int Bits, bool Flip>
void int_tile_bits(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const int64_t width = panel_width(p.x.rows), padded = round_up(p.x.rows, width), segments = p.x.sum_segments;
  const int64_t stride = padded < kChunk ? padded : kChunk;
  const int32_t offset = w.offset + (Flip ? 128 : 0);
  uint8_t* tile = thread_scratch<1>().get<uint8_t>(kTile * kDeepI8);
  float* sums = thread_scratch<2>().get<float>(2 * kTile * stride);
  int32_t* partial = reinterpret_cast<int32_t*>(sums + kTile * stride);
  float* scales = thread_scratch<0>().get<float>(kTile * (2 * w.segments + segments));
  int32_t* zeros = reinterpret_cast<int32_t*>(scales + kTile * w.segments);
  int32_t* codesums = zeros + kTile * w.segments;
  alignas(64) uint8_t tail[kBlock];
  for (int64_t n = n0; n < n1; n += kTile) {
    const int64_t count = n1 - n < kTile ? n1 - n : kTile, micro = round_up(count, kMicro);
    const float* scale[kTile];
    const int32_t *zero[kTile], *codesum[kTile];
    for (int64_t r = 0; r < micro; ++r) {
      const int64_t own = r < count ? r : count - 1;   // rows that pad the last register tile repeat a real one and are not stored
      scale[r] = scales + own * w.segments;
      zero[r] = zeros + own * w.segments;
      codesum[r] = codesums + own * segments;
      if (r >= count) continue;
      row_scales(w, n + r, scales + r * w.segments);
      const auto* z = static_cast<const uint8_t*>(w.zero) + (w.zero_kind == Zero::Int ? scale_row(w, n + r) * w.segments : 0);
      for (int64_t s = 0; s < w.segments; ++s) zeros[r * w.segments + s] = offset + (w.zero_kind == Zero::Int ? z[s] : 0);
    }
    if (count < micro) std::memset(tile + count * kDeepI8, 0, static_cast<size_t>((micro - count) * kDeepI8));
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      if (p.x.zero) std::memset(codesums, 0, static_cast<size_t>(kTile * segments) * sizeof(int32_t));
      for (int64_t k = 0; k < p.x.kp; k += kDeepI8) {
        const int64_t deep = p.x.kp - k < kDeepI8 ? p.x.kp - k : kDeepI8;
        for (int64_t r = 0; r < count; ++r) {
          const uint8_t* row = w.codes + (n + r) * w.row_bytes;
          prefetch_next(w, n + r, k, deep);
          uint8_t* to = tile + r * kDeepI8;
          for (int64_t b = k / kBlock; b < (k + deep) / kBlock; ++b, to += kBlock) {
            __m512i lo, hi;
            bytes<Bits, Flip>(block_at<16 * Bits>(w, row, b, tail), lo, hi);
            _mm512_storeu_si512(to, lo);
            _mm512_storeu_si512(to + 64, hi);
          }
          if (p.x.zero)  // sums of (code - zero) of every segment, for asymmetric activations
            for (int64_t i = 0; i < deep && k + i < w.k; ++i) {
              const int64_t s = segments == 1 ? 0 : (k + i) / p.segment;
              codesums[r * segments + s] += tile[r * kDeepI8 + i] - zero[r][w.segments == 1 ? 0 : (k + i) / w.group];
            }
        }
        for (int64_t m = 0; m < rows; m += width) {
          const int64_t at = (m0 + m) / width;
          const IntPanel panel{p.x.i8 + (m0 + m) * p.x.kp, p.x.sums + at * segments * width, p.x.scale + at * p.x.scale_step * width,
                               p.x.zero ? p.x.zero + at * width : nullptr};
          for (int64_t r = 0; r < micro; r += kMicro)
            (rows - m > 16 ? int_micro<2> : int_micro<1>)(p, tile + r * kDeepI8, panel, width, k, k + deep, scale + r, zero + r, codesum + r,
                                                          sums + r * stride + m, partial + r * stride + m, stride);
        }
      }
      const bool rowwise = segments > 1 && p.x.scale_step == 1;
      for (int64_t m = 0; m < rows; m += width)
        store_columns(p.out, sums + m, stride, count, n, m0 + m, rows - m < width ? rows - m : width, rowwise ? p.x.scale + m0 + m : nullptr);
    }
  }
}

}  // namespace

namespace avx512 {

void float_tile(const Product& p, int64_t n0, int64_t n1) {
  with_decoder(*p.w, [&](auto* decode) { float_tile_code<std::remove_pointer_t<decltype(decode)>>(p, n0, n1); });
}

void int_tile(const Product& p, int64_t n0, int64_t n1) {
  switch (p.w->lowbits()) {
    case 2: return int_tile_bits<2, false>(p, n0, n1);
    case 3: return int_tile_bits<3, false>(p, n0, n1);
    case 4: return int_tile_bits<4, false>(p, n0, n1);
    case 5: return int_tile_bits<5, false>(p, n0, n1);
    case 6: return int_tile_bits<6, false>(p, n0, n1);
    case 7: return int_tile_bits<7, false>(p, n0, n1);
    default: return p.w->code == Code::Int8 ? int_tile_bits<8, true>(p, n0, n1) : int_tile_bits<8, false>(p, n0, n1);
  }
}

}  // namespace avx512
}  // namespace qfunc
