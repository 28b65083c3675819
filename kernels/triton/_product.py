"""One tile of tokens times output channels: the loop that the dense and the grouped kernel share.

The packed storage is read as it lies. A step of the loop takes 128 contracted elements, which are one block of the packing: the bytes
of its widest plane are read once, RUN at a time, and give 8 / width digits each, every one a run of RUN consecutive elements; the
narrower planes add their bits. `SWAP` makes the weight the left operand of the product.
"""

import triton
import triton.language as tl

from ._decode import along_m, along_n, decode, scale_value, stored_scale
from ._ptx import byte_code, nibble


@triton.jit
def total(v, SWAP: tl.constexpr, OF_WEIGHT: tl.constexpr, INTEGER: tl.constexpr):
    """Sum of an operand over the contracted axis."""
    wide = v.to(tl.int32) if INTEGER else v.to(tl.float32)
    return tl.sum(wide, axis=1 if SWAP == OF_WEIGHT else 0)


@triton.jit
def factors(k, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, OF_SUM: tl.constexpr,
            SCALE: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, X_SCALE: tl.constexpr, PLACE: tl.constexpr):
    """(scales of the weight as stored, their own scales, zero points that come off sums, scales of x) of the segment that starts at the
    contracted element k; the last segment's beyond the end. What a format does not have is one of the others."""
    at = s_row + min(k // GROUP, GROUPS - 1)
    s, second = stored_scale(scale_ptr, scale2_ptr, at, SCALE)
    zero = s
    if OF_SUM:
        zero = tl.load(zero_ptr + at)
    x_scale = x_scale_row
    if X_SCALE and PLACE > 0 and X_GROUP > 0:
        x_scale = tl.load(x_scale_ptr + x_scale_row + min(k // X_GROUP, X_GROUPS - 1))
    elif X_SCALE and PLACE == 0:
        x_scale = tl.load(x_scale_ptr + x_scale_row)
    return s, second, zero, x_scale


@triton.jit
def settle(part, x_sum, w_sum, x_zero, s, second, zero, x_scale, levels_ptr, mean, outer, SWAP: tl.constexpr, DOT: tl.constexpr,
           BITS: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, X_GROUP: tl.constexpr,
           X_SCALE: tl.constexpr, X_ZERO: tl.constexpr, PLACE: tl.constexpr):
    """The sums of one segment with zero points taken off and the scales of `factors` put on; float32.

    One scale for all of a token comes last, outside; with one segment alone it comes first, as the reference multiplies.
    """
    if X_ZERO:
        part -= along_n(w_sum, SWAP) * along_m(x_zero, SWAP)
    if DOT == "s8" and BITS == 8 and ZERO == "int":
        part += along_n(128 - zero.to(tl.int32), SWAP) * along_m(x_sum, SWAP)
    y = part.to(tl.float32)
    if X_SCALE and PLACE == 0:
        y *= along_m(x_scale, SWAP)
    y *= along_n(scale_value(s, second, levels_ptr, mean, outer, SCALE, SCALE2), SWAP)
    if ZERO == "float":
        extra = x_sum.to(tl.float32)
        if X_SCALE and PLACE == 0:
            extra *= x_scale
        y += along_n(zero.to(tl.float32), SWAP) * along_m(extra, SWAP)
    if X_SCALE and PLACE > 0 and X_GROUP > 0:
        y *= along_m(x_scale, SWAP)
    return y


@triton.jit
def product(x_ptr, x_row, x_scale_ptr, x_scale_row, x_zero, codes_ptr, w_row, scale_ptr, scale2_ptr, levels_ptr, mean, outer, zero_ptr,
            s_row, GROUPS, X_GROUPS, table_ptr, K, first, last,
            BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
            PRECISION: tl.constexpr, PTX: tl.constexpr, CODE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
            SCALE: tl.constexpr, SCALE2: tl.constexpr, GROUP: tl.constexpr, X_CODE: tl.constexpr, X_GROUP: tl.constexpr,
            X_SCALE: tl.constexpr, X_ZERO: tl.constexpr, PLACE: tl.constexpr):
    """Scaled sums over the steps [first, last), float32 [BN, BM] where SWAP, else [BM, BN].

    x_row, x_scale_row [BM] and w_row, s_row [BN] are offsets of the rows in elements; `outer` is the second scale [BN] and `mean` that
    of nested scales; GROUP and X_GROUP are contracted elements under one scale, X_GROUP 0 where a token has one.
    """
    WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    DIGITS: tl.constexpr = 8 // WIDE
    RUNS: tl.constexpr = 16 * WIDE // RUN
    INTEGER: tl.constexpr = DOT == "s8"
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    X_SUM: tl.constexpr = ZERO == "float" or (INTEGER and BITS == 8 and ZERO == "int")
    FRESH: tl.constexpr = PLACE > 0 or DOT == "e4m3" or DOT == "e5m2"       # Hopper adds fp8 products with fewer bits than float32 has
    # Of few tokens, scales and zero points are read one segment ahead, or memory's latency would show in every segment; of many, products
    # hide it, and the registers are theirs.
    AHEAD: tl.constexpr = PLACE > 0 and BM <= 32
    ROWS: tl.constexpr = BN if SWAP else BM
    COLUMNS: tl.constexpr = BM if SWAP else BN

    acc = tl.zeros((ROWS, COLUMNS), dtype=SUM if PLACE == 0 else tl.float32)
    part = tl.zeros((ROWS, COLUMNS), dtype=SUM)
    x_sum = tl.zeros((BM,), dtype=SUM)
    w_sum = tl.zeros((BN,), dtype=tl.int32)
    x_at = along_m(x_row, SWAP)
    w_at = along_n(w_row, SWAP)
    if AHEAD:
        s_next, second_next, zero_next, x_scale_next = factors(
            first * 128, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM, SCALE, GROUP, X_GROUP,
            X_SCALE, PLACE)
    for step in range(first, last):
        base = step * 128
        if AHEAD and PLACE == 1:
            s, second, zero, x_scale = s_next, second_next, zero_next, x_scale_next
            s_next, second_next, zero_next, x_scale_next = factors(
                base + 128, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM, SCALE, GROUP,
                X_GROUP, X_SCALE, PLACE)
        if FRESH:
            part = tl.zeros((ROWS, COLUMNS), dtype=SUM)
        if PLACE > 0:
            x_sum = tl.zeros((BM,), dtype=SUM)
            w_sum = tl.zeros((BN,), dtype=tl.int32)
        for run in tl.static_range(RUNS):
            j = run * RUN + tl.arange(0, RUN)
            jw = along_m(j, SWAP)               # the contracted axis of the weight's tile lies where the tokens lie in the result
            jx = along_n(j, SWAP)
            block = codes_ptr + w_at + step * (16 * BITS)
            if BITS == 8 and not EVEN:
                byte = tl.load(block + jw, mask=base + jw < K, other=0.0 if DOT == "e4m3" or DOT == "e5m2" else 0)
            else:
                byte = tl.load(block + jw)
            if BITS & 2 and WIDE == 4:
                pair = tl.load(block + 64 + jw % 32)
            if BITS & 1 and BITS < 8:
                single = tl.load(block + 16 * (BITS - 1) + jw % 16)
            for digit in tl.static_range(DIGITS):
                start = base + digit * (16 * WIDE)
                if AHEAD and PLACE == 2:
                    s, second, zero, x_scale = s_next, second_next, zero_next, x_scale_next
                    if digit + 1 < DIGITS:
                        ahead = start + 16 * WIDE + run * RUN
                    else:
                        ahead = base + ((run + 1) * RUN if run + 1 < RUNS else 128)
                    s_next, second_next, zero_next, x_scale_next = factors(
                        ahead, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM, SCALE, GROUP,
                        X_GROUP, X_SCALE, PLACE)
                if PLACE == 2:
                    part = tl.zeros((ROWS, COLUMNS), dtype=SUM)
                    x_sum = tl.zeros((BM,), dtype=SUM)
                    w_sum = tl.zeros((BN,), dtype=tl.int32)
                k = start + jx
                if EVEN:
                    x = tl.load(x_ptr + x_at + k)
                elif DOT == "e4m3" or DOT == "e5m2" or X_CODE == "float":
                    x = tl.load(x_ptr + x_at + k, mask=k < K, other=0.0)
                else:
                    x = tl.load(x_ptr + x_at + k, mask=k < K, other=0)
                if X_CODE != "float" and DOT != "s8":
                    x = decode(x, 0, table_ptr, X_CODE, 8, "none", DOT)
                if ZERO == "int" and not X_SUM:
                    # Not read ahead: a value of the step before would send the decoded tile through shared memory.
                    offset = along_n(tl.load(zero_ptr + s_row + min((start + run * RUN) // GROUP, GROUPS - 1)), SWAP)
                else:
                    offset = tl.full((1, 1), OFFSET, tl.uint8)
                if BITS == 8 or PTX:
                    code = byte
                else:
                    code = (byte >> (digit * WIDE)) & ((1 << WIDE) - 1)
                    if BITS & 2 and WIDE == 4:
                        code |= ((pair >> ((digit * 4 + jw // 32 * 2) & 7).to(tl.uint8)) & 3) << 4
                    if BITS & 1:
                        code |= ((single >> ((digit * WIDE + jw // 16) & 7).to(tl.uint8)) & 1) << (BITS - 1)
                if PTX and BITS == 8:
                    w = byte_code(code, CODE, DOT, PTX)
                elif PTX:
                    w = nibble(code, offset, digit, CODE, DOT, PTX)
                else:
                    w = decode(code, offset, table_ptr, CODE, BITS, ZERO, DOT)
                if X_SUM:
                    x_sum += total(x, SWAP, False, INTEGER)
                if X_ZERO:
                    if not EVEN:                # what fills the last block is zero as a code, not less its zero point
                        w = tl.where(start + jw < K, w, tl.full((1, 1), 0, tl.int8))
                    w_sum += total(w, SWAP, True, True)
                if SWAP:
                    part = tl.dot(w, x, acc=part, input_precision=PRECISION, out_dtype=SUM)
                else:
                    part = tl.dot(x, w, acc=part, input_precision=PRECISION, out_dtype=SUM)
                if PLACE == 2:
                    if not AHEAD:
                        s, second, zero, x_scale = factors(
                            start + run * RUN, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM,
                            SCALE, GROUP, X_GROUP, X_SCALE, PLACE)
                    acc += settle(part, x_sum, w_sum, x_zero, s, second, zero, x_scale, levels_ptr, mean, outer, SWAP, DOT, BITS,
                                  ZERO, SCALE, SCALE2, X_GROUP, X_SCALE, X_ZERO, PLACE)
        if PLACE == 1:
            if not AHEAD:
                s, second, zero, x_scale = factors(
                    base, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM, SCALE, GROUP, X_GROUP,
                    X_SCALE, PLACE)
            acc += settle(part, x_sum, w_sum, x_zero, s, second, zero, x_scale, levels_ptr, mean, outer, SWAP, DOT, BITS,
                          ZERO, SCALE, SCALE2, X_GROUP, X_SCALE, X_ZERO, PLACE)
        elif PLACE == 0 and FRESH:
            acc += part
    if PLACE == 0:
        if not FRESH:
            acc = part
        s, second, zero, x_scale = factors(0, x_scale_ptr, x_scale_row, scale_ptr, scale2_ptr, zero_ptr, s_row, GROUPS, X_GROUPS, X_SUM,
                                           SCALE, GROUP, X_GROUP, X_SCALE, PLACE)
        y = settle(acc, x_sum, w_sum, x_zero, s, second, zero, x_scale, levels_ptr, mean, outer, SWAP, DOT, BITS, ZERO, SCALE, SCALE2,
                   X_GROUP, X_SCALE, X_ZERO, PLACE)
    elif X_SCALE and X_GROUP == 0:
        y = acc * along_m(tl.load(x_scale_ptr + x_scale_row), SWAP)
    else:
        y = acc
    return y
