// Prefill path (many rows of x) of integer products in AVX-512 VNNI, and of small floats that are whole numbers of one unit.
#include "avx512.h"
#include "avx512_small_tile.h"

namespace qfunc {
namespace {

template <int Bits, bool Flip = false>
struct Codes {
  static constexpr int bits = Bits;
  int32_t offset;
  explicit Codes(const Weight& w) : offset(w.offset + (Flip ? 128 : 0)) {}
  inline void block(const uint8_t* p, uint8_t* to) const {
    __m512i lo, hi;
    bytes<Bits, Flip>(p, lo, hi);
    _mm512_storeu_si512(to, lo);
    _mm512_storeu_si512(to + 64, hi);
  }
};

// Values of a table, counted in its unit, above kMiddle: 16 of them, or 32 magnitudes and a sign.
template <int Bits>
struct Wholes {
  static constexpr int bits = Bits;
  static constexpr int32_t offset = kMiddle;
  __m512i low, high;
  explicit Wholes(const Weight& w) {
    alignas(64) uint8_t magnitude[32];
    for (int i = 0; i < (Bits == 4 ? 16 : 32); ++i) magnitude[i] = static_cast<uint8_t>(static_cast<int32_t>(w.table[i] * static_cast<float>(w.whole)) + (Bits == 4 ? kMiddle : 0));
    low = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(magnitude)));
    high = Bits == 4 ? low : _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(magnitude + 16)));
  }
  inline __m512i value(__m512i code) const {
    if constexpr (Bits == 4) return _mm512_shuffle_epi8(low, code);
    const __m512i index = _mm512_and_si512(code, _mm512_set1_epi8(15)), middle = _mm512_set1_epi8(kMiddle);
    const __m512i magnitude = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(low, index), _mm512_test_epi8_mask(code, _mm512_set1_epi8(16)), high, index);
    return _mm512_mask_sub_epi8(_mm512_add_epi8(middle, magnitude), _mm512_test_epi8_mask(code, _mm512_set1_epi8(32)), middle, magnitude);
  }
  inline void block(const uint8_t* p, uint8_t* to) const {
    __m512i lo, hi;
    bytes<Bits>(p, lo, hi);
    _mm512_storeu_si512(to, value(lo));
    _mm512_storeu_si512(to + 64, value(hi));
  }
};

}  // namespace

namespace avx512 {

void int_tile(const Product& p, int64_t n0, int64_t n1) {
  if (p.w->whole) return p.w->code == Code::Table4 ? small_tile<IntDots, Wholes<4>>(p, n0, n1) : small_tile<IntDots, Wholes<6>>(p, n0, n1);
  switch (p.w->lowbits()) {
    case 2: return small_tile<IntDots, Codes<2>>(p, n0, n1);
    case 3: return small_tile<IntDots, Codes<3>>(p, n0, n1);
    case 4: return small_tile<IntDots, Codes<4>>(p, n0, n1);
    case 5: return small_tile<IntDots, Codes<5>>(p, n0, n1);
    case 6: return small_tile<IntDots, Codes<6>>(p, n0, n1);
    case 7: return small_tile<IntDots, Codes<7>>(p, n0, n1);
    default: return p.w->code == Code::Int8 ? small_tile<IntDots, Codes<8, true>>(p, n0, n1) : small_tile<IntDots, Codes<8>>(p, n0, n1);
  }
}

}  // namespace avx512
}  // namespace qfunc
