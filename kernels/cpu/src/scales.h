// Scales and zero points of one row of w as float32, whatever their stored type. Included by every instruction set's unit.
#pragma once
#include <cmath>
#include <cstring>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "problem.h"
#include "scratch.h"

namespace qfunc {
namespace {

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float e8m0(uint8_t e) {
  const uint32_t shifted = static_cast<uint32_t>(e) << 23;
  return from_bits(e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : shifted);
}
// Integer arithmetic only: threads of XLA flush subnormal floats to zero.
inline float e4m3(uint8_t c) {
  const uint32_t magnitude = c & 0x7f;
  const float normal = from_bits((magnitude << 20) + (120u << 23));
  const float small = static_cast<float>(static_cast<int>(magnitude & 7)) * 0.001953125f;
  const float value = magnitude >= 8 ? normal : small;
  const uint32_t bits = magnitude == 0x7f ? 0x7fc00000u : to_bits(value);
  return from_bits(bits | (static_cast<uint32_t>(c & 0x80) << 24));
}
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fff, exponent = magnitude >> 10;
  const float normal = from_bits((magnitude << 13) + (112u << 23));
  const float small = static_cast<float>(static_cast<int>(magnitude & 0x3ff)) * 5.9604644775390625e-8f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t bits = exponent == 31 ? special : to_bits(exponent == 0 ? small : normal);
  return from_bits(bits | (static_cast<uint32_t>(h & 0x8000) << 16));
}
inline float bf16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
inline float e5m2(uint8_t c) { return half_to_float(static_cast<uint16_t>(c << 8)); }
inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = to_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t float_to_half(float f) {
  const uint32_t bits = to_bits(f), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal half: the addition of 2^-1 rounds at its last bit
    const float shifted = from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

#if defined(__AVX512BW__)
// Scales of nvfp4 are as many as a sixteenth of the weights, too many for the loop above.
inline void convert_e4m3(const uint8_t* from, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m128i v = _mm_maskz_loadu_epi8(mask, from + i);
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(v), 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(v, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
    half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f)));
  }
}
#else
inline void convert_e4m3(const uint8_t* from, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = e4m3(from[i]);
}
#endif

inline void convert_numbers(const void* from, Number type, int64_t start, int64_t count, float* out) {
  const auto* b8 = static_cast<const uint8_t*>(from) + start;
  const auto* b16 = static_cast<const uint16_t*>(from) + start;
  const auto* b32 = static_cast<const float*>(from) + start;
  switch (type) {
    case Number::F32: std::memcpy(out, b32, count * sizeof(float)); break;
    case Number::F16: for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(b16[i]); break;
    case Number::BF16: for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(b16[i]); break;
    case Number::E4M3: convert_e4m3(b8, count, out); break;
    case Number::E8M0: for (int64_t i = 0; i < count; ++i) out[i] = e8m0(b8[i]); break;
    case Number::UInt8: for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(b8[i]); break;
    case Number::Nested: case Number::None: break;
  }
}

// out[i] += add[i * step], in a function of its own: inlined, the compiler would contract it with the product before it, and the
// reference rounds twice.
[[gnu::noinline]] inline void add_apart(float* out, const float* add, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += add[i * step];
}

// The reference's `usable`: 1 where the scale is zero or subnormal, NaN where it is not finite.
inline float usable(float s) {
  const uint32_t magnitude = to_bits(s) & 0x7fffffffu;
  if (magnitude < 0x00800000u) return 1.0f;
  return magnitude >= 0x7f800000u ? from_bits(0x7fc00000u) : s;
}

inline int64_t scale_row(const Weight& w, int64_t n) { return w.share == 0 ? 0 : n / w.share; }

// out [segments]: every level multiplied together. Type None leaves the scale at 1 (integer accumulators as they are).
inline void row_scales(const Weight& w, int64_t n, float* out) {
  const int64_t row = scale_row(w, n), start = row * w.segments;
  if (w.scale_type == Number::Nested) {
    const auto* index = static_cast<const uint8_t*>(w.scale) + start;
    for (int64_t i = 0; i < w.segments; ++i) out[i] = w.nested_map[index[i]] * w.outer[(start + i) >> 8];
    add_apart(out, &w.nested_mean, 0, w.segments);
    return;
  }
  convert_numbers(w.scale, w.scale_type, start, w.segments, out);
  if (w.outer) {
    const float* outer = w.outer + w.outer_step * row;
    if (w.outer_span)
      for (int64_t i = 0; i < w.segments; ++i) out[i] *= outer[i / w.outer_span];
    else
      for (int64_t i = 0; i < w.segments; ++i) out[i] *= outer[0];
  }
}

// shift [segments] such that a weight is code * scale + shift; the codes' own offset is not in it.
inline void row_shifts(const Weight& w, int64_t n, const float* scale, float* shift) {
  const int64_t start = scale_row(w, n) * w.segments;
  if (w.zero_kind == Zero::Float) {
    convert_numbers(w.zero, w.scale_type, start, w.segments, shift);
    return;
  }
  const auto* zero = static_cast<const uint8_t*>(w.zero) + start;
  for (int64_t i = 0; i < w.segments; ++i) shift[i] = -static_cast<float>(zero[i]) * scale[i];
}

inline float load_number(const void* from, Number type, int64_t index) {
  float out = 0;
  convert_numbers(from, type, index, 1, &out);
  return out;
}

inline void store_number(void* to, Number type, int64_t index, float value) {
  switch (type) {
    case Number::F32: static_cast<float*>(to)[index] = value; break;
    case Number::BF16: static_cast<uint16_t*>(to)[index] = float_to_bf16(value); break;
    case Number::F16: static_cast<uint16_t*>(to)[index] = float_to_half(value); break;
    default: break;
  }
}

inline float bias_at(const Output& out, int64_t n) { return out.bias ? load_number(out.bias, out.bias_type, n) : 0.0f; }

template <int Slot>
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace
}  // namespace qfunc
