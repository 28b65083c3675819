// Decoding in AVX-512 registers.
#pragma once
#include <immintrin.h>

#include "codes.h"

namespace qfunc {
namespace {

// ---- bytes in natural order, for integer products -------------------------------------------------------------------------
inline __m512i shifts16(int a, int b, int c, int d) {
  return _mm512_set_epi64(d * 0x0001000100010001LL, d * 0x0001000100010001LL, c * 0x0001000100010001LL, c * 0x0001000100010001LL,
                          b * 0x0001000100010001LL, b * 0x0001000100010001LL, a * 0x0001000100010001LL, a * 0x0001000100010001LL);
}

// The unsigned codes 0..63 and 64..127 of a block; int8 becomes offset binary.
template <int Bits, bool Flip = false>
inline void bytes(const uint8_t* p, __m512i& lo, __m512i& hi) {
  if constexpr (Bits == 8) {
    lo = _mm512_loadu_si512(p);
    hi = _mm512_loadu_si512(p + 64);
    if constexpr (Flip) {
      const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
      lo = _mm512_xor_si512(lo, flip);
      hi = _mm512_xor_si512(hi, flip);
    }
    return;
  }
  lo = hi = _mm512_setzero_si512();
  if constexpr (Bits & 4) {
    const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    lo = _mm512_and_si512(v, mask);
    hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    p += 64;
  }
  if constexpr (Bits & 2) {
    const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), mask = _mm512_set1_epi8(3);
    const __m512i a = _mm512_and_si512(_mm512_srlv_epi16(v, shifts16(0, 0, 2, 2)), mask);
    const __m512i b = _mm512_and_si512(_mm512_srlv_epi16(v, shifts16(4, 4, 6, 6)), mask);
    lo = _mm512_or_si512(lo, _mm512_slli_epi16(a, (Bits & 4)));
    hi = _mm512_or_si512(hi, _mm512_slli_epi16(b, (Bits & 4)));
    p += 32;
  }
  if constexpr (Bits & 1) {
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), mask = _mm512_set1_epi8(1);
    const __m512i a = _mm512_and_si512(_mm512_srlv_epi16(v, shifts16(0, 1, 2, 3)), mask);
    const __m512i b = _mm512_and_si512(_mm512_srlv_epi16(v, shifts16(4, 5, 6, 7)), mask);
    lo = _mm512_or_si512(lo, _mm512_slli_epi16(a, (Bits & 6)));
    hi = _mm512_or_si512(hi, _mm512_slli_epi16(b, (Bits & 6)));
  }
}

// ---- 16 values at a time, for float products ------------------------------------------------------------------------------
// A decoder is loaded with one block; vec<V>() are its eight vectors. In `lanes` order lane j of vector V holds the code
// 64 (V & 1) + 4 j + (V >> 1): a double word is shifted by 4 V, and nothing is ever moved between lanes.
inline __m512i lane_shift(int step, int per) {
  alignas(64) int32_t s[16];
  for (int j = 0; j < 16; ++j) s[j] = step * (j / per);
  return _mm512_load_si512(s);
}

// Fields of a plane at bit 4 V of each double word (2-bit and 1-bit planes are broadcast and shifted into place).
inline __m512i plane2(const uint8_t* p) {
  const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_srlv_epi32(v, lane_shift(2, 8));
}
inline __m512i plane1(const uint8_t* p) {
  const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_srlv_epi32(v, lane_shift(1, 4));
}
inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

// Up to 4 bits: any values, by a table of 16 in a register.
template <int Bits>
struct DecodeTable {
  static constexpr bool natural = false, tabled = true;
  static constexpr int bytes_per_block = 16 * Bits;
  __m512 table, scaled;
  __m512i state;
  explicit DecodeTable(const Weight& w) {
    alignas(64) float t[16];
    for (int i = 0; i < 16; ++i) t[i] = w.code == Code::Table4 ? w.table[i] : static_cast<float>((i & ((1 << Bits) - 1)) - w.offset);
    table = _mm512_load_ps(t);
  }
  inline void load(const uint8_t* p) {
    if constexpr (Bits == 4) state = _mm512_loadu_si512(p);
    if constexpr (Bits == 2) state = plane2(p);
    if constexpr (Bits == 3) {
      const __m512i one = _mm512_rol_epi32(plane1(p + 32), 2);
      state = select(_mm512_set1_epi32(0x33333333), plane2(p), one);
    }
  }
  template <int V>
  inline __m512 vec() const { return _mm512_permutexvar_ps(_mm512_srli_epi32(state, 4 * V), table); }
  // Where a block has one scale, it is applied to the table.
  inline void scale(__m512 s) { scaled = _mm512_mul_ps(table, s); }
  inline void scale(__m512 s, __m512 shift) { scaled = _mm512_fmadd_ps(table, s, shift); }
  template <int V>
  inline __m512 scaled_vec() const { return _mm512_permutexvar_ps(_mm512_srli_epi32(state, 4 * V), scaled); }
};

// 5 to 7 bits: the low nibble and the bits above it.
template <int Bits>
struct DecodeWide {
  static constexpr bool natural = false, tabled = false;
  static constexpr int bytes_per_block = 16 * Bits;
  __m512i nibbles, high, offset;
  explicit DecodeWide(const Weight& w) : offset(_mm512_set1_epi32(w.offset)) {}
  inline void load(const uint8_t* p) {
    nibbles = _mm512_loadu_si512(p);
    if constexpr (Bits == 5) high = _mm512_rol_epi32(plane1(p + 64), 4);
    if constexpr (Bits == 6) high = _mm512_rol_epi32(plane2(p + 64), 4);
    if constexpr (Bits == 7)  // two bits and one: together three of every four, rotated above the nibble
      high = _mm512_rol_epi32(select(_mm512_set1_epi32(0x33333333), plane2(p + 64), _mm512_rol_epi32(plane1(p + 96), 2)), 4);
  }
  template <int V>
  inline __m512i code() const {
    const __m512i both = select(_mm512_set1_epi32(15), _mm512_srli_epi32(nibbles, 4 * V), _mm512_ror_epi32(high, 4 * V));
    return _mm512_and_si512(both, _mm512_set1_epi32((1 << Bits) - 1));
  }
  template <int V>
  inline __m512 vec() const { return _mm512_cvtepi32_ps(_mm512_sub_epi32(code<V>(), offset)); }
};

// e2m3 and e3m2: 32 magnitudes in two registers and a sign.
struct DecodeFloat6 {
  static constexpr bool natural = false, tabled = false;
  static constexpr int bytes_per_block = 96;
  DecodeWide<6> wide;
  __m512 low, high;
  explicit DecodeFloat6(const Weight& w) : wide(w), low(_mm512_loadu_ps(w.table)), high(_mm512_loadu_ps(w.table + 16)) {}
  inline void load(const uint8_t* p) { wide.load(p); }
  template <int V>
  inline __m512 vec() const {
    const __m512i code = wide.code<V>();
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(32)), 26);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(_mm512_permutex2var_ps(low, code, high)), sign));
  }
};

template <bool Signed>
struct DecodeInt8 {
  static constexpr bool natural = true, tabled = false;
  static constexpr int bytes_per_block = 128;
  const uint8_t* p;
  explicit DecodeInt8(const Weight&) {}
  inline void load(const uint8_t* from) { p = from; }
  template <int V>
  inline __m512 vec() const {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * V));
    return _mm512_cvtepi32_ps(Signed ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
  }
};

// fp8 through half precision, whose conversion is exact for subnormals whatever the flush modes are.
template <bool E4M3>
struct DecodeFloat8 {
  static constexpr bool natural = true, tabled = false;
  static constexpr int bytes_per_block = 128;
  const uint8_t* p;
  explicit DecodeFloat8(const Weight&) {}
  inline void load(const uint8_t* from) { p = from; }
  template <int V>
  inline __m512 vec() const {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * V));
    if constexpr (!E4M3) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(v), 8));
    const __m256i wide = _mm256_cvtepi8_epi16(v);
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(v, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
    half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  }
};

// ggml's blocks are decoded by plain loops, their own scales included, and read again from the first-level cache.
struct DecodeGgml {
  static constexpr bool natural = true, tabled = false;
  static constexpr int bytes_per_block = 0;
  const Weight* w;
  alignas(64) float values[kBlock];
  explicit DecodeGgml(const Weight& weight) : w(&weight) {}
  inline void load_block(const uint8_t* row, int64_t b) { ggml_block(*w, row, b, values); }
  template <int V>
  inline __m512 vec() const { return _mm512_load_ps(values + 16 * V); }
};

inline const uint8_t* lanes_order() {
  static const struct Order {
    uint8_t at[128];
    Order() {
      for (int v = 0; v < 8; ++v)
        for (int j = 0; j < 16; ++j) at[16 * v + j] = static_cast<uint8_t>(64 * (v & 1) + 4 * j + (v >> 1));
    }
  } order;
  return order.at;
}

}  // namespace
}  // namespace qfunc
