// The repacking of checkpoints in plain C, called without XLA (and, from Python, without its lock).
#include "repack.h"

#include "kernels.h"

namespace qfunc {

const Repack repack_generic{stream, awq};

namespace {
const Repack& chosen() {
#if defined(__x86_64__)
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (kernels == &kernels_avx512 || kernels == &kernels_avx512bf16) return repack_avx512;
  if (kernels == &kernels_avx2) return repack_avx2;
#endif
  return repack_generic;
}
}  // namespace
}  // namespace qfunc

extern "C" {

__attribute__((visibility("default"))) void qfunc_repack_stream(const uint32_t* words, int64_t step, int64_t apart, int64_t count,
                                                                int64_t outs, int64_t columns, int32_t bits, const int32_t* order,
                                                                int32_t fill, uint8_t* out, int64_t stride) {
  qfunc::chosen().stream(words, step, apart, count, outs, columns, bits, order, fill, out, stride);
}

__attribute__((visibility("default"))) void qfunc_repack_awq(const uint32_t* words, int64_t step, int64_t groups, int64_t columns,
                                                             int32_t fill, uint8_t* out, int64_t stride) {
  qfunc::chosen().awq(words, step, groups, columns, fill, out, stride);
}

}  // extern "C"
