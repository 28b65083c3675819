// Prefill path (many rows of x) of products of small floats in AVX-512 BF16: every number of up to 8 significant bits is a bf16, and the
// product of two of them is a float32. Scales meet the sums.
#include "avx512.h"
#include "avx512_small_tile.h"

namespace qfunc {
namespace {

struct HalfDots {
  using Cell = uint16_t;
  using Sum = __m512;
  static constexpr bool kInteger = false;
  static constexpr int kPer = 2;
  static inline Sum zero() { return _mm512_setzero_ps(); }
  static inline Sum load(const void* p) { return _mm512_loadu_ps(p); }
  static inline void store(void* p, Sum v) { _mm512_storeu_ps(p, v); }
  static inline Sum add(Sum acc, __m512i w, __m512i x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  static inline __m512 floats(Sum v) { return v; }
};

// The upper and the lower bytes of the values of 16 or 128 codes; the sign of codes of eight bits is their highest one.
template <int Bits>
struct Halves {
  static constexpr int bits = Bits;
  static constexpr int32_t offset = 0;
  static constexpr int kCodes = Bits <= 4 ? 16 : 128;
  __m512i upper[2], lower[2], apart;
  explicit Halves(const Weight& w) {
    alignas(64) uint8_t up[128], low[128];
    for (int c = 0; c < kCodes; ++c) {
      const uint32_t number = to_bits(value_of(w, static_cast<uint8_t>(c))) >> 16;
      up[c] = static_cast<uint8_t>(number >> 8);
      low[c] = static_cast<uint8_t>(number);
    }
    for (int i = 0; i < 2; ++i) {
      upper[i] = Bits <= 4 ? _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(up))) : _mm512_load_si512(up + 64 * i);
      lower[i] = Bits <= 4 ? _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low))) : _mm512_load_si512(low + 64 * i);
    }
    // Upper and lower bytes are interleaved within quarters of a register: codes go where that leaves them in their natural order.
    apart = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  }
  static float value_of(const Weight& w, uint8_t c) {
    switch (w.code) {
      case Code::Table4: return w.table[c];
      case Code::E2M3: case Code::E3M2: return from_bits(to_bits(w.table[c & 31]) | (static_cast<uint32_t>(c & 32) << 26));
      case Code::E4M3: return e4m3(c);
      case Code::E5M2: return e5m2(c);
      default: return static_cast<float>(static_cast<int32_t>(c & ((1 << w.lowbits()) - 1)) - w.offset);
    }
  }
  inline void half(__m512i code, uint8_t* to) const {
    code = _mm512_permutexvar_epi64(apart, code);
    __m512i up, low;
    if constexpr (Bits <= 4) {
      up = _mm512_shuffle_epi8(upper[0], code);
      low = _mm512_shuffle_epi8(lower[0], code);
    } else {
      up = _mm512_permutex2var_epi8(upper[0], code, upper[1]);
      low = _mm512_permutex2var_epi8(lower[0], code, lower[1]);
      if constexpr (Bits == 8) up = _mm512_ternarylogic_epi32(up, code, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // up | code & 0x80
    }
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(low, up));
    _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi8(low, up));
  }
  inline void block(const uint8_t* p, uint8_t* to) const {
    __m512i lo, hi;
    bytes<Bits>(p, lo, hi);
    half(lo, to);
    half(hi, to + 128);
  }
};

}  // namespace

namespace avx512 {

double half_peak(int64_t rounds) {
  alignas(64) static const uint16_t numbers[32] = {0x3f80, 0x3f00};
  __m512 sums[12];
  const __m512i v = _mm512_load_si512(numbers);
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) sums[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      sums[j] = HalfDots::add(sums[j], v, v);
      asm volatile("" : "+v"(sums[j]));  // twelve equal sums would be computed once
    }
  }
  volatile float sink = 0;
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) sink = sink + _mm512_reduce_add_ps(sums[j]);
  return static_cast<double>(rounds) * 12 * 16 * HalfDots::kPer;
}

void half_tile(const Product& p, int64_t n0, int64_t n1) {
  switch (p.w->lowbits()) {
    case 2: return small_tile<HalfDots, Halves<2>>(p, n0, n1);
    case 3: return small_tile<HalfDots, Halves<3>>(p, n0, n1);
    case 4: return small_tile<HalfDots, Halves<4>>(p, n0, n1);
    case 5: return small_tile<HalfDots, Halves<5>>(p, n0, n1);
    case 6: return small_tile<HalfDots, Halves<6>>(p, n0, n1);
    case 7: return small_tile<HalfDots, Halves<7>>(p, n0, n1);
    default: return small_tile<HalfDots, Halves<8>>(p, n0, n1);
  }
}

}  // namespace avx512
}  // namespace qfunc
