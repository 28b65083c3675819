"""The formulas of the formats in float64 numpy, written from their descriptions and without anything of qfunc.

Float64 holds every product and quotient of two float32 numbers well enough that one rounding to float32 gives what a correct float32
operation gives, so the tests can ask for equal bits.
"""

import numpy as np

# sign, exponent bits, mantissa bits, bias, largest value: OCP MX 1.0 and OCP FP8 1.0
FLOATS = {"fp4_e2m1": (2, 1, 1, 6.0), "fp6_e2m3": (2, 3, 1, 7.5), "fp6_e3m2": (3, 2, 3, 28.0),
          "fp8_e4m3": (4, 3, 7, 448.0), "fp8_e5m2": (5, 2, 15, 57344.0)}
EMAX = {"fp4_e2m1": 2, "fp6_e2m3": 2, "fp6_e3m2": 4, "fp8_e4m3": 8, "fp8_e5m2": 15}
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4_BNB = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25]
TABLES = {"nf4": np.array(NF4), "fp4_bnb": np.array(FP4_BNB + [-v for v in FP4_BNB])}


def f32(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def bits_of(code):
    return int("".join(c for c in code.removeprefix("fp4_bnb") or "4" if c.isdigit())[0]) if code != "nf4" else 4


def magnitudes(code):
    """Every non-negative number of a small float format in the order of its codes."""
    exponent, mantissa, bias, largest = FLOATS[code]
    codes = np.arange(2 ** (exponent + mantissa))
    e, m = codes >> mantissa, codes & (2**mantissa - 1)
    values = np.where(e == 0, m * 2.0 ** (1 - bias - mantissa), (2**mantissa + m) * 2.0 ** (e - bias - mantissa))
    return values[values <= largest]


def nearest_even(x, grid):
    """Index of the nearest number of an ascending grid, ties to the even index; beyond the last, the last."""
    low = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 1)
    high = np.minimum(low + 1, len(grid) - 1)
    below, above = x - grid[low], grid[high] - x
    return np.where((above < below) | ((above == below) & (low % 2 == 1)), high, low)


def encode(x, code, zero=0.0):
    """Codes (values for integers, bit patterns otherwise) of x already divided by its scale."""
    bits = bits_of(code)
    if code.startswith("int"):
        return np.clip(np.round(x), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if code.startswith("uint"):
        return np.clip(np.round(x) + zero, 0, 2**bits - 1)
    if code in TABLES:
        table = TABLES[code]
        distance = np.abs(x[..., None] - table)
        return np.argmin(np.where(distance == distance.min(-1, keepdims=True), table, np.inf), -1)      # a tie goes to the lower value
    index = nearest_even(np.abs(x), magnitudes(code))
    return index + np.where(np.signbit(x), 2 ** (bits - 1), 0)


def values(codes, code):
    """What codes mean."""
    if "int" in code:
        return np.asarray(codes, np.float64)
    if code in TABLES:
        return TABLES[code][codes]
    half = 2 ** (bits_of(code) - 1)
    return np.where(codes >= half, -1.0, 1.0) * magnitudes(code)[codes % half]


def unpack(packed, bits, columns):
    """Codes of the canonical packing, bit by bit as its description says."""
    packed = np.asarray(packed).astype(np.int64)
    blocks = packed.reshape(*packed.shape[:-1], packed.shape[-1] // (16 * bits), 16 * bits)
    out = np.zeros((*blocks.shape[:-1], 128), np.int64)
    start = low = 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        for k in range(128):
            byte, slot = k % (16 * width), k // (16 * width)
            out[..., k] |= ((blocks[..., start + byte] >> (slot * width)) & (2**width - 1)) << low
        start, low = start + 16 * width, low + width
    return out.reshape(*packed.shape[:-1], out.shape[-2] * 128)[..., :columns]


def cells(granularity, rows, columns):
    """(cell of each row, cell of each column) of a matrix [rows = out, columns = in]."""
    r, c = np.arange(rows), np.arange(columns)
    return {"tensor": (0 * r, 0 * c), "channel": (r, 0 * c), "token": (r, 0 * c),
            "group": (r, c // max(granularity.size, 1)),
            "block": (r // max(granularity.out, 1), c // max(granularity.size, 1))}[granularity.kind]


def extremes(w, granularity):
    """(smallest, largest) element of every cell."""
    r, c = cells(granularity, *w.shape)
    lo, hi = np.full((r[-1] + 1, c[-1] + 1), np.inf), np.full((r[-1] + 1, c[-1] + 1), -np.inf)
    np.minimum.at(lo, (r[:, None], c[None, :]), w)
    np.maximum.at(hi, (r[:, None], c[None, :]), w)
    return lo, hi


def top(code):
    return 2.0 ** (bits_of(code) - 1) - 1 if "int" in code else FLOATS[code][3] if code in FLOATS else 1.0


def floor_log2(x):
    return np.frexp(x)[1] - 1.0


def ceil_log2(x):
    mantissa, exponent = np.frexp(x)
    return np.where(mantissa == 0.5, exponent - 1.0, exponent)


def mx_exponent(amax, code, rule):
    """floor, ceil or rounding of log2, less the format's largest exponent (formats.md 0.7)."""
    with np.errstate(divide="ignore"):
        e = {"mx_floor": lambda: floor_log2(amax) - EMAX[code], "mx_ceil": lambda: ceil_log2(amax) - EMAX[code],
             "mx_rceil": lambda: ceil_log2(f32(amax / FLOATS[code][3])), "mx_ceil_x": lambda: ceil_log2(f32(amax / 7.25)),
             "mx_even": lambda: _even(amax, FLOATS[code][1]) - EMAX[code], "mx_even1": lambda: _even(amax, 1) - EMAX[code]}[rule]()
    return np.where(amax == 0, 0.0, np.clip(e, -126, 127))


def _even(amax, mantissa_bits):
    """floor(log2) of amax rounded to a mantissa of so many bits, halves up."""
    fraction, exponent = np.frexp(amax)
    return exponent - 1.0 + (2 * fraction >= 2 - 2.0 ** -(mantissa_bits + 1))


def scales(w, spec):
    """(scale as a float, zero or None) of every cell of w [N, K] float64 by a weight spec's rule; two-level scales multiplied out."""
    lo, hi = extremes(w, spec.granularity)
    amax, bits = np.maximum(np.abs(lo), np.abs(hi)), bits_of(spec.code)
    rule = spec.scale_rule
    if rule.startswith("mx"):
        return 2.0 ** mx_exponent(amax, spec.code, rule), None
    if rule == "two_level":
        outer = f32(np.abs(w).max() / 2688)
        outer = 1.0 if outer == 0 else outer
        inner = np.clip(f32(f32(amax / 6) / outer), 2.0**-9, 448)
        grid = magnitudes("fp8_e4m3")
        return f32(grid[nearest_even(inner, grid)] * outer), None
    if rule == "minmax":
        lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        s = (hi - lo) / (2**bits - 1)
        s = np.where(s == 0, 1.0, s)
        return f32(s), np.clip(np.round(f32(-lo / f32(s))), 0, 2**bits - 1)
    if rule == "minmax_float":
        s = (hi - lo) / (2**bits - 1)
        s = np.where(s == 0, 1.0, s)
        return s, lo + 2 ** (bits - 1) * s
    s = {"amax": lambda: amax / top(spec.code), "amax_half": lambda: amax / (2 ** (bits - 1) - 0.5),
         "full_range": lambda: np.where(np.abs(hi) >= np.abs(lo), -hi, -lo) / 2 ** (bits - 1)}[rule]()
    return f32(np.where(s == 0, 1.0, s)), None


def spread(cell_values, granularity, rows, columns):
    r, c = cells(granularity, rows, columns)
    return cell_values[r[:, None], c[None, :]]


def quantize_rows(x, code, size=None, clip=1.0):
    """Symmetric codes and float32 scales of the rows of x [M, K] (groups of `size`, or whole rows): s = clip amax / c, or 1."""
    size = size or x.shape[-1]
    columns = np.arange(x.shape[-1]) // size
    amax = np.stack([np.abs(x[..., columns == g]).max(-1) for g in range(columns[-1] + 1)], -1)
    s = f32(f32(amax * np.float32(clip)) / top(code))
    s = np.where(s == 0, 1.0, s)
    y = f32(x / s[..., columns])
    codes = np.clip(np.round(y), -top(code), top(code)) if "int" in code else encode(y, code)
    return codes, s, values(codes.astype(np.int64), code) * s[..., columns]
