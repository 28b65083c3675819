// Prefill path (many rows of x) of float products in AVX-512: 12 rows of w are decoded into the cache and meet all panels of x. The
// lanes of a register are rows of x, so that a weight is one broadcast and no sum ever crosses lanes.
#include "avx512.h"
#include "avx512_store.h"

namespace qfunc {
namespace {

constexpr int64_t kDeep = 256;    // codes of K decoded at a time, half of it for wide panels: a panel takes half of the first-level cache
constexpr int64_t kChunk = 256;   // rows of x whose results stay in cache

template <int MV>
inline void float_micro(const float* tile, const float* x, int64_t width, int64_t steps, float* sums, int64_t stride, bool first) {
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
      const __m512 weight = _mm512_set1_ps(tile[r * kDeep + k]);
#pragma GCC unroll 2
      for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_fmadd_ps(weight, xv[v], acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < MV; ++v) _mm512_storeu_ps(sums + r * stride + 16 * v, acc[r][v]);
}

// Up to 8 rows of x: a register holds two neighbours of K for each of them, and the weight is a broadcast of two.
inline void float_micro_pairs(const float* tile, const float* x, int64_t steps, float* sums, int64_t stride, bool first, bool last) {
  __m512 acc[kMicro];
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r) acc[r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride);
  for (int64_t k = 0; k < steps; k += 2) {
    const __m512 xv = _mm512_loadu_ps(x + k * 8);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      double two;
      std::memcpy(&two, tile + r * kDeep + k, 8);
      acc[r] = _mm512_fmadd_ps(_mm512_castpd_ps(_mm512_set1_pd(two)), xv, acc[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r) {
    if (last) {
      const __m512 both = _mm512_add_ps(acc[r], _mm512_permute_ps(acc[r], 0xb1));
      acc[r] = _mm512_maskz_compress_ps(0x5555, both);
    }
    _mm512_storeu_ps(sums + r * stride, acc[r]);
  }
}

// How scales (and shifts) meet the vectors of a block: one for all of it, one for the even and one for the odd vectors, one for each.
enum class Spread { Whole, Halves, Each };

// Codes of blocks [b0, b1) of `live` rows from n on as floats; `own` is the distance between the scales of two rows, with shifts half way.
template <class Decode, Spread Mode, bool Shifted>
void float_decode(const Weight& w, const Decode& prototype, const Spreader<Decode::natural>& spreader, int64_t n, int64_t live, int64_t b0, int64_t b1,
                  const float* scales, int64_t own, float* tile) {
  constexpr int kKinds = Mode == Spread::Whole ? 1 : Mode == Spread::Halves ? 2 : 8;
  constexpr bool tabled = Decode::tabled && Mode == Spread::Whole;
  alignas(64) uint8_t tail[kBlock];
  Decode decode = prototype;  // a copy stays in registers
  for (int64_t i = 0; i < live; ++i) {
    const uint8_t* row = w.codes + (n + i) * w.row_bytes;
    const float *scale = scales + i * 2 * own, *shift = scale + own;
    float* out = tile + i * kDeep;
    for (int64_t b = b0; b < b1; ++b, out += kBlock) {
      load_block(decode, w, row, b, tail);
      __m512 s[kKinds], c[kKinds];
      if constexpr (Mode == Spread::Whole) {
        s[0] = _mm512_set1_ps(scale[spreader.whole(b)]);
        if constexpr (Shifted) c[0] = _mm512_set1_ps(shift[spreader.whole(b)]);
        if constexpr (tabled && Shifted) decode.scale(s[0], c[0]);
        else if constexpr (tabled) decode.scale(s[0]);
      } else if constexpr (Mode == Spread::Halves) {
        spreader.halves(scale, b, s[0], s[1]);
        if constexpr (Shifted) spreader.halves(shift, b, c[0], c[1]);
      } else {
        spreader.all(scale, b, s);
        if constexpr (Shifted) spreader.all(shift, b, c);
      }
#define QFUNC_STEP(V)                                                                             \
  {                                                                                               \
    __m512 value;                                                                                 \
    if constexpr (tabled) value = decode.template scaled_vec<V>();                                \
    else if constexpr (Shifted) value = _mm512_fmadd_ps(decode.template vec<V>(), s[V % kKinds], c[V % kKinds]); \
    else value = _mm512_mul_ps(decode.template vec<V>(), s[V % kKinds]);                          \
    _mm512_storeu_ps(out + 16 * V, value);                                                        \
  }
      QFUNC_STEP(0) QFUNC_STEP(1) QFUNC_STEP(2) QFUNC_STEP(3) QFUNC_STEP(4) QFUNC_STEP(5) QFUNC_STEP(6) QFUNC_STEP(7)
#undef QFUNC_STEP
    }
  }
}

template <class Decode>
auto decoder_of(const Weight& w, const Spreader<Decode::natural>& spreader) {
  const bool shifted = w.zero_kind != Zero::None;
  if (w.group >= w.k || w.group % kBlock == 0) return shifted ? float_decode<Decode, Spread::Whole, true> : float_decode<Decode, Spread::Whole, false>;
  if constexpr (!Decode::natural)
    if (!spreader.any()) return shifted ? float_decode<Decode, Spread::Halves, true> : float_decode<Decode, Spread::Halves, false>;
  return shifted ? float_decode<Decode, Spread::Each, true> : float_decode<Decode, Spread::Each, false>;
}

// The packed bytes that will be decoded next are asked for while these are computed.
inline void prefetch(const Weight& w, int64_t n, int64_t k, int64_t deep) {
  const uint8_t* p = w.codes + (n < w.n ? n : w.n - 1) * w.row_bytes + k * w.lowbits() / 8;
  for (int64_t i = 0; i < deep * w.lowbits() / 8; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

inline int64_t panel_width(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : 32; }

template <class Decode>
void float_tile_code(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const Decode decode(w);
  const Spreader<Decode::natural> spreader(w);
  const auto decode_rows = decoder_of<Decode>(w, spreader);
  const bool shifted = w.zero_kind != Zero::None;
  const int64_t own = scales_stride(w), kp = p.x.kp;
  const int64_t width = panel_width(p.x.rows), most = width == 32 ? kDeep / 2 : kDeep, padded = round_up(p.x.rows, width);
  const int64_t stride = (padded < kChunk ? round_up(padded, 16) : kChunk) + 16;  // a power of two would crowd a few sets of the cache
  // A wide panel is worth keeping in the first-level cache for several tiles, whatever the size of x.
  const int64_t block = block_rows(padded, width == 32 ? INT64_MAX : padded * kp * 4, n1 - n0, shifted ? 2 * own : own);
  float* tile = thread_scratch<1>().get<float>(kMicro * kDeep);
  float* sums = thread_scratch<2>().get<float>(static_cast<size_t>(block * stride));
  float* scales = thread_scratch<0>().get<float>(static_cast<size_t>(block * 2 * own));
  const bool fits = NextBlock::fits(w, block);
  NextBlock::start(w, n0, block, n1);
  for (int64_t n = n0; n < n1; n += block) {
    const int64_t count = n1 - n < block ? n1 - n : block;
    const NextBlock next(w, n, block, n1);
    int64_t asked = 0;
    for (int64_t r = 0; r < count; ++r) {
      float* s = scales + r * 2 * own;
      row_scales(w, n + r, s);
      end_scales(w, s);
      if (shifted) row_shifts(w, n + r, s, s + own);
      end_scales(w, s + own);
    }
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      for (int64_t k = 0; k < kp; k += most) {
        const int64_t deep = kp - k < most ? kp - k : most;
        for (int64_t r = 0; r < count; r += kMicro) {
          const int64_t live = count - r < kMicro ? count - r : kMicro;
          const bool along = block == kMicro && k + deep < kp;    // what comes next: more of these rows, or the next ones
          for (int64_t i = 0; i < live; ++i) {
            if (!fits) prefetch(w, along ? n + r + i : n + r + kMicro + i, along ? k + deep : block == kMicro ? 0 : k, deep);
            else if (m0 == 0) next.ask(asked, deep * w.lowbits() / 8), asked += deep * w.lowbits() / 8;
          }
          decode_rows(w, decode, spreader, n + r, live, k / kBlock, (k + deep) / kBlock, scales + r * 2 * own, own, tile);
          if (live < kMicro) std::memset(tile + live * kDeep, 0, static_cast<size_t>((kMicro - live) * kDeep) * sizeof(float));
          for (int64_t m = 0; m < rows; m += width) {
            const float* x = p.x.f32 + (m0 + m) * kp + k * width;
            float* to = sums + r * stride + m;
            if (width == 8) float_micro_pairs(tile, x, deep, to, stride, k == 0, k + deep == kp);
            else (rows - m > 16 ? float_micro<2> : float_micro<1>)(tile, x, width, deep, to, stride, k == 0);
          }
        }
      }
      store_columns(p.out, sums, stride, count, n, m0, rows, nullptr);
    }
  }
}

}  // namespace

namespace avx512 {

void float_tile(const Product& p, int64_t n0, int64_t n1) {
  with_decoder(*p.w, [&](auto* decode) { float_tile_code<std::remove_pointer_t<decltype(decode)>>(p, n0, n1); });
}

}  // namespace avx512
}  // namespace qfunc
