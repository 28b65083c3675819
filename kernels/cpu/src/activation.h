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
  // e5m2 has infinities and, after them, several codes of NaN, of which casts give the middle one.
  const int32_t nan = f.sign == 7 && f.mantissa == 2 ? 0x7e : (1 << f.sign) - 1;
  const int32_t code = bits > 0x7f800000u ? nan : below ? small : normal;
  return static_cast<uint8_t>(code | static_cast<int32_t>(to_bits(value) >> 31 << f.sign));
}

inline float two_level(float top, const FloatFormat& f, float outer) {
  float inner = top / f.largest / outer;
  inner = inner < 0.001953125f ? 0.001953125f : inner;
  return nearest(inner, 3, -6, 448.0f) * outer;
}

inline float power(float top, const FloatFormat& f) {
  const float v = f.divisor != 1.0f ? top / f.divisor : top;
  const int32_t e = static_cast<int32_t>((to_bits(v) + static_cast<uint32_t>(f.bump)) >> 23 & 255) - f.emax;
  const float found = from_bits(static_cast<uint32_t>(e < 1 ? 1 : e > 254 ? 254 : e) << 23), finite = top == 0.0f ? 1.0f : found;
  return from_bits(to_bits(top) >= 0x7f800000u ? 0x7fc00000u : to_bits(finite));
}

inline float cell_scale(float top, const FloatFormat& f, float outer) {
  switch (f.rule) {
    case Rule::Amax: return usable(top / f.largest);
    case Rule::Given: return outer;
    case Rule::Power: return power(top, f);
    case Rule::TwoLevel: case Rule::Dual: break;
  }
  return two_level(top, f, outer);
}

// Scales of `count` cells of `size` from their largest elements, the first of them at the beginning of a span; every rule is a loop of its
// own, which compilers vectorise.
inline void cell_scales(const float* top, int64_t count, int64_t size, const FloatFormat& f, float outer, float* s) {
  if (f.rule == Rule::Dual) {
    const int64_t cells = kDualSpan / size;
    for (int64_t first = 0; first < count; first += cells) {
      const int64_t last = first + cells < count ? first + cells : count;
      const float wide = usable(largest(top + first, last - first) / f.largest);
      for (int64_t i = first; i < last; ++i) s[i] = power(top[i] / wide, f) * wide;
    }
    return;
  }
  if (f.rule == Rule::TwoLevel)
    for (int64_t i = 0; i < count; ++i) s[i] = two_level(top[i], f, outer);
  else if (f.rule == Rule::Power)
    for (int64_t i = 0; i < count; ++i) s[i] = power(top[i], f);
  else
    for (int64_t i = 0; i < count; ++i) s[i] = cell_scale(top[i], f, outer);
}

// `Size` elements of a cell where that is known to the compiler, else 0.
template <int64_t Size>
inline void quantize_cells(const float* x, int64_t k, int64_t group, const FloatFormat& f, float clip, float outer, const SmallRow& out) {
  constexpr int64_t kCells = 64;
  float top[kCells], s[kCells];
  const int64_t size = Size ? Size : group, cells = (k + size - 1) / size;
  for (int64_t first = 0; first < cells; first += kCells) {
    const int64_t here = cells - first < kCells ? cells - first : kCells;
    for (int64_t g = 0; g < here; ++g) {
      const int64_t start = (first + g) * size, left = k - start;
      top[g] = (f.rule == Rule::Given ? 0.0f : left >= size ? largest(x + start, size) : largest(x + start, left)) * clip;
    }
    cell_scales(top, here, size, f, outer, s);
    for (int64_t g = 0; out.scale && g < here; ++g) out.scale[first + g] = s[g];
    for (int64_t g = 0; g < here; ++g) {
      const int64_t start = (first + g) * size, left = k - start;
      const auto cell = [&](int64_t count) {
        const float step = s[g], unit = out.unit;
        const auto found = [&](int64_t i) { return nearest(x[i] / step, f.mantissa, f.exponent, f.largest); };
        if (uint8_t* codes = out.codes)
          for (int64_t i = start; i < start + count; ++i) codes[i] = code_of(found(i), f);
        if (int8_t* wholes = out.wholes)
#pragma GCC ivdep
          for (int64_t i = start; i < start + count; ++i) {
            const float steps = found(i) * unit;
            wholes[i] = static_cast<int8_t>(static_cast<int32_t>(steps == steps ? steps : 0.0f));  // the scale carries NaN
          }
        if (uint16_t* halves = out.halves)
#pragma GCC ivdep
          for (int64_t i = start; i < start + count; ++i) halves[i] = static_cast<uint16_t>(to_bits(found(i)) >> 16);
        if (float* values = out.values)
#pragma GCC ivdep  // values may be x: each is read before it is written, and a test of overlap would choose the slow loop
          for (int64_t i = start; i < start + count; ++i) values[i] = found(i) * step;
      };
      left >= size ? cell(size) : cell(left);
    }
  }
}

void quantize_floats(const float* x, int64_t k, int64_t group, const FloatFormat& format, float clip, const float* given, const SmallRow& out) {
  const FloatFormat f = format;
  float outer = given ? *given : 1.0f;
  if (f.rule == Rule::TwoLevel && !given) outer = usable(largest(x, k) * clip / (f.largest * 448.0f));
  if (group == 16) quantize_cells<16>(x, k, group, f, clip, outer, out);
  else if (group == 32) quantize_cells<32>(x, k, group, f, clip, outer, out);
  else quantize_cells<0>(x, k, group, f, clip, outer, out);
}

}  // namespace
}  // namespace qfunc
