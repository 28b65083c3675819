// Other people's packings of narrow codes to canonical rows, for loaders. Included once per instruction set.
//
// Canonical rows hold blocks of 128 codes as bit planes of 4, 2 and 1 bits (qfunc/_pack.py). 64 outputs at a time are unpacked to bytes
// side by side, so that every step works on 64 of them at once; the planes are then turned into rows, eight by eight bytes in a register.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace qfunc {

// The two packings, as compiled for one instruction set.
struct Repack {
  void (*stream)(const uint32_t* words, int64_t step, int64_t apart, int64_t count, int64_t outs, int64_t columns, int32_t bits,
                 const int32_t* order, int32_t fill, uint8_t* out, int64_t stride);
  void (*awq)(const uint32_t* words, int64_t step, int64_t groups, int64_t columns, int32_t fill, uint8_t* out, int64_t stride);
};
extern const Repack repack_generic, repack_avx2, repack_avx512;

namespace {

constexpr int64_t kBlock = 128, kLanes = 64;
using Codes = uint8_t[kBlock][kLanes];

// A bit stream: word i of output o is words[i * step + o * stride].
struct Stream {
  const uint32_t* words;
  int64_t step, stride;
};

// One code of all lanes: bits [shift, shift + bits) of `low`, continued in `high`.
template <int kShift, int kBits>
inline void take(const uint32_t* low, const uint32_t* high, uint8_t* out) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  if constexpr (kShift + kBits <= 32) {
    for (int64_t o = 0; o < kLanes; ++o) out[o] = static_cast<uint8_t>((low[o] >> kShift) & kMask);
  } else {
    for (int64_t o = 0; o < kLanes; ++o) out[o] = static_cast<uint8_t>(((low[o] >> kShift) | (high[o] << (32 - kShift))) & kMask);
  }
}

template <int kBits, int kCode>
inline void take_from(const uint32_t (*words)[kLanes], Codes codes) {
  if constexpr (kCode < 32) {
    constexpr int kWord = kCode * kBits / 32, kShift = kCode * kBits % 32;
    take<kShift, kBits>(words[kWord], words[kShift + kBits > 32 ? kWord + 1 : kWord], codes[kCode]);
    take_from<kBits, kCode + 1>(words, codes);
  }
}

// The codes of a block, 32 codes of every lane being `bits` whole words.
template <int kBits>
void unpack(const uint32_t (*words)[kLanes], Codes codes) {
  for (int64_t part = 0; part < 4; ++part) take_from<kBits, 0>(words + part * kBits, codes + part * 32);
}

void (*const kUnpack[9])(const uint32_t (*)[kLanes], Codes) = {nullptr, unpack<1>, unpack<2>, unpack<3>, unpack<4>,
                                                               unpack<5>, unpack<6>, unpack<7>, unpack<8>};

// A plane of digits of kWidth bits, the lowest at bit `low` of a code: byte j holds the digits of codes j, 16 width + j, ...
template <int kWidth>
inline void plane(const Codes codes, int low, uint8_t (*out)[kLanes]) {
  constexpr int kRows = 16 * kWidth;
  constexpr uint8_t kMask = (1 << kWidth) - 1;
  for (int j = 0; j < kRows; ++j) {
    for (int64_t o = 0; o < kLanes; ++o) {
      uint8_t byte = 0;
      for (int i = 0; i < 8 / kWidth; ++i) byte |= static_cast<uint8_t>(((codes[i * kRows + j][o] >> low) & kMask) << (i * kWidth));
      out[j][o] = byte;
    }
  }
}

void pack(const Codes codes, int bits, uint8_t (*out)[kLanes]) {
  if (bits == 8) {
    std::memcpy(out, codes, sizeof(Codes));
    return;
  }
  int low = 0;
  if (bits & 4) plane<4>(codes, low, out), low += 4, out += 64;
  if (bits & 2) plane<2>(codes, low, out), low += 2, out += 32;
  if (bits & 1) plane<1>(codes, low, out);
}

// Eight rows of eight bytes, transposed (Hacker's Delight, 7-3).
inline void turn(uint64_t x[8]) {
  const auto swap = [&](int a, int b, int shift, uint64_t mask) {
    const uint64_t t = ((x[a] >> shift) ^ x[b]) & mask;
    x[b] ^= t;
    x[a] ^= t << shift;
  };
  for (int i = 0; i < 4; ++i) swap(i, i + 4, 32, 0x00000000FFFFFFFFull);
  for (int i : {0, 1, 4, 5}) swap(i, i + 2, 16, 0x0000FFFF0000FFFFull);
  for (int i : {0, 2, 4, 6}) swap(i, i + 1, 8, 0x00FF00FF00FF00FFull);
}

// Columns of `size` bytes, at most 128, to rows of the result.
void store(const uint8_t (*columns)[kLanes], int64_t size, int64_t lanes, uint8_t* out, int64_t stride) {
  alignas(64) uint8_t rows[kLanes][kBlock];
  for (int64_t j = 0; j < size; j += 8) {
    for (int64_t o = 0; o < lanes; o += 8) {
      uint64_t x[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&x[i], &columns[j + i][o], 8);
      turn(x);
      for (int i = 0; i < 8; ++i) std::memcpy(&rows[o + i][j], &x[i], 8);
    }
  }
  for (int64_t o = 0; o < lanes; ++o) std::memcpy(out + o * stride, rows[o], size);
}

void gather(const Stream& in, int64_t first, int64_t count, int64_t lanes, uint32_t (*words)[kLanes]) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* from = in.words + (first + i) * in.step;
    if (in.stride == 1) {
      std::memcpy(words[i], from, lanes * sizeof(uint32_t));
    } else {
      for (int64_t o = 0; o < lanes; ++o) words[i][o] = from[o * in.stride];
    }
  }
}

// One code of all lanes, wherever it lies.
void pick(const Stream& in, int64_t bit, int bits, int64_t lanes, uint8_t* out) {
  const int shift = static_cast<int>(bit % 32);
  const uint32_t* low = in.words + bit / 32 * in.step;
  for (int64_t o = 0; o < lanes; ++o) {
    uint32_t code = low[o * in.stride] >> shift;
    if (shift + bits > 32) code |= low[in.step + o * in.stride] << (32 - shift);
    out[o] = static_cast<uint8_t>(code & ((1u << bits) - 1));
  }
}

// `count` words of a stream of codes of 1 to 8 bits for each of `outs` outputs, to rows of `stride` bytes. `order` (or null): which of the
// `columns` codes comes where. `fill`: the code that completes the last block. The caller has checked that the words hold `columns` codes.
void stream(const uint32_t* words, int64_t step, int64_t apart, int64_t count, int64_t outs, int64_t columns, int32_t bits,
            const int32_t* order, int32_t fill, uint8_t* out, int64_t stride) {
  alignas(64) uint32_t part[4 * 8][kLanes];
  alignas(64) Codes codes;
  alignas(64) uint8_t packed[kBlock][kLanes];
  std::memset(codes, 0, sizeof(codes));
  std::memset(part, 0, sizeof(part));
  for (int64_t first = 0; first < outs; first += kLanes) {
    const int64_t lanes = std::min(kLanes, outs - first);
    const Stream in{words + first * apart, step, apart};
    for (int64_t block = 0; block * kBlock < columns; ++block) {
      const int64_t size = std::min(kBlock, columns - block * kBlock);
      if (order) {
        for (int64_t k = 0; k < size; ++k) pick(in, static_cast<int64_t>(order[block * kBlock + k]) * bits, bits, lanes, codes[k]);
      } else {
        gather(in, 4 * bits * block, std::min<int64_t>(4 * bits, count - 4 * bits * block), lanes, part);
        kUnpack[bits](part, codes);
      }
      for (int64_t k = size; k < kBlock; ++k) std::memset(codes[k], fill, kLanes);
      pack(codes, bits, packed);
      const int64_t bytes = bits == 8 ? size : 16 * bits;
      store(packed, bytes, lanes, out + first * stride + (bits == 8 ? kBlock : bytes) * block, stride);
    }
  }
}

// AWQ: words [columns, groups], eight outputs of one input a word, nibble i belonging to output (0, 2, 4, 6, 1, 3, 5, 7)[i].
void awq(const uint32_t* words, int64_t step, int64_t groups, int64_t columns, int32_t fill, uint8_t* out, int64_t stride) {
  alignas(64) uint8_t packed[64][kLanes];
  const uint32_t fills = 0x11111111u * static_cast<uint32_t>(fill);
  for (int64_t first = 0; first < groups; first += 8) {
    const int64_t here = std::min<int64_t>(8, groups - first);
    for (int64_t block = 0; block * kBlock < columns; ++block) {
      for (int64_t j = 0; j < 64; ++j) {
        const int64_t k = block * kBlock + j;
        for (int64_t g = 0; g < here; ++g) {
          const uint32_t low = k < columns ? words[k * step + first + g] : fills;
          const uint32_t high = k + 64 < columns ? words[(k + 64) * step + first + g] : fills;
          // Bytes 0 to 3 of `even` are the outputs 0, 4, 1, 5, those of `odd` 2, 6, 3, 7.
          const uint64_t even = (low & 0x0F0F0F0Fu) | ((high & 0x0F0F0F0Fu) << 4), odd = ((low >> 4) & 0x0F0F0F0Fu) | (high & 0xF0F0F0F0u);
          const uint64_t all = even | odd << 32;
          const uint64_t halves = (all & 0x000000FF000000FFull) | (all >> 8 & 0x0000FF000000FF00ull);       // (0, 1, -, -, 2, 3, -, -)
          const uint64_t others = (all >> 8 & 0x000000FF000000FFull) | (all >> 16 & 0x0000FF000000FF00ull); // (4, 5, -, -, 6, 7, -, -)
          const uint64_t ordered = (halves & 0xFFFF) | (halves >> 16 & 0xFFFF0000ull) | (others & 0xFFFF) << 32 | (others >> 32 & 0xFFFF) << 48;
          std::memcpy(&packed[j][8 * g], &ordered, 8);
        }
      }
      store(packed, 64, 8 * here, out + 8 * first * stride + 64 * block, stride);
    }
  }
}

}  // namespace
}  // namespace qfunc
