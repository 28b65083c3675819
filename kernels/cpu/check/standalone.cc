// The kernels without XLA or Python: every code, granularity and zero point on odd shapes against sums in double precision.
// For cross-compiled targets under an emulator, for the sanitizers, and (with an argument) for a profiler:
//   standalone                       checks; exits 1 at the first product that differs
//   standalone M K N code group mode [f32|e4m3|e8m0 [threads]]  repeats one product for a second, each time with other weights;
//   modes: 0 float activations, 1 int8, 2 to 6 small floats in the order of kFormats
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../src/matmul.h"

using namespace qfunc;

namespace {

std::mt19937 rng(7);
int64_t below(int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }
float normal() { return std::normal_distribution<float>()(rng); }

struct Element {
  const char* name;
  Code code;
  int32_t bits, offset;
};
const Element kElements[] = {
    {"int8", Code::Int8, 8, 0},      {"uint8", Code::UInt8, 8, 0},    {"int2", Code::Packed, 2, 2},   {"int3", Code::Packed, 3, 4},
    {"int4", Code::Packed, 4, 8},    {"int5", Code::Packed, 5, 16},   {"int6", Code::Packed, 6, 32},  {"int7", Code::Packed, 7, 64},
    {"uint4", Code::Packed, 4, 0},   {"table4", Code::Table4, 4, 0},  {"e2m3", Code::E2M3, 6, 0},     {"e3m2", Code::E3M2, 6, 0},
    {"e4m3", Code::E4M3, 8, 0},      {"e5m2", Code::E5M2, 8, 0},       {"e2m1", Code::Table4, 4, 0},
};

// Small float activations: e4m3 by row, as MX, e2m3 as MX, e2m1 as MX and with two levels.
const FloatFormat kFormats[] = {
    {3, -6, 448, 7, Rule::Amax, 1, 0, 0}, {3, -6, 448, 7, Rule::Power, 1, 0, 8}, {3, 0, 7.5f, 5, Rule::Power, 1, 0, 2},
    {1, 0, 6, 3, Rule::Power, 1, 0, 2},   {1, 0, 6, 3, Rule::TwoLevel, 1, 0, 0},
};

// The value of stored code c, by the definitions of the formats.
double minifloat(int c, int exponent_bits, int mantissa_bits, int bias) {
  const int mantissa = c & ((1 << mantissa_bits) - 1), exponent = (c >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double magnitude = exponent ? std::ldexp(1.0 + std::ldexp(mantissa, -mantissa_bits), exponent - bias) : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return (c >> (exponent_bits + mantissa_bits)) & 1 ? -magnitude : magnitude;
}

// The nearest number of a format, halves to the even code, found by looking at all of them.
double nearest_of(const FloatFormat& f, double y) {
  double best = 0, distance = INFINITY;
  for (int c = 0; c < 1 << f.sign; ++c) {
    const double value = minifloat(c, f.sign - f.mantissa, f.mantissa, 1 - f.exponent), apart = std::fabs(std::fabs(y) - value);
    if (value <= f.largest && (apart < distance || (apart == distance && c % 2 == 0))) best = value, distance = apart;
  }
  return std::copysign(best, y);
}

float scale_of(const FloatFormat& f, float top, float row_top) {
  if (f.rule == Rule::Power) return std::ldexp(1.0f, static_cast<int>(std::floor(std::log2(top))) - f.emax);
  if (f.rule == Rule::Amax) return top / f.largest;
  const float outer = row_top / (f.largest * 448.0f);
  return static_cast<float>(nearest_of(kFormats[0], std::max(top / f.largest / outer, 0.001953125f))) * outer;
}

struct Problem {
  Element element;
  int64_t m, k, n, group, share, batch;
  Zero zero_kind;
  Number scale_type;
  Quantize mode;
  int64_t x_group;
  bool x_zero;
  int format;
};

int code_at(const Problem& p, const std::vector<uint8_t>& codes, int64_t row_bytes, int64_t row, int64_t k) {
  if (p.element.bits == 8) return codes[row * row_bytes + k];
  const uint8_t* block = codes.data() + row * row_bytes + k / 128 * 16 * p.element.bits;
  int value = 0, low = 0, j = static_cast<int>(k % 128);
  for (int width = 4; width; width /= 2) {
    if (!(p.element.bits & width)) continue;
    value |= (block[j % (16 * width)] >> (j / (16 * width) * width) & ((1 << width) - 1)) << low;
    block += 16 * width;
    low += width;
  }
  return value;
}

double value_of(const Problem& p, const std::vector<float>& table, int c) {
  switch (p.element.code) {
    case Code::Int8: return static_cast<int8_t>(c);
    case Code::UInt8: return c;
    case Code::Packed: return c - p.element.offset;
    case Code::Table4: return table[c];
    case Code::E2M3: return minifloat(c, 2, 3, 1);
    case Code::E3M2: return minifloat(c, 3, 2, 3);
    case Code::E4M3: return minifloat(c, 4, 3, 7);
    case Code::E5M2: return minifloat(c, 5, 2, 15);
    case Code::Ggml: break;  // held to the reference by the tests in Python
  }
  return 0;
}

struct Threads {
  std::vector<std::thread> running;
  Pool pool{3, [this](std::function<void()> task) { running.emplace_back(std::move(task)); }};
  ~Threads() { for (auto& t : running) t.join(); }
};

struct Data {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero_f, table, x, x_scale, y, bias, outer;
  std::vector<uint8_t> scale_bytes, zero_u;
  std::vector<int8_t> x_codes;
  std::vector<int32_t> x_zero;
  Matrices w{};
  Activation a{};
};

void fill(const Problem& p, Data& d) {
  const int64_t row_bytes = p.element.bits == 8 ? p.k : (p.k + 127) / 128 * 16 * p.element.bits;
  const int64_t outs = p.share ? (p.n + p.share - 1) / p.share : 1, segments = (p.k + p.group - 1) / p.group, cells = p.batch * outs * segments;
  d.codes.resize(p.batch * p.n * row_bytes);
  for (auto& c : d.codes) {
    c = static_cast<uint8_t>(rng());
    if (p.element.code == Code::E4M3 && (c & 0x7f) == 0x7f) c = 1;
    if (p.element.code == Code::E5M2 && (c & 0x7c) == 0x7c) c = 1;
  }
  const bool e2m1 = !std::strcmp(p.element.name, "e2m1");
  if (p.element.code == Code::Table4) for (int i = 0; i < 16; ++i) d.table.push_back(e2m1 ? static_cast<float>(minifloat(i, 2, 1, 1)) : normal());
  if (p.element.code == Code::E2M3 || p.element.code == Code::E3M2)
    for (int i = 0; i < 32; ++i) d.table.push_back(static_cast<float>(value_of(p, d.table, i)));
  for (int64_t i = 0; i < cells; ++i) {
    const int byte = p.scale_type == Number::E8M0 ? 120 + static_cast<int>(below(12)) : 1 + static_cast<int>(below(120));
    d.scale_bytes.push_back(static_cast<uint8_t>(byte));
    d.scale.push_back(p.scale_type == Number::F32 ? 0.01f + 0.1f * std::fabs(normal())
                      : p.scale_type == Number::E8M0 ? std::ldexp(1.0f, byte - 127) : static_cast<float>(minifloat(byte, 4, 3, 7)));
    d.zero_f.push_back(normal());
    d.zero_u.push_back(static_cast<uint8_t>(below(1 << p.element.bits)));
  }
  for (int64_t i = 0; i < p.batch; ++i) d.outer.push_back(1.5f + static_cast<float>(i));
  for (int64_t i = 0; i < p.batch * p.n; ++i) d.bias.push_back(normal());
  for (int64_t i = 0; i < p.batch * p.m * p.k; ++i) {
    d.x.push_back(normal() + 0.5f);
    d.x_codes.push_back(static_cast<int8_t>(below(255) - 127));
  }
  const int64_t steps = p.x_group < p.k ? (p.k + p.x_group - 1) / p.x_group : 1;
  for (int64_t i = 0; i < p.batch * p.m * steps; ++i) d.x_scale.push_back(0.01f + 0.1f * std::fabs(normal()));
  for (int64_t i = 0; i < p.batch * p.m; ++i) d.x_zero.push_back(static_cast<int32_t>(below(64)) - 32);
  d.y.assign(p.batch * p.m * p.n, -1e30f);

  Weight& w = d.w.first;
  w.codes = d.codes.data();
  w.row_bytes = row_bytes;
  w.n = p.n;
  w.k = p.k;
  w.code = p.element.code;
  w.bits = p.element.bits;
  w.offset = p.element.offset;
  w.table = d.table.data();
  w.scale_type = p.scale_type;
  w.scale = p.scale_type == Number::F32 ? static_cast<const void*>(d.scale.data()) : d.scale_bytes.data();
  w.segments = segments;
  w.group = p.group;
  w.share = p.share;
  if (p.scale_type == Number::E4M3) w.outer = d.outer.data();
  w.zero_kind = p.zero_kind;
  w.zero = p.zero_kind == Zero::Int ? static_cast<const void*>(d.zero_u.data()) : d.zero_f.data();
  d.w.count = p.batch;
  d.w.code_bytes = p.n * row_bytes;
  d.w.scale_bytes = outs * segments * (p.scale_type == Number::F32 ? 4 : 1);
  d.w.zero_bytes = outs * segments * (p.zero_kind == Zero::Int ? 1 : 4);
  d.w.outer_items = 1;
  d.w.bias = d.bias.data();
  d.w.bias_type = Number::F32;
  d.a.mode = p.mode;
  d.a.x = p.mode == Quantize::Codes ? static_cast<const void*>(d.x_codes.data()) : d.x.data();
  d.a.type = Number::F32;
  d.a.scale = p.mode == Quantize::Float ? nullptr : d.x_scale.data();
  d.a.format = kFormats[p.format];
  d.a.zero = p.x_zero ? d.x_zero.data() : nullptr;
  d.a.scale_step = steps;
  d.a.group = p.x_group;
  d.a.clip = 1;
  d.a.lowest = -127;
  d.a.highest = 127;
  d.a.threshold = 0;
  d.a.shared = false;
  d.a.limit = 131071;
}

double error_of(const Problem& p, const Data& d) {
  const int64_t outs = p.share ? (p.n + p.share - 1) / p.share : 1, segments = d.w.first.segments, steps = d.a.scale_step;
  std::vector<double> x(p.k);
  double distance = 0, size = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.m; ++m) {
      const int64_t row = b * p.m + m;
      const int64_t own = p.mode == Quantize::Token ? p.k : p.x_group;
      for (int64_t k = 0; k < p.k; ++k) {
        if (p.mode == Quantize::None) x[k] = d.x[row * p.k + k];
        else if (p.mode == Quantize::Codes) x[k] = (d.x_codes[row * p.k + k] - (p.x_zero ? d.x_zero[row] : 0)) * static_cast<double>(d.x_scale[row * steps + (steps > 1 ? k / p.x_group : 0)]);
        else {
          float top = 0;
          const int64_t start = k / own * own;
          for (int64_t i = start; i < std::min(p.k, start + own); ++i) top = std::max(top, std::fabs(d.x[row * p.k + i]));
          if (p.mode == Quantize::Float) {
            float row_top = 0;
            for (int64_t i = 0; i < p.k; ++i) row_top = std::max(row_top, std::fabs(d.x[row * p.k + i]));
            const float s = scale_of(d.a.format, top, row_top);
            x[k] = nearest_of(d.a.format, d.x[row * p.k + k] / s) * s;
            continue;
          }
          const float s = top / 127.0f;
          x[k] = static_cast<double>(std::nearbyint(d.x[row * p.k + k] / s)) * s;
        }
      }
      for (int64_t n = 0; n < p.n; ++n) {
        double sum = d.bias[b * p.n + n];
        for (int64_t k = 0; k < p.k; ++k) {
          const int64_t cell = (b * outs + (p.share ? n / p.share : 0)) * segments + k / p.group;
          double value = value_of(p, d.table, code_at(p, d.codes, d.w.first.row_bytes, b * p.n + n, k));
          if (p.zero_kind == Zero::Int) value -= d.zero_u[cell];
          value *= d.scale[cell] * (p.scale_type == Number::E4M3 ? d.outer[b] : 1.0f);
          if (p.zero_kind == Zero::Float) value += d.zero_f[cell];
          sum += x[k] * value;
        }
        const double got = d.y[row * p.n + n];
        distance += (got - sum) * (got - sum);
        size += sum * sum;
      }
    }
  return std::sqrt(distance / std::max(size, 1e-300));
}

bool check(const Kernels& kernels, const Problem& p) {
  Data d;
  fill(p, d);
  std::vector<Slice> slices;
  for (int64_t b = 0; b < p.batch; ++b) slices.push_back({b * p.m, p.m, b});
  {
    Threads threads;
    multiply(kernels, threads.pool, d.w, d.a, slices, d.y.data(), Number::F32);
  }
  const double error = error_of(p, d), limit = p.mode == Quantize::None || p.mode == Quantize::Float ? 1e-5 : 2e-6;
  if (error <= limit) return true;
  std::printf("FAIL %s: M %ld K %ld N %ld group %ld share %ld zero %d scale %d mode %d x_group %ld x_zero %d: %.2e\n", p.element.name, long(p.m), long(p.k), long(p.n),
              long(p.group), long(p.share), int(p.zero_kind), int(p.scale_type), int(p.mode), long(p.x_group), int(p.x_zero), error);
  return false;
}

// A second thread that waits for work without sleeping, as a pool that is in use has it.
struct Companion {
  std::atomic<std::function<void()>*> next{nullptr};
  std::atomic<bool> stop{false};
  std::thread thread{[this] {
    while (!stop)
      if (std::function<void()>* task = next.exchange(nullptr)) {
        (*task)();
        delete task;
      }
  }};
  Pool pool{2, [this](std::function<void()> task) { delete next.exchange(new std::function<void()>(std::move(task))); }};
  ~Companion() {
    stop = true;
    thread.join();
    delete next.exchange(nullptr);
  }
};

constexpr int64_t kBeyondCaches = int64_t{256} << 20;

int repeat(const Kernels& kernels, int argc, char** argv) {
  Problem p{kElements[0], std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]), 0, 1, 1, Zero::None, Number::F32, Quantize::None, 0, false, 0};
  for (const Element& e : kElements) if (!std::strcmp(e.name, argv[4])) p.element = e;
  p.group = std::min<int64_t>(p.k, std::atoll(argv[5]));
  const int mode = std::atoi(argv[6]);
  p.mode = mode == 0 ? Quantize::None : mode == 1 ? Quantize::Token : Quantize::Float;
  p.format = std::max(0, mode - 2);
  p.x_group = mode < 3 ? p.k : mode == 6 ? 16 : 32;
  const std::string scales = argc > 7 ? argv[7] : "f32";
  if (scales != "f32") p.scale_type = scales == "e8m0" ? Number::E8M0 : Number::E4M3;
  const bool two = argc > 8 && std::atoi(argv[8]) > 1;
  // Every product meets another matrix, and all of them are more than any cache holds.
  p.batch = 1 + kBeyondCaches / (p.k * p.n * p.element.bits / 8);
  Data d;
  fill(p, d);
  Companion companion;
  std::vector<double> times;
  int64_t turn = 0;
  // On one thread processor time, which a crowded machine lengthens little.
  const auto now = [two] {
    timespec t;
    clock_gettime(two ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  for (double total = 0; total < 1;) {
    const double start = now();
    multiply(kernels, two ? companion.pool : Pool{}, d.w, d.a, {{0, p.m, turn++ % p.batch}}, d.y.data(), Number::F32);
    times.push_back(now() - start);
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  const double middle = times[times.size() / 2], bytes = static_cast<double>(d.w.code_bytes + d.w.scale_bytes);
  std::printf("%s %s M %ld, %d thread: median %.3f ms, best %.3f; at the median %.1f GB/s, %.1f GMAC/s\n", kernels.name, p.element.name, long(p.m), two ? 2 : 1,
              middle * 1e3, times[0] * 1e3, bytes / middle / 1e9, static_cast<double>(p.m * p.k * p.n) / middle / 1e9);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char* reason = nullptr;
  const Kernels* kernels = select_kernels(&reason);
  if (!kernels) return std::printf("%s\n", reason), 2;
  if (argc >= 7) return repeat(*kernels, argc, argv);
  int64_t done = 0;
  bool good = true;
  for (const Element& e : kElements)
    for (int64_t m : {1, 2, 3, 5, 9, 17, 40})
      for (int shape = 0; shape < 4; ++shape) {
        const int64_t k = (e.bits == 8 ? 64 : 128) + 4 * below(120) + below(2) * below(4), n = 1 + below(60), groups[] = {k, 128, 32, 16, 64, 256, 20};
        const bool integer = e.code <= Code::Packed;
        Problem p{e, m, k, n, std::min(k, groups[below(7)]), below(3) == 0 ? 0 : 1, 1 + below(2), Zero::None, Number::F32, Quantize::None, k, false, 0};
        if (below(4) == 0) p.share = 1 + below(40);
        if (integer && e.offset == 0 && e.code != Code::Int8) p.zero_kind = static_cast<Zero>(below(3));
        if (p.zero_kind == Zero::None) p.scale_type = below(3) == 0 ? Number::E8M0 : below(2) ? Number::E4M3 : Number::F32;
        good &= check(*kernels, p), ++done;
        p.mode = Quantize::Float;
        p.format = static_cast<int>(below(5));
        p.x_group = p.format == 0 ? k : std::min<int64_t>(k, p.format == 4 ? 16 : 32);
        if (m > 1) good &= check(*kernels, p), ++done;
        p.x_group = k;
        if (!integer || p.zero_kind == Zero::Float) continue;
        p.mode = Quantize::Token;
        good &= check(*kernels, p), ++done;
        p.mode = Quantize::Codes;
        p.x_zero = below(2);
        good &= check(*kernels, p), ++done;
        p.x_zero = false;
        p.mode = Quantize::Group;
        p.x_group = std::min<int64_t>(k, 32 << below(3));
        good &= check(*kernels, p), ++done;
      }
  std::printf("%s: %ld products %s\n", kernels->name, long(done), good ? "agree" : "DIFFER");
  return good ? 0 : 1;
}
