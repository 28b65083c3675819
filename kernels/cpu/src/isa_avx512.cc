// AVX-512 with VNNI: the table, and what is common to both paths.
#include "activation.h"
#include "avx512.h"
#include "avx512_codes.h"
#include "avx512_transpose.h"
#include "kernels.h"
#include "survey.h"

namespace qfunc {
namespace {

const uint8_t* packed_order(const Weight& w) { return w.packed() ? lanes_order() : nullptr; }

constexpr int64_t kPairs = 8;

void panel_f32(const float* rows, int64_t count, int64_t kp, int64_t width, float* out) {
  if (width == kPairs) {
    for (int64_t m = 0; m < kPairs; ++m)
      for (int64_t k = 0; k < kp; k += 2) {
        if (m < count) std::memcpy(out + k * kPairs + 2 * m, rows + m * kp + k, 8);
        else std::memset(out + k * kPairs + 2 * m, 0, 8);
      }
    return;
  }
  for (int64_t m = 0; m < width; m += 16)
    for (int64_t k = 0; k < kp; k += 16) {
      __m512 v[16];
      for (int64_t j = 0; j < 16; ++j) v[j] = m + j < count ? _mm512_loadu_ps(rows + (m + j) * kp + k) : _mm512_setzero_ps();
      transpose16(v);
      for (int64_t j = 0; j < 16; ++j) _mm512_storeu_ps(out + (k + j) * width + m, v[j]);
    }
}

double peak(Peak kind, int64_t rounds) {
  if (kind == Peak::Half) return 0;
  const bool integer = kind == Peak::Integer;
  alignas(64) static const int32_t numbers[16] = {1, 2, 3};
  __m512i counts[12];
  __m512 sums[12];
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) counts[j] = _mm512_setzero_si512(), sums[j] = _mm512_setzero_ps();
  const __m512i v = _mm512_load_si512(numbers);
  const __m512 f = _mm512_castsi512_ps(v);
  for (int64_t i = 0; i < rounds; ++i) {
    // Every sum passes through an unknown operation: twelve equal ones would be computed once.
    if (integer) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) {
        counts[j] = _mm512_dpbusd_epi32(counts[j], v, v);
        asm volatile("" : "+v"(counts[j]));
      }
    } else {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) {
        sums[j] = _mm512_fmadd_ps(f, f, sums[j]);
        asm volatile("" : "+v"(sums[j]));
      }
    }
  }
  volatile float sink = 0;
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) sink = sink + _mm512_reduce_add_ps(sums[j]) + static_cast<float>(_mm512_reduce_add_epi32(counts[j]));
  return static_cast<double>(rounds) * 12 * 16 * (integer ? 4 : 1);
}

double peak_with_half(Peak kind, int64_t rounds) { return kind == Peak::Half ? avx512::half_peak(rounds) : peak(kind, rounds); }

}  // namespace

#define QFUNC_AVX512_KERNELS(variable, label, half, peak)                                                                       \
  extern const Kernels variable;                                                                                                \
  const Kernels variable = {label, kPairs, 16, 32, 4, 8, 16, 12, packed_order, avx512::int_stream_ok, avx512::float_stream,     \
                            avx512::float_tile, avx512::int_stream, avx512::int_tile, half, true, dequantize_row, quantize_row, \
                            quantize_floats, survey, add_columns, convert_numbers, panel_f32, peak};
QFUNC_AVX512_KERNELS(kernels_avx512, "avx512", nullptr, peak)
QFUNC_AVX512_KERNELS(kernels_avx512bf16, "avx512bf16", avx512::half_tile, peak_with_half)
}  // namespace qfunc
