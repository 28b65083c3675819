"""The cases of the interpreter, as data: schemes by shapes, types, targets and options, pairwise through tables of coprime lengths."""

import itertools
from dataclasses import dataclass, field

from qfunc._codes import code
from qfunc._schemes import scheme, schemes


@dataclass(frozen=True)
class Case:
    """One launch. `scheme` is an element code for rows; `sizes` and `tokens` make a grouped product; `config` overrides the tiles."""

    kind: str
    scheme: str
    rows: int
    columns: int
    outs: int = 0
    dtype: str = "bfloat16"
    out: str = "float32"
    target: str = "sm_90"
    lead: tuple = ()
    bias: bool = False
    sizes: tuple | None = None
    tokens: int = 0
    config: dict = field(default_factory=dict, hash=False)
    granularity: str = "token"
    fields: tuple = ()
    front: str = "none"
    label: str = ""

    @property
    def id(self) -> str:
        """The name of the test's row."""
        return "-".join([self.kind, self.label or self.scheme, f"{self.rows}x{self.columns}x{self.outs}", self.dtype, self.target])


# (tokens, outputs, leading axes): one token, tiles that stick out, more than one tile, batches
SHAPES = ((1, 40, ()), (5, 65, ()), (17, 33, ()), (3, 24, (2,)), (33, 16, ()), (4, 130, ()), (2, 19, (2, 1)))
DTYPES = ("bfloat16", "float16", "float32")
OUTS = ("float32", "bfloat16", "float32", "float16", "float32")
TARGETS = ("sm_90", "sm_80", "gfx942", "sm_89")
CONFIGS = (
    dict(block_m=16, block_n=32, swapped=True, split_k=1), dict(block_m=16, block_n=16, swapped=False, split_k=1),
    dict(block_m=16, block_n=64, swapped=True, split_k=2), dict(block_m=32, block_n=16, swapped=True, split_k=1, block_k=64),
    dict(block_m=16, block_n=32, swapped=False, split_k=3), dict(block_m=16, block_n=64, swapped=True, split_k=1, block_k=32),
)
SIZES = ((3, 0, 4), (0, 0, 9, 1), (1, 1, 1, 1, 1), (6,), (0, 0), (2, 17, 0, 5), (9, 3))


def contracted(name: str, turn: int) -> int:
    """A contracted size that the scheme's groups divide: whole blocks, and where that is possible a last block that is not full."""
    row = scheme(name)
    sizes = [g.size for g in (row.weight.granularity, row.activation.granularity if row.activation else None)
             if g is not None and g.kind == "group"]
    largest = max(sizes, default=0)
    if largest > 128:
        return 2 * largest
    ladder = {0: (256, 200, 72, 384, 130, 129), 16: (256, 208, 48), 32: (256, 160, 96, 288), 64: (256, 192, 64, 320), 128: (256, 384, 128)}
    choices = ladder[largest]
    if any(g.kind == "block" for g in (row.weight.granularity,)) and row.activation is not None:
        choices = (256, 384)
    return choices[turn % len(choices)]


def kernels_take(name: str) -> bool:
    return name != "llm_int8" and not scheme(name).weight.code.startswith("gguf")


NAMES = tuple(name for name in schemes if kernels_take(name) and "actorder" not in name)


def _dense():
    turn = 0
    for name in NAMES:
        for variant in range(6):
            rows, outs, lead = SHAPES[(turn + variant) % 7]
            quantized = scheme(name).activation is not None
            yield Case("dense", name, rows, contracted(name, turn + variant), outs, DTYPES[0 if quantized else (turn + variant) % 3],
                       OUTS[turn % 5], TARGETS[(turn + variant // 2) % 4], lead, bias=turn % 3 == 1, config=CONFIGS[turn % 6],
                       label=f"{name}-{variant}")
            turn += 1


def _grouped():
    turn = 0
    for name in NAMES:
        for variant in range(2):
            sizes = SIZES[turn % 7]
            rows = sum(sizes) + (0, 3, 1)[turn % 3]
            quantized = scheme(name).activation is not None
            yield Case("grouped", name, max(rows, 2), contracted(name, turn), (24, 33, 70)[turn % 3],
                       DTYPES[0 if quantized else turn % 3], OUTS[turn % 5], TARGETS[turn % 4], (), turn % 2 == 1, sizes,
                       tokens=4 if turn % 4 == 3 else 0, config={**CONFIGS[turn % 6], "split_k": 1}, label=f"{name}-{variant}")
            turn += 1


def _rows():
    integers = (("int8", {}), ("int4", {}), ("int8", {"zero": "int", "scale_rule": "minmax"}), ("int8", {"clip": 0.9}),
                ("int8", {"scale_rule": "amax_half"}), ("int4", {"rounding": "rha"}), ("int8", {"rounding": "trunc"}))
    floats = tuple((name, {}) for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2"))
    shapes = ((4, 96, ()), (5, 200, ()), (1, 256, ()), (3, 130, (2,)))
    turn = 0
    for name, extra in (*integers, *floats):
        for granularity in ("token", "group:32", "tensor", "static", "group:128"):
            fields = dict(extra)
            if granularity.startswith("group") and "zero" in fields:
                continue
            if granularity == "static":
                fields["mode"] = "static"
            rows, columns, lead = shapes[turn % 4]
            yield Case("rows", name, rows, columns, 0, DTYPES[turn % 3], target=TARGETS[turn % 4], lead=lead,
                       granularity="tensor" if granularity == "static" else granularity, fields=tuple(sorted(fields.items())),
                       config=dict(block_k=(64, 4096)[turn % 2], block_m=(1, 2, 4)[turn % 3]),
                       label="-".join([name, granularity.replace(":", ""), *(str(v) for v in extra.values())]))
            turn += 1
    for name, _ in floats:
        for rule in ("mx_floor", "mx_even", "mx_even1", "mx_ceil", "mx_rceil", "mx_ceil_x"):
            yield Case("rows", name, 5, 96, dtype=DTYPES[turn % 3], granularity="group:32", target=TARGETS[turn % 4],
                       fields=(("scale_dtype", "e8m0"), ("scale_rule", rule)), config=dict(block_k=64), label=f"{name}-{rule}")
            turn += 1
    for outer in ("tensor", "token"):
        yield Case("rows", "fp4_e2m1", 5, 96, granularity="group:16", fields=(("outer", outer), ("scale_dtype", "fp8_e4m3")),
                   config=dict(block_k=64, block_m=2), label=f"nvfp4-{outer}")
    inverses = ({"scale_rule": "amax_half_inverse"}, {"scale_rule": "minmax_inverse", "zero": "int"})
    for turn, (rule, granularity) in enumerate(itertools.product(inverses, ("token", "tensor", "group:32"))):
        if granularity != "group:32" or "zero" not in rule:
            yield Case("rows", "int8", 5, 200, dtype=DTYPES[turn % 3], target=TARGETS[turn % 4], granularity=granularity,
                       fields=tuple(sorted(rule.items())), config=dict(block_k=(64, 4096)[turn % 2]),
                       label=f"int8-{rule['scale_rule']}-{granularity.replace(':', '')}")


def _fronts():
    kinds = (("int8", "token", 384), ("fp8_e4m3", "token", 200), ("int8", "group:128", 384), ("fp8_e4m3", "group:128", 384))
    for i, front in enumerate(("rmsnorm", "swiglu")):
        for j, (name, granularity, columns) in enumerate(kinds):
            yield Case("fronts", name, 3 + j % 2, columns, dtype=DTYPES[(i + j) % 3], granularity=granularity, front=front,
                       config=dict(block_k=128), label=f"{front}-{name}-{granularity.replace(':', '')}")


def _take():
    for turn, name in enumerate(NAMES):
        yield Case("take", name, 7, contracted(name, turn), 19, out=("float32", "bfloat16", "float16")[turn % 3],
                   target=TARGETS[turn % 4], config=dict(block_k=(64, 128)[turn % 2]), label=name)


def _whole():
    """From the float activation on: smoothing, permutation, calibrated scales, scales of one tensor and of each expert."""
    for name in ("w8a8_dynamic", "w8a8_static_asym", "w4a8_dynamic_g128", "fp8", "nvfp4", "mxfp4", "w4a16_g128_actorder",
                 "w8a8_dynamic_tensor"):
        yield Case("whole", name, 5, 256, 24, label=name)
        if "actorder" not in name:
            yield Case("whole", name, 6, 256, 24, sizes=(2, 0, 3), label=f"{name}-experts")


def _ptx():
    """All bytes, as many to a block of PTX as there are columns."""
    for name in ("int", "nf4", "fp4_bnb", "fp4_e2m1"):
        for dot in ("s8", "bf16", "f16")[0 if name == "int" else 1:]:
            yield Case("ptx", name, 256, 4, dtype=dot)
    yield Case("ptx", "fp8_e4m3", 256, 4, dtype="bf16")
    for name, dots in (("int", 2), ("fp4_e2m1", 2), ("int8", 2), ("fp8_e4m3", 1)):
        for dot in ("bf16", "f16")[:dots]:
            yield Case("ptx", name, 256, 2, dtype=dot)


FAULTS = ("offset", "scale", "step", "grid", "rows", "columns", "groups", "experts")


def _faults():
    """Launches with one thing wrong, which the checks must notice."""
    for name in FAULTS:
        sizes = (2, 0, 3) if name == "experts" else None
        yield Case("faults", "w4a16_g128", 5, 384, 24, "float32", sizes=sizes, label=name)


ALL: dict[str, Case] = {case.id: case for make in (_dense, _grouped, _rows, _fronts, _take, _whole, _ptx, _faults) for case in make()}

# Every weight code, scale, place of the scale and arithmetic once, in the usual run; the rest runs in `make test-gpu-offline`.
_SCHEMES = """w2a16_g32 w3a16_g128 w4a16 w4a16_g32 w4a16_g128_asym w5a16_g64 w6a16 w7a16 w8a16 w8a16_asym w8a8_dynamic w8a8_static_asym
w8a8_block w4a8_dynamic w4a8_dynamic_g128_asym w4a4_dynamic w3a8_dynamic w4afp8_g128 int4wo_g32 int4wo_g128 fp8 fp8_dynamic
fp8_block fp8_e5m2 fp8_w8a16 fp8_e5m2_w8a16 mxfp8 mxfp6 mxfp6_e3m2_a16 mxfp4 mxfp4_a16 nvfp4 nvfp4_a16 nf4 nf4_dq fp4_bnb""".split()


def _sampled(case: Case, index: int) -> bool:
    name, _, variant = case.label.rpartition("-")
    if case.kind == "dense":
        return name in _SCHEMES and int(variant) == _SCHEMES.index(name) % 6
    if case.kind == "grouped":
        return name in _SCHEMES and int(variant) == 0 and _SCHEMES.index(name) % 2 == 0
    return {"rows": index % 4 == 0, "fronts": True, "take": case.scheme in _SCHEMES and _SCHEMES.index(case.scheme) % 5 == 0,
            "whole": index % 3 == 0, "ptx": case.columns == 2 or case.dtype != "f16", "faults": True}[case.kind]


USUAL = tuple(case.id for index, case in enumerate(ALL.values()) if _sampled(case, index))
assert len(USUAL) <= 120, len(USUAL)
assert all(code(scheme(name).weight.code) for name in NAMES)
