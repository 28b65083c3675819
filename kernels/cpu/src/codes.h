// Codes of one block of 128 as bytes and as values: plain loops that compilers vectorise for any instruction set.
#pragma once
#include <algorithm>

#include "ggml.h"

namespace qfunc {
namespace {

// Planes of 4, 2 and 1 bits, widest first; the widest holds the low bits.
template <int Bits>
inline void unpack_block(const uint8_t* __restrict__ p, uint8_t* __restrict__ out) {
  int low = 0;
  for (int j = 0; j < 128; ++j) out[j] = 0;
  if (Bits & 4) {
    for (int j = 0; j < 64; ++j) out[j] = p[j] & 15;
    for (int j = 0; j < 64; ++j) out[64 + j] = p[j] >> 4;
    p += 64;
    low += 4;
  }
  if (Bits & 2) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 32; ++j) out[32 * i + j] |= static_cast<uint8_t>(((p[j] >> (2 * i)) & 3) << low);
    p += 32;
    low += 2;
  }
  if (Bits & 1) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 16; ++j) out[16 * i + j] |= static_cast<uint8_t>(((p[j] >> i) & 1) << low);
  }
}

// The bytes of block `b` of a row (zeros beyond K where codes are whole bytes).
inline void block_bytes(const Weight& w, const uint8_t* row, int64_t b, uint8_t* out) {
  switch (w.lowbits()) {
    case 2: unpack_block<2>(row + b * 32, out); break;
    case 3: unpack_block<3>(row + b * 48, out); break;
    case 4: unpack_block<4>(row + b * 64, out); break;
    case 5: unpack_block<5>(row + b * 80, out); break;
    case 6: unpack_block<6>(row + b * 96, out); break;
    case 7: unpack_block<7>(row + b * 112, out); break;
    default: {
      const int64_t left = w.k - b * kBlock;
      const size_t count = static_cast<size_t>(left < kBlock ? left : kBlock);
      std::memcpy(out, row + b * kBlock, count);
      std::memset(out + count, 0, kBlock - count);
    }
  }
}

// The 128 values of block `b`, before scales.
inline void block_values(const Weight& w, const uint8_t* row, int64_t b, float* __restrict__ out) {
  if (w.code == Code::Ggml) return ggml_block(w, row, b, out);
  alignas(64) uint8_t code[kBlock];
  block_bytes(w, row, b, code);
  switch (w.code) {
    case Code::Int8: for (int j = 0; j < kBlock; ++j) out[j] = static_cast<float>(static_cast<int8_t>(code[j])); break;
    case Code::UInt8: for (int j = 0; j < kBlock; ++j) out[j] = static_cast<float>(code[j]); break;
    case Code::Packed: for (int j = 0; j < kBlock; ++j) out[j] = static_cast<float>(static_cast<int32_t>(code[j]) - w.offset); break;
    case Code::Table4: for (int j = 0; j < kBlock; ++j) out[j] = w.table[code[j] & 15]; break;
    case Code::E2M3: case Code::E3M2:
      for (int j = 0; j < kBlock; ++j) out[j] = from_bits(to_bits(w.table[code[j] & 31]) | (static_cast<uint32_t>(code[j] & 32) << 26));
      break;
    case Code::E4M3: for (int j = 0; j < kBlock; ++j) out[j] = e4m3(code[j]); break;
    case Code::Ggml: break;
    case Code::E5M2: for (int j = 0; j < kBlock; ++j) out[j] = e5m2(code[j]); break;
  }
}

// Block b times its scales: out[j] = value * scale (+ shift); `shift` null where there are no zero points.
inline void scaled_block(const Weight& w, const uint8_t* row, int64_t b, const float* scale, const float* shift, float* out) {
  block_values(w, row, b, out);
  const int64_t k0 = b * kBlock, k1 = (w.k < k0 + kBlock ? w.k : k0 + kBlock);
  for (int64_t k = k0; k < k1;) {
    const int64_t s = k / w.group, end = (s + 1) * w.group < k1 ? (s + 1) * w.group : k1;
    const float factor = scale[s], add = shift ? shift[s] : 0.0f;
    float* o = out + (k - k0);
    if (shift)
      for (int64_t i = 0; i < end - k; ++i) o[i] = o[i] * factor + add;
    else
      for (int64_t i = 0; i < end - k; ++i) o[i] *= factor;
    k = end;
  }
  for (int64_t k = k1; k < k0 + kBlock; ++k) out[k - k0] = 0;
}

// One row as the reference dequantizes it: zero points are subtracted before the product, so that equal inputs give equal bits.
[[maybe_unused]] void dequantize_row(const Weight& w, int64_t n, float* out) {
  const uint8_t* row = w.codes + n * w.row_bytes;
  float* scale = thread_scratch<0>().get<float>(2 * w.segments);
  float* zero = scale + w.segments;
  row_scales(w, n, scale);
  if (w.zero_kind != Zero::None)
    convert_numbers(w.zero, w.zero_kind == Zero::Int ? Number::UInt8 : w.scale_type, scale_row(w, n) * w.segments, w.segments, zero);
  alignas(64) float block[kBlock];
  for (int64_t k = 0; k < w.k; ++k) {
    if (k % kBlock == 0) block_values(w, row, k / kBlock, block);
    const int64_t s = k / w.group;
    const float value = block[k % kBlock];
    out[k] = (w.zero_kind == Zero::Int ? value - zero[s] : value) * scale[s];
  }
  if (w.zero_kind == Zero::Float)
    for (int64_t s = 0; s < w.segments; ++s) add_apart(out + s * w.group, zero + s, 0, std::min(w.group, w.k - s * w.group));
}

}  // namespace
}  // namespace qfunc
