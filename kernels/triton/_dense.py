"""The dense quantized matmul: y [B, M, N] = x [B, M, K] @ w [B, K, N], w packed."""

import triton
import triton.language as tl

from ._decode import along_m, along_n
from ._product import product

GROUP_M = tl.constexpr(8)
"""Tiles of tokens that are taken together before the next output channels, so that both stay in the second-level cache."""


@triton.jit
def scale_rows(n, N, GROUPS, SHARE: tl.constexpr):
    """(rows of scales of a matrix, where those of the output channels n begin); SHARE channels have one row, 0 for all of them."""
    if SHARE == 0:
        return 1, n * 0
    else:
        return tl.cdiv(N, SHARE), n // SHARE * GROUPS


@triton.jit
def second_scale(scale, scale2, matrix, n, N, GROUPS, SCALE2: tl.constexpr):
    """(pointer to the second scales of a matrix, those of the output channels n); what there is none of is never read."""
    if SCALE2 == "matrix":
        return scale2 + matrix, tl.load(scale2 + matrix + n * 0)
    elif SCALE2 == "row":
        return scale2 + matrix * N, tl.load(scale2 + matrix * N + n)
    elif SCALE2 == "nested":
        return scale2 + matrix * tl.cdiv(N * GROUPS, 256), n
    else:
        return scale, n


@triton.jit
def dense(x, x_scale, x_zero, codes, scale, scale2, scale_offset, zero, table, levels, bias, y, M, N, K, ROW, GROUPS, X_GROUPS,
          BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
          DOT: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, CODE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr,
          ZERO: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, X_CODE: tl.constexpr,
          X_GROUP: tl.constexpr, X_SCALE: tl.constexpr, X_ZERO: tl.constexpr, PLACE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Arguments: see `_plan_matmul.describe`. Grid: (tiles, SPLIT, B); with SPLIT > 1, y is float32 [SPLIT, B, M, N], to be added."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    band = pid // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - band, GROUP_M)
    rank = pid % (GROUP_M * tiles_n)
    rm = (band + rank % height) * BM + tl.arange(0, BM)
    rn = rank // height * BN + tl.arange(0, BN)
    matrix = tl.program_id(2).to(tl.int64)
    m = tl.where(rm < M, rm, 0)
    n = tl.where(rn < N, rn, 0)

    s_rows, s_row = scale_rows(n, N, GROUPS, SHARE)
    steps = tl.cdiv(K, 128)
    each = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * each
    last = min(first + each, steps)
    zx = m
    if X_ZERO:
        zx = tl.load(x_zero + matrix * M + m)
    mean = 0.0
    if SCALE == "nested":
        mean = tl.load(scale_offset + matrix)
    seconds, outer = second_scale(scale, scale2, matrix, n, N, GROUPS, SCALE2)
    w_base = matrix * N * ROW
    s_base = matrix * s_rows * GROUPS
    zero_base = scale
    if ZERO != "none":
        zero_base = zero + s_base
    tile = product(x + matrix * M * K, m.to(tl.int64) * K, x_scale, (matrix * M + m) * X_GROUPS, zx, codes + w_base, n.to(tl.int64) *
                   ROW, scale + s_base, seconds, levels, mean, outer, zero_base, s_row, GROUPS, X_GROUPS, table, K, first, last, BM, BN,
                   RUN, SWAP, EVEN, DOT, PRECISION, PTX, CODE, BITS, OFFSET, ZERO, SCALE, SCALE2, GROUP, X_CODE, X_GROUP, X_SCALE,
                   X_ZERO, PLACE)
    if HAS_BIAS:
        tile += along_n(tl.load(bias + matrix * N + n).to(tl.float32), SWAP)
    slab = tl.program_id(1) * tl.num_programs(2) + matrix
    at = along_m((slab * M + rm) * N, SWAP) + along_n(rn, SWAP)
    tl.store(y + at, tile.to(y.dtype.element_ty), mask=along_m(rm < M, SWAP) & along_n(rn < N, SWAP))
