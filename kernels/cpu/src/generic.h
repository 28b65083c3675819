// The kernels for every other instruction set, on GCC's vector extension. The unit that includes this defines before:
//   kLanes           float lanes of a register
//   kMicro           rows of w in a register tile (kMicro x 2 accumulators)
//   kSignedWeights   whether the integer dot wants weights as int8 (else uint8)
//   kFastDots        whether it is so fast that small floats are better multiplied as whole numbers
//   Ints dot4(Ints acc, Bytes w, Bytes x)   acc + sums of four neighbouring byte products
#pragma once
#include "activation.h"
#include "codes.h"
#include "kernels.h"
#include "survey.h"

namespace qfunc {
namespace {

constexpr int64_t kTile = 8 * kMicro, kDeep = 256, kChunk = 256, kWidth = 2 * kLanes;

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline Ints loadi(const void* p) { Ints v; std::memcpy(&v, p, sizeof v); return v; }
inline Bytes loadb(const void* p) { Bytes v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline Floats spread(float f) { return Floats{} + f; }
inline Ints spread(int32_t i) { return Ints{} + i; }
inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
inline float total(Floats v) { float s = 0; for (int i = 0; i < kLanes; ++i) s += v[i]; return s; }
inline int32_t total(Ints v) { uint32_t s = 0; for (int i = 0; i < kLanes; ++i) s += static_cast<uint32_t>(v[i]); return static_cast<int32_t>(s); }

inline bool flipped(const Weight& w) { return w.code == (kSignedWeights ? Code::UInt8 : Code::Int8); }
inline int32_t code_offset(const Weight& w) {
  if (w.whole) return kSignedWeights ? 0 : kMiddle;
  return w.offset + (flipped(w) ? (kSignedWeights ? -128 : 128) : 0);
}
inline void int_block(const Weight& w, const uint8_t* row, int64_t b, uint8_t* out) {
  block_bytes(w, row, b, out);
  if (w.whole) {
    const float whole = static_cast<float>(w.whole);
    const bool table = w.code == Code::Table4;
    for (int j = 0; j < kBlock; ++j) {
      const int32_t magnitude = static_cast<int32_t>(w.table[out[j] & (table ? 15 : 31)] * whole);
      out[j] = static_cast<uint8_t>((!table && out[j] & 32 ? -magnitude : magnitude) + code_offset(w));
    }
  }
  if (flipped(w)) for (int j = 0; j < kBlock; ++j) out[j] ^= 0x80;
}

const uint8_t* natural_order(const Weight&) { return nullptr; }
bool stream_ok(const Product& p) { return p.x.zero == nullptr && (p.x.sum_segments == 1 || p.segment % kBlock == 0); }

void float_stream(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  float* scale = thread_scratch<0>().get<float>(2 * w.segments);
  alignas(64) float block[kBlock];
  for (int64_t n = n0; n < n1; ++n) {
    const uint8_t* row = w.codes + n * w.row_bytes;
    row_scales(w, n, scale);
    float* shift = w.zero_kind == Zero::None ? nullptr : scale + w.segments;
    if (shift) row_shifts(w, n, scale, shift);
    Floats sum[8] = {};
    for (int64_t b = 0; b < p.x.kp / kBlock; ++b) {
      scaled_block(w, row, b, scale, shift, block);
      for (int64_t m = 0; m < p.x.rows; ++m) {
        const float* x = p.x.f32 + m * p.x.kp + b * kBlock;
        Floats even{}, odd{};
        for (int j = 0; j < kBlock; j += 2 * kLanes) {
          even += load(block + j) * load(x + j);
          odd += load(block + j + kLanes) * load(x + j + kLanes);
        }
        sum[m] += even + odd;
      }
    }
    for (int64_t m = 0; m < p.x.rows; ++m) store_number(p.out.y, p.out.type, m * p.out.n + n, total(sum[m]) + bias_at(p.out, n));
  }
}

void int_stream(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const int64_t blocks = p.x.kp / kBlock, segments = p.x.sum_segments, per = segments == 1 ? blocks : p.segment / kBlock;
  const bool grouped_x = p.x.scale_step > 1;
  float* scale = thread_scratch<0>().get<float>(w.segments);
  alignas(64) uint8_t block[kBlock];
  for (int64_t n = n0; n < n1; ++n) {
    const uint8_t* row = w.codes + n * w.row_bytes;
    const auto* zero = static_cast<const uint8_t*>(w.zero) + (w.zero_kind == Zero::Int ? scale_row(w, n) * w.segments : 0);
    row_scales(w, n, scale);
    float result[8] = {};
    for (int64_t s = 0; s < segments; ++s) {
      Ints acc[8] = {};
      const int64_t ws = w.segments == 1 ? 0 : s * p.segment / w.group;
      for (int64_t b = s * per; b < (s + 1) * per && b < blocks; ++b) {
        int_block(w, row, b, block);
        for (int64_t m = 0; m < p.x.rows; ++m)
          for (int j = 0; j < kBlock; j += 4 * kLanes) acc[m] = dot4(acc[m], loadb(block + j), loadb(p.x.i8 + m * p.x.kp + b * kBlock + j));
      }
      const int32_t z = code_offset(w) + (w.zero_kind == Zero::Int ? zero[ws] : 0);
      for (int64_t m = 0; m < p.x.rows; ++m) {
        const uint32_t exact = static_cast<uint32_t>(total(acc[m])) - static_cast<uint32_t>(z) * static_cast<uint32_t>(p.x.sums[m * segments + s]);
        const float value = static_cast<float>(static_cast<int32_t>(exact));
        const float sx = p.x.scale[grouped_x ? m * p.x.scale_step + s * p.segment / p.x.scale_group : m];
        if (segments == 1) result[m] = value * sx * scale[ws];
        else result[m] += value * (scale[ws] * (grouped_x ? sx : 1.0f));
      }
    }
    for (int64_t m = 0; m < p.x.rows; ++m) {
      if (segments > 1 && !grouped_x) result[m] *= p.x.scale[m];
      store_number(p.out.y, p.out.type, m * p.out.n + n, result[m] + bias_at(p.out, n));
    }
  }
}

inline void store_columns(const Output& out, const float* sums, int64_t stride, int64_t count, int64_t n0, int64_t m0, int64_t rows, const float* scale) {
  for (int64_t i = 0; i < count; ++i) {
    const float bias = bias_at(out, n0 + i);
    for (int64_t m = 0; m < rows; ++m)
      store_number(out.y, out.type, (m0 + m) * out.n + n0 + i, sums[i * stride + m] * (scale ? scale[m] : 1.0f) + bias);
  }
}

inline void float_micro(const float* tile, const float* x, int64_t steps, float* sums, int64_t stride, bool first) {
  Floats acc[kMicro][2];
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[r][v] = first ? Floats{} : load(sums + r * stride + kLanes * v);
  for (int64_t k = 0; k < steps; ++k) {
    const Floats x0 = load(x + k * kWidth), x1 = load(x + k * kWidth + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      const Floats weight = spread(tile[r * kDeep + k]);
      acc[r][0] += weight * x0;
      acc[r][1] += weight * x1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(sums + r * stride + kLanes * v, acc[r][v]);
}

void float_tile(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  float* tile = thread_scratch<1>().get<float>(kTile * kDeep);
  float* sums = thread_scratch<2>().get<float>(kTile * kChunk);
  float* scales = thread_scratch<0>().get<float>(kTile * 2 * w.segments);
  for (int64_t n = n0; n < n1; n += kTile) {
    const int64_t count = n1 - n < kTile ? n1 - n : kTile;
    std::memset(tile, 0, static_cast<size_t>(kTile * kDeep) * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      float* s = scales + 2 * r * w.segments;
      row_scales(w, n + r, s);
      if (w.zero_kind != Zero::None) row_shifts(w, n + r, s, s + w.segments);
    }
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      for (int64_t k = 0; k < p.x.kp; k += kDeep) {
        const int64_t deep = p.x.kp - k < kDeep ? p.x.kp - k : kDeep;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t b = 0; b < deep / kBlock; ++b) {
            const float* s = scales + 2 * r * w.segments;
            scaled_block(w, w.codes + (n + r) * w.row_bytes, k / kBlock + b, s, w.zero_kind == Zero::None ? nullptr : s + w.segments,
                         tile + r * kDeep + b * kBlock);
          }
        for (int64_t m = 0; m < rows; m += kWidth)
          for (int64_t r = 0; r < count; r += kMicro)
            float_micro(tile + r * kDeep, p.x.f32 + (m0 + m) * p.x.kp + k * kWidth, deep, sums + r * kChunk + m, kChunk, k == 0);
      }
      store_columns(p.out, sums, kChunk, count, n, m0, rows, nullptr);
    }
  }
}

inline void int_dots(const uint8_t* tile, const int8_t* x, int64_t steps, Ints (*acc)[2]) {
  for (int64_t k = 0; k < steps; ++k) {
    const Bytes x0 = loadb(x + k * 4 * kWidth), x1 = loadb(x + k * 4 * kWidth + 4 * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kMicro; ++r) {
      int32_t four;
      std::memcpy(&four, tile + r * kDeep + 4 * k, 4);
      const Bytes weight = (Bytes)spread(four);
      acc[r][0] = dot4(acc[r][0], weight, x0);
      acc[r][1] = dot4(acc[r][1], weight, x1);
    }
  }
}

void int_tile(const Product& p, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  const int64_t segments = p.x.sum_segments;
  const bool grouped_x = p.x.scale_step > 1;
  uint8_t* tile = thread_scratch<1>().get<uint8_t>(kTile * kDeep);
  float* sums = thread_scratch<2>().get<float>(2 * kTile * kChunk);
  int32_t* partial = reinterpret_cast<int32_t*>(sums + kTile * kChunk);
  float* scales = thread_scratch<0>().get<float>(kTile * (2 * w.segments + segments));
  int32_t* zeros = reinterpret_cast<int32_t*>(scales + kTile * w.segments);
  int32_t* codesums = zeros + kTile * w.segments;
  for (int64_t n = n0; n < n1; n += kTile) {
    const int64_t count = n1 - n < kTile ? n1 - n : kTile;
    std::memset(tile, 0, static_cast<size_t>(kTile * kDeep));
    for (int64_t r = 0; r < count; ++r) {
      row_scales(w, n + r, scales + r * w.segments);
      for (int64_t s = 0; s < w.segments; ++s) scales[r * w.segments + s] *= p.unit;
      const auto* z = static_cast<const uint8_t*>(w.zero) + (w.zero_kind == Zero::Int ? scale_row(w, n + r) * w.segments : 0);
      for (int64_t s = 0; s < w.segments; ++s) zeros[r * w.segments + s] = code_offset(w) + (w.zero_kind == Zero::Int ? z[s] : 0);
    }
    for (int64_t m0 = 0; m0 < p.x.rows; m0 += kChunk) {
      const int64_t rows = p.x.rows - m0 < kChunk ? p.x.rows - m0 : kChunk;
      if (p.x.zero) std::memset(codesums, 0, static_cast<size_t>(kTile * segments) * sizeof(int32_t));
      for (int64_t k = 0; k < p.x.kp; k += kDeep) {
        const int64_t deep = p.x.kp - k < kDeep ? p.x.kp - k : kDeep;
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t b = 0; b < deep / kBlock; ++b) int_block(w, w.codes + (n + r) * w.row_bytes, k / kBlock + b, tile + r * kDeep + b * kBlock);
          if (p.x.zero)
            for (int64_t i = 0; i < deep && k + i < w.k;) {
              const int64_t s = segments == 1 ? 0 : (k + i) / p.segment, ends = s + 1 == segments ? w.k : (s + 1) * p.segment;
              const int64_t stop = (ends < k + deep ? ends : k + deep) - k, z = zeros[r * w.segments + (w.segments == 1 ? 0 : (k + i) / w.group)];
              int32_t sum = 0;
              for (int64_t j = i; j < stop; ++j) sum += kSignedWeights ? static_cast<int32_t>(static_cast<int8_t>(tile[r * kDeep + j])) : tile[r * kDeep + j];
              codesums[r * segments + s] += sum - static_cast<int32_t>((stop - i) * z);
              i = stop;
            }
        }
        for (int64_t m = 0; m < rows; m += kWidth) {
          const int64_t at = (m0 + m) / kWidth;
          for (int64_t r0 = 0; r0 < count; r0 += kMicro)
            for (int64_t from = k; from < k + deep;) {
              const int64_t s = segments == 1 ? 0 : from / p.segment, start = s * p.segment, stop = s + 1 == segments ? p.x.kp : start + p.segment;
              const int64_t end = stop < k + deep ? stop : k + deep;
              int32_t* part = partial + r0 * kChunk + m;
              Ints acc[kMicro][2];
#pragma GCC unroll 12
              for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) acc[r][v] = from == start ? Ints{} : loadi(part + r * kChunk + kLanes * v);
              int_dots(tile + r0 * kDeep + (from - k), p.x.i8 + (m0 + m) * p.x.kp + from * kWidth, (end - from) / 4, acc);
              if (end < stop) {
#pragma GCC unroll 12
                for (int r = 0; r < kMicro; ++r)
#pragma GCC unroll 2
                  for (int v = 0; v < 2; ++v) store(part + r * kChunk + kLanes * v, acc[r][v]);
              } else {
                const int64_t ws = w.segments == 1 ? 0 : start / w.group, xs = grouped_x ? start / p.x.scale_group : 0;
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                  const Ints xsum = loadi(p.x.sums + (at * segments + s) * kWidth + kLanes * v);
                  const Floats sx = load(p.x.scale + (at * p.x.scale_step + xs) * kWidth + kLanes * v);
#pragma GCC unroll 12
                  for (int r = 0; r < kMicro; ++r) {
                    const int64_t own = r0 + r < count ? r0 + r : count - 1;
                    Ints exact = acc[r][v] - spread(zeros[own * w.segments + ws]) * xsum;
                    if (p.x.zero) exact -= spread(codesums[own * segments + s]) * loadi(p.x.zero + at * kWidth + kLanes * v);
                    const Floats value = to_float(exact), sw = spread(scales[own * w.segments + ws]);
                    float* to = sums + (r0 + r) * kChunk + m + kLanes * v;
                    if (segments == 1) store(to, value * sx * sw);
                    else store(to, (s == 0 ? Floats{} : load(to)) + value * (grouped_x ? sw * sx : sw));
                  }
                }
              }
              from = end;
            }
        }
      }
      store_columns(p.out, sums, kChunk, count, n, m0, rows, segments > 1 && !grouped_x ? p.x.scale + m0 : nullptr);
    }
  }
}

void panel_f32(const float* rows, int64_t count, int64_t kp, int64_t width, float* out) {
  // Codes come as floats, too: they are moved as integers, which no processor changes.
  for (int64_t m = 0; m < width; ++m)
    for (int64_t k = 0; k < kp; ++k) {
      if (m < count) std::memcpy(out + k * width + m, rows + m * kp + k, 4);
      else out[k * width + m] = 0.0f;
    }
}

double peak(Peak kind, int64_t rounds) {
  if (kind == Peak::Half) return 0;
  const bool integer = kind == Peak::Integer;
  alignas(64) static const uint8_t bytes[64] = {1, 2, 3};
  alignas(64) static const float floats[16] = {1.0f, 0.5f};
  Floats sums[12] = {};
  Ints counts[12] = {};
  const Bytes w = loadb(bytes);
  const Floats a = load(floats);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      asm volatile("" ::: "memory");  // nothing is known to stay the same: twelve equal sums would be computed once
      if (integer) counts[j] = dot4(counts[j], loadb(bytes), w);
      else sums[j] += load(floats) * a;
    }
  }
  volatile float sink = 0;
  for (int j = 0; j < 12; ++j) sink = sink + total(sums[j]) + static_cast<float>(total(counts[j]));
  return static_cast<double>(rounds) * 12 * kLanes * (integer ? 4 : 1);
}

}  // namespace

#define QFUNC_GENERIC_KERNELS(variable, label)                                                                                     \
  extern const Kernels variable;                                                                                                   \
  const Kernels variable = {label, 0, kWidth, kWidth, 4, 4, 1, kTile, natural_order, stream_ok, float_stream, float_tile, int_stream,      \
                            int_tile, nullptr, kFastDots, dequantize_row, quantize_row, quantize_floats, survey, add_columns, convert_numbers, panel_f32, peak};
}  // namespace qfunc
