"""What is compiled ahead of time, as data: launch, target and the matrix instruction that must come out."""

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np

from qfunc import _codec
from qfunc._codes import code
from qfunc._qtensor import QTensor
from qfunc._schemes import scheme, schemes
from qfunc._spec import ActivationSpec, Granularity
from qfunc.kernels._dispatch import Call, Packed
from qfunc.kernels.triton import _launch, _plan_matmul, _plan_rows, _tables

Struct = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Row:
    """`kind` dense, grouped, routed, rows, rmsnorm, swiglu or take; `tokens` M; `config` overrides of the default tiles."""

    kind: str
    scheme: str
    tokens: int
    target: str
    config: tuple = ()
    columns: int = 4096
    outs: int = 4096
    experts: int = 128
    dtype: str = "bfloat16"
    label: str = ""

    @property
    def id(self) -> str:
        """The name of the test's row."""
        if self.label:
            return self.label
        tiles = "".join(f"-{name}{value}" for name, value in self.config)
        return f"{self.kind}-{self.scheme}-{self.tokens}x{self.columns}x{self.outs}-{self.dtype}-{self.target}{tiles}"


def _call(row: Row) -> Call:
    dtype = jnp.dtype(row.dtype)
    if row.kind in ("rows", "rmsnorm", "swiglu"):
        kind, _, size = row.scheme.partition(":")[2].partition(":")
        fields = dict(scale_dtype="e8m0", scale_rule="mx_rceil") if size == "32" else {}
        spec = ActivationSpec(row.scheme.partition(":")[0], Granularity(kind, int(size or 0)), **fields)
        return Call("quantize_activation", (Struct((row.tokens, row.columns), dtype),), spec=spec)
    record = scheme(row.scheme)
    lead = (row.experts,) if row.kind in ("grouped", "routed") else ()
    shape = Struct((*lead, row.outs, row.columns), jnp.float32)
    leaves = jax.eval_shape(lambda w: _codec.encode(w, record.weight), shape)
    q = QTensor(**leaves, scheme=record, dtype=row.dtype, pad=-row.columns % 128 if code(record.weight.code).packed else 0)
    sizes = Struct((row.experts,), np.int32) if lead else None
    name = {"dense": "quantized_matmul", "take": "take"}.get(row.kind, "quantized_grouped_matmul")
    x = Struct((row.tokens,), np.int32) if row.kind == "take" else Struct((row.tokens, row.columns), dtype)
    bias = Struct((row.outs,), dtype) if row.kind == "dense" else None
    return Call(name, (x,), Packed.of(q), tuple(q.leaves.values()), sizes, bias, record.activation if row.kind != "take" else None,
                out_dtype=dtype)


def launch(row: Row):
    """(Launch, Target) of a row, made as the bridge makes them."""
    call, target = _call(row), _launch.Target.parse(row.target)
    config = dataclasses.replace(_launch.default_config(call, target), **dict(row.config))
    if row.kind in ("rmsnorm", "swiglu"):
        gain = Struct((row.columns,), jnp.dtype(row.dtype))
        return _plan_rows.describe(call, target, _launch.adapt(call, target, config), row.kind, gain, 1e-6), target
    described = _launch.describe(call, target, config)
    return (_plan_matmul.routed(described, max(row.tokens // 8, 1), True) if row.kind == "routed" else described), target


FIRST, OTHERS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"), ("sm_86", "sm_120")
TARGETS = (*FIRST, *OTHERS)
INSTRUCTIONS = {
    # operand type: what the tensor cores of each target are to be asked for
    "s8": {"sm_80": r"mma\..*s8\.s8", "sm_89": r"mma\..*s8\.s8", "sm_90": r"wgmma.*\.s8\.s8", "sm_100": "tcgen05.*i8",
           "gfx942": "v_mfma_i32_.*i8", "gfx950": "v_mfma_i32_.*i8"},
    "bf16": {"sm_80": r"mma\..*bf16\.bf16", "sm_89": r"mma\..*bf16\.bf16", "sm_90": r"wgmma.*bf16\.bf16", "sm_100": "tcgen05.*f16",
             "gfx942": "v_mfma_f32_.*bf16", "gfx950": "v_mfma_f32_.*bf16"},
    "f16": {"sm_80": r"mma\..*f16\.f16", "sm_89": r"mma\..*f16\.f16", "sm_90": r"wgmma.*f16\.f16", "sm_100": "tcgen05.*f16",
            "gfx942": "v_mfma_f32_.*f16", "gfx950": "v_mfma_f32_.*f16"},
    "e4m3": {"sm_89": r"mma\..*e4m3\.e4m3", "sm_90": r"wgmma.*e4m3\.e4m3", "sm_100": "tcgen05.*f8f6f4", "gfx950": "v_mfma_.*(fp8|f8f6f4)"},
    "e5m2": {"sm_89": r"mma\..*e5m2\.e5m2", "sm_90": r"wgmma.*e5m2\.e5m2", "sm_100": "tcgen05.*f8f6f4", "gfx950": "v_mfma_.*(bf8|f8f6f4)"},
    "f32": {"sm_80": r"mma\..*tf32", "sm_89": r"mma\..*tf32", "sm_90": "tf32", "sm_100": "tf32|tcgen05", "gfx942": "v_mfma_f32",
            "gfx950": "v_mfma_f32"},
}


for _operands in INSTRUCTIONS.values():
    # Ampere's second chip has the first one's products; Blackwell's small one has no tensor memory, and multiplies like Ada.
    _operands |= {other: _operands[like] for other, like in (("sm_86", "sm_80"), ("sm_120", "sm_89")) if like in _operands}
DIVISION = {"cuda": r"^div\.rn\.f32", "hip": "^v_div_fixup_f32"}
"""Codes of an activation are quotients, rounded correctly."""


def expected(launched, target) -> str | None:
    """The instruction of a product's operand type on a target, or the division of `quantize_rows`; None for `take`."""
    if launched.kernel.name == "quantize_rows":
        return DIVISION[target.backend]
    dot = launched.constants.get("DOT")
    return None if dot is None else INSTRUCTIONS[dot][str(target)]


# Every scheme that differs in what is compiled, at decode, at a small batch and at prefill.
SCHEMES = ("w4a16_g128", "w4a16_g128_asym", "w4a16_g32", "w4a16", "w3a16_g128", "w2a16_g64", "w6a16_g128", "w7a16", "w8a16", "w8a16_asym",
            "w4a8_dynamic", "w4a8_dynamic_g128", "w4a8_dynamic_g128_asym", "w8a8_dynamic", "w8a8_block", "w4afp8_g128", "fp8_dynamic",
            "fp8_block", "fp8_e5m2_dynamic", "fp8_w8a16", "mxfp8", "mxfp6", "mxfp4", "mxfp4_a16", "nvfp4", "nvfp4_a16", "nf4", "nf4_dq",
            "int4wo_g128")
_PREFILL = ("w8a8_dynamic", "fp8_dynamic", "fp8_block", "w8a8_block", "w4a16_g128", "w4a8_dynamic")
_EXPERTS = ("w4a16_g128", "w8a8_dynamic", "fp8_block", "mxfp4_a16", "w4a8_dynamic", "nf4")
_ROW_KINDS = ("int8:token", "fp8_e4m3:token", "int4:token", "int8:group:128", "fp8_e4m3:group:128", "fp4_e2m1:group:32", "int8:tensor")


def _rows():
    for target in TARGETS:
        for name in SCHEMES:
            for tokens in (16, 64):
                yield Row("dense", name, tokens, target)
            yield Row("dense", name, 64, target, outs=24576)     # so many outputs that their tile is the wider one
        for name in _PREFILL:
            for tokens in (512, 8192):
                yield Row("dense", name, tokens, target)
        for name in ("w4a16_g128", "fp8_w8a16", "mxfp4_a16"):
            yield Row("dense", name, 16, target, dtype="float16")
            yield Row("dense", name, 16, target, dtype="float32")
        yield Row("dense", "w4a16", 5, target, columns=1000, outs=1001)
        yield Row("dense", "w8a8_dynamic", 5, target, columns=1000, outs=1001)
        for name in _EXPERTS:
            for tokens in (64, 4096):
                yield Row("grouped", name, tokens, target, columns=2048, outs=1536)
        yield Row("routed", "w4a16_g128", 64, target, columns=2048, outs=1536)
        for name in _ROW_KINDS:
            yield Row("rows", name, 512, target)
        for kind in ("rmsnorm", "swiglu"):
            yield Row(kind, "int8:token", 512, target)
            yield Row(kind, "fp8_e4m3:group:128", 512, target)
        for name in ("w4a16_g128", "w8a16", "nf4_dq"):
            yield Row("take", name, 512, target)


def _scheme_of(form: str) -> str:
    """A scheme of the format of a tuning table: symmetric, of this code, group and activation."""
    _, element, group, x = form.split("/")
    for name in schemes:
        weight, activation = scheme(name).weight, scheme(name).activation
        plain = activation is None or activation.outlier_threshold is None and activation.mode == "dynamic" and activation.zero is None
        own = "bfloat16" if activation is None else activation.code
        found = weight.code, f"g{weight.granularity.size}", own
        if plain and found == (element, group, x) and weight.zero is None and weight.granularity.kind != "tensor":
            return name
    raise LookupError(f"no scheme has the format {form}")


def _tabled():
    """Every row of the tuning tables that the package ships, for every target that asks them; rows that differ in nothing but the number
    of slabs are compiled once."""
    shipped = _tables._folder(_tables.PACKAGE)
    for table, target in ((t, target) for target in TARGETS for t in shipped if _tables.serves(t, target)):
        if table.target != target and any(t.target == target for t in shipped):
            continue                                            # the target's own is asked, which has the same formats
        for form, entries in table.formats.items():
            kind, name, seen = form.split("/")[0], _scheme_of(form), set()
            for entry in entries:
                config = dataclasses.replace(entry.config, split_k=min(entry.config.split_k, 2))
                if config in seen:
                    continue
                seen.add(config)
                tiles = "x".join(map(str, dataclasses.astuple(config)[:4]))
                order = "swapped" if config.swapped else "plain"
                label = f"table-{target}-{form}-{tiles}-w{config.num_warps}-s{config.num_stages}-{order}"
                tokens = entry.m * (128 if kind == "grouped" else 1)
                yield Row(kind, name, tokens, target, tuple(vars(config).items()), entry.k, entry.n, label=label)


ALL = {row.id: row for make in (_rows, _tabled) for row in make()}


def weight_in_registers(name: str) -> bool:
    """Whether a row is one of those in which Hopper's left operand is to be the unpacked weight, in registers."""
    row = ALL[name]
    product = row.kind in ("dense", "grouped", "routed")
    return product and row.target == "sm_90" and row.dtype != "float32" and code(scheme(row.scheme).weight.code).packed


@dataclass(frozen=True)
class Known:
    """Rows (a pattern of their names) that do not give what they should, with the reason."""

    rows: str
    reason: str
    spills: int = 0
    instruction: str | None = None


_OLDER = "Triton 3.6 has no int8 product of Blackwell's tensor memory (3.9 has); the products of the generation before run there"
EXCEPTIONS: tuple[Known, ...] = (
    Known("*-w?a8_*-sm_100", _OLDER, instruction=r"^mma\..*s8\.s8"),
    Known("table-sm_100-*/int8-*", _OLDER, instruction=r"^mma\..*s8\.s8"),
    *(Known(rows, "one register waits in memory while the loop runs, which neither reads nor writes it", spills=8)
      for rows in (*(f"dense-w4a8_dynamic_g128_asym-64x*x24576-*-{target}" for target in ("sm_86", "sm_89", "sm_100", "sm_120")),
                   *(f"dense-w8a16_asym-64x*x24576-*-{target}" for target in ("sm_86", "sm_89")),
                   "grouped-mxfp4_a16-64x2048x1536-*-sm_120")),
)


def exceptions(name: str) -> list[Known]:
    """The exceptions that a row may claim."""
    return [record for record in EXCEPTIONS if fnmatchcase(name, record.rows)]


# The usual run: every scheme, kernel and target; Hopper, which is the first device, in full at decode.
def _usual(index: int, row: Row) -> bool:
    if row.label:
        return False
    if row.target in OTHERS:
        return (row.kind, row.scheme, row.tokens) == ("dense", "w8a8_dynamic", 512)
    if row.outs == 24576:
        return False
    if row.kind == "dense" and row.tokens in (16, 64) and row.dtype == "bfloat16" and row.columns == 4096:
        return row.target == ("sm_90" if row.tokens == 16 else FIRST[SCHEMES.index(row.scheme) % 6])
    if row.kind == "dense" and row.tokens == 512:
        return row.target in ("sm_90", "gfx942") and row.scheme in ("w8a8_dynamic", "fp8_block")
    if row.kind in ("routed", "rmsnorm", "swiglu"):
        return row.target in ("sm_90", "gfx942") and "group" not in row.scheme
    return index % 17 == 5 and row.tokens != 8192


USUAL = tuple(name for index, (name, row) in enumerate(ALL.items()) if _usual(index, row))
assert len(USUAL) <= 80, len(USUAL)
