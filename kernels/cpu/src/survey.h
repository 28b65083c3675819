// What has to be known of many rows of x before one of them is quantized, and the columns that LLM.int8 multiplies in floating point.
// Plain loops: every unit compiles them for its own instruction set.
#pragma once
#include "activation.h"
#include "codes.h"

namespace qfunc {
namespace {

// The largest |x|; marks[k] becomes 1 where |x[k]| reaches the threshold, which NaN does not.
float survey(const float* x, int64_t k, float threshold, uint8_t* marks) {
  if (marks)
    for (int64_t i = 0; i < k; ++i) marks[i] |= from_bits(to_bits(x[i]) & 0x7fffffffu) >= threshold;
  return largest(x, k);
}

constexpr int64_t kOuts = 16;

// y[m, n] += sum over j of x[m, j] w[n, columns[j]] for n in [n0, n1): x [rows, count] are the columns (in rising order) of the
// activation that the integer product has left out. y is float32.
void add_columns(const Product& p, const int32_t* columns, int64_t count, const float* x, int64_t n0, int64_t n1) {
  const Weight& w = *p.w;
  float* values = thread_scratch<1>().get<float>(static_cast<size_t>(count * kOuts));
  float* scale = thread_scratch<0>().get<float>(static_cast<size_t>(2 * w.segments));
  float* shift = w.zero_kind == Zero::None ? nullptr : scale + w.segments;
  const bool bytes = !shift && (w.code == Code::Int8 || w.code == Code::UInt8);
  alignas(64) float block[kBlock];
  for (int64_t n = n0; n < n1; n += kOuts) {
    const int64_t live = n1 - n < kOuts ? n1 - n : kOuts;
    for (int64_t i = 0; i < live; ++i) {
      const uint8_t* row = w.codes + (n + i) * w.row_bytes;
      row_scales(w, n + i, scale);
      if (shift) row_shifts(w, n + i, scale, shift);
      int64_t decoded = -1;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t k = columns[j];
        float value;
        if (bytes) {
          value = static_cast<float>(w.code == Code::Int8 ? static_cast<int8_t>(row[k]) : row[k]) * scale[k / w.group];
        } else {
          if (k / kBlock != decoded) scaled_block(w, row, decoded = k / kBlock, scale, shift, block);
          value = block[k % kBlock];
        }
        values[j * kOuts + i] = value;
      }
    }
    for (int64_t i = live; i < kOuts; ++i)
      for (int64_t j = 0; j < count; ++j) values[j * kOuts + i] = 0;
    for (int64_t m = 0; m < p.x.rows; ++m) {
      float sum[kOuts] = {};
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < kOuts; ++i) sum[i] += x[m * count + j] * values[j * kOuts + i];
      float* y = static_cast<float*>(p.out.y) + m * p.out.n + n;
      for (int64_t i = 0; i < live; ++i) y[i] += sum[i];
    }
  }
}

}  // namespace
}  // namespace qfunc
