// The table of functions that one instruction set provides.
#pragma once
#include "problem.h"

namespace qfunc {

// The instruction whose peak is asked for; 0 is the answer where there is none.
enum class Peak : int32_t { Float, Integer, Half };

struct Kernels {
  const char* name;
  int64_t pairs;           // float panels of so many rows hold two neighbours of K side by side, [kp / 2, pairs, 2]; 0: there are none
  int64_t narrow, wide;    // rows of x in a panel: for few rows, for many
  int64_t float_rows;      // up to so many rows, the decode path of float products is faster
  int64_t int_rows;        // the same for integer products
  int64_t sum_lanes;       // the decode path takes sums of codes for each of so many lanes of 4 neighbours
  int64_t weight_rows;     // rows of w that the prefill path works on at once: a good multiple for splitting
  // Position in a block of 128 -> code, or null for the natural order: how packed float activations must lie.
  const uint8_t* (*order)(const Weight& w);
  bool (*int_stream_ok)(const Product& p);
  void (*float_stream)(const Product& p, int64_t n0, int64_t n1);
  void (*float_tile)(const Product& p, int64_t n0, int64_t n1);
  void (*int_stream)(const Product& p, int64_t n0, int64_t n1);
  void (*int_tile)(const Product& p, int64_t n0, int64_t n1);
  // Products of small floats on both sides before their scales: null where there is no such instruction.
  void (*half_tile)(const Product& p, int64_t n0, int64_t n1);
  bool wholes;             // int_tile takes tables of whole numbers, and that is faster than floats
  // One row of w as float32 [K], exactly as the reference dequantizes it.
  void (*dequantize_row)(const Weight& w, int64_t n, float* out);
  // codes = clip(rint(x / s) + zero) of one row; `dynamic`: s = clip * amax / highest first, one for every `group` codes.
  void (*quantize_row)(const float* x, int64_t k, int64_t group, bool dynamic, float clip, float lowest, float highest, const int32_t* zero,
                       float* scale, int8_t* codes);
  // The same for a small float format; `given` as `Activation::scale`.
  void (*quantize_floats)(const float* x, int64_t k, int64_t group, const FloatFormat& format, float clip, const float* given, const SmallRow& out);
  // What the rows of x have in common, and columns that integers cannot hold: see survey.h.
  float (*survey)(const float* x, int64_t k, float threshold, uint8_t* marks);
  void (*add_columns)(const Product& p, const int32_t* columns, int64_t count, const float* x, int64_t n0, int64_t n1);
  void (*to_f32)(const void* from, Number type, int64_t start, int64_t count, float* out);
  // Rows of float32 [kp] into a panel [kp, width].
  void (*panel_f32)(const float* rows, int64_t count, int64_t kp, int64_t width, float* out);
  // Multiply-adds done in so many rounds of the kernels' own instruction from registers: what a benchmark divides by.
  double (*peak)(Peak kind, int64_t rounds);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_i8mm;
#endif

// The best table for this machine, or the one that QFUNC_CPU_ISA names; null with a message where that cannot run here.
const Kernels* select_kernels(const char** error);

}  // namespace qfunc
