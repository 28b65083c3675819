"""4- and 8-bit codes to operands in PTX, four or two bytes at a time: fewer instructions than the compiler makes of shifts and masks.

NVIDIA only; `_decode.decode` is the same in plain Triton, for every other code and device. A register holds four bytes of the packed
storage; digit 0 is their low nibbles, digit 1 their high ones. `prmt.b32 d, a, b, s` picks four of the eight bytes of a and b by the four
nibbles of s, which makes it a table of eight entries.

Hopper's register operand of 16-bit numbers wants two neighbours of each thread: four bytes would be joined from two loads, a byte at a
time, and taken apart again. There two bytes (a register of 16 bits) give one register of two numbers.
"""

import numpy as np
import triton
import triton.language as tl

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4_BNB = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)


def _digit(digit: int) -> str:
    """t: the nibbles of a digit, one in each byte."""
    return ("shr.u32 t, $SOURCE, 4; and.b32 t, t, 0x0f0f0f0f;" if digit else "and.b32 t, $SOURCE, 0x0f0f0f0f;")


def _program(outputs: int, body: str, registers: str = "t") -> str:
    return "{ .reg .b32 " + registers + "; " + body.replace("$SOURCE", f"${outputs}") + " }"


def _biased(digit: int, high: int) -> str:
    """The bit patterns of 128 + code as bfloat16 (`high` 0x43) or 1024 + code as float16 (0x64)."""
    fill = f"0x{high * 0x01010101:08x}"
    return _program(2, _digit(digit) + f" prmt.b32 $0, t, {fill}, 0x4140; prmt.b32 $1, t, {fill}, 0x4342;")


def _bytes(digit: int) -> str:
    """code - offset as int8: with bit 7 set no byte borrows from the next."""
    return _program(1, _digit(digit) + " or.b32 t, t, 0x80808080; sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080;")


def _halves(values, kind: str) -> tuple[list[int], list[int]]:
    """Lower and upper bytes of the 16-bit patterns of values, rounded to nearest even, as words of four."""
    if kind == "f16":
        bits = np.asarray(values, np.float16).view(np.uint16).astype(np.uint32)
    else:
        wide = np.asarray(values, np.float32).view(np.uint32)
        bits = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    def words(part):
        return [int(w) for w in part.astype(np.uint8).view("<u4")]
    return words(bits & 255), words(bits >> 8)


def _table(digit: int, values, kind: str) -> str:
    """Sixteen values by code; eight where the upper half of the codes are the negative ones of the lower half."""
    low, high = _halves(values, kind)
    # The four nibbles one after another: the selector of a permutation.
    body = _digit(digit) + " shr.u32 u, t, 4; or.b32 u, t, u; prmt.b32 s, u, u, 0x4420; and.b32 i, s, 0x7777;"
    for name, words in (("l", low), ("h", high)):
        body += f" mov.b32 a, 0x{words[0]:08x}; mov.b32 b, 0x{words[1]:08x}; prmt.b32 {name}, a, b, i;"
        if len(words) == 4:
            body += f" mov.b32 a, 0x{words[2]:08x}; mov.b32 b, 0x{words[3]:08x}; prmt.b32 a, a, b, i;"
            body += f" shr.u32 u, s, 1; and.b32 u, u, 0x4444; or.b32 u, u, 0x3210; prmt.b32 {name}, {name}, a, u;"
    if len(low) == 2:
        body += " shl.b32 u, t, 4; and.b32 u, u, 0x80808080; or.b32 h, h, u;"
    return _program(2, body + " prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362;", "t, u, s, i, l, h, a, b")


def _e4m3() -> str:
    """e4m3 bytes as the bit patterns of their values times 2^-120 in bfloat16; NaN stays NaN."""
    body = ""
    for result, select in enumerate(("0x1404", "0x3424")):
        body += f" prmt.b32 v, $SOURCE, 0x00000000, {select}; shr.u32 m, v, 4; and.b32 m, m, 0x07f007f0; and.b32 v, v, 0x80008000;"
        # Only the magnitude 0x7F carries into bit 11, from where all bits of the exponent are set.
        body += " add.u32 n, m, 0x00100010; and.b32 n, n, 0x08000800; shl.b32 t, n, 4; shr.u32 n, n, 4; sub.u32 n, t, n;"
        body += f" or.b32 v, v, m; or.b32 ${result}, v, n;"
    return _program(2, body, "t, v, m, n")


def _pair(body: str, registers: str = "v, t, c, z") -> str:
    """A program of two bytes, which v holds in its lower half."""
    return "{ .reg .b32 " + registers + "; cvt.u32.u16 v, $1; " + body + " }"


APART = "prmt.b32 v, v, 0, 0x1404; "
"""Each byte as the upper half of 16 bits."""


def _times(kind: str, factor: int, target: str = "$0") -> str:
    """v times a number given by its bits; minus zero is added so that zeros keep their sign."""
    fill = factor * 0x10001
    return f"mov.b32 c, 0x{fill:08x}; mov.b32 z, 0x80008000; fma.rn.{kind}x2 {target}, v, c, z; "


def _pair_biased(digit: int, high: int) -> str:
    """`_biased` of two bytes."""
    shift = "shr.u32 v, v, 4; " if digit else ""
    return _pair(shift + f"and.b32 v, v, 0x0f0f; prmt.b32 $0, v, 0x{high * 0x01010101:08x}, 0x4140;", "v")


def _pair_e2m1(digit: int, kind: str) -> str:
    """The bits of e2m1 as those of a wider float, times the difference of the biases, 2^126 or 2^14."""
    move, mask, factor = (6, 0x01C001C0, 0x7E80) if kind == "bf16" else (3, 0x0E000E00, 0x7400)
    body = APART + ("" if digit else "shl.b32 v, v, 4; ") + f"shr.u32 t, v, {move}; and.b32 t, t, 0x{mask:08x}; "
    return _pair(body + "and.b32 v, v, 0x80008000; or.b32 v, v, t; " + _times(kind, factor))


def _pair_e4m3() -> str:
    """e4m3 as bfloat16. Of all magnitudes only 0x7F, which reads as 480, overflows times 1.125 2^119 (448 does not), and infinity
    times zero is NaN."""
    body = APART + "shr.u32 t, v, 4; and.b32 t, t, 0x07f007f0; and.b32 v, v, 0x80008000; or.b32 v, v, t; "
    return _pair(body + _times("bf16", 0x7B80, "v") + _times("bf16", 0x7B10, "t") + "mov.b32 c, 0; fma.rn.bf16x2 $0, t, c, v;")


def _pair_int8(kind: str) -> str:
    """int8 as a difference of numbers that are bit patterns: 128 + the lower seven bits less 128 or 256, or 1024 + 128 + code less 1152."""
    if kind == "f16":
        return _pair("xor.b32 v, v, 0x8080; prmt.b32 v, v, 0x64646464, 0x4140; mov.b32 c, 0x3c003c00; mov.b32 z, 0xe480e480; "
                     "fma.rn.f16x2 $0, v, c, z;")
    return _pair("prmt.b32 v, v, 0x43434343, 0x4140; and.b32 t, v, 0xff80ff80; and.b32 v, v, 0xff7fff7f; mov.b32 c, 0xbf80bf80; "
                 "fma.rn.bf16x2 $0, t, c, v;", "v, t, c")


E4M3 = tl.constexpr(_e4m3())
BF16_LOW, BF16_HIGH = (tl.constexpr(_biased(digit, 0x43)) for digit in (0, 1))
F16_LOW, F16_HIGH = (tl.constexpr(_biased(digit, 0x64)) for digit in (0, 1))
S8_LOW, S8_HIGH = (tl.constexpr(_bytes(digit)) for digit in (0, 1))
FP4_BF16_LOW, FP4_BF16_HIGH = (tl.constexpr(_table(digit, FP4, "bf16")) for digit in (0, 1))
FP4_F16_LOW, FP4_F16_HIGH = (tl.constexpr(_table(digit, FP4, "f16")) for digit in (0, 1))
NF4_BF16_LOW, NF4_BF16_HIGH = (tl.constexpr(_table(digit, NF4, "bf16")) for digit in (0, 1))
NF4_F16_LOW, NF4_F16_HIGH = (tl.constexpr(_table(digit, NF4, "f16")) for digit in (0, 1))
BNB_BF16_LOW, BNB_BF16_HIGH = (tl.constexpr(_table(digit, FP4_BNB, "bf16")) for digit in (0, 1))
BNB_F16_LOW, BNB_F16_HIGH = (tl.constexpr(_table(digit, FP4_BNB, "f16")) for digit in (0, 1))

E4M3_PAIR = tl.constexpr(_pair_e4m3())
INT8_BF16_PAIR, INT8_F16_PAIR = (tl.constexpr(_pair_int8(kind)) for kind in ("bf16", "f16"))
BF16_LOW_PAIR, BF16_HIGH_PAIR = (tl.constexpr(_pair_biased(digit, 0x43)) for digit in (0, 1))
F16_LOW_PAIR, F16_HIGH_PAIR = (tl.constexpr(_pair_biased(digit, 0x64)) for digit in (0, 1))
FP4_BF16_LOW_PAIR, FP4_BF16_HIGH_PAIR = (tl.constexpr(_pair_e2m1(digit, "bf16")) for digit in (0, 1))
FP4_F16_LOW_PAIR, FP4_F16_HIGH_PAIR = (tl.constexpr(_pair_e2m1(digit, "f16")) for digit in (0, 1))


@triton.jit
def _two(byte, DIGIT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DOT: tl.constexpr):
    """Two bytes to two 16-bit numbers."""
    ASM: tl.constexpr = HIGH if DIGIT else LOW
    if DOT == "bf16":
        return tl.inline_asm_elementwise(ASM, "=r,h", [byte], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,h", [byte], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _wide(byte, DIGIT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DOT: tl.constexpr):
    """Four bytes to four 16-bit numbers."""
    ASM: tl.constexpr = HIGH if DIGIT else LOW
    if DOT == "bf16":
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def byte_code(byte, CODE: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr):
    """The operands of 8-bit codes, exact, as `_decode.decode` makes them; PTX bytes at a time. e4m3 by four is for bfloat16 alone."""
    if CODE == "int":
        tl.static_assert(PTX == 2)
        return _two(byte, 0, INT8_BF16_PAIR if DOT == "bf16" else INT8_F16_PAIR, None, DOT)
    elif PTX == 2:
        return _two(byte, 0, E4M3_PAIR, None, DOT)
    else:
        return tl.inline_asm_elementwise(E4M3, "=r,=r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4) * (2.0 ** 120)


@triton.jit
def nibble(byte, offset, DIGIT: tl.constexpr, CODE: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr):
    """The operands of one digit of packed 4-bit codes, as `_decode.decode` makes them, PTX bytes at a time. DOT is s8, bf16 or f16."""
    if DOT == "s8":
        if DIGIT:
            return tl.inline_asm_elementwise(S8_HIGH, "=r,r,r", [byte, offset], dtype=tl.int8, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(S8_LOW, "=r,r,r", [byte, offset], dtype=tl.int8, is_pure=True, pack=4)
    elif CODE == "int":
        if DOT == "bf16":
            if PTX == 2:
                biased = _two(byte, DIGIT, BF16_LOW_PAIR, BF16_HIGH_PAIR, DOT)
            else:
                biased = _wide(byte, DIGIT, BF16_LOW, BF16_HIGH, DOT)
            return biased - (offset.to(tl.float32) + 128.0).to(tl.bfloat16)
        else:
            if PTX == 2:
                biased = _two(byte, DIGIT, F16_LOW_PAIR, F16_HIGH_PAIR, DOT)
            else:
                biased = _wide(byte, DIGIT, F16_LOW, F16_HIGH, DOT)
            return biased - (offset.to(tl.float32) + 1024.0).to(tl.float16)
    elif CODE == "fp4_e2m1":
        if PTX == 2:
            if DOT == "bf16":
                return _two(byte, DIGIT, FP4_BF16_LOW_PAIR, FP4_BF16_HIGH_PAIR, DOT)
            else:
                return _two(byte, DIGIT, FP4_F16_LOW_PAIR, FP4_F16_HIGH_PAIR, DOT)
        elif DOT == "bf16":
            return _wide(byte, DIGIT, FP4_BF16_LOW, FP4_BF16_HIGH, DOT)
        else:
            return _wide(byte, DIGIT, FP4_F16_LOW, FP4_F16_HIGH, DOT)
    elif CODE == "nf4":
        if DOT == "bf16":
            return _wide(byte, DIGIT, NF4_BF16_LOW, NF4_BF16_HIGH, DOT)
        else:
            return _wide(byte, DIGIT, NF4_F16_LOW, NF4_F16_HIGH, DOT)
    else:
        tl.static_assert(CODE == "fp4_bnb")
        if DOT == "bf16":
            return _wide(byte, DIGIT, BNB_BF16_LOW, BNB_BF16_HIGH, DOT)
        else:
            return _wide(byte, DIGIT, BNB_F16_LOW, BNB_F16_HIGH, DOT)
