"""The grouped quantized matmul of experts: rows sorted by expert, each times its own expert's packed matrix.

Every program finds its expert itself, from the sizes: no table of tiles is made in front of the launch. The rows beyond the sum of
the sizes form a last group, whose tiles are written as zeros.
"""

import triton
import triton.language as tl

from ._decode import along_m, along_n
from ._dense import scale_rows, second_scale
from ._product import product


@triton.jit
def tile_of(sizes, pm, M, E, BM: tl.constexpr, E_BLOCK: tl.constexpr):
    """(group, first row, end of its rows) of the tile pm; group E holds the rows that no expert has, and E + 1 is beyond the last."""
    e = tl.arange(0, E_BLOCK)
    size = tl.load(sizes + e, mask=e < E, other=0)
    upper = tl.cumsum(size, axis=0)
    # Sizes that add up to more than there are rows end where the rows end.
    starts = tl.minimum(upper - size, M)
    ends = tl.where(e == E, M, tl.minimum(upper, M))
    size = ends - starts
    tiles = (size + BM - 1) // BM
    upto = tl.cumsum(tiles, axis=0)
    group = tl.sum((upto <= pm).to(tl.int32), axis=0)
    mine = e == group
    first = tl.sum(tl.where(mine, starts + (pm - upto + tiles) * BM, 0), axis=0)
    return group, first, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def grouped(x, x_scale, x_zero, codes, scale, scale2, scale_offset, zero, table, levels, bias, sizes, rows, weights, y, M, N, K, ROW,
            GROUPS, X_GROUPS, E, BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
            EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, CODE: tl.constexpr, BITS: tl.constexpr,
            OFFSET: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, GROUP: tl.constexpr,
            SHARE: tl.constexpr, X_CODE: tl.constexpr, X_GROUP: tl.constexpr, X_SCALE: tl.constexpr, X_ZERO: tl.constexpr,
            PLACE: tl.constexpr, HAS_BIAS: tl.constexpr, E_BLOCK: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr):
    """y [M, N]. Arguments: see `_plan_matmul.describe`.

    With GATHER, row r of the product takes row rows[r] of x (a token that several experts share); with WEIGHTED, row r of y is
    multiplied by weights[r] in float32 before the cast.
    """
    tiles_n = tl.cdiv(N, BN)
    group, start, end = tile_of(sizes, tl.program_id(0) // tiles_n, M, E, BM, E_BLOCK)
    rn = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    rm = start + tl.arange(0, BM)
    kept = along_m(rm < end, SWAP) & along_n(rn < N, SWAP)
    at = along_m(rm.to(tl.int64) * N, SWAP) + along_n(rn, SWAP)
    if group < E:
        m = tl.where(rm < end, rm, start)
        n = tl.where(rn < N, rn, 0)
        src = m
        if GATHER:
            src = tl.load(rows + m)
        matrix = group.to(tl.int64)
        s_rows, s_row = scale_rows(n, N, GROUPS, SHARE)
        zx = m
        if X_ZERO:
            zx = tl.load(x_zero + src)
        mean = 0.0
        if SCALE == "nested":
            mean = tl.load(scale_offset + matrix)
        seconds, outer = second_scale(scale, scale2, matrix, n, N, GROUPS, SCALE2)
        s_base = matrix * s_rows * GROUPS
        zero_base = scale
        if ZERO != "none":
            zero_base = zero + s_base
        tile = product(x, src.to(tl.int64) * K, x_scale, src.to(tl.int64) * X_GROUPS, zx, codes + matrix * N * ROW, n.to(tl.int64) * ROW,
                       scale + s_base, seconds, levels, mean, outer, zero_base, s_row, GROUPS, X_GROUPS, table, K, 0, tl.cdiv(K, 128),
                       BM, BN, RUN, SWAP, EVEN, DOT, PRECISION, PTX, CODE, BITS, OFFSET, ZERO, SCALE, SCALE2, GROUP, X_CODE, X_GROUP,
                       X_SCALE, X_ZERO, PLACE)
        if HAS_BIAS:
            tile += along_n(tl.load(bias + matrix * N + n).to(tl.float32), SWAP)
        if WEIGHTED:
            tile *= along_m(tl.load(weights + m), SWAP)
        tl.store(y + at, tile.to(y.dtype.element_ty), mask=kept)
    elif group == E:
        nothing = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
        tl.store(y + at, nothing.to(y.dtype.element_ty), mask=kept)
