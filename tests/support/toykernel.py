"""A kernel for tests of the bridge: arrays, numbers and results, one of which starts from zero."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x, s, y, total, n, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * n + k, mask=k < n, other=0.0).to(tl.float32) * tl.load(s + row) * factor
    tl.store(y + row * n + k, value.to(y.dtype.element_ty), mask=k < n)
    tl.atomic_add(total, tl.sum(value, axis=0))
