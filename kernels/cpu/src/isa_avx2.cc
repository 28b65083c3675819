#include <immintrin.h>

#include "problem.h"

namespace qfunc {
namespace {
constexpr int kLanes = 8, kMicro = 6;
constexpr bool kSignedWeights = false, kFastDots = false;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(32)));

// vpmaddubsw saturates sums of two products at 16 bits: weights up to 255 are cut into two addends of at most 128, which cannot.
inline Ints dot4(Ints acc, Bytes w, Bytes x) {
  const __m256i weight = (__m256i)w, value = (__m256i)x, ones = _mm256_set1_epi16(1);
  const __m256i half = _mm256_and_si256(_mm256_srli_epi16(weight, 1), _mm256_set1_epi8(127));
  const __m256i first = _mm256_madd_epi16(_mm256_maddubs_epi16(half, value), ones);
  const __m256i second = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_sub_epi8(weight, half), value), ones);
  return acc + (Ints)_mm256_add_epi32(first, second);
}
}  // namespace
}  // namespace qfunc
#include "generic.h"

namespace qfunc { QFUNC_GENERIC_KERNELS(kernels_avx2, "avx2") }
