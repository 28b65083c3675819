"""The launches of `quantized_matmul` and `quantized_grouped_matmul`: which constants a weight format becomes, tiles and grid."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qfunc._codes import CODES, code
from qfunc._pack import planes
from qfunc._qtensor import CODECS
from qfunc._spec import ActivationSpec

from .._dispatch import Call
from ._launch import POINTER, Config, Kernel, Launch, Target, struct

STEP = 128
"""Contracted elements of one step of the kernels' loop: a block of the canonical packing."""
WHOLE = 1 << 30
"""GROUP where one scale serves all of K, so that one compiled kernel serves every K."""
WEIGHT = ("codes", "scale", "scale2", "scale_offset", "zero", "table", "levels")
CONSTANTS = ("BM", "BN", "RUN", "SWAP", "SPLIT", "EVEN", "DOT", "PRECISION", "PTX", "CODE", "BITS", "OFFSET", "ZERO", "SCALE", "SCALE2",
             "GROUP", "SHARE", "X_CODE", "X_GROUP", "X_SCALE", "X_ZERO", "PLACE", "HAS_BIAS")
DENSE = Kernel("dense", "qfunc.kernels.triton._dense", "dense", ("x", "x_scale", "x_zero", *WEIGHT, "bias"), ("y",),
               ("M", "N", "K", "ROW", "GROUPS", "X_GROUPS"), CONSTANTS)
GROUPED = Kernel("grouped", "qfunc.kernels.triton._grouped", "grouped",
                 ("x", "x_scale", "x_zero", *WEIGHT, "bias", "sizes", "rows", "weights"), ("y",),
                 ("M", "N", "K", "ROW", "GROUPS", "X_GROUPS", "E"), (*CONSTANTS, "E_BLOCK", "GATHER", "WEIGHTED"))

FLOATS = ("bfloat16", "float16", "float32")
NATIVE = {"fp8_e4m3": ("e4m3", "*fp8e4nv"), "fp8_e5m2": ("e5m2", "*fp8e5")}
"""fp8 codes that both operands share are multiplied as they are where the target can."""
TABLE_CODES = ("nf4", "fp4_bnb")
"""Codes whose numbers are looked up."""
INTEGER_RUN, NATIVE_RUN, FLOAT_RUN = 32, 32, 16
"""The shortest product of tiles that the tensor cores take, by operand type."""
SCALES = {"float32": "float", "float16": "float", "bfloat16": "float", "float8_e4m3fn": "e4m3", "e8m0": "e8m0", "nested": "nested"}


def coded(call: Call) -> Call:
    """The call after its activation has been quantized; the call itself where nothing is to be quantized."""
    if call.spec is None or call.quantized:
        return call
    shape, spec = call.x[0].shape, call.spec
    element, columns = code(spec.code), shape[-1]
    groups = -(-columns // spec.granularity.size) if spec.granularity.kind == "group" else 1
    dtype = np.int8 if element.integer else element.dtype
    scale = struct((*shape[:-1], groups), np.float32)
    parts = struct(shape, dtype), scale, *((struct(scale.shape, np.int32),) if spec.zero is not None else ())
    return dataclasses.replace(call, x=parts)


def is_integer(call: Call) -> bool:
    """Whether codes on both sides are integers, so that sums are made in int32."""
    w = call.packed.scheme.weight
    return call.spec is not None and code(w.code).integer and code(call.spec.code).integer and w.zero != "float"


def refusal(call: Call, target: Target) -> str | None:
    """None, or why the matmul kernels do not take this call."""
    spec = call.packed.scheme.weight
    if call.packed.layout != "canonical":
        return f"the weight is laid out for {call.packed.layout}"
    if spec.code in CODECS.decoders or spec.code not in CODES:
        return f"there is no GPU decoder of {spec.code}"
    if call.spec is not None and call.spec.outlier_threshold is not None and not call.quantized:
        return "outlier columns are split off first: a product of codes and one in floating point"
    reasons = (_refuse_types, _refuse_sizes, _refuse_integer)
    return next((reason for check in reasons if (reason := check(coded(call), target)) is not None), None)


def _refuse_types(call: Call, target: Target) -> str | None:
    w, spec = call.w, call.packed.scheme.weight
    floats = {"the result": call.out_dtype, "bias": None if call.bias is None else call.bias.dtype,
              "x": None if call.quantized else call.x[0].dtype}
    for name, dtype in floats.items():
        if dtype is not None and str(np.dtype(dtype)) not in FLOATS:
            return f"{name} of type {np.dtype(dtype)}"
    if scale_kind(w) not in SCALES:
        return f"scales of type {scale_kind(w)}"
    if spec.zero == "int" and np.dtype(w.zero.dtype) != np.uint8:
        return f"zero points of type {w.zero.dtype}"
    if spec.zero == "float" and str(np.dtype(w.zero.dtype)) not in FLOATS:
        return f"zero points of type {w.zero.dtype}"
    return None


def _refuse_sizes(call: Call, target: Target) -> str | None:
    w = call.w
    *_, columns, rows = w.matrix_shape
    count = math.prod(call.x[0].shape[:-1])
    if 0 in (columns, rows, count):
        return "an empty product"
    if rows * w.scale.shape[-1] >= 2**31:
        return f"{rows} times {w.scale.shape[-1]} scales, which 32-bit indices do not reach"
    if max(columns, rows, count) >= 2**30:
        return f"an axis of {max(columns, rows, count)}, which 32-bit indices do not reach safely"
    if math.prod(w.matrix_shape[:-2]) > 65535 and call.sizes is None:
        return f"{math.prod(w.matrix_shape[:-2])} matrices, more than one launch has room for"
    for name, size in (("weight", weight_group(call)), ("activation", activation_group(call))):
        if size < columns and size % STEP and size not in (16, 32, 64):
            return f"{name} groups of {size}: expected 16, 32, 64 or a multiple of {STEP}"
    if w.scale2 is not None and scale_kind(w) != "nested" and w.scale2.shape[-1] != 1:
        return f"second scales {w.scale2.shape} for parts of a row"
    return None


def _refuse_integer(call: Call, target: Target) -> str | None:
    if not is_integer(call):
        asymmetric = call.spec is not None and call.spec.zero is not None
        return "zero points of the activation in a product that is not of integers" if asymmetric else None
    columns, spec, w = call.x[0].shape[-1], call.spec, call.packed.scheme.weight
    smallest = min(weight_group(call), activation_group(call))
    if smallest < min(INTEGER_RUN, columns):
        return f"integer groups of {smallest}, shorter than the {INTEGER_RUN} codes of an integer product"
    if spec.zero is not None and activation_group(call) < columns:
        return "zero points for groups of the activation"
    if w.zero is not None and w.code == "uint8" and spec.zero is not None:
        return "zero points on both sides of 8-bit codes"
    if min(columns, smallest) > exact_terms(spec, w):
        return f"a sum of {columns} products, which int32 does not hold"
    return None


def exact_terms(x: ActivationSpec, w) -> int:
    """How many products of codes an int32 sum can hold."""
    def reach(spec):
        element = code(spec.code)
        return max(-element.lowest, element.highest if spec.zero is None else element.highest - element.lowest)
    return int((2**31 - 1) // (reach(x) * reach(w)))


def scale_kind(w) -> str:
    """How stored scales are read, a key of `SCALES` where that is known."""
    spec = w.scheme.weight
    if spec.scale_rule == "double" and w.scale_offset is not None:
        return "nested"
    return "e8m0" if spec.scale_dtype == "e8m0" else str(np.dtype(w.scale.dtype))


def weight_group(call: Call) -> int:
    """Codes of one output channel under one scale; K where a channel has one scale."""
    granularity, columns = call.packed.scheme.weight.granularity, call.x[0].shape[-1]
    return min(granularity.size, columns) if granularity.kind in ("group", "block") else columns


def activation_group(call: Call) -> int:
    """Codes of one token under one scale; K where a token has one scale, or none."""
    columns = call.x[0].shape[-1]
    grouped = call.spec is not None and call.spec.granularity.kind == "group"
    return min(call.spec.granularity.size, columns) if grouped else columns


def arithmetic(call: Call, target: Target) -> str:
    """Type of the tensor cores' operands: s8, e4m3, e5m2, bf16, f16 or f32. All codes but nf4 and fp4_bnb are exact in all of these."""
    if call.spec is None:
        return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[str(np.dtype(call.x[0].dtype))]
    if is_integer(call):
        return "s8"
    own = call.packed.scheme.weight.code
    long = min(weight_group(call), activation_group(call)) >= min(NATIVE_RUN, call.x[0].shape[-1])
    if own == call.spec.code and own in NATIVE and native_fp8(target) and long:
        return NATIVE[own][0]
    return "bf16"


def native_fp8(target: Target) -> bool:
    """Whether the target multiplies OCP's fp8 types: Ada, Hopper, Blackwell and CDNA4; CDNA3 has other ones (fnuz)."""
    return target.arch >= 89 if target.backend == "cuda" else target.arch == "gfx950"


def default_config(call: Call, target: Target) -> Config:
    """Tiles for two programs on each of some 130 processors: the tokens in up to 64, outputs of 64 until there are enough of them, then
    128, and the contracted axis split where both are few. None of it was measured."""
    call = coded(call)
    rows, columns = call.w.matrix_shape[-1], call.x[0].shape[-1]
    count = max(math.prod(call.x[0].shape[call.batch:-1]), 1)
    if call.sizes is not None:
        count = -(-count // call.sizes.shape[0])
    if code(call.packed.scheme.weight.code).bits == 8 and count >= 128:
        few = count * rows < 8192 * 264
        return Config(64 if few else 128, 128 if few else 256, 128, 1, 4 if few else 8, 3, swapped=False)
    block_m = min(max(16, 1 << (count - 1).bit_length()), 64)
    block_n = 64 if rows < 128 * 132 else 128
    tiles = -(-rows // block_n) * -(-count // block_m) * max(math.prod(call.x[0].shape[:call.batch]), 1)
    split = 1
    while call.sizes is None and split < 16 and tiles * split < 264 and columns // (2 * split) >= 512:
        split *= 2
    return Config(block_m, block_n, 128, split, 4, 4 if block_m <= 32 else 3, swapped=True)


def largest_tile(call: Call, target: Target, swapped: bool = True) -> tuple[int, int]:
    """(sums of the largest tile, sums up to which four warps have registers for them), as compilations show.

    Sums that are scaled step by step take their registers twice; 8-bit codes that are decoded, and on all but Hopper operands of any
    product, lie in registers beside them: 128 of a step where codes have 8 bits and are the left operand.
    """
    call = coded(call)
    dot = arithmetic(call, target)
    smallest = min(weight_group(call), activation_group(call))
    scaled = smallest < call.x[0].shape[-1]
    fresh, decoded = scaled or dot in ("e4m3", "e5m2"), dot not in ("s8", "e4m3", "e5m2")
    hopper, later = target.arch == 90, target.backend == "cuda" and target.arch > 90
    tight = not hopper and fresh and (decoded or target.backend == "hip") or later and scaled
    bits = code(call.packed.scheme.weight.code).bits
    whole_step = tight and swapped and decoded and target.backend == "cuda" and bits == 8
    # Of products of 16 contracted elements in larger tiles, Triton 3.6 makes an empty kernel on sm_100; others spill.
    short = not hopper and (smallest < 32 or smallest < STEP and call.quantized and (later or bits not in (4, 8)))
    largest = 64 * 64 if whole_step or short else 64 * 128 if tight else 128 * 128 if fresh or decoded else 128 * 256
    if dot == "f32" and target.backend == "cuda" and not hopper:
        # Three tf32 products hold each operand three times: larger tiles spill kilobytes, on sm_100 they come out empty.
        largest = min(largest, 64 * 64 if target.arch == 100 and smallest >= 32 else 64 * 32)
    crowded = fresh and target.backend == "cuda" and not hopper
    return largest, 64 * 32 if crowded else 64 * 64 if decoded or smallest < STEP else 64 * 128


def adapt(call: Call, target: Target, config: Config) -> Config:
    """Tiles of at least 16 that fit the registers, no more slabs than steps, none for experts; two stages on AMD, whose shared memory
    is small."""
    steps = -(-call.x[0].shape[-1] // STEP)
    split = 1 if call.sizes is not None else max(min(config.split_k, steps), 1)
    split = -(-steps // -(-steps // split))                     # no program without a step of its own
    stages = min(config.num_stages, 2) if target.backend == "hip" else config.num_stages
    (largest, light), m, n = largest_tile(call, target, config.swapped), max(config.block_m, 16), max(config.block_n, 16)
    if target.shared_memory <= 1 << 16 and call.packed.scheme.weight.code in TABLE_CODES:
        n = min(n, 64)                                          # numbers out of a table lie in shared memory before they are multiplied
    while m * n > largest:
        m, n = (m // 2, n) if m > n else (m, n // 2)
    warps = max(config.num_warps, 8 if m * n > light else 1)
    return dataclasses.replace(config, block_m=m, block_n=n, split_k=split, num_warps=warps, num_stages=stages)


def run_width(call: Call, target: Target, config: Config) -> int:
    """Contracted elements of one product of tiles: those of one digit of the widest plane, cut so that each has one scale."""
    bits = code(call.packed.scheme.weight.code).bits
    columns = call.x[0].shape[-1]
    # Three tf32 products hold each operand three times; rows that are not aligned are read byte by byte, each with its own address.
    tight = arithmetic(call, target) == "f32" or columns % 16 != 0
    width = min(config.block_k, 64 if tight else STEP) if bits == 8 else 16 * planes(bits)[0][0]
    for size in (weight_group(call), activation_group(call)):
        if size < columns and size % STEP:
            width = min(width, size)
    return max(width, FLOAT_RUN if arithmetic(call, target) in ("bf16", "f16", "f32") else INTEGER_RUN)


def describe(call: Call, target: Target, config: Config) -> Launch:
    """The launch of a matmul; see `_launch.describe`."""
    call = coded(call)
    w, spec = call.w, call.packed.scheme.weight
    element, dot, kind = code(spec.code), arithmetic(call, target), scale_kind(w)
    *batch, columns, rows = w.matrix_shape
    matrices, grouped = math.prod(batch), call.sizes is not None
    leading = 1 if grouped else matrices
    count = math.prod(call.x[0].shape[:-1]) // leading
    own, theirs = weight_group(call), activation_group(call)
    place = max(_place(size, columns) for size in (own, theirs))
    split = config.split_k
    out = call.out_dtype if split == 1 else np.float32

    arrays = {"x": struct((leading, count, columns), call.x[0].dtype)}
    if call.quantized:
        arrays["x_scale"] = struct((leading, count, -(-columns // theirs)), np.float32)
    if len(call.x) > 2:
        arrays["x_zero"] = struct((leading, count, 1), np.int32)
    for name in ("codes", "scale", "scale2", "scale_offset", "zero"):
        if (leaf := getattr(w, name)) is not None:
            arrays[name] = struct((matrices, *leaf.shape[-2:]) if name != "scale_offset" else (matrices,), leaf.dtype)
    if element.name in TABLE_CODES:
        arrays["table"] = struct((16,), np.float32)
    if kind == "nested":
        arrays["levels"] = struct((256,), np.float32)
    if call.bias is not None and split == 1:
        arrays["bias"] = struct((matrices, rows), call.bias.dtype)
    if grouped:
        arrays["sizes"] = struct(call.sizes.shape, np.int32)
    types = {name: POINTER[str(np.dtype(array.dtype))] for name, array in arrays.items()}
    if dot in ("e4m3", "e5m2"):
        types |= dict.fromkeys(("x", "codes"), NATIVE[spec.code][1])

    granularity = spec.granularity
    constants = dict(
        BM=config.block_m, BN=config.block_n, RUN=run_width(call, target, config), SWAP=config.swapped, SPLIT=split,
        EVEN=columns % STEP == 0, DOT=dot, PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        PTX=by_ptx(spec, dot, target, config.swapped),
        CODE=code_kind(element.name),
        BITS=element.bits, OFFSET=element.offset if element.integer else 0, ZERO=spec.zero or "none", SCALE=SCALES[kind],
        SCALE2=second_kind(w, kind), GROUP=own if own < columns else WHOLE,
        SHARE={"tensor": 0, "block": granularity.out}.get(granularity.kind, 1), X_GROUP=theirs if theirs < columns else 0,
        X_CODE=code_kind(call.spec.code) if call.quantized else "float", X_SCALE=call.quantized,
        X_ZERO=len(call.x) > 2, PLACE=place, HAS_BIAS="bias" in arrays)
    scalars = dict(M=count, N=rows, K=columns, ROW=w.codes.shape[-1], GROUPS=w.scale.shape[-1], X_GROUPS=-(-columns // theirs))
    tiles = -(-count // config.block_m) * -(-rows // config.block_n)
    grid = (tiles, split, leading)
    if grouped:
        scalars["E"] = matrices
        constants |= dict(E_BLOCK=1 << matrices.bit_length(), GATHER=False, WEIGHTED=False)
        # Every expert that has rows, and the rows that have none, may end in a tile that is not full.
        owners = min(matrices + 1, count)
        grid = ((owners + (count - owners) // config.block_m) * -(-rows // config.block_n), 1, 1)
    types["y"] = POINTER[str(np.dtype(out))]
    shape = (count, rows) if grouped else (leading, count, rows)
    result = struct(shape if split == 1 else (split, *shape), out)
    return Launch(GROUPED if grouped else DENSE, tuple(arrays.items()), types, (("y", result),), scalars, constants, grid,
                  config.num_warps, config.num_stages, split)


def routed(launch: Launch, tokens: int | None = None, weighted: bool = False) -> Launch:
    """A grouped launch with the routing of experts inside.

    With `tokens`, x (and its scales) have that many rows, and row r of the product takes row `rows[r]`, int32 [T], of them; with
    `weighted`, row r of y is multiplied by `weights[r]`, float32 [T], in float32. Both arrays follow `sizes`.
    """
    arrays, count = dict(launch.arrays), launch.scalars["M"]
    for name in ("x", "x_scale", "x_zero"):
        if tokens is not None and name in arrays:
            arrays[name] = struct((1, tokens, arrays[name].shape[-1]), arrays[name].dtype)
    extra = {"rows": struct((count,), np.int32)} if tokens is not None else {}
    extra |= {"weights": struct((count,), np.float32)} if weighted else {}
    types = launch.types | {name: POINTER[str(np.dtype(array.dtype))] for name, array in extra.items()}
    constants = launch.constants | dict(GATHER=tokens is not None, WEIGHTED=weighted)
    return dataclasses.replace(launch, arrays=tuple((arrays | extra).items()), types=types, constants=constants)


def by_ptx(w, dot: str, target: Target, swapped: bool) -> int:
    """How many bytes of codes one block of `_ptx.py` decodes; 0 where plain Triton does.

    Two on Hopper where decoded numbers of 16 bits are the register operand, but for the tables of nf4 and fp4_bnb, which cost the same
    for two as for four.
    """
    bits, half = code(w.code).bits, dot in ("bf16", "f16")
    if target.backend != "cuda" or bits not in (4, 8):
        return 0
    if target.arch == 90 and swapped and half and w.code not in TABLE_CODES:
        plain = bits == 4 or w.code == "int8" and w.zero != "int" or (w.code, dot) == ("fp8_e4m3", "bf16")
        return 2 if plain else 0
    return 4 if bits == 4 and (half or dot == "s8") or (w.code, dot) == ("fp8_e4m3", "bf16") else 0


def _place(size: int, columns: int) -> int:
    """Where the scales of groups of `size` come in: 0 after all sums, 1 after each step of 128, 2 after each product of tiles."""
    return 0 if size >= columns else 1 if size % STEP == 0 else 2


def second_kind(w, kind: str) -> str:
    """Where the second scale of two-level formats lies: none, one of a matrix, one of a row, or one of 256 scales."""
    if w.scale2 is None:
        return "none"
    return "nested" if kind == "nested" else "row" if w.scale2.shape[-2] > 1 else "matrix"


def code_kind(name: str) -> str:
    """`int`, or the name of a table or small float: what the decoders tell apart beyond the number of bits."""
    return "int" if code(name).integer else name
