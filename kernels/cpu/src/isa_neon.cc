#include <arm_neon.h>

#include "problem.h"

namespace qfunc {
namespace {
constexpr int kLanes = 4, kMicro = 8;
constexpr bool kSignedWeights = true, kFastDots = true;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Ints dot4(Ints acc, Bytes w, Bytes x) { return (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x); }
}  // namespace
}  // namespace qfunc
#include "generic.h"

namespace qfunc { QFUNC_GENERIC_KERNELS(kernels_neon, "neon") }
