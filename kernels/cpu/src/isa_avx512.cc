// AVX-512 with VNNI: the table, and what is common to both paths.
#include "activation.h"
#include "avx512.h"
#include "avx512_codes.h"
#include "avx512_transpose.h"
#include "kernels.h"

namespace qfunc {
namespace {

const uint8_t* packed_order(const Weight& w) { return w.packed() ? lanes_order() : nullptr; }

void panel_f32(const float* rows, int64_t count, int64_t kp, int64_t width, float* out) {
  for (int64_t m = 0; m < width; m += 16)
    for (int64_t k = 0; k < kp; k += 16) {
      __m512 v[16];
      for (int64_t j = 0; j < 16; ++j) v[j] = m + j < count ? _mm512_loadu_ps(rows + (m + j) * kp + k) : _mm512_setzero_ps();
      transpose16(v);
      for (int64_t j = 0; j < 16; ++j) _mm512_storeu_ps(out + (k + j) * width + m, v[j]);
    }
}
// Four codes are one element of the same transposition.
void panel_i8(const int8_t* rows, int64_t count, int64_t kp, int64_t width, int8_t* out) {
  panel_f32(reinterpret_cast<const float*>(rows), count, kp / 4, width, reinterpret_cast<float*>(out));
}

}  // namespace

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = {"avx512", 16, 32, 4, 8, 16, 48, packed_order, avx512::int_stream_ok, avx512::float_stream,
                                avx512::float_tile, avx512::int_stream, avx512::int_tile, dequantize_row, quantize_row, convert_numbers, panel_f32, panel_i8};
}  // namespace qfunc
