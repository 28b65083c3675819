// Splits products into tasks: first the activation is quantized and laid out, then ranges of output columns are computed.
#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "scratch.h"

namespace qfunc {
namespace {

constexpr int64_t kSerialWork = 1 << 18;      // multiply-adds below which waking another thread costs more than it saves
constexpr int64_t kSerialElements = 1 << 15;  // the same for quantizing

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t number_size(Number type) { return type == Number::F32 ? 4 : type == Number::F16 || type == Number::BF16 ? 2 : 1; }

// How one slice is computed and where its activation lies in the scratch memory.
struct Plan {
  Slice slice;
  bool stream;
  int64_t width, padded;
  int64_t data, sums, scale, zero;  // offsets in bytes
  Weight w;
};

class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += round_up(bytes, 64);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// The common refinement of the segments of both sides; all of K where neither is divided.
int64_t common_segment(const Weight& w, const Activation& a) {
  const int64_t weight = w.group < w.k ? w.group : 0, activation = a.group < w.k ? a.group : 0;
  const int64_t both = std::gcd(weight, activation);
  // Where nothing divides K, sums that int32 cannot hold are cut, on a border that the packed codes have too.
  return both ? both : std::min(w.k, a.limit / kBlock * kBlock);
}

struct Job {
  const Kernels& kernels;
  const Activation& a;
  int64_t k, kp, segment, segments, x_steps;
  char* memory;

  template <class T>
  T* at(int64_t offset) const { return reinterpret_cast<T*>(memory + offset); }

  // Codes, sums and scales of one row of x; `step` is the distance between the segments of a row in sums and scale. Sums are made for
  // `lanes` lanes apart, code k belonging to lane k / 4.
  void integer_row(int64_t row, float* wide, int8_t* codes, int32_t* sums, float* scale, int64_t step, int64_t lanes) const {
    float own[1], *s = own;
    thread_local Scratch kept;
    if (x_steps > 1) s = kept.get<float>(static_cast<size_t>(x_steps));
    if (a.mode == Quantize::Codes) {
      std::memcpy(codes, static_cast<const int8_t*>(a.x) + row * k, static_cast<size_t>(k));
      std::memcpy(s, a.scale + row * a.scale_step, static_cast<size_t>(x_steps) * sizeof(float));
    } else {
      const float* x = wide;
      if (a.type == Number::F32) x = static_cast<const float*>(a.x) + row * k;
      else kernels.to_f32(a.x, a.type, row * k, k, wide);
      if (a.mode == Quantize::Given) s[0] = a.scale[row];
      kernels.quantize_row(x, k, a.group < k ? a.group : k, a.mode != Quantize::Given, a.clip, a.lowest, a.highest, a.zero ? a.zero + row : nullptr, s, codes);
    }
    std::memset(codes + k, 0, static_cast<size_t>(kp - k));
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t end = i + 1 == segments ? k : (i + 1) * segment;
      if (lanes == 1) {
        int32_t sum = 0;
        for (int64_t j = i * segment; j < end; ++j) sum += codes[j];
        sums[i * step] = sum;
      } else {
        int32_t* lane = sums + i * lanes;
        std::fill(lane, lane + lanes, 0);
        for (int64_t j = i * segment; j < end; ++j) lane[j / 4 % lanes] += codes[j];
      }
    }
    for (int64_t i = 0; i < x_steps; ++i) scale[i * step] = s[i];
  }

  void float_row(int64_t row, const uint8_t* order, float* wide, float* out) const {
    float* to = order ? wide : out;
    kernels.to_f32(a.x, a.type, row * k, k, to);
    if (a.mode == Quantize::Float)
      kernels.quantize_floats(to, k, std::min(a.group, k), a.format, a.clip, a.scale ? a.scale + row : nullptr, nullptr, nullptr, to);
    std::fill(to + k, to + kp, 0.0f);
    if (order)
      for (int64_t b = 0; b < kp; b += kBlock)
        for (int64_t i = 0; i < kBlock; ++i) out[b + i] = wide[b + order[i]];
  }

  // One panel (prefill) or all rows (decode) of a slice.
  void pack(const Plan& p, int64_t first) const {
    const bool integer = a.integer();
    const int64_t count = std::min(p.slice.rows - first, p.width);
    thread_local Scratch row_scratch, wide_scratch;
    float* wide = wide_scratch.get<float>(static_cast<size_t>(kp));
    const size_t bytes = static_cast<size_t>(kp * p.width) * (integer ? 1 : 4);
    char* rows = p.stream ? at<char>(p.data) : static_cast<char*>(row_scratch.get(bytes));
    if (integer) {
      // In panels the rows are the fastest axis of sums and scales, in the decode path the slowest.
      const int64_t lanes = p.stream ? kernels.sum_lanes : 1;
      int32_t* sums = at<int32_t>(p.sums) + first * segments * lanes;
      float* scale = at<float>(p.scale) + first * x_steps;
      if (count < p.width) {
        std::memset(sums, 0, static_cast<size_t>(p.width * segments * lanes) * 4);
        std::memset(scale, 0, static_cast<size_t>(p.width * x_steps) * 4);
        std::memset(rows + count * kp, 0, static_cast<size_t>((p.width - count) * kp));
      }
      for (int64_t m = 0; m < count; ++m)
        integer_row(p.slice.row + first + m, wide, reinterpret_cast<int8_t*>(rows) + m * kp, sums + (p.stream ? m * segments * lanes : m),
                    scale + (p.stream ? m * x_steps : m), p.stream ? 1 : p.width, lanes);
      if (a.zero)
        for (int64_t m = 0; m < p.width; ++m) at<int32_t>(p.zero)[first + m] = m < count ? a.zero[p.slice.row + first + m] : 0;
      if (!p.stream) kernels.panel_i8(reinterpret_cast<int8_t*>(rows), count, kp, p.width, at<int8_t>(p.data) + first * kp);
    } else {
      const uint8_t* order = kernels.order(p.w);
      float* to = reinterpret_cast<float*>(rows);
      for (int64_t m = 0; m < count; ++m) float_row(p.slice.row + first + m, order, wide, to + m * kp);
      if (p.stream) std::fill(to + count * kp, to + p.width * kp, 0.0f);
      else kernels.panel_f32(to, count, kp, p.width, at<float>(p.data) + first * kp);
    }
  }

  Product product(const Plan& p, const Matrices& matrices, void* y, Number y_type) const {
    Product out{};
    const bool integer = a.integer();
    out.w = &p.w;
    out.x.f32 = integer ? nullptr : at<float>(p.data);
    out.x.i8 = integer ? at<int8_t>(p.data) : nullptr;
    out.x.sums = at<int32_t>(p.sums);
    out.x.scale = at<float>(p.scale);
    out.x.zero = a.zero ? at<int32_t>(p.zero) : nullptr;
    out.x.scale_step = x_steps;
    out.x.scale_group = a.group;
    out.x.rows = p.slice.rows;
    out.x.kp = kp;
    out.x.sum_segments = segments;
    out.segment = segment;
    const int64_t n = p.w.n;
    out.out = {static_cast<char*>(y) + p.slice.row * n * number_size(y_type), y_type,
               matrices.bias ? static_cast<const char*>(matrices.bias) + p.slice.matrix * n * number_size(matrices.bias_type) : nullptr,
               matrices.bias_type, n};
    return out;
  }
};

}  // namespace

Weight Matrices::at(int64_t i) const {
  Weight w = first;
  w.codes += i * code_bytes;
  if (w.scale) w.scale = static_cast<const char*>(w.scale) + i * scale_bytes;
  if (w.zero) w.zero = static_cast<const char*>(w.zero) + i * zero_bytes;
  if (w.outer) w.outer += i * outer_items;
  if (nested_means) w.nested_mean = nested_means[i];
  return w;
}

void multiply(const Kernels& kernels, const Pool& pool, const Matrices& matrices, const Activation& a, const std::vector<Slice>& slices,
              void* y, Number y_type) {
  const Weight& shape = matrices.first;
  const bool integer = a.integer();
  const int64_t kp = round_up(shape.k, kBlock), segment = integer ? common_segment(shape, a) : shape.k;
  Job job{kernels, a, shape.k, kp, segment, (shape.k + segment - 1) / segment, integer && a.group < shape.k ? (shape.k + a.group - 1) / a.group : 1, nullptr};

  Layout layout;
  std::vector<Plan> plans;
  int64_t rows = 0, panels = 0;
  for (const Slice& slice : slices) {
    if (slice.rows == 0) continue;
    Plan p{slice, false, 0, 0, 0, 0, 0, 0, matrices.at(slice.matrix)};
    Product probe{};
    probe.x.zero = a.zero;
    probe.x.rows = slice.rows;
    probe.x.sum_segments = job.segments;
    probe.segment = segment;
    p.stream = slice.rows <= (integer ? kernels.int_rows : kernels.float_rows) && (!integer || kernels.int_stream_ok(probe));
    if (p.stream)
      for (p.width = 1; p.width < slice.rows;) p.width *= 2;
    else
      p.width = !integer && slice.rows <= kernels.pairs ? kernels.pairs : slice.rows <= kernels.narrow ? kernels.narrow : kernels.wide;
    p.padded = round_up(slice.rows, p.width);
    p.data = layout.add(p.padded * kp * (integer ? 1 : 4));
    p.sums = layout.add(integer ? p.padded * job.segments * (p.stream ? kernels.sum_lanes : 1) * 4 : 0);
    p.scale = layout.add(integer ? p.padded * job.x_steps * 4 : 0);
    p.zero = layout.add(a.zero ? p.padded * 4 : 0);
    rows += slice.rows;
    panels += p.padded / p.width;
    plans.push_back(p);
  }
  if (plans.empty() || shape.n == 0) return;
  thread_local Scratch memory;
  job.memory = static_cast<char*>(memory.get(static_cast<size_t>(layout.size())));

  // Tasks of all slices are numbered through, so that many small experts spread as well as one large product.
  struct Task {
    int32_t plan;
    int64_t begin;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < plans.size(); ++i)
    for (int64_t first = 0; first < plans[i].padded; first += plans[i].width) tasks.push_back({static_cast<int32_t>(i), first});
  const Pool serial;
  parallel_for(rows * shape.k < kSerialElements ? serial : pool, static_cast<int64_t>(tasks.size()),
               [&](int64_t t) { job.pack(plans[static_cast<size_t>(tasks[static_cast<size_t>(t)].plan)], tasks[static_cast<size_t>(t)].begin); });

  tasks.clear();
  const int64_t pieces = std::max<int64_t>(1, 8 * pool.threads / static_cast<int64_t>(plans.size()));
  const int64_t even = (shape.n + pieces - 1) / pieces;
  const bool any_tile = std::any_of(plans.begin(), plans.end(), [](const Plan& p) { return !p.stream; });
  const int64_t step = any_tile ? round_up(even, kernels.weight_rows) : std::max<int64_t>(8, round_up(even, 2));
  for (size_t i = 0; i < plans.size(); ++i)
    for (int64_t n = 0; n < shape.n; n += step) tasks.push_back({static_cast<int32_t>(i), n});
  std::vector<Product> products;
  for (const Plan& p : plans) products.push_back(job.product(p, matrices, y, y_type));
  parallel_for(rows * shape.k * shape.n < kSerialWork ? serial : pool, static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    const Task& task = tasks[static_cast<size_t>(t)];
    const Plan& p = plans[static_cast<size_t>(task.plan)];
    const auto compute = integer ? (p.stream ? kernels.int_stream : kernels.int_tile) : (p.stream ? kernels.float_stream : kernels.float_tile);
    compute(products[static_cast<size_t>(task.plan)], task.begin, std::min(task.begin + step, shape.n));
  });
}

void take(const Kernels& kernels, const Pool& pool, const Weight& w, const int32_t* ids, int64_t count, float* out) {
  const int64_t rows = 16, tasks = (count + rows - 1) / rows;
  parallel_for(pool, tasks, [&](int64_t t) {
    for (int64_t i = t * rows; i < std::min(count, (t + 1) * rows); ++i) kernels.dequantize_row(w, ids[i], out + i * w.k);
  });
}

void quantize(const Kernels& kernels, const Pool& pool, const Activation& a, int64_t rows, int64_t k, void* codes, float* scale) {
  const int64_t group = std::min(a.group, k), steps = (k + group - 1) / group, chunk = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(k, 1));
  parallel_for(pool, (rows + chunk - 1) / chunk, [&](int64_t t) {
    thread_local Scratch wide;
    for (int64_t i = t * chunk; i < std::min(rows, (t + 1) * chunk); ++i) {
      const float* x = static_cast<const float*>(a.x) + i * k;
      if (a.type != Number::F32) {
        float* own = wide.get<float>(static_cast<size_t>(k));
        kernels.to_f32(a.x, a.type, i * k, k, own);
        x = own;
      }
      if (a.mode == Quantize::Float) {
        kernels.quantize_floats(x, k, group, a.format, a.clip, a.scale ? a.scale + i : nullptr, scale + i * steps, static_cast<uint8_t*>(codes) + i * k, nullptr);
        continue;
      }
      if (a.mode == Quantize::Given) scale[i * steps] = a.scale[i];
      kernels.quantize_row(x, k, group, a.mode != Quantize::Given, a.clip, a.lowest, a.highest, a.zero ? a.zero + i : nullptr, scale + i * steps,
                           static_cast<int8_t*>(codes) + i * k);
    }
  });
}

}  // namespace qfunc
