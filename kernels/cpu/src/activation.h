// Quantization of activation rows, and their panels. Plain loops: every unit compiles them for its own instruction set.
#pragma once
#include "scales.h"

namespace qfunc {
namespace {

// The largest |x| as a bit pattern, so that NaN wins over everything.
inline float largest(const float* x, int64_t count) {
  int32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffffu);
    top = bits > top ? bits : top;
  }
  return from_bits(static_cast<uint32_t>(top));
}

// The reference's `usable`: 1 where the scale is zero or subnormal, NaN where it is not finite.
inline float usable(float s) {
  const uint32_t magnitude = to_bits(s) & 0x7fffffffu;
  if (magnitude < 0x00800000u) return 1.0f;
  return magnitude >= 0x7f800000u ? from_bits(0x7fc00000u) : s;
}

// codes = clip(rint(x / s) + zero, lowest, highest). Clipping first changes nothing, since the bounds are integers, and makes the
// addition of 1.5 * 2^23 round to the nearest even integer.
inline void encode(const float* __restrict__ x, int64_t count, float s, float lowest, float highest, float zero, int8_t* __restrict__ codes) {
  const float lo = lowest - zero, hi = highest - zero, magic = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] / s;
    const bool number = v == v;
    v = v < lo ? lo : v;
    v = v > hi ? hi : v;
    v = (v + magic) - magic;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(number ? v + zero : 0.0f));
  }
}

void quantize_row(const float* x, int64_t k, int64_t group, bool dynamic, float clip, float lowest, float highest, const int32_t* zero,
                  float* scale, int8_t* codes) {
  for (int64_t start = 0, g = 0; start < k; start += group, ++g) {
    const int64_t count = k - start < group ? k - start : group;
    if (dynamic) {
      float top = largest(x + start, count);
      if (clip != 1.0f) top *= clip;
      scale[g] = usable(top / highest);
    }
    encode(x + start, count, scale[g], lowest, highest, zero ? static_cast<float>(zero[g]) : 0.0f, codes + start);
  }
}

}  // namespace
}  // namespace qfunc
