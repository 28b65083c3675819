// Splits products into tasks: first the activation is quantized and laid out, then ranges of output columns are computed.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "common.h"
#include "operand.h"
#include "scales.h"

namespace qfunc {
namespace {

constexpr int64_t kSerialWork = 1 << 18;      // multiply-adds below which waking another thread costs more than it saves

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t number_size(Number type) { return type == Number::F32 ? 4 : type == Number::F16 || type == Number::BF16 ? 2 : 1; }

// How one slice is computed and where its activation lies in the scratch memory.
struct Plan {
  Slice slice;
  Operand operand;
  bool stream;
  int64_t width, padded;
  int64_t data, sums, scale, zero;  // offsets in bytes
  int64_t rows, kept;               // the same of rows before they become a panel (-1: they stay with the thread), and of columns kept apart
  const std::vector<int32_t>* columns;
  Weight w;
  bool coded() const { return operand != Operand::Float; }
  int64_t size() const { return operand == Operand::Float ? 4 : operand == Operand::Half ? 2 : 1; }  // of a number of x
};

int64_t cost(const Activation& a) { return a.mode == Quantize::None || a.mode == Quantize::Codes ? 1 : 3; }  // of an element: a tenth of a nanosecond, about

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

struct Job {
  const Kernels& kernels;
  const Activation& a;
  int64_t k, kp, segment, segments, x_steps;
  char* memory;
  Bytes bytes;

  template <class T>
  T* at(int64_t offset) const { return reinterpret_cast<T*>(memory + offset); }

  // Codes, sums and scales of one row of x; `step` is the distance between the segments of a row in sums and scale. Sums are made for
  // `lanes` lanes apart, code k belonging to lane k / 4.
  // Numbers of `columns` go to `kept`, and zeros are quantized in their place.
  void coded_row(const Plan& p, int64_t row, const std::vector<int32_t>& columns, float* kept, float* wide, char* to, int32_t* sums, float* scale, int64_t step,
                   int64_t lanes) const {
    float own[1], *s = own;
    thread_local Scratch steps;
    if (x_steps > 1) s = steps.get<float>(static_cast<size_t>(x_steps));
    auto* codes = reinterpret_cast<int8_t*>(to);
    auto* halves = reinterpret_cast<uint16_t*>(to);
    if (a.mode == Quantize::FloatCodes) {
      const auto* from = static_cast<const uint8_t*>(a.x) + row * k;
      if (p.operand == Operand::Half)
        for (int64_t i = 0; i < k; ++i) halves[i] = bytes.halves[from[i]];
      else
        for (int64_t i = 0; i < k; ++i) codes[i] = bytes.wholes[from[i]];
      std::memcpy(s, a.scale + row * a.scale_step, static_cast<size_t>(x_steps) * sizeof(float));
    } else if (a.mode == Quantize::Codes) {
      std::memcpy(codes, static_cast<const int8_t*>(a.x) + row * k, static_cast<size_t>(k));
      std::memcpy(s, a.scale + row * a.scale_step, static_cast<size_t>(x_steps) * sizeof(float));
    } else {
      const float* x = wide;
      if (a.type == Number::F32) x = static_cast<const float*>(a.x) + row * k;
      else kernels.to_f32(a.x, a.type, row * k, k, wide);
      if (!columns.empty()) {
        if (x != wide) std::memcpy(wide, x, static_cast<size_t>(k) * sizeof(float));
        x = wide;
        for (size_t j = 0; j < columns.size(); ++j) kept[j] = wide[columns[j]], wide[columns[j]] = 0.0f;
      }
      if (a.mode == Quantize::Given) s[0] = a.scale[row];
      if (a.mode == Quantize::Float)
        kernels.quantize_floats(x, k, std::min(a.group, k), a.format, a.clip, a.scale ? a.scale + row : nullptr,
                                p.operand == Operand::Half ? SmallRow{s, nullptr, nullptr, nullptr, halves, 0.0f}
                                                           : SmallRow{s, nullptr, nullptr, codes, nullptr, static_cast<float>(steps_of(a.format))});
      else
        kernels.quantize_row(x, k, a.group < k ? a.group : k, a.mode != Quantize::Given, a.clip, a.lowest, a.highest, a.zero ? a.zero + row : nullptr, s, codes);
    }
    std::memset(to + k * p.size(), 0, static_cast<size_t>((kp - k) * p.size()));
    for (int64_t i = 0; i < segments && p.operand != Operand::Half; ++i) {
      const int64_t end = i + 1 == segments ? k : (i + 1) * segment;
      if (lanes == 1) {
        int32_t sum = 0;
        for (int64_t j = i * segment; j < end; ++j) sum += codes[j];
        sums[i * step] = sum;
      } else {
        int32_t* lane = sums + i * lanes;
        std::fill(lane, lane + lanes, 0);
        // Segments start with the first lane, and what follows K in the last one is zero.
        for (int64_t j = i * segment; j < end; j += 4 * lanes)
          for (int64_t l = 0; l < lanes; ++l) lane[l] += codes[j + 4 * l] + codes[j + 4 * l + 1] + codes[j + 4 * l + 2] + codes[j + 4 * l + 3];
      }
    }
    for (int64_t i = 0; i < x_steps; ++i) scale[i * step] = s[i];
  }

  void float_row(int64_t row, const uint8_t* order, float* wide, float* out) const {
    float* to = order ? wide : out;
    if (a.mode == Quantize::FloatCodes) {
      const auto* codes = static_cast<const uint8_t*>(a.x) + row * k;
      const float* s = a.scale + row * a.scale_step;
      const int64_t group = std::min(a.group, k);
      for (int64_t start = 0; start < k; start += group, ++s)
        for (int64_t i = start; i < std::min(k, start + group); ++i) to[i] = bytes.floats[codes[i]] * *s;
    } else {
      kernels.to_f32(a.x, a.type, row * k, k, to);
    }
    if (a.mode == Quantize::Float)
      kernels.quantize_floats(to, k, std::min(a.group, k), a.format, a.clip, a.scale ? a.scale + row : nullptr, {nullptr, nullptr, to, nullptr, nullptr, 0.0f});
    std::fill(to + k, to + kp, 0.0f);
    if (order)
      for (int64_t b = 0; b < kp; b += kBlock)
        for (int64_t i = 0; i < kBlock; ++i) out[b + i] = wide[b + order[i]];
  }

  size_t row_size(const Plan& p) const { return static_cast<size_t>(kp * p.size()); }

  // Rows [m0, m1) of the panel (prefill) or of all rows (decode) that start at `first`, quantized into `rows` [width, kp].
  void fill_rows(const Plan& p, int64_t first, int64_t m0, int64_t m1, char* rows) const {
    thread_local Scratch wide_scratch;
    float* wide = wide_scratch.get<float>(static_cast<size_t>(kp));
    const uint8_t* order = kernels.order(p.w);
    // In panels the rows are the fastest axis of sums and scales, in the decode path the slowest.
    const int64_t lanes = p.stream ? kernels.sum_lanes : 1, sum_step = p.stream ? segments * lanes : 1, scale_step = p.stream ? x_steps : 1;
    for (int64_t m = m0; m < m1; ++m) {
      char* to = rows + static_cast<size_t>(m) * row_size(p);
      if (p.coded())
        coded_row(p, p.slice.row + first + m, *p.columns, at<float>(p.kept) + (first + m) * static_cast<int64_t>(p.columns->size()), wide,
                  to, at<int32_t>(p.sums) + first * segments * lanes + m * sum_step,
                  at<float>(p.scale) + first * x_steps + m * scale_step, p.stream ? 1 : p.width, lanes);
      else float_row(p.slice.row + first + m, order, wide, reinterpret_cast<float*>(to));
    }
  }

  // Rows become a panel; lanes and rows that only pad it are zero.
  void finish(const Plan& p, int64_t first, char* rows) const {
    const int64_t count = std::min(p.slice.rows - first, p.width), spare = p.width - count;
    if (spare) std::memset(rows + static_cast<size_t>(count) * row_size(p), 0, static_cast<size_t>(spare) * row_size(p));
    if (p.coded() && spare) {
      if (p.stream) {
        std::memset(at<int32_t>(p.sums) + count * segments * kernels.sum_lanes, 0, static_cast<size_t>(spare * segments * kernels.sum_lanes) * 4);
        std::memset(at<float>(p.scale) + count * x_steps, 0, static_cast<size_t>(spare * x_steps) * 4);
      } else {
        for (int64_t i = 0; i < segments; ++i) std::fill_n(at<int32_t>(p.sums) + first * segments + i * p.width + count, spare, 0);
        for (int64_t i = 0; i < x_steps; ++i) std::fill_n(at<float>(p.scale) + first * x_steps + i * p.width + count, spare, 0.0f);
      }
    }
    if (a.zero)
      for (int64_t m = 0; m < p.width; ++m) at<int32_t>(p.zero)[first + m] = m < count ? a.zero[p.slice.row + first + m] : 0;
    if (p.stream) return;
    // Four codes, or two halves, are one element of the same transposition.
    kernels.panel_f32(reinterpret_cast<float*>(rows), count, kp * p.size() / 4, p.width, reinterpret_cast<float*>(at<char>(p.data) + first * kp * p.size()));
  }

  // Where the rows of a panel are before it is one.
  char* rows_of(const Plan& p, int64_t first) const {
    if (p.rows >= 0) return at<char>(p.rows) + static_cast<size_t>(first) * row_size(p);
    thread_local Scratch scratch;
    return p.stream ? at<char>(p.data) : static_cast<char*>(scratch.get(static_cast<size_t>(p.width) * row_size(p)));
  }

  Product product(const Plan& p, const Matrices& matrices, void* y, Number y_type) const {
    Product out{};
    out.w = &p.w;
    out.x.f32 = p.coded() ? nullptr : at<float>(p.data);
    out.x.i8 = p.coded() ? at<int8_t>(p.data) : nullptr;
    out.x.sums = at<int32_t>(p.sums);
    out.x.scale = at<float>(p.scale);
    out.x.zero = a.zero ? at<int32_t>(p.zero) : nullptr;
    out.x.scale_step = x_steps;
    out.x.scale_group = a.group;
    out.x.rows = p.slice.rows;
    out.x.kp = kp;
    out.x.sum_segments = segments;
    out.segment = segment;
    out.unit = p.operand == Operand::Whole ? 1.0f / static_cast<float>(steps_of(a.format) * steps_of(p.w)) : 1.0f;
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

void multiply(const Kernels& kernels, const Pool& pool, const Matrices& matrices, const Activation& activation,
              const std::vector<Slice>& slices, void* y, Number y_type) {
  const Weight& shape = matrices.first;
  Activation a = activation;
  const int64_t kp = round_up(shape.k, kBlock), segment = common_segment(shape, a);
  static const std::vector<int32_t> no_columns;
  int64_t rows = 0;
  for (const Slice& slice : slices) rows += slice.rows;
  const Pool serial;
  Team team(rows * shape.k * shape.n < kSerialWork ? serial : pool, pool.threads);
  Common common;
  if (a.shared || a.threshold > 0) common = find_common(kernels, team, a, slices, shape.k);
  if (a.shared) a.scale = common.scale.data();
  Job job{kernels, a, shape.k, kp, segment, (shape.k + segment - 1) / segment, a.group < shape.k ? (shape.k + a.group - 1) / a.group : 1, nullptr,
          a.mode == Quantize::FloatCodes ? Bytes(a.format) : Bytes()};

  Layout layout;
  std::vector<Plan> plans;
  int64_t panels = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    const Slice& slice = slices[i];
    if (slice.rows == 0) continue;
    Plan p{slice, operand_of(kernels, shape, a, slice.rows), false, 0, 0, 0, 0, 0, 0, -1, 0, a.threshold > 0 ? &common.columns[i] : &no_columns, matrices.at(slice.matrix)};
    if (p.operand == Operand::Whole && shape.code != Code::Packed) p.w.whole = steps_of(shape);
    Product probe{};
    probe.w = &p.w;
    probe.x.zero = a.zero;
    probe.x.rows = slice.rows;
    probe.x.sum_segments = job.segments;
    probe.segment = segment;
    p.stream = p.operand == Operand::Float ? slice.rows <= kernels.float_rows : p.operand == Operand::Code && slice.rows <= kernels.int_rows && kernels.int_stream_ok(probe);
    if (p.stream)
      for (p.width = 1; p.width < slice.rows;) p.width *= 2;
    else
      p.width = !p.coded() && slice.rows <= kernels.pairs ? kernels.pairs : slice.rows <= kernels.narrow ? kernels.narrow : kernels.wide;
    p.padded = round_up(slice.rows, p.width);
    p.data = layout.add(p.padded * kp * p.size());
    p.sums = layout.add(p.coded() ? p.padded * job.segments * (p.stream ? kernels.sum_lanes : 1) * 4 : 0);
    p.scale = layout.add(p.coded() ? p.padded * job.x_steps * 4 : 0);
    p.zero = layout.add(a.zero ? p.padded * 4 : 0);
    p.kept = layout.add(slice.rows * static_cast<int64_t>(p.columns->size()) * 4);
    panels += p.padded / p.width;
    plans.push_back(p);
  }
  if (plans.empty() || shape.n == 0) return;
  const bool short_rows = rows * shape.k * cost(a) < kSerialElements;
  // With fewer panels than threads, rows are quantized apart and laid out after that.
  const bool apart = !short_rows && panels < team.threads() && rows > panels;
  if (apart)
    for (Plan& p : plans) p.rows = p.stream ? p.data : layout.add(p.padded * static_cast<int64_t>(job.row_size(p)));
  thread_local Scratch memory;
  job.memory = static_cast<char*>(memory.get(static_cast<size_t>(layout.size())));

  // Tasks of all slices are numbered through, so that many small experts spread as well as one large product.
  struct Task {
    int32_t plan;
    int64_t begin, end;
  };
  std::vector<Task> tasks;
  Team alone(serial, 1);
  const auto run = [&](Team& threads, auto&& body) {
    threads.run(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
      const Task& task = tasks[static_cast<size_t>(t)];
      body(plans[static_cast<size_t>(task.plan)], task);
    });
  };
  const auto count = [](const Plan& p, int64_t first) { return std::min(p.slice.rows - first, p.width); };
  if (apart) {
    const int64_t chunk = std::max<int64_t>(1, rows / (4 * team.threads()));
    for (size_t i = 0; i < plans.size(); ++i)
      for (int64_t m = 0; m < plans[i].slice.rows; m += chunk) tasks.push_back({static_cast<int32_t>(i), m, std::min(m + chunk, plans[i].slice.rows)});
    run(team, [&](const Plan& p, const Task& task) {
      for (int64_t m = task.begin; m < task.end;) {
        const int64_t first = m / p.width * p.width, end = std::min(task.end, first + p.width);
        job.fill_rows(p, first, m - first, end - first, job.rows_of(p, first));
        m = end;
      }
    });
    tasks.clear();
  }
  for (size_t i = 0; i < plans.size(); ++i)
    for (int64_t first = 0; first < plans[i].padded; first += plans[i].width) tasks.push_back({static_cast<int32_t>(i), first, 0});
  run(short_rows ? alone : team, [&](const Plan& p, const Task& task) {
    char* to = job.rows_of(p, task.begin);
    if (!apart) job.fill_rows(p, task.begin, 0, count(p, task.begin), to);
    job.finish(p, task.begin, to);
  });

  tasks.clear();
  const int64_t pieces = std::max<int64_t>(1, 8 * pool.threads / static_cast<int64_t>(plans.size()));
  const int64_t even = (shape.n + pieces - 1) / pieces;
  const bool any_tile = std::any_of(plans.begin(), plans.end(), [](const Plan& p) { return !p.stream; });
  const int64_t step = any_tile ? round_up(even, kernels.weight_rows) : std::max<int64_t>(8, round_up(even, 2));
  for (size_t i = 0; i < plans.size(); ++i)
    for (int64_t n = 0; n < shape.n; n += step) tasks.push_back({static_cast<int32_t>(i), n, std::min(n + step, shape.n)});
  std::vector<Product> products;
  for (const Plan& p : plans) products.push_back(job.product(p, matrices, y, y_type));
  run(team, [&](const Plan& p, const Task& task) {
    const auto compute = p.operand == Operand::Half ? kernels.half_tile : p.operand == Operand::Float ? (p.stream ? kernels.float_stream : kernels.float_tile)
                         : p.stream ? kernels.int_stream : kernels.int_tile;
    const Product& product = products[static_cast<size_t>(task.plan)];
    compute(product, task.begin, task.end);
    if (!p.columns->empty())
      kernels.add_columns(product, p.columns->data(), static_cast<int64_t>(p.columns->size()), job.at<float>(p.kept), task.begin, task.end);
  });
}

void take(const Kernels& kernels, const Pool& pool, const Weight& w, const int32_t* ids, int64_t count, float* out) {
  const int64_t rows = 16, tasks = (count + rows - 1) / rows;
  parallel_for(pool, tasks, [&](int64_t t) {
    for (int64_t i = t * rows; i < std::min(count, (t + 1) * rows); ++i) kernels.dequantize_row(w, ids[i], out + i * w.k);
  });
}

void quantize(const Kernels& kernels, const Pool& pool, const Activation& activation, int64_t rows, int64_t k, int64_t together, void* codes,
              float* scale) {
  Activation a = activation;
  const int64_t group = std::min(a.group, k), steps = (k + group - 1) / group, chunk = std::max<int64_t>(1, kSerialElements / (cost(a) * std::max<int64_t>(k, 1)));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  Team team(pool, chunks);
  Common common;
  if (a.shared) {
    std::vector<Slice> slices;
    for (int64_t row = 0; row < rows; row += together) slices.push_back({row, together, 0});
    common = find_common(kernels, team, a, slices, k);
    a.scale = common.scale.data();
  }
  team.run(chunks, [&](int64_t t) {
    thread_local Scratch wide;
    for (int64_t i = t * chunk; i < std::min(rows, (t + 1) * chunk); ++i) {
      const float* x = static_cast<const float*>(a.x) + i * k;
      if (a.type != Number::F32) {
        float* own = wide.get<float>(static_cast<size_t>(k));
        kernels.to_f32(a.x, a.type, i * k, k, own);
        x = own;
      }
      if (a.mode == Quantize::Float) {
        kernels.quantize_floats(x, k, group, a.format, a.clip, a.scale ? a.scale + i : nullptr,
                                {scale + i * steps, static_cast<uint8_t*>(codes) + i * k, nullptr, nullptr, nullptr, 0.0f});
        continue;
      }
      if (a.mode == Quantize::Given) scale[i * steps] = a.scale[i];
      kernels.quantize_row(x, k, group, a.mode != Quantize::Given, a.clip, a.lowest, a.highest, a.zero ? a.zero + i : nullptr, scale + i * steps,
                           static_cast<int8_t*>(codes) + i * k);
    }
  });
}

}  // namespace qfunc
