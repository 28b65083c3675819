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

// ---- small floats -------------------------------------------------------------------------------------------------------------
// The nearest number of a format with the sign of y, saturating. Adding and subtracting a power of two that is large enough rounds
// half to even at the format's last bit.
inline float nearest(float y, int32_t mantissa, int32_t exponent, float largest) {
  float a = from_bits(to_bits(y) & 0x7fffffffu);
  a = a > largest ? largest : a;
  const int32_t least = 127 + exponent, field = static_cast<int32_t>(to_bits(a) >> 23);
  const float big = from_bits(static_cast<uint32_t>((field < least ? least : field) + 23 - mantissa) << 23);
  const float rounded = (a + big) - big;
  return from_bits(to_bits(rounded) | (to_bits(y) & 0x80000000u));
}

inline uint8_t code_of(float value, const FloatFormat& f) {
  const uint32_t bits = to_bits(value) & 0x7fffffffu;
  const int32_t normal = static_cast<int32_t>(bits >> (23 - f.mantissa)) - ((126 + f.exponent) << f.mantissa);
  const bool below = static_cast<int32_t>(bits >> 23) < 127 + f.exponent;
  const int32_t small = static_cast<int32_t>(from_bits(below ? bits : 0) * from_bits(static_cast<uint32_t>(127 + f.mantissa - f.exponent) << 23));
  const int32_t code = bits > 0x7f800000u ? (1 << f.sign) - 1 : below ? small : normal;
  return static_cast<uint8_t>(code | static_cast<int32_t>(to_bits(value) >> 31 << f.sign));
}

inline float cell_scale(float top, const FloatFormat& f, float outer) {
  switch (f.rule) {
    case Rule::Amax: return usable(top / f.largest);
    case Rule::Given: return outer;
    case Rule::Power: {
      if (to_bits(top) >= 0x7f800000u) return from_bits(0x7fc00000u);
      if (top == 0.0f) return 1.0f;
      const float v = f.divisor != 1.0f ? top / f.divisor : top;
      const int32_t e = static_cast<int32_t>((to_bits(v) + static_cast<uint32_t>(f.bump)) >> 23 & 255) - f.emax;
      return from_bits(static_cast<uint32_t>(e < 1 ? 1 : e > 254 ? 254 : e) << 23);
    }
    case Rule::TwoLevel: break;
  }
  float inner = top / f.largest / outer;
  inner = inner < 0.001953125f ? 0.001953125f : inner;
  return nearest(inner, 3, -6, 448.0f) * outer;
}

void quantize_floats(const float* x, int64_t k, int64_t group, const FloatFormat& format, float clip, const float* given, float* scale,
                     uint8_t* codes, float* values) {
  const FloatFormat f = format;
  float outer = given ? *given : 1.0f;
  if (f.rule == Rule::TwoLevel && !given) outer = usable(largest(x, k) * clip / (f.largest * 448.0f));
  for (int64_t start = 0, g = 0; start < k; start += group, ++g) {
    const int64_t count = k - start < group ? k - start : group;
    const float s = cell_scale(f.rule == Rule::Given ? 0.0f : largest(x + start, count) * clip, f, outer);
    if (scale) scale[g] = s;
    const float* from = x + start;
    if (codes)
      for (int64_t i = 0; i < count; ++i) codes[start + i] = code_of(nearest(from[i] / s, f.mantissa, f.exponent, f.largest), f);
    if (values)
      for (int64_t i = 0; i < count; ++i) values[start + i] = nearest(from[i] / s, f.mantissa, f.exponent, f.largest) * s;
  }
}

}  // namespace
}  // namespace qfunc
