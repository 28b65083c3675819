// Quantized products as the FFI handlers ask for them; knows nothing of XLA.
#pragma once
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace qfunc {

// A stack of matrices of equal form. `first` describes matrix 0; the steps lead to the next one, in bytes or in elements.
struct Matrices {
  Weight first;
  int64_t count;
  int64_t code_bytes, scale_bytes, zero_bytes;
  int64_t outer_items;
  const float* nested_means;  // one for each matrix, or null
  const void* bias;           // [count, n], or null
  Number bias_type;
  Weight at(int64_t i) const;
};

struct Activation {
  const void* x;  // [rows, k], of `type`; int8 codes where mode is Codes, bytes where it is FloatCodes
  Number type;
  Quantize mode;
  const float* scale;   // [rows, scale_step] for Codes and FloatCodes, [rows] for Given; [rows] or null for Float: what Rule::Given or TwoLevel start from
  const int32_t* zero;  // [rows] or null
  int64_t scale_step;
  int64_t group;        // codes under one activation scale
  float clip, lowest, highest;
  FloatFormat format;   // for Float
  float threshold;      // columns of a slice in which |x| reaches it are multiplied in floating point; 0: none are
  bool shared;          // one scale for all rows of a slice is found first, as if it had come in `scale`
  int64_t limit;        // products of codes that an int32 sum can hold
  bool integer() const { return mode != Quantize::None && mode != Quantize::Float && mode != Quantize::FloatCodes; }
};

// Rows [row, row + rows) of x meet matrix `matrix`.
struct Slice {
  int64_t row, rows, matrix;
};

void multiply(const Kernels& kernels, const Pool& pool, const Matrices& matrices, const Activation& activation,
              const std::vector<Slice>& slices, void* y, Number y_type);

// Rows `ids` of a matrix as float32 [ids, k]; every id is in [0, n).
void take(const Kernels& kernels, const Pool& pool, const Weight& w, const int32_t* ids, int64_t count, float* out);

// codes (a byte each) [rows, k] and scale [rows, ceil(k / group)] of x; `together` rows share a scale where the activation says so.
void quantize(const Kernels& kernels, const Pool& pool, const Activation& activation, int64_t rows, int64_t k, int64_t together, void* codes,
              float* scale);

}  // namespace qfunc
