// What a quantized matmul is, as plain data: the only language between the FFI handlers, the scheduler and the kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qfunc {

constexpr int64_t kBlock = 128;  // codes of one packed block along K
constexpr int64_t kExactWholes = 131071;  // products of bytes that an int32 sum can hold
constexpr int32_t kMiddle = 64;  // stands for zero where small floats are unsigned whole numbers of a unit; all are nearer than that

enum class Code : int32_t { Int8, UInt8, Packed, Table4, E2M3, E3M2, E4M3, E5M2, Ggml };
enum class Number : int32_t { None, F32, F16, BF16, E4M3, E8M0, UInt8, Nested };
enum class Zero : int32_t { None, Int, Float };
enum class Input : int32_t { F32, BF16, F16, Int8 };
// Where an integer activation's codes and scales come from.
// Float: codes of a small float format, whose values are multiplied in floating point; FloatCodes: such codes as they come in.
enum class Quantize : int32_t { None, Codes, Token, Group, Given, Float, FloatCodes };
// How the scale of a cell of a small float activation comes about.
enum class Rule : int32_t { Amax, Power, TwoLevel, Given, Dual };
constexpr int64_t kDualSpan = 512;  // codes under an outer scale of Rule::Dual

// A small float format and its scales. Amax: s = clip amax / largest. Power (MX): s = 2^e, e the exponent field of amax / divisor after
// `bump` is added to its bits, less `emax`. TwoLevel (NVFP4): s = e4m3(clip amax / largest / outer) outer.
// Dual: s = Power of clip amax / outer, times outer = clip amax / largest of kDualSpan codes.
struct FloatFormat {
  int32_t mantissa, exponent;  // bits of the mantissa, exponent of the smallest normal number
  float largest;
  int32_t sign;                // position of the sign bit in a code
  Rule rule;
  float divisor;
  int32_t bump, emax;
};

// One matrix [N, K] as stored. Segment: `group` consecutive codes of a row that share a scale (all of K when per channel).
struct Weight {
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t n, k;
  Code code;
  int32_t bits;    // of Ggml: the number of its type
  int32_t offset;  // stored code of the value 0
  const float* table;  // values of 16 codes (Table4), or of the 32 magnitudes (E2M3, E3M2)
  int32_t whole;       // the table in an integer product: its values times this are whole numbers; 0: it is none, or the codes are whole as they are
  const void* scale;
  Number scale_type;
  int64_t segments;    // scales in a row
  int64_t group;       // codes in a segment
  int64_t share;       // consecutive rows that share a row of scales; 0: all of them
  const float* outer;  // second level, or null
  int64_t outer_step;  // distance between the rows of outer, 0: one for all; blocks of 256 scales when Nested
  int64_t outer_span;  // scales of a row under one of outer; 0: all of them
  float nested_mean;
  const float* nested_map;
  const void* zero;
  Zero zero_kind;
  int64_t lowbits() const { return code == Code::Int8 || code == Code::UInt8 || code >= Code::E4M3 ? 8 : bits; }
  bool packed() const { return lowbits() < 8; }
};

// Where a row of a small float activation goes. Each may be null; values may be the row itself.
struct SmallRow {
  float* scale;      // of each cell
  uint8_t* codes;
  float* values;     // scaled
  int8_t* wholes;    // values before scales, in steps of 1 / unit
  uint16_t* halves;  // values before scales as bf16
  float unit;
};

// Float outputs of every kernel go through this.
struct Output {
  void* y;  // [rows, n]
  Number type;
  const void* bias;  // [n] of bias_type or null
  Number bias_type;
  int64_t n;
};

// The activation of one product as the kernels read it; made by the packers.
// Rows [rows, kp] (decode path), or panels of `width` rows, [kp, width], [kp / 4, width, 4] or [kp / 2, width, 2] (prefill path); kp is K
// rounded up to blocks.
struct Packed {
  const float* f32;
  const int8_t* i8;      // codes, or the bf16 of a product of halves
  const int32_t* sums;   // sum of the codes of each segment: [rows, segments, lanes] or [panel, segments, width]
  const float* scale;    // [rows, scale_step] or [panel, scale_step, width]
  const int32_t* zero;   // [rows] or [panel, width], or null
  int64_t scale_step;    // activation scales in a row
  int64_t scale_group;   // codes under one of them
  int64_t rows, kp, sum_segments;
};

struct Product {
  const Weight* w;
  Packed x;
  Output out;
  int64_t segment;  // products of codes: length of the common segments
  float unit;       // what one of them is worth before the scales
};

}  // namespace qfunc
