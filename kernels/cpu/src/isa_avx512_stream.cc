// Decode path (few rows of x) in AVX-512: every packed weight is read once, decoded in registers and met by all rows of x.
#include "avx512.h"
#include "avx512_scales.h"

namespace qfunc {
namespace {

// How scales meet the weights. Whole, Halves: one scale for a block, or two vectors of them, are applied to sums of products. The others scale
// (and shift) the weights: Block by one scale, Lanes by one vector for the even and one for the odd vectors, Natural by one scale for each
// vector, Each by any vectors.
enum class Spread { Whole, Halves, Block, Lanes, Natural, Each };

constexpr int kMaxRows = 4;

// NR rows of w, M rows of x.
template <class Decode, int M, int NR, Spread Mode, bool Shifted>
void float_rows(const Product& p, const Decode& prototype, const uint8_t* const* row, const float* const* scale, const float* const* shift,
                float (*out)[kMaxRows]) {
  constexpr bool tabled = Decode::tabled && Mode == Spread::Block;
  constexpr int kKinds = Mode == Spread::Each ? 8 : 2;
  const Weight& w = *p.w;
  const int64_t kp = p.x.kp, blocks = kp / kBlock;
  alignas(64) uint8_t tail[NR][kBlock];
  Decode decode[2] = {prototype, prototype};
  const Spreader<Decode::natural> spreader(w);
  NextRows next(w, row[0], NR, blocks);
  __m512 total[NR][M];
  for (int r = 0; r < NR; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = p.x.f32 + b * kBlock;
    __m512 each[NR][kKinds], add[NR][kKinds];
    const int64_t first = Mode == Spread::Natural ? spreader.start(b) : 0;
    next.ask<NR * Decode::bytes_per_block>();
    for (int r = 0; r < NR; ++r) {
      load_block(decode[r], w, row[r], b, tail[r]);
      if constexpr (Mode == Spread::Halves || Mode == Spread::Lanes) {
        spreader.halves(scale[r], b, each[r][0], each[r][1]);
        if constexpr (Shifted) spreader.halves(shift[r], b, add[r][0], add[r][1]);
      }
      if constexpr (Mode == Spread::Block) {
        each[r][0] = each[r][1] = _mm512_set1_ps(scale[r][spreader.whole(b)]);
        if constexpr (Shifted) add[r][0] = add[r][1] = _mm512_set1_ps(shift[r][spreader.whole(b)]);
        if constexpr (tabled && Shifted) decode[r].scale(each[r][0], add[r][0]);
        else if constexpr (tabled) decode[r].scale(each[r][0]);
      }
      if constexpr (Mode == Spread::Each) {
        spreader.all(scale[r], b, each[r]);
        if constexpr (Shifted) spreader.all(shift[r], b, add[r]);
      }
    }
    __m512 part[NR][M];
#define QFUNC_STEP(V, FIRST)                                                        \
  for (int r = 0; r < NR; ++r) {                                                    \
    __m512 value;                                                                   \
    if constexpr (tabled) {                                                         \
      value = decode[r].template scaled_vec<V>();                                   \
    } else {                                                                        \
      value = decode[r].template vec<V>();                                          \
      if constexpr (Mode == Spread::Natural) {                                      \
        const __m512 s = _mm512_set1_ps(scale[r][first + spreader.at(V)]);          \
        if constexpr (Shifted) value = _mm512_fmadd_ps(value, s, _mm512_set1_ps(shift[r][first + spreader.at(V)])); \
        else value = _mm512_mul_ps(value, s);                                       \
      } else if constexpr (Mode != Spread::Whole && Mode != Spread::Halves) {       \
        if constexpr (Shifted) value = _mm512_fmadd_ps(value, each[r][V % kKinds], add[r][V % kKinds]); \
        else value = _mm512_mul_ps(value, each[r][V % kKinds]);                     \
      }                                                                             \
    }                                                                               \
    for (int m = 0; m < M; ++m) {                                                   \
      const __m512 xv = _mm512_loadu_ps(x + m * kp + 16 * V);                       \
      part[r][m] = V == FIRST ? _mm512_mul_ps(value, xv) : _mm512_fmadd_ps(value, xv, part[r][m]); \
    }                                                                               \
  }
#define QFUNC_SUM(FACTOR)                                                           \
  for (int r = 0; r < NR; ++r)                                                      \
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(part[r][m], FACTOR, total[r][m]);
    if constexpr (Mode == Spread::Halves) {
      QFUNC_STEP(0, 0) QFUNC_STEP(2, 0) QFUNC_STEP(4, 0) QFUNC_STEP(6, 0)
      QFUNC_SUM(each[r][0])
      QFUNC_STEP(1, 1) QFUNC_STEP(3, 1) QFUNC_STEP(5, 1) QFUNC_STEP(7, 1)
      QFUNC_SUM(each[r][1])
    } else {
      QFUNC_STEP(0, 0) QFUNC_STEP(1, 0) QFUNC_STEP(2, 0) QFUNC_STEP(3, 0)
      QFUNC_STEP(4, 0) QFUNC_STEP(5, 0) QFUNC_STEP(6, 0) QFUNC_STEP(7, 0)
      if constexpr (Mode == Spread::Whole) {
        const int64_t s = spreader.whole(b);
        QFUNC_SUM(_mm512_set1_ps(scale[r][s]))
      } else {
        for (int r = 0; r < NR; ++r)
          for (int m = 0; m < M; ++m) total[r][m] = _mm512_add_ps(total[r][m], part[r][m]);
      }
    }
#undef QFUNC_STEP
#undef QFUNC_SUM
  }
  for (int r = 0; r < NR; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(total[r][m]);
}

template <class Decode, int M, Spread Mode, bool Shifted>
void float_stream_rows(const Product& p, int64_t n0, int64_t n1) {
  constexpr int NR = 2;
  const Weight& w = *p.w;
  const Decode prototype(w);
  const int64_t stride = scales_stride(w);
  float* scales = thread_scratch<0>().get<float>(static_cast<size_t>(2 * NR * stride));
  float out[NR][kMaxRows];
  for (int64_t n = n0; n < n1; n += NR) {
    const uint8_t* row[NR];
    const float *scale[NR], *shift[NR];
    for (int r = 0; r < NR; ++r) {
      const int64_t own = n + r < n1 ? n + r : n1 - 1;
      float* s = scales + 2 * r * stride;
      row[r] = w.codes + own * w.row_bytes;
      row_scales(w, own, s);
      end_scales(w, s);
      scale[r] = s;
      shift[r] = s + stride;
      if constexpr (Shifted) {
        row_shifts(w, own, s, s + stride);
        end_scales(w, s + stride);
      }
    }
    float_rows<Decode, M, NR, Mode, Shifted>(p, prototype, row, scale, shift, out);
    for (int r = 0; r < NR && n + r < n1; ++r) {
      const float bias = bias_at(p.out, n + r);
      for (int64_t m = 0; m < p.x.rows; ++m) store_number(p.out.y, p.out.type, m * p.out.n + n + r, out[r][m] + bias);
    }
  }
}

template <class Decode, Spread Mode, bool Shifted>
void float_stream_mode(const Product& p, int64_t n0, int64_t n1) {
  if (p.x.rows == 1) float_stream_rows<Decode, 1, Mode, Shifted>(p, n0, n1);
  else if (p.x.rows == 2) float_stream_rows<Decode, 2, Mode, Shifted>(p, n0, n1);
  else float_stream_rows<Decode, 4, Mode, Shifted>(p, n0, n1);
}

template <class Decode, bool Shifted>
void float_stream_code(const Product& p, int64_t n0, int64_t n1) {
  const Spreader<Decode::natural> spreader(*p.w);
  if (spreader.any()) return float_stream_mode<Decode, Spread::Each, Shifted>(p, n0, n1);
  if (!spreader.even()) return float_stream_mode<Decode, Shifted ? Spread::Block : Spread::Whole, Shifted>(p, n0, n1);
  if constexpr (Decode::natural) float_stream_mode<Decode, Spread::Natural, Shifted>(p, n0, n1);
  else float_stream_mode<Decode, Shifted || !Decode::tabled ? Spread::Lanes : Spread::Halves, Shifted>(p, n0, n1);
}

}  // namespace

namespace avx512 {

void float_stream(const Product& p, int64_t n0, int64_t n1) {
  with_decoder(*p.w, [&](auto* decode) {
    using Decode = std::remove_pointer_t<decltype(decode)>;
    p.w->zero_kind == Zero::None ? float_stream_code<Decode, false>(p, n0, n1) : float_stream_code<Decode, true>(p, n0, n1);
  });
}

}  // namespace avx512
}  // namespace qfunc
