// i8mm brings the dot of unsigned with signed bytes, which saves the flip of unsigned 8-bit codes.
#include <arm_neon.h>

#include "problem.h"

namespace qfunc {
namespace {
constexpr int kLanes = 4, kMicro = 8;
constexpr bool kSignedWeights = false, kFastDots = true;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Ints dot4(Ints acc, Bytes w, Bytes x) { return (Ints)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)x); }
}  // namespace
}  // namespace qfunc
#include "generic.h"

namespace qfunc { QFUNC_GENERIC_KERNELS(kernels_i8mm, "i8mm") }
