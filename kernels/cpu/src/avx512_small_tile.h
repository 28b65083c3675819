// Prefill path of products of small codes: several neighbours of K lie in every lane, and one instruction sums their products. What
// differs between whole numbers (four bytes, exact sums in int32) and halves (two bf16, sums in float32) is `Dots`.
#pragma once
#include "avx512_store.h"

namespace qfunc {
namespace {

constexpr int64_t kTileBytes = 512;  // of a row of w decoded at a time
constexpr int64_t kChunk = 512;      // rows of x whose results stay in cache

// Four unsigned weights by four signed codes of x.
struct IntDots {
  using Cell = uint8_t;
  using Sum = __m512i;
  static constexpr bool kInteger = true;
  static constexpr int kPer = 4;
  static inline Sum zero() { return _mm512_setzero_si512(); }
  static inline Sum load(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store(void* p, Sum v) { _mm512_storeu_si512(p, v); }
  static inline Sum add(Sum acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static inline __m512 floats(Sum v) { return _mm512_cvtepi32_ps(v); }
};

// The packed bytes that will be decoded next, asked for one line a step: many at once would be more than the processor can have under
// way, and it would wait.
struct Ahead {
  static constexpr int kRound = 16;  // steps, in which a row of w advances by `round` bytes
  const uint8_t* p;
  int64_t step, wrap;
  bool near = true;  // into the first-level cache
  // Nothing: a line that is in the cache anyway.
  explicit Ahead(const uint8_t* here) : p(here), step(0), wrap(0) {}
  // In the order of addresses.
  Ahead(const uint8_t* from, int64_t round, bool near) : p(from), step(kMicro * round / kRound), wrap(0), near(near) {}
  // The same piece of rows side by side, each in turn.
  Ahead(const uint8_t* from, int64_t row_bytes, int64_t round) : p(from), step(row_bytes), wrap(round - kRound * row_bytes) {}
  inline void ask(int64_t k) {
    if (near) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    else _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
    p += step;
    if (k % kRound == kRound - 1) p += wrap;
  }
};

// `steps` double words of K: rows of the tile by a panel of x.
template <class Dots, int MV, int MR>
inline void dots(const uint8_t* tile, const uint8_t* x, int64_t width, int64_t first, int64_t steps, Ahead& ahead, typename Dots::Sum (*acc)[MV]) {
  for (int64_t k = 0; k < steps; ++k) {
    ahead.ask(first + k);
    __m512i xv[MV];
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) xv[v] = _mm512_loadu_si512(x + k * width * 4 + 64 * v);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      int32_t some;
      std::memcpy(&some, tile + r * kTileBytes + 4 * k, 4);
      const __m512i weight = _mm512_set1_epi32(some);
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = Dots::add(acc[r][v], weight, xv[v]);
    }
  }
}

struct Panel {
  const uint8_t* x;      // the panel, at k = 0
  const int32_t* sums;   // [segments, width]
  const float* scale;    // [scale_step, width]
  const int32_t* zero;   // [width] or null
};

// Scales and zero points of the rows of a register tile, each [rows, step].
struct Sides {
  const float* scale;
  const int32_t* zero;
  const int32_t* codesum;
  int64_t step, codesum_step;
};

// What short segments have in common: they are powers of two, and so are the groups of both sides.
struct Short {
  int64_t length = 0;       // of a segment; 0: they are not short
  int weight = 63, x = 63;  // shifts from a segment to the group of either side
  bool zeros = false;       // rows have zero points of their own

  Short(const Product& p, int64_t most) {
    const Weight& w = *p.w;
    const auto power = [](int64_t n) { return n > 0 && (n & (n - 1)) == 0; };
    const bool grouped_w = w.segments > 1, grouped_x = p.x.scale_step > 1;
    if (p.x.zero || p.x.sum_segments == 1 || p.segment > most || p.segment < 16 || !power(p.segment)) return;
    if ((grouped_w && !power(w.group)) || (grouped_x && !power(p.x.scale_group))) return;
    length = p.segment;
    if (grouped_w) weight = __builtin_ctzll(static_cast<uint64_t>(w.group / length));
    if (grouped_x) x = __builtin_ctzll(static_cast<uint64_t>(p.x.scale_group / length));
    zeros = w.zero_kind == Zero::Int;
  }
};

// One register tile over short segments [s0, s1), the last of which the tile may end (at code `end`): sums of a segment are scaled and added
// while they are in registers.
template <class Dots, int MV, int MR>
void short_micro(const Product& p, const Short& cut, const uint8_t* tile, const Panel& panel, int64_t width, int64_t s0, int64_t s1, int64_t end,
                 const Sides& rows, int32_t offset, float* sums, int64_t stride, Ahead& ahead) {
  const int64_t steps = cut.length / Dots::kPer;
  const bool grouped_x = p.x.scale_step > 1;
  __m512 total[MR][MV];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) total[r][v] = s0 == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + 16 * v);
  for (int64_t s = s0; s < s1; ++s) {
    typename Dots::Sum acc[MR][MV];
    const float* scale = rows.scale + (s >> cut.weight);
    if constexpr (Dots::kInteger) {
      __m512i xsum[MV];
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) xsum[v] = _mm512_loadu_si512(panel.sums + s * width + 16 * v);
      if (cut.zeros) {
        const int32_t* zero = rows.zero + (s >> cut.weight);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_mullo_epi32(_mm512_set1_epi32(-zero[r * rows.step]), xsum[v]);
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < MV; ++v) xsum[v] = _mm512_mullo_epi32(_mm512_set1_epi32(-offset), xsum[v]);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < MV; ++v) acc[r][v] = xsum[v];
      }
    } else {
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < MV; ++v) acc[r][v] = Dots::zero();
    }
    dots<Dots, MV, MR>(tile + (s - s0) * cut.length * static_cast<int64_t>(sizeof(typename Dots::Cell)), panel.x + s * steps * 4 * width, width, (s - s0) * steps,
                       std::min(steps, (end - s * cut.length) / Dots::kPer), ahead, acc);
    __m512 sx[MV];
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) sx[v] = grouped_x ? _mm512_loadu_ps(panel.scale + (s >> cut.x) * width + 16 * v) : _mm512_set1_ps(1);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const __m512 sw = _mm512_set1_ps(scale[r * rows.step]);
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) total[r][v] = _mm512_fmadd_ps(_mm512_mul_ps(Dots::floats(acc[r][v]), sw), sx[v], total[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) _mm512_storeu_ps(sums + r * stride + 16 * v, total[r][v]);
}

// One register tile over codes [k0, k1) of K, which may hold several segments or a part of one.
template <class Dots, int MV>
void long_micro(const Product& p, const uint8_t* tile, const Panel& panel, int64_t width, int64_t k0, int64_t k1, const Sides& rows, float* sums,
                int32_t* partial, int64_t stride, Ahead& ahead) {
  const Weight& w = *p.w;
  const bool grouped_x = p.x.scale_step > 1;
  constexpr int64_t size = sizeof(typename Dots::Cell);
  for (int64_t k = k0; k < k1;) {
    const int64_t s = p.x.sum_segments == 1 ? 0 : k / p.segment;
    const int64_t start = s * p.segment, stop = s + 1 == p.x.sum_segments ? p.x.kp : start + p.segment;
    const int64_t end = stop < k1 ? stop : k1;
    typename Dots::Sum acc[kMicro][MV];
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = k == start ? Dots::zero() : Dots::load(partial + r * stride + 16 * v);
    dots<Dots, MV, kMicro>(tile + (k - k0) * size, panel.x + k * width * size, width, (k - k0) / Dots::kPer, (end - k) / Dots::kPer, ahead, acc);
    if (end < stop) {
#pragma GCC unroll 12
      for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < MV; ++v) Dots::store(partial + r * stride + 16 * v, acc[r][v]);
    } else {
      const int64_t ws = w.segments == 1 ? 0 : start / w.group, xs = grouped_x ? start / p.x.scale_group : 0;
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) {
        const __m512 sx = grouped_x || p.x.sum_segments == 1 ? _mm512_loadu_ps(panel.scale + xs * width + 16 * v) : _mm512_set1_ps(1);
#pragma GCC unroll 12
        for (int r = 0; r < kMicro; ++r) {
          if constexpr (Dots::kInteger) {
            acc[r][v] = _mm512_sub_epi32(acc[r][v], _mm512_mullo_epi32(_mm512_set1_epi32(rows.zero[r * rows.step + ws]), _mm512_loadu_si512(panel.sums + s * width + 16 * v)));
            if (panel.zero)
              acc[r][v] = _mm512_sub_epi32(acc[r][v], _mm512_mullo_epi32(_mm512_set1_epi32(rows.codesum[r * rows.codesum_step + s]), _mm512_loadu_si512(panel.zero + 16 * v)));
          }
          const __m512 value = Dots::floats(acc[r][v]), sw = _mm512_set1_ps(rows.scale[r * rows.step + ws]);
          float* to = sums + r * stride + 16 * v;
          if (p.x.sum_segments == 1) {
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_mul_ps(value, sx), sw));
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

// `Decode` has bits, an offset (what stands for zero in a tile of whole numbers) and turns a block of 128 codes into cells of the tile.
template <class Dots, class Decode>
void small_tile(const Product& p, int64_t n0, int64_t n1) {
  constexpr int64_t size = sizeof(typename Dots::Cell), deepest = kTileBytes / size;
  constexpr int bits = Decode::bits;
  const Weight& w = *p.w;
  const Decode decode(w);
  const Short cut(p, deepest);
  const int64_t width = p.x.rows <= 16 ? 16 : 32, padded = round_up(p.x.rows, width), segments = p.x.sum_segments, kp = p.x.kp;
  const int64_t stride = (padded < kChunk ? padded : kChunk) + 16;  // a power of two would crowd a few sets of the cache
  const int64_t block = block_rows(padded, padded * kp * size, n1 - n0, 2 * w.segments + segments);
  const int32_t offset = decode.offset;
  const auto* panels = reinterpret_cast<const uint8_t*>(p.x.i8);
  uint8_t* tile = thread_scratch<1>().get<uint8_t>(kMicro * kTileBytes);
  float* sums = thread_scratch<2>().get<float>(static_cast<size_t>(2 * block * stride));
  int32_t* partial = reinterpret_cast<int32_t*>(segments == 1 ? sums : sums + block * stride);  // a single segment has no sums before its end
  float* scales = thread_scratch<0>().get<float>(static_cast<size_t>(block * (2 * w.segments + segments)));
  int32_t* zeros = reinterpret_cast<int32_t*>(scales + block * w.segments);
  int32_t* codesums = zeros + block * w.segments;
  alignas(64) uint8_t tail[kBlock];
  const bool fits = NextBlock::fits(w, block);
  NextBlock::start(w, n0, block, n1);
  for (int64_t n = n0; n < n1; n += block) {
    const int64_t count = n1 - n < block ? n1 - n : block, micro = round_up(count, kMicro);
    int64_t asked = 0;
    for (int64_t r = 0; r < micro; ++r) {  // rows that pad the last register tile repeat a real one and are not stored
      const int64_t own = n + (r < count ? r : count - 1);
      float* scale = scales + r * w.segments;
      row_scales(w, own, scale);
      if (p.unit != 1.0f)
        for (int64_t s = 0; s < w.segments; ++s) scale[s] *= p.unit;
      const auto* z = static_cast<const uint8_t*>(w.zero) + (w.zero_kind == Zero::Int ? scale_row(w, own) * w.segments : 0);
      for (int64_t s = 0; s < w.segments; ++s) zeros[r * w.segments + s] = offset + (w.zero_kind == Zero::Int ? z[s] : 0);
    }
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      if (p.x.zero) std::memset(codesums, 0, static_cast<size_t>(block * segments) * sizeof(int32_t));
      for (int64_t k = 0; k < kp; k += deepest) {
        const int64_t deep = kp - k < deepest ? kp - k : deepest;
        for (int64_t r = 0; r < micro; r += kMicro) {
          const int64_t live = count - r < kMicro ? count - r : kMicro;
          for (int64_t i = 0; i < live; ++i) {
            const uint8_t* row = w.codes + (n + r + i) * w.row_bytes;
            uint8_t* to = tile + i * kTileBytes;
            for (int64_t b = k / kBlock; b < (k + deep) / kBlock; ++b, to += kBlock * size) decode.block(block_at<16 * bits>(w, row, b, tail), to);
            if constexpr (Dots::kInteger)
              for (int64_t j = 0; p.x.zero && j < deep && k + j < w.k;) {  // sums of (code - zero) of every segment, for asymmetric activations
                const int64_t s = segments == 1 ? 0 : (k + j) / p.segment, ends = s + 1 == segments ? w.k : (s + 1) * p.segment;
                const int64_t length = (ends < k + deep ? ends : k + deep) - (k + j);
                codesums[(r + i) * segments + s] += sum_codes(tile + i * kTileBytes + j, length) -
                                                    static_cast<int32_t>(length) * zeros[(r + i) * w.segments + (w.segments == 1 ? 0 : (k + j) / w.group)];
                j += length;
              }
          }
          if (live < kMicro) std::memset(tile + live * kTileBytes, 0, static_cast<size_t>((kMicro - live) * kTileBytes));
          const bool along = block == kMicro && k + deep < kp;    // what comes next: more of these rows, or the next ones
          const int64_t next = along ? n + r : n + r + kMicro;
          const Ahead nothing(tile);
          Ahead first = nothing;
          constexpr int64_t round = Ahead::kRound * Dots::kPer * bits / 8;
          if (fits) {
            // Few rows of x are over so soon that a block of whole bytes would push them out of the first level.
            if (m0 == 0 && n + block < n1) first = Ahead(w.codes + (n + block) * w.row_bytes + asked, round, !Dots::kInteger || bits < 8 || width > 16);
            asked += kMicro * deep * bits / 8;
          } else if (next + kMicro <= w.n) {
            first = Ahead(w.codes + next * w.row_bytes + (along ? k + deep : block == kMicro ? 0 : k) * bits / 8, w.row_bytes, round);
          }
          const Sides sides{scales + r * w.segments, zeros + r * w.segments, codesums + r * segments, w.segments, segments};
          for (int64_t m = 0; m < rows; m += width) {
            // Early for the second-level cache, and once more for the first.
            Ahead ahead = m == 0 || (m + width >= rows && !fits) ? first : nothing;
            const int64_t at = (m0 + m) / width;
            const Panel panel{panels + (m0 + m) * kp * size, p.x.sums + at * segments * width, p.x.scale + at * p.x.scale_step * width,
                              p.x.zero ? p.x.zero + at * width : nullptr};
            float* to = sums + r * stride + m;
            if (!cut.length) {
              (rows - m > 16 ? long_micro<Dots, 2> : long_micro<Dots, 1>)(p, tile, panel, width, k, k + deep, sides, to, partial + r * stride + m, stride, ahead);
              continue;
            }
            const int64_t s0 = k / cut.length, end = k + deep, s1 = std::min(segments, (end + cut.length - 1) / cut.length);
            if (rows - m <= 16) {
              short_micro<Dots, 1, kMicro>(p, cut, tile, panel, width, s0, s1, end, sides, offset, to, stride, ahead);
              continue;
            }
            constexpr int half = kMicro / 2;
            for (int h = 0; h < 2; ++h, ahead = nothing) {
              const int64_t skip = h * half;
              const Sides own{sides.scale + skip * sides.step, sides.zero + skip * sides.step, nullptr, sides.step, 0};
              short_micro<Dots, 2, half>(p, cut, tile + skip * kTileBytes, panel, width, s0, s1, end, own, offset, to + skip * stride, stride, ahead);
            }
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
}  // namespace qfunc
