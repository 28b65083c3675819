// How the scales of a block meet its decoded vectors, and which decoder a weight takes.
#pragma once
#include "avx512_codes.h"

namespace qfunc {
namespace {

// Where block b of a row starts; the last block of whole-byte codes is completed with zeros.
template <int BytesPerBlock>
inline const uint8_t* block_at(const Weight& w, const uint8_t* row, int64_t b, uint8_t* tail) {
  const uint8_t* p = row + b * BytesPerBlock;
  if constexpr (BytesPerBlock == kBlock) {
    if ((b + 1) * kBlock > w.k) {
      block_bytes(w, row, b, tail);
      return tail;
    }
  }
  return p;
}

// Block b of a row into a decoder.
template <class Decode>
inline void load_block(Decode& decode, const Weight& w, const uint8_t* row, int64_t b, uint8_t* tail) {
  if constexpr (Decode::bytes_per_block == 0) decode.load_block(row, b);
  else decode.load(block_at<Decode::bytes_per_block>(w, row, b, tail));
}

// The bytes of the next rows, asked for in the order of their addresses while these rows are computed. Rows that are read side by side
// are as many streams of a few pages each, which the hardware does not follow; a single rising address it does.
class NextRows {
 public:
  // `count` rows of `blocks` blocks from `row` on are computed.
  NextRows(const Weight& w, const uint8_t* row, int count, int64_t blocks)
      : next_(reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(std::max(count * w.row_bytes, kLeast))), step_(count * w.row_bytes / blocks) {}
  // Once for each block; `Bytes` of them are decoded at a time, 0: not known here.
  template <int Bytes>
  inline void ask() {
    const int64_t step = Bytes ? Bytes : step_;
#pragma GCC unroll 8
    for (int64_t i = 0; i < step; i += 64) _mm_prefetch(reinterpret_cast<const char*>(next_ + static_cast<uintptr_t>(i)), _MM_HINT_T0);
    next_ += static_cast<uintptr_t>(step);
  }

 private:
  static constexpr int64_t kLeast = 2048;
  uintptr_t next_;
  int64_t step_;
};

// Scales of a row are kept with a vector of zeros behind them, so that a block at the edge can load past the last.
inline int64_t scales_stride(const Weight& w) { return (w.segments + 31) / 16 * 16; }
inline void end_scales(const Weight& w, float* s) {
  for (int64_t i = w.segments; i < scales_stride(w); ++i) s[i] = 0.0f;
}

// The scales of a block as one vector for every vector of the block, in the decoder's order of codes.
template <bool Natural>
class Spreader {
 public:
  explicit Spreader(const Weight& w) : group_(w.group), segments_(w.segments) {
    kind_ = w.group >= w.k ? Kind::Row : w.group % kBlock == 0 ? Kind::Block : w.group == 16 || w.group == 32 || w.group == 64 ? Kind::Even : Kind::Any;
    // A division by multiplication: exact below 2^16 blocks, and a division for every block would cost more than the block.
    if (kind_ == Kind::Block) inverse_ = ((uint64_t{1} << 32) + static_cast<uint64_t>(w.group / kBlock) - 1) / static_cast<uint64_t>(w.group / kBlock);
    if (kind_ != Kind::Even) return;
    per_ = kBlock / w.group;
    low_ = lane_shift(1, static_cast<int>(w.group / 4));
    high_ = _mm512_add_epi32(low_, _mm512_set1_epi32(static_cast<int>(64 / w.group)));
    for (int v = 0; v < 8; ++v) at_[v] = 16 * v / w.group;
  }
  // Lanes order only: the scales of the even and of the odd vectors.
  inline void halves(const float* s, int64_t b, __m512& even, __m512& odd) const {
    if (kind_ == Kind::Even) {
      const __m512 all = _mm512_loadu_ps(s + b * per_);
      even = _mm512_permutexvar_ps(low_, all);
      odd = _mm512_permutexvar_ps(high_, all);
    } else {
      even = odd = _mm512_set1_ps(s[whole(b)]);
    }
  }
  // The segment of block b where segments hold whole blocks.
  inline int64_t whole(int64_t b) const { return static_cast<int64_t>(static_cast<uint64_t>(b) * inverse_ >> 32); }
  inline bool any() const { return kind_ == Kind::Any; }
  inline bool even() const { return kind_ == Kind::Even; }
  // Natural order, groups of 16 to 64: where the scale of vector V of block b is.
  inline int64_t start(int64_t b) const { return b * per_; }
  inline int64_t at(int v) const { return at_[v]; }
  inline void all(const float* s, int64_t b, __m512* out) const {
    if (kind_ == Kind::Any) return slow(s, b, out);
    if constexpr (Natural) {
      const float* own = s + (kind_ == Kind::Even ? b * per_ : whole(b));
      for (int v = 0; v < 8; ++v) out[v] = _mm512_set1_ps(own[kind_ == Kind::Even ? at_[v] : 0]);
    } else {
      halves(s, b, out[0], out[1]);
      for (int v = 2; v < 8; ++v) out[v] = out[v & 1];
    }
  }

 private:
  enum class Kind { Row, Block, Even, Any };
  // Any other group size, one lane at a time.
  void slow(const float* s, int64_t b, __m512* out) const {
    alignas(64) float wide[kBlock];
    const uint8_t* order = lanes_order();
    for (int i = 0; i < kBlock; ++i) {
      const int64_t segment = (b * kBlock + (Natural ? i : order[i])) / group_;
      wide[i] = segment < segments_ ? s[segment] : 0.0f;
    }
    for (int v = 0; v < 8; ++v) out[v] = _mm512_load_ps(wide + 16 * v);
  }
  Kind kind_;
  int64_t group_, segments_, per_ = 0;
  uint64_t inverse_ = 0;
  int64_t at_[8] = {};
  __m512i low_ = _mm512_setzero_si512(), high_ = _mm512_setzero_si512();
};

// The decoder of a weight code, handed to a generic function.
template <class F>
inline void with_decoder(const Weight& w, F&& f) {
  switch (w.code) {
    case Code::Int8: return f(static_cast<DecodeInt8<true>*>(nullptr));
    case Code::UInt8: return f(static_cast<DecodeInt8<false>*>(nullptr));
    case Code::E4M3: return f(static_cast<DecodeFloat8<true>*>(nullptr));
    case Code::E5M2: return f(static_cast<DecodeFloat8<false>*>(nullptr));
    case Code::E2M3: case Code::E3M2: return f(static_cast<DecodeFloat6*>(nullptr));
    case Code::Table4: return f(static_cast<DecodeTable<4>*>(nullptr));
    case Code::Ggml: return f(static_cast<DecodeGgml*>(nullptr));
    case Code::Packed: break;
  }
  switch (w.bits) {
    case 2: return f(static_cast<DecodeTable<2>*>(nullptr));
    case 3: return f(static_cast<DecodeTable<3>*>(nullptr));
    case 4: return f(static_cast<DecodeTable<4>*>(nullptr));
    case 5: return f(static_cast<DecodeWide<5>*>(nullptr));
    case 6: return f(static_cast<DecodeWide<6>*>(nullptr));
    default: return f(static_cast<DecodeWide<7>*>(nullptr));
  }
}

}  // namespace
}  // namespace qfunc
