// What the numbers of a product are multiplied as.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "matmul.h"

namespace qfunc {
namespace {

// Float: as float32. Code: integer codes. Whole: small floats on both sides that are whole numbers of a unit, so that integers sum their
// products exactly. Half: small floats as bf16, which holds them exactly; their products are summed in float32.
enum class Operand { Float, Code, Whole, Half };

// The common refinement of the segments of both sides; all of K where neither is divided.
inline int64_t common_segment(const Weight& w, const Activation& a) {
  const int64_t weight = w.group < w.k ? w.group : 0, activation = a.group < w.k ? a.group : 0;
  const int64_t both = std::gcd(weight, activation);
  // Where nothing divides K, sums that int32 cannot hold are cut, on a border that the packed codes have too.
  return both ? both : std::min(w.k, a.limit / kBlock * kBlock);
}

// How many of the smallest steps of a format are 1, or 0 where its largest number has too many steps for a byte.
inline int32_t steps_of(const FloatFormat& f) {
  const float steps = std::ldexp(1.0f, f.mantissa - f.exponent);
  return f.largest * steps < kMiddle ? static_cast<int32_t>(steps) : 0;
}
inline int32_t steps_of(const Weight& w) {
  if (w.code == Code::Packed) return w.bits <= 6 ? 1 : 0;
  if (w.code != Code::Table4 && w.code != Code::E2M3 && w.code != Code::E3M2) return 0;
  const float* end = w.table + (w.code == Code::Table4 ? 16 : 32);
  for (int32_t steps = 1; steps <= 8; steps *= 2)
    if (std::all_of(w.table, end, [steps](float v) { return std::nearbyint(v * steps) == v * steps && std::fabs(v * steps) < kMiddle; })) return steps;
  return 0;
}

inline bool fits_bf16(const Weight& w) {
  if (w.code == Code::Int8 || w.code == Code::UInt8 || w.code == Code::Ggml) return false;
  if (w.code != Code::Table4) return true;
  return std::all_of(w.table, w.table + 16, [](float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return (bits & 0xffff) == 0;
  });
}

// Few rows are bound by reading w, which is decoded to floats anyway.
inline Operand operand_of(const Kernels& kernels, const Weight& w, const Activation& a, int64_t rows) {
  if (a.integer()) return Operand::Code;
  if (a.mode == Quantize::None || rows <= kernels.float_rows || w.zero_kind != Zero::None) return Operand::Float;
  if (w.k > kExactWholes || common_segment(w, a) % 4) return Operand::Float;
  // An integer has no NaN: the scale must carry it, which given ones do not.
  const bool carried = a.mode == Quantize::FloatCodes || a.format.rule != Rule::Given;
  if (kernels.wholes && carried && steps_of(w) && steps_of(a.format)) return Operand::Whole;
  return kernels.half_tile && fits_bf16(w) ? Operand::Half : Operand::Float;
}

// The number that each byte stands for; e4m3 has no infinities, the narrower formats have no NaN either.
inline float value_of(const FloatFormat& f, int c) {
  const int magnitude = c & ((1 << f.sign) - 1), field = magnitude >> f.mantissa, rest = magnitude & ((1 << f.mantissa) - 1);
  float value = std::ldexp(static_cast<float>(field ? (1 << f.mantissa) + rest : rest), f.exponent - f.mantissa + (field ? field - 1 : 0));
  if (f.sign == 7 && f.mantissa == 3 && magnitude == 0x7f) value = NAN;
  if (f.sign == 7 && f.mantissa == 2 && field == 31) value = rest ? NAN : INFINITY;
  return c >> f.sign & 1 ? -value : value;
}

// What each byte of FloatCodes is as each kind of operand.
struct Bytes {
  std::vector<float> floats;
  std::vector<int8_t> wholes;
  std::vector<uint16_t> halves;
  Bytes() = default;
  explicit Bytes(const FloatFormat& f) {
    const auto steps = static_cast<float>(steps_of(f));
    for (int c = 0; c < 256; ++c) {
      const float value = value_of(f, c);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      floats.push_back(value);
      wholes.push_back(steps > 0 ? static_cast<int8_t>(value * steps) : int8_t{0});
      halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
};

}  // namespace
}  // namespace qfunc
