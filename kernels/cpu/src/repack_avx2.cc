#include "repack.h"

namespace qfunc {
const Repack repack_avx2{stream, awq};
}
