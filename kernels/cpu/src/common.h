// What rows of x have in common, found before one of them is quantized.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "scales.h"

namespace qfunc {
namespace {

constexpr int64_t kSerialElements = 1 << 16;  // numbers below which another thread costs more than it saves

// The larger of two magnitudes, whose order is that of their bits: NaN is above all.
inline float upper(float a, float b) { return to_bits(a) > to_bits(b) ? a : b; }

// Before any row is quantized: the scale that the rows of a slice share, and the columns that are too large for integers.
struct Common {
  std::vector<float> scale;                   // [rows]
  std::vector<std::vector<int32_t>> columns;  // by slice
};

Common find_common(const Kernels& kernels, Team& team, const Activation& a, const std::vector<Slice>& slices, int64_t k) {
  struct Task {
    size_t slice;
    int64_t begin, end;
    float top;
    std::vector<uint8_t> marks;
  };
  int64_t rows = 0;
  for (const Slice& slice : slices) rows = std::max(rows, slice.row + slice.rows);
  const int64_t chunk = std::max<int64_t>({1, kSerialElements / k, rows / (4 * team.threads())});
  std::vector<Task> tasks;
  for (size_t i = 0; i < slices.size(); ++i)
    for (int64_t m = 0; m < slices[i].rows; m += chunk)
      tasks.push_back({i, slices[i].row + m, slices[i].row + std::min(m + chunk, slices[i].rows), 0.0f, {}});
  team.run(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    Task& task = tasks[static_cast<size_t>(t)];
    thread_local Scratch wide;
    if (a.threshold > 0) task.marks.resize(static_cast<size_t>(k));
    for (int64_t m = task.begin; m < task.end; ++m) {
      const float* x = static_cast<const float*>(a.x) + m * k;
      if (a.type != Number::F32) {
        float* own = wide.get<float>(static_cast<size_t>(k));
        kernels.to_f32(a.x, a.type, m * k, k, own);
        x = own;
      }
      task.top = upper(task.top, kernels.survey(x, k, a.threshold, a.threshold > 0 ? task.marks.data() : nullptr));
    }
  });
  Common found;
  found.columns.resize(slices.size());
  std::vector<float> top(slices.size(), 0.0f);
  for (size_t first = 0; first < tasks.size();) {
    Task& task = tasks[first];
    const size_t slice = task.slice;
    size_t next = first;
    for (; next < tasks.size() && tasks[next].slice == slice; ++next) {
      const Task& other = tasks[next];
      top[slice] = upper(top[slice], other.top);
      if (next > first)
        for (size_t i = 0; i < other.marks.size(); ++i) task.marks[i] |= other.marks[i];
    }
    for (size_t i = 0; i < task.marks.size(); ++i)
      if (task.marks[i]) found.columns[slice].push_back(static_cast<int32_t>(i));
    first = next;
  }
  if (a.shared) {
    found.scale.assign(static_cast<size_t>(rows), 1.0f);
    const bool two = a.mode == Quantize::Float && a.format.rule == Rule::TwoLevel;
    for (size_t i = 0; i < slices.size(); ++i)
      std::fill_n(found.scale.begin() + slices[i].row, slices[i].rows, usable(top[i] * a.clip / (two ? a.highest * 448.0f : a.highest)));
  }
  return found;
}

}  // namespace
}  // namespace qfunc
