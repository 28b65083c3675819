// Blocks of ggml as they lie in a GGUF file: 128 values of a row at a time. Sizes and bit positions are those of ggml's `ggml-quants.c`.
#pragma once
#include "scales.h"

namespace qfunc {
namespace {

// Numbers of the types in tensor headers.
enum Ggml : int32_t { kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14 };

inline float half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}

// 32 codes of the types with one scale (and one minimum) for 32 elements: value = d q + m.
inline void ggml_plain(int32_t type, const uint8_t* p, float* __restrict__ out) {
  const float d = half_at(p);
  if (type == kQ8_0) {
    for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(p[2 + j]));
    return;
  }
  const bool shifted = type == kQ4_1 || type == kQ5_1, fifth = type == kQ5_0 || type == kQ5_1;
  const int32_t offset = type == kQ4_0 ? 8 : type == kQ5_0 ? 16 : 0;
  const float m = shifted ? half_at(p + 2) : 0.0f;
  p += shifted ? 4 : 2;
  uint32_t high = 0;
  if (fifth) {
    std::memcpy(&high, p, 4);
    p += 4;
  }
  for (int j = 0; j < 16; ++j) {
    const int32_t a = (p[j] & 15) | static_cast<int32_t>((high >> j & 1) << 4), b = (p[j] >> 4) | static_cast<int32_t>((high >> (j + 16) & 1) << 4);
    out[j] = d * static_cast<float>(a - offset) + m;
    out[j + 16] = d * static_cast<float>(b - offset) + m;
  }
}

// Half of a block of 256 with eight 6-bit scales and minima for 32 elements each.
inline void ggml_k45(int32_t type, const uint8_t* p, int half, float* __restrict__ out) {
  const float d = half_at(p), least = half_at(p + 2);
  const uint8_t* s = p + 4;
  const uint8_t* high = p + 16;
  const uint8_t* low = p + (type == kQ5_K ? 48 : 16) + 64 * half;
  for (int i = 0; i < 4; ++i) {
    const int j = 4 * half + i;
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4, min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    const float factor = d * static_cast<float>(scale), shift = least * static_cast<float>(min);
    const uint8_t* q = low + 32 * (i / 2);
    for (int l = 0; l < 32; ++l) {
      int32_t code = i % 2 ? q[l] >> 4 : q[l] & 15;
      if (type == kQ5_K) code |= (high[l] >> j & 1) << 4;
      out[32 * i + l] = factor * static_cast<float>(code) - shift;
    }
  }
}

// Half of a block of 256 of 6 bits with sixteen 8-bit scales.
inline void ggml_k6(const uint8_t* p, int half, float* __restrict__ out) {
  const float d = half_at(p + 208);
  const uint8_t *low = p + 64 * half, *high = p + 128 + 32 * half;
  const auto* scale = reinterpret_cast<const int8_t*>(p + 192 + 8 * half);
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < 32; ++l) {
      const int32_t nibble = i < 2 ? low[32 * (i % 2) + l] & 15 : low[32 * (i % 2) + l] >> 4;
      const int32_t code = (nibble | (high[l] >> (2 * i) & 3) << 4) - 32;
      out[32 * i + l] = d * static_cast<float>(scale[2 * i + l / 16]) * static_cast<float>(code);
    }
}

inline int64_t ggml_block_size(int32_t type) {
  switch (type) {
    case kQ4_0: return 18;
    case kQ4_1: return 20;
    case kQ5_0: return 22;
    case kQ5_1: return 24;
    case kQ8_0: return 34;
    case kQ4_K: return 144;
    case kQ5_K: return 176;
    case kQ6_K: return 210;
    default: return 0;
  }
}

// Bytes of a row of k elements, or 0 where the type or k is impossible.
inline int64_t ggml_row_bytes(int32_t type, int64_t k) {
  const int64_t elements = type >= kQ4_K ? 256 : 32;
  return k % elements ? 0 : k / elements * ggml_block_size(type);
}

// Block b of a row; zeros beyond K.
inline void ggml_block(const Weight& w, const uint8_t* row, int64_t b, float* out) {
  const int64_t size = ggml_block_size(w.bits);
  if (w.bits >= kQ4_K) {
    const uint8_t* p = row + b / 2 * size;
    if (w.bits == kQ6_K) return ggml_k6(p, static_cast<int>(b % 2), out);
    return ggml_k45(w.bits, p, static_cast<int>(b % 2), out);
  }
  for (int64_t i = 0; i < 4; ++i) {
    if (b * kBlock + 32 * i < w.k) ggml_plain(w.bits, row + (4 * b + i) * size, out + 32 * i);
    else std::memset(out + 32 * i, 0, 32 * sizeof(float));
  }
}

}  // namespace
}  // namespace qfunc
