#include "repack.h"

namespace qfunc {
const Repack repack_avx512{stream, awq};
}
