// Prefill path (many rows of x) of integer products in AVX-512 VNNI: as in floats, with four codes in every lane.
#include "avx512.h"
#include "avx512_store.h"

namespace qfunc {
namespace {

constexpr int64_t kDeep = 512;    // codes of K decoded at a time
constexpr int64_t kChunk = 512;   // rows of x whose results stay in cache

// The packed bytes that will be decoded next. They are asked for a few at a time between the products: all at once would be more
// than the processor can have under way.
struct Ahead {
  const uint8_t* p = nullptr;   // of the same piece of the next rows, or
  int64_t row_bytes = 0, step = 0;    // bytes of 64 codes
  const NextBlock* block = nullptr;   // in the order of addresses
  int64_t at = 0;
  inline void ask() {
    if (block) {
      block->ask(at, kMicro * step);
      at += kMicro * step;
    } else if (p) {
      for (int r = 0; r < kMicro; ++r) _mm_prefetch(reinterpret_cast<const char*>(p + r * row_bytes), _MM_HINT_T1);
      p += step;
    }
  }
};

template <int MV>
inline void int_dots(const uint8_t* tile, const int8_t* x, int64_t width, int64_t first, int64_t steps, Ahead& ahead, __m512i (*acc)[MV]) {
  for (int64_t k = 0; k < steps; ++k) {
    if ((first + k) % 16 == 0) ahead.ask();
    __m512i xv[MV];
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) xv[v] = _mm512_loadu_si512(x + k * width * 4 + 64 * v);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      int32_t four;
      std::memcpy(&four, tile + r * kDeep + 4 * k, 4);
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
               const int32_t* const* zero, const int32_t* const* codesum, float* sums, int32_t* partial, int64_t stride, Ahead ahead) {
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
    int_dots<MV>(tile + (k - k0), panel.x + k * width, width, (k - k0) / 4, (end - k) / 4, ahead, acc);
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

inline int32_t sum_codes(const uint8_t* p, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    const __mmask64 mask = count - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (count - i)) - 1;
    sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask, p + i), _mm512_set1_epi8(1));
  }
  return _mm512_reduce_add_epi32(sum);
}

template <int Bits, bool Flip>
void int_tile_bits(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const int64_t width = p.x.rows <= 16 ? 16 : 32, padded = round_up(p.x.rows, width), segments = p.x.sum_segments, kp = p.x.kp;
  const int64_t stride = (padded < kChunk ? padded : kChunk) + 16;  // a power of two would crowd a few sets of the cache
  const int64_t block = block_rows(padded, padded * kp, n1 - n0, 2 * w.segments + segments);
  const int32_t offset = w.offset + (Flip ? 128 : 0);
  uint8_t* tile = thread_scratch<1>().get<uint8_t>(kMicro * kDeep);
  float* sums = thread_scratch<2>().get<float>(static_cast<size_t>(2 * block * stride));
  int32_t* partial = reinterpret_cast<int32_t*>(sums + block * stride);
  float* scales = thread_scratch<0>().get<float>(static_cast<size_t>(block * (2 * w.segments + segments)));
  int32_t* zeros = reinterpret_cast<int32_t*>(scales + block * w.segments);
  int32_t* codesums = zeros + block * w.segments;
  alignas(64) uint8_t tail[kBlock];
  const float* scale[kBlockRows];
  const int32_t *zero[kBlockRows], *codesum[kBlockRows];
  const bool fits = NextBlock::fits(w, block);
  NextBlock::start(w, n0, block, n1);
  for (int64_t n = n0; n < n1; n += block) {
    const int64_t count = n1 - n < block ? n1 - n : block, micro = round_up(count, kMicro);
    const NextBlock next_block(w, n, block, n1);
    int64_t asked = 0;
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
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      if (p.x.zero) std::memset(codesums, 0, static_cast<size_t>(block * segments) * sizeof(int32_t));
      for (int64_t k = 0; k < kp; k += kDeep) {
        const int64_t deep = kp - k < kDeep ? kp - k : kDeep;
        for (int64_t r = 0; r < micro; r += kMicro) {
          const int64_t live = count - r < kMicro ? count - r : kMicro;
          for (int64_t i = 0; i < live; ++i) {
            const uint8_t* row = w.codes + (n + r + i) * w.row_bytes;
            uint8_t* to = tile + i * kDeep;
            for (int64_t b = k / kBlock; b < (k + deep) / kBlock; ++b, to += kBlock) {
              __m512i lo, hi;
              bytes<Bits, Flip>(block_at<16 * Bits>(w, row, b, tail), lo, hi);
              _mm512_storeu_si512(to, lo);
              _mm512_storeu_si512(to + 64, hi);
            }
            for (int64_t j = 0; p.x.zero && j < deep && k + j < w.k;) {  // sums of (code - zero) of every segment, for asymmetric activations
              const int64_t s = segments == 1 ? 0 : (k + j) / p.segment, ends = s + 1 == segments ? w.k : (s + 1) * p.segment;
              const int64_t length = (ends < k + deep ? ends : k + deep) - (k + j);
              codesums[(r + i) * segments + s] +=
                  sum_codes(tile + i * kDeep + j, length) - static_cast<int32_t>(length) * zero[r + i][w.segments == 1 ? 0 : (k + j) / w.group];
              j += length;
            }
          }
          if (live < kMicro) std::memset(tile + live * kDeep, 0, static_cast<size_t>((kMicro - live) * kDeep));
          const bool along = block == kMicro && k + deep < kp;    // what comes next: more of these rows, or the next ones
          const int64_t next = along ? n + r : n + r + kMicro;
          Ahead ahead;
          if (fits) {
            if (m0 == 0) ahead = {nullptr, 0, 8 * Bits, &next_block, asked};
            asked += kMicro * deep * Bits / 8;
          } else if (next + kMicro <= w.n) {
            ahead = {w.codes + next * w.row_bytes + (along ? k + deep : block == kMicro ? 0 : k) * Bits / 8, w.row_bytes, 8 * Bits, nullptr, 0};
          }
          for (int64_t m = 0; m < rows; m += width, ahead = {}) {
            const int64_t at = (m0 + m) / width;
            const IntPanel panel{p.x.i8 + (m0 + m) * kp, p.x.sums + at * segments * width, p.x.scale + at * p.x.scale_step * width,
                                 p.x.zero ? p.x.zero + at * width : nullptr};
            (rows - m > 16 ? int_micro<2> : int_micro<1>)(p, tile, panel, width, k, k + deep, scale + r, zero + r, codesum + r,
                                                          sums + r * stride + m, partial + r * stride + m, stride, ahead);
          }
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
