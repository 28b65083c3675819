// Decode path (few rows of x) in AVX-512: every packed weight is read once, decoded in registers and met by all rows of x.
#include "avx512.h"
#include "avx512_scales.h"

namespace qfunc {
namespace {

// Groups smaller than a block need a scale in every lane.
enum class Spread { Whole, Halves, Each };

constexpr int kMaxRows = 8;

// NR rows of w, M rows of x. Whole: one scale a block, applied to the sum; Halves: two vectors of scales; Each: weights are scaled
// (and shifted) one by one, which every combination can fall back on.
template <class Decode, int M, int NR, Spread Mode>
void float_rows(const Product& p, const Decode& prototype, const uint8_t* const* row, const float* const* scale, const float* const* shift,
                float (*out)[kMaxRows]) {
  const Weight& w = *p.w;
  const int64_t kp = p.x.kp, blocks = kp / kBlock;
  alignas(64) uint8_t tail[NR][kBlock];
  Decode decode[2] = {prototype, prototype};
  const Spreader<Decode::natural> spreader(w);
  __m512 total[NR][M];
  for (int r = 0; r < NR; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = p.x.f32 + b * kBlock;
    __m512 each[NR][8], add[NR][8];
    for (int r = 0; r < NR; ++r) {
      const uint8_t* from = block_at<Decode::bytes_per_block>(w, row[r], b, tail[r]);
      _mm_prefetch(reinterpret_cast<const char*>(from + 1024), _MM_HINT_T0);
      if constexpr (Decode::bytes_per_block > 64) _mm_prefetch(reinterpret_cast<const char*>(from + 1088), _MM_HINT_T0);
      decode[r].load(from);
      if constexpr (Mode == Spread::Halves) spreader.halves(scale[r], b, each[r][0], each[r][1]);
      if constexpr (Mode == Spread::Each) {
        spreader.all(scale[r], b, each[r]);
        if (shift) spreader.all(shift[r], b, add[r]);
        else for (int v = 0; v < 8; ++v) add[r][v] = _mm512_setzero_ps();
      }
    }
    __m512 part[NR][M];
#define QFUNC_STEP(V, FIRST)                                                        \
  for (int r = 0; r < NR; ++r) {                                                    \
    __m512 value = decode[r].template vec<V>();                                     \
    if constexpr (Mode == Spread::Each) value = _mm512_fmadd_ps(value, each[r][V], add[r][V]); \
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

template <class Decode, int M, Spread Mode>
void float_stream_rows(const Product& p, int64_t n0, int64_t n1) {
  constexpr int NR = M <= 4 ? 2 : 1;
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
      if (w.zero_kind != Zero::None) row_shifts(w, own, s, s + stride);
      end_scales(w, s + stride);
    }
    float_rows<Decode, M, NR, Mode>(p, prototype, row, scale, w.zero_kind == Zero::None ? nullptr : shift, out);
    for (int r = 0; r < NR && n + r < n1; ++r) {
      const float bias = bias_at(p.out, n + r);
      for (int64_t m = 0; m < p.x.rows; ++m) store_number(p.out.y, p.out.type, m * p.out.n + n + r, out[r][m] + bias);
    }
  }
}

template <class Decode, Spread Mode>
void float_stream_mode(const Product& p, int64_t n0, int64_t n1) {
  if (p.x.rows == 1) float_stream_rows<Decode, 1, Mode>(p, n0, n1);
  else if (p.x.rows == 2) float_stream_rows<Decode, 2, Mode>(p, n0, n1);
  else if (p.x.rows <= 4) float_stream_rows<Decode, 4, Mode>(p, n0, n1);
  else float_stream_rows<Decode, 8, Mode>(p, n0, n1);
}

template <class Decode>
void float_stream_code(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  if (w.zero_kind == Zero::None && (w.group >= w.k || w.group % kBlock == 0)) return float_stream_mode<Decode, Spread::Whole>(p, n0, n1);
  if constexpr (!Decode::natural && Decode::bytes_per_block <= 64)
    if (w.zero_kind == Zero::None && !Spreader<false>(w).any()) return float_stream_mode<Decode, Spread::Halves>(p, n0, n1);
  float_stream_mode<Decode, Spread::Each>(p, n0, n1);
}

// ---- integers ---------------------------------------------------------------------------------------------------------------
// acc starts at -z * sum(x), lane by lane: zero points and the offset of the code are subtracted exactly, and no lane holds a large
// number that only another one would cancel after the conversion to float.
template <int Bits, bool Flip, int M, int NR>
void int_stream_rows(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const int64_t kp = p.x.kp, blocks = kp / kBlock, segments = p.x.sum_segments;
  const int64_t per = segments == 1 ? blocks : p.segment / kBlock;
  const bool grouped_x = p.x.scale_step > 1;
  const int32_t offset = w.offset + (Flip ? 128 : 0);
  float* scales = thread_scratch<0>().get<float>(NR * w.segments);
  alignas(64) uint8_t tail[NR][kBlock];
  for (int64_t n = n0; n < n1; n += NR) {
    const uint8_t* row[NR];
    const uint8_t* zero[NR];
    for (int r = 0; r < NR; ++r) {
      const int64_t own = n + r < n1 ? n + r : n1 - 1;
      row[r] = w.codes + own * w.row_bytes;
      row_scales(w, own, scales + r * w.segments);
      zero[r] = w.zero_kind == Zero::Int ? static_cast<const uint8_t*>(w.zero) + scale_row(w, own) * w.segments : nullptr;
    }
    float result[NR][M] = {};
    __m512 total[NR][M];
    for (int r = 0; r < NR; ++r)
      for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t ws = w.segments == 1 ? 0 : s * p.segment / w.group;
      const int64_t end = (s + 1) * per < blocks ? (s + 1) * per : blocks;
      __m512i acc[NR][M];
      for (int r = 0; r < NR; ++r)
        for (int m = 0; m < M; ++m) {
          const int32_t z = offset + (zero[r] ? zero[r][ws] : 0);
          acc[r][m] = _mm512_mullo_epi32(_mm512_set1_epi32(-z), _mm512_loadu_si512(p.x.sums + (m * segments + s) * 16));
        }
      for (int64_t b = s * per; b < end; ++b) {
        __m512i lo[NR], hi[NR];
        for (int r = 0; r < NR; ++r) {
          const uint8_t* from = block_at<16 * Bits>(w, row[r], b, tail[r]);
          _mm_prefetch(reinterpret_cast<const char*>(from + 1024), _MM_HINT_T0);
          if constexpr (Bits > 4) _mm_prefetch(reinterpret_cast<const char*>(from + 1088), _MM_HINT_T0);
          bytes<Bits, Flip>(from, lo[r], hi[r]);
        }
        const int8_t* x = p.x.i8 + b * kBlock;
        for (int m = 0; m < M; ++m) {
          const __m512i xlo = _mm512_loadu_si512(x + m * kp), xhi = _mm512_loadu_si512(x + m * kp + 64);
          for (int r = 0; r < NR; ++r) {
            acc[r][m] = _mm512_dpbusd_epi32(acc[r][m], lo[r], xlo);
            acc[r][m] = _mm512_dpbusd_epi32(acc[r][m], hi[r], xhi);
          }
        }
      }
      for (int r = 0; r < NR; ++r)
        for (int m = 0; m < M; ++m) {
          const float sw = scales[r * w.segments + ws];
          if (segments == 1) {
            result[r][m] = static_cast<float>(_mm512_reduce_add_epi32(acc[r][m])) * p.x.scale[m] * sw;
          } else {
            const float sx = grouped_x ? p.x.scale[m * p.x.scale_step + s * p.segment / p.x.scale_group] : 1.0f;
            total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][m]), _mm512_set1_ps(sw * sx), total[r][m]);
          }
        }
    }
    for (int r = 0; r < NR && n + r < n1; ++r) {
      const float bias = bias_at(p.out, n + r);
      for (int m = 0; m < M && m < p.x.rows; ++m) {
        if (segments > 1) result[r][m] = _mm512_reduce_add_ps(total[r][m]) * (grouped_x ? 1.0f : p.x.scale[m]);
        store_number(p.out.y, p.out.type, m * p.out.n + n + r, result[r][m] + bias);
      }
    }
  }
}

template <int Bits, bool Flip = false>
void int_stream_bits(const Product& p, int64_t n0, int64_t n1) {
  if (p.x.rows == 1) int_stream_rows<Bits, Flip, 1, 2>(p, n0, n1);
  else if (p.x.rows == 2) int_stream_rows<Bits, Flip, 2, 2>(p, n0, n1);
  else if (p.x.rows <= 4) int_stream_rows<Bits, Flip, 4, 2>(p, n0, n1);
  else int_stream_rows<Bits, Flip, 8, 2>(p, n0, n1);
}

}  // namespace

namespace avx512 {

bool int_stream_ok(const Product& p) { return p.x.zero == nullptr && (p.x.sum_segments == 1 || p.segment % kBlock == 0); }

void int_stream(const Product& p, int64_t n0, int64_t n1) {
  switch (p.w->lowbits()) {
    case 2: return int_stream_bits<2>(p, n0, n1);
    case 3: return int_stream_bits<3>(p, n0, n1);
    case 4: return int_stream_bits<4>(p, n0, n1);
    case 5: return int_stream_bits<5>(p, n0, n1);
    case 6: return int_stream_bits<6>(p, n0, n1);
    case 7: return int_stream_bits<7>(p, n0, n1);
    default: return p.w->code == Code::Int8 ? int_stream_bits<8, true>(p, n0, n1) : int_stream_bits<8>(p, n0, n1);
  }
}

void float_stream(const Product& p, int64_t n0, int64_t n1) {
  with_decoder(*p.w, [&](auto* decode) { float_stream_code<std::remove_pointer_t<decltype(decode)>>(p, n0, n1); });
}

}  // namespace avx512
}  // namespace qfunc
