// Portable C++: no instruction set assumed beyond the compiler's default.
#include "problem.h"

namespace qfunc {
namespace {
constexpr int kLanes = 4, kMicro = 6;
constexpr bool kSignedWeights = false, kFastDots = false;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Ints dot4(Ints acc, Bytes w, Bytes x) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) acc[i] += static_cast<int32_t>(w[4 * i + j]) * static_cast<int8_t>(x[4 * i + j]);
  return acc;
}
}  // namespace
}  // namespace qfunc
#include "generic.h"

namespace qfunc { QFUNC_GENERIC_KERNELS(kernels_generic, "generic") }
