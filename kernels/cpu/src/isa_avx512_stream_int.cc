// Decode path (few rows of x) of integer products in AVX-512 VNNI.
#include "avx512.h"
#include "avx512_scales.h"

namespace qfunc {
namespace {

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
    NextRows next(w, row[0], NR, blocks);
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
        next.ask<NR * 16 * Bits>();
        for (int r = 0; r < NR; ++r) {
          bytes<Bits, Flip>(block_at<16 * Bits>(w, row[r], b, tail[r]), lo[r], hi[r]);
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

// Whole bytes take so little work that two rows of w were computed faster than their prefetches were accepted.
template <int Bits, bool Flip = false>
void int_stream_bits(const Product& p, int64_t n0, int64_t n1) {
  constexpr int NR = Bits == 8 ? 4 : 2;
  if (p.x.rows == 1) return int_stream_rows<Bits, Flip, 1, NR>(p, n0, n1);
  if (p.x.rows == 2) return int_stream_rows<Bits, Flip, 2, NR>(p, n0, n1);
  if (p.x.rows <= 4) return int_stream_rows<Bits, Flip, 4, NR>(p, n0, n1);
  if constexpr (Bits < 8) int_stream_rows<Bits, Flip, 8, NR>(p, n0, n1);
}

}  // namespace

namespace avx512 {

// More than four rows leave no registers for the sums of several segments, or of four rows of w; panels are faster then.
bool int_stream_ok(const Product& p) {
  if (p.x.zero != nullptr) return false;
  return p.x.rows <= 4 ? p.x.sum_segments == 1 || p.segment % kBlock == 0 : p.x.sum_segments == 1 && p.w->lowbits() < 8;
}

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

}  // namespace avx512
}  // namespace qfunc
