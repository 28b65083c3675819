// The XLA FFI handlers: shapes and types are checked here once more, cheaply, before any pointer is used.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "ggml.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace qfunc {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;

Error refuse(const std::string& what) { return Error::InvalidArgument("qfunc native kernel: " + what); }

int64_t width_of(DataType type) { return static_cast<int64_t>(ffi::ByteWidth(type)); }

constexpr int64_t kSpan = 512;

// An operand that is not there is an array without elements.
bool present(const AnyBuffer& b) { return b.element_count() != 0; }

Number number_of(DataType type) {
  switch (type) {
    case DataType::F32: return Number::F32;
    case DataType::F16: return Number::F16;
    case DataType::BF16: return Number::BF16;
    case DataType::F8E4M3FN: return Number::E4M3;
    case DataType::U8: return Number::UInt8;
    default: return Number::None;
  }
}

bool is_float(Number n) { return n == Number::F32 || n == Number::F16 || n == Number::BF16; }

const Kernels* kernels_or(Error& error) {
  static const char* reason = nullptr;
  static const Kernels* kernels = select_kernels(&reason);
  if (!kernels) error = refuse(reason);
  return kernels;
}

Pool pool_of(ffi::ThreadPool& threads) {
  Pool pool;
  pool.threads = threads.num_threads();
  pool.schedule = [&threads](std::function<void()> task) { threads.Schedule(std::move(task)); };
  return pool;
}

struct ActivationAttributes {
  int32_t mode;
  int64_t group;
  float clip, lowest, highest;
  int64_t limit;
  int32_t rule, mantissa, exponent, sign, bump, emax;
  float divisor, threshold;
  int64_t together;
};

// x [rows, k] with what is known of its scales beforehand.
Error read_activation(const AnyBuffer& x, const AnyBuffer& scale, const AnyBuffer& zero, int64_t rows, int64_t k, const ActivationAttributes& at,
                      Activation& a) {
  if (at.mode < 0 || at.mode > static_cast<int32_t>(Quantize::FloatCodes) || at.group < 1 || at.limit < kBlock) return refuse("unknown activation");
  a.x = x.untyped_data();
  a.type = number_of(x.element_type());
  a.mode = static_cast<Quantize>(at.mode);
  a.group = at.group;
  a.clip = at.clip;
  a.lowest = at.lowest;
  a.highest = at.highest;
  a.limit = at.limit;
  const bool small = a.mode == Quantize::FloatCodes, codes = a.mode == Quantize::Codes || small;
  if (small ? width_of(x.element_type()) != 1 : codes ? x.element_type() != DataType::S8 : !is_float(a.type)) return refuse("x has an unexpected type");
  if (a.mode == Quantize::Float || small) {
    const bool known = at.rule >= 0 && at.rule <= static_cast<int32_t>(Rule::Dual) && at.mantissa >= 1 && at.mantissa <= 3 && at.sign >= 3 && at.sign <= 7 &&
                       at.exponent >= -14 && at.exponent <= 0;
    if (!known) return refuse("unknown activation format");
    if (at.rule == static_cast<int32_t>(Rule::Dual) && (at.group < 16 || kDualSpan % at.group)) return refuse("groups that do not divide an outer one");
    a.format = {at.mantissa, at.exponent, at.highest, at.sign, static_cast<Rule>(at.rule), at.divisor, at.bump, at.emax};
  }
  if (at.together < 0 || (at.together > 0 && rows % at.together)) return refuse("rows do not divide into what shares a scale");
  a.threshold = at.threshold;
  if (a.threshold > 0 && (at.together == 0 || (a.mode != Quantize::Token && a.mode != Quantize::Group))) return refuse("a threshold needs scales found here");
  if (a.mode == Quantize::Given && at.group < k) return refuse("a given scale is one of a whole row");
  const bool known = codes || a.mode == Quantize::Given || (a.mode == Quantize::Float && a.format.rule == Rule::Given);
  const bool common = known || (a.mode == Quantize::Float && a.format.rule == Rule::TwoLevel);
  a.shared = at.together > 0 && common && !codes && !present(scale) && !present(zero);
  if (!a.shared && (known || present(scale))) {
    const int64_t steps = codes && at.group < k ? (k + at.group - 1) / at.group : 1;
    if (static_cast<int64_t>(scale.element_count()) != rows * steps || scale.element_type() != DataType::F32) return refuse("x_scale does not match x");
    a.scale = static_cast<const float*>(scale.untyped_data());
    a.scale_step = steps;
  }
  if (present(zero)) {
    if (static_cast<int64_t>(zero.element_count()) != rows || zero.element_type() != DataType::S32) return refuse("x_zero does not match x");
    if (at.group < k) return refuse("groups of x have no zero points");
    a.zero = static_cast<const int32_t*>(zero.untyped_data());
  }
  return Error::Success();
}

struct WeightAttributes {
  int32_t code, bits, offset, scale_type, zero_kind;
  int64_t group, share;
};

// codes [W, N, row], scale and zero [W, outs, segments], outer [W, ...]; k is not in the codes where rows are padded.
Error read_weight(const AnyBuffer& codes, const AnyBuffer& scale, const AnyBuffer& outer, const AnyBuffer& zero, const AnyBuffer& mean,
                  const AnyBuffer& map, const AnyBuffer& table, const WeightAttributes& at, int64_t n, int64_t k, Matrices& out) {
  const auto c = codes.dimensions();
  if (c.size() != 3 || width_of(codes.element_type()) != 1) return refuse("codes must be bytes [W, N, row]");
  Weight& w = out.first;
  w = {};
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.code = static_cast<Code>(at.code);
  w.bits = at.bits;
  w.offset = at.offset;
  w.n = n;
  w.k = k;
  w.row_bytes = c[2];
  if (at.code < 0 || at.code > static_cast<int32_t>(Code::Ggml) || at.bits < 2 || at.bits > (w.code == Code::Ggml ? 64 : 8)) return refuse("unknown weight code");
  const int32_t width = w.code == Code::Table4 ? 4 : w.code == Code::E2M3 || w.code == Code::E3M2 ? 6 : w.code == Code::Packed ? std::min(at.bits, 7) : 8;
  if (w.code != Code::Ggml && at.bits != width) return refuse("the code has another number of bits");
  const int64_t bytes = w.code == Code::Ggml ? ggml_row_bytes(at.bits, k) : w.packed() ? (k + kBlock - 1) / kBlock * 16 * at.bits : k;
  if (c[1] != n || c[2] != bytes || bytes == 0) return refuse("codes do not have the shape of the product");
  out.count = c[0];
  out.code_bytes = c[1] * c[2];

  const auto s = scale.dimensions();
  if (s.size() != 3 || s[0] != out.count || at.group < 1 || at.share < 0) return refuse("scale must be [W, outs, segments]");
  w.scale = scale.untyped_data();
  w.scale_type = static_cast<Number>(at.scale_type);
  w.group = at.group;
  w.share = at.share;
  w.segments = s[2];
  const int64_t outs = at.share == 0 ? 1 : (n + at.share - 1) / at.share;
  if (s[1] != outs || s[2] != (k + at.group - 1) / at.group) return refuse("scale does not have the shape of its granularity");
  const Number stored = number_of(scale.element_type());
  if (stored == Number::None || at.scale_type > static_cast<int32_t>(Number::Nested)) return refuse("unknown type of scale");
  if (stored != w.scale_type && !(stored == Number::UInt8 && (w.scale_type == Number::E8M0 || w.scale_type == Number::Nested)))
    return refuse("scale has another type than announced");
  out.scale_bytes = s[1] * s[2] * width_of(scale.element_type());

  const auto o = outer.dimensions();
  if (present(outer)) {
    if (o.size() != 3 || o[0] != out.count || outer.element_type() != DataType::F32) return refuse("outer scale must be float32 [W, ...]");
    w.outer = static_cast<const float*>(outer.untyped_data());
    out.outer_items = o[1] * o[2];
    w.outer_step = o[1] > 1 || o[2] > 1 ? o[2] : 0;
    // Below one row of them may lie spans of 512 codes (two levels of powers of two), else all of a row.
    const bool nested = w.scale_type == Number::Nested, spans = !nested && o[2] > 1;
    if (spans) w.outer_span = kSpan / at.group;
    const bool fits = nested ? o[1] * o[2] >= (outs * s[2] + 255) / 256 : (o[1] == 1 || o[1] == outs) && (!spans || (kSpan % at.group == 0 && o[1] == outs && o[2] == (k + kSpan - 1) / kSpan));
    if (!fits) return refuse("outer scale does not have the shape of its level");
  }
  if (w.scale_type == Number::Nested) {
    if (!present(outer) || static_cast<int64_t>(mean.element_count()) != out.count || map.element_count() != 256 || mean.element_type() != DataType::F32 || map.element_type() != DataType::F32) return refuse("nested scales need their levels");
    out.nested_means = static_cast<const float*>(mean.untyped_data());
    w.nested_map = static_cast<const float*>(map.untyped_data());
  }
  if (at.zero_kind < 0 || at.zero_kind > static_cast<int32_t>(Zero::Float)) return refuse("unknown kind of zero point");
  w.zero_kind = static_cast<Zero>(at.zero_kind);
  if (w.zero_kind != Zero::None) {
    const auto z = zero.dimensions();
    const bool typed = w.zero_kind == Zero::Int ? zero.element_type() == DataType::U8 : zero.element_type() == scale.element_type() && is_float(stored);
    if (z.size() != 3 || z[0] != s[0] || z[1] != s[1] || z[2] != s[2] || !typed) return refuse("zero must have the shape of scale");
    w.zero = zero.untyped_data();
    out.zero_bytes = z[1] * z[2] * width_of(zero.element_type());
  }
  const size_t entries = w.code == Code::Table4 ? 16 : w.code == Code::E2M3 || w.code == Code::E3M2 ? 32 : 0;
  if (entries && (table.element_count() != entries || table.element_type() != DataType::F32)) return refuse("the code needs its table");
  w.table = static_cast<const float*>(table.untyped_data());
  return Error::Success();
}

Error matmul(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer x_scale, AnyBuffer x_zero, AnyBuffer codes, AnyBuffer scale, AnyBuffer outer,
             AnyBuffer zero, AnyBuffer mean, AnyBuffer map, AnyBuffer table, AnyBuffer bias, AnyBuffer sizes, ffi::Result<AnyBuffer> y,
             int32_t code, int32_t bits, int32_t offset, int32_t scale_type, int32_t zero_kind, int64_t group, int64_t share, int32_t mode,
             int64_t x_group, float clip, float lowest, float highest, int64_t limit, int32_t rule, int32_t mantissa, int32_t exponent, int32_t sign,
             int32_t bump, int32_t emax, float divisor, float threshold, int64_t together) {
  Error error = Error::Success();
  const Kernels* kernels = kernels_or(error);
  if (!kernels) return error;
  const auto xd = x.dimensions(), yd = y->dimensions();
  if (xd.size() != 3 || yd.size() != 3 || xd[0] != yd[0] || xd[1] != yd[1]) return refuse("x [B, M, K] and y [B, M, N] do not match");
  const int64_t batch = xd[0], rows = xd[1], k = xd[2], n = yd[2];
  if (y->element_count() == 0) return Error::Success();
  if (k == 0) return refuse("the contracted axis is empty");
  Matrices matrices{};
  error = read_weight(codes, scale, outer, zero, mean, map, table, {code, bits, offset, scale_type, zero_kind, group, share}, n, k, matrices);
  if (error.failure()) return error;

  Activation a{};
  error = read_activation(x, x_scale, x_zero, batch * rows, k, {mode, x_group, clip, lowest, highest, limit, rule, mantissa, exponent, sign, bump, emax, divisor, threshold, together}, a);
  if (error.failure()) return error;
  if (a.integer() && matrices.first.code > Code::Packed) return refuse("integer products need integer codes");
  const int64_t weight_segment = group < k ? group : 0, x_segment = x_group < k ? x_group : 0;
  if (a.integer() && (weight_segment % 4 || x_segment % 4)) return refuse("integer segments must be multiples of 4");

  if (present(bias)) {
    matrices.bias = bias.untyped_data();
    matrices.bias_type = number_of(bias.element_type());
    if (!is_float(matrices.bias_type) || static_cast<int64_t>(bias.element_count()) != matrices.count * n) return refuse("bias must be float [W, N]");
  }
  const Number y_type = number_of(y->element_type());
  if (!is_float(y_type)) return refuse("y must be float32, bfloat16 or float16");
  if (together > 0 && (present(sizes) || rows % together)) return refuse("rows of one matrix do not divide into what shares a scale");
  if (a.threshold > 0 && y_type != Number::F32) return refuse("with a threshold y must be float32");

  std::vector<Slice> slices;
  if (present(sizes)) {
    if (batch != 1 || static_cast<int64_t>(sizes.element_count()) != matrices.count || sizes.element_type() != DataType::S32) return refuse("sizes must be int32 [W]");
    const auto* size = static_cast<const int32_t*>(sizes.untyped_data());
    int64_t row = 0;
    for (int64_t e = 0; e < matrices.count && row < rows; ++e) {
      const int64_t own = std::min<int64_t>(std::max<int32_t>(size[e], 0), rows - row);
      if (own) slices.push_back({row, own, e});
      row += own;
    }
    const int64_t row_bytes = n * width_of(y->element_type());
    std::memset(static_cast<char*>(y->untyped_data()) + row * row_bytes, 0, static_cast<size_t>((rows - row) * row_bytes));
  } else {
    if (batch != matrices.count) return refuse("x and w have different numbers of matrices");
    const int64_t own = together > 0 ? together : rows;
    for (int64_t row = 0; row < batch * rows; row += own) slices.push_back({row, own, row / rows});
  }
  multiply(*kernels, pool_of(threads), matrices, a, slices, y->untyped_data(), y_type);
  return Error::Success();
}

Error take_rows(ffi::ThreadPool threads, ffi::Buffer<DataType::S32> ids, AnyBuffer codes, AnyBuffer scale, AnyBuffer outer, AnyBuffer zero,
                AnyBuffer mean, AnyBuffer map, AnyBuffer table, ffi::ResultBuffer<DataType::F32> out, int32_t code, int32_t bits,
                int32_t offset, int32_t scale_type, int32_t zero_kind, int64_t group, int64_t share) {
  Error error = Error::Success();
  const Kernels* kernels = kernels_or(error);
  if (!kernels) return error;
  const auto od = out->dimensions(), cd = codes.dimensions();
  const int64_t count = static_cast<int64_t>(ids.element_count());
  if (od.size() != 2 || cd.size() != 3 || cd[0] != 1 || od[0] != count) return refuse("ids [T] and rows [T, K] do not match");
  if (out->element_count() == 0) return Error::Success();
  Matrices matrices{};
  error = read_weight(codes, scale, outer, zero, mean, map, table, {code, bits, offset, scale_type, zero_kind, group, share}, cd[1], od[1], matrices);
  if (error.failure()) return error;
  for (int64_t i = 0; i < count; ++i)
    if (ids.typed_data()[i] < 0 || ids.typed_data()[i] >= cd[1]) return refuse("a row is out of range");
  take(*kernels, pool_of(threads), matrices.at(0), ids.typed_data(), count, out->typed_data());
  return Error::Success();
}

Error quantize_rows(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer x_scale, AnyBuffer x_zero, ffi::Result<AnyBuffer> codes,
                    ffi::ResultBuffer<DataType::F32> scale, int32_t mode, int64_t x_group, float clip, float lowest, float highest, int64_t limit,
                    int32_t rule, int32_t mantissa, int32_t exponent, int32_t sign, int32_t bump, int32_t emax, float divisor, float threshold, int64_t together) {
  Error error = Error::Success();
  const Kernels* kernels = kernels_or(error);
  if (!kernels) return error;
  const auto xd = x.dimensions();
  if (xd.size() != 2) return refuse("x must be [M, K]");
  const int64_t rows = xd[0], k = xd[1];
  if (x.element_count() == 0) return Error::Success();
  Activation a{};
  error = read_activation(x, x_scale, x_zero, rows, k, {mode, x_group, clip, lowest, highest, limit, rule, mantissa, exponent, sign, bump, emax, divisor, threshold, together}, a);
  if (error.failure()) return error;
  if (a.mode == Quantize::None || a.mode == Quantize::Codes || a.mode == Quantize::FloatCodes || a.threshold > 0)
    return refuse("there is nothing to quantize");
  const int64_t steps = x_group < k ? (k + x_group - 1) / x_group : 1;
  if (codes->element_count() != x.element_count() || width_of(codes->element_type()) != 1 || static_cast<int64_t>(scale->element_count()) != rows * steps)
    return refuse("codes and scale do not match x");
  quantize(*kernels, pool_of(threads), a, rows, k, together, codes->untyped_data(), scale->typed_data());
  return Error::Success();
}

}  // namespace
}  // namespace qfunc

#define QFUNC_EXPORT __attribute__((visibility("default")))
#define QFUNC_WEIGHT_ATTRIBUTES \
  .Attr<int32_t>("code").Attr<int32_t>("bits").Attr<int32_t>("offset").Attr<int32_t>("scale_type").Attr<int32_t>("zero_kind").Attr<int64_t>("group").Attr<int64_t>("share")
#define QFUNC_X_ATTRIBUTES .Attr<int32_t>("mode").Attr<int64_t>("x_group").Attr<float>("clip").Attr<float>("lowest").Attr<float>("highest") \
  .Attr<int64_t>("limit").Attr<int32_t>("rule").Attr<int32_t>("mantissa").Attr<int32_t>("exponent").Attr<int32_t>("sign").Attr<int32_t>("bump").Attr<int32_t>("emax") \
  .Attr<float>("divisor").Attr<float>("threshold").Attr<int64_t>("together")
#define QFUNC_ANY .Arg<xla::ffi::AnyBuffer>()

extern "C" QFUNC_EXPORT XLA_FFI_Error* qfunc_matmul(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER(matmul_handler, qfunc::matmul,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>() QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY
                           QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY.Ret<xla::ffi::AnyBuffer>() QFUNC_WEIGHT_ATTRIBUTES QFUNC_X_ATTRIBUTES);
XLA_FFI_Error* qfunc_matmul(XLA_FFI_CallFrame* frame) { return matmul_handler(frame); }

extern "C" QFUNC_EXPORT XLA_FFI_Error* qfunc_take(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER(take_handler, qfunc::take_rows,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>() QFUNC_ANY QFUNC_ANY QFUNC_ANY
                           QFUNC_ANY QFUNC_ANY QFUNC_ANY QFUNC_ANY.Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>() QFUNC_WEIGHT_ATTRIBUTES);
XLA_FFI_Error* qfunc_take(XLA_FFI_CallFrame* frame) { return take_handler(frame); }

extern "C" QFUNC_EXPORT XLA_FFI_Error* qfunc_quantize(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER(quantize_handler, qfunc::quantize_rows,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>() QFUNC_ANY QFUNC_ANY QFUNC_ANY.Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>() QFUNC_X_ATTRIBUTES);
XLA_FFI_Error* qfunc_quantize(XLA_FFI_CallFrame* frame) { return quantize_handler(frame); }

// The name of the instruction set that will run, or null; `error` then says why.
extern "C" QFUNC_EXPORT const char* qfunc_isa(const char** error) {
  const qfunc::Kernels* kernels = qfunc::select_kernels(error);
  return kernels ? kernels->name : nullptr;
}

// Multiply-adds done; `kind` numbers Peak. See Kernels::peak.
extern "C" QFUNC_EXPORT double qfunc_peak(int kind, int64_t rounds) {
  const char* error = nullptr;
  const qfunc::Kernels* kernels = qfunc::select_kernels(&error);
  return kernels ? kernels->peak(static_cast<qfunc::Peak>(kind), rounds) : 0.0;
}

// Reads `count` numbers of 8 bytes; the result is their exclusive or, so that nothing can be left out. For measuring bandwidth.
extern "C" QFUNC_EXPORT uint64_t qfunc_read(const uint64_t* from, int64_t count) {
  uint64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found ^= from[i];
  return found;
}
