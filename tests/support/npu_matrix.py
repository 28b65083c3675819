"""Every scheme row of the Ascend bridge on the layer shapes of real models, for every tensor parallel size and generation, without memory.

    python tests/support/npu_matrix.py                 # judge all, print the counts
    python tests/support/npu_matrix.py --write         # and write docs/ascend_refused.csv anew

A combination is placed on the meta device and run: every call is put to torch_npu's Meta functions and to the eager rules. It is either
accepted by both, or refused by `place`: by the table of generations, or by an alignment rule that is named. A refusal by Meta or by the
rules after `place` accepted is a fault of the bridge. Equal shapes are judged once and counted as often as they occur.
"""

from __future__ import annotations

import csv
import functools
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

REFUSED = Path(__file__).parents[2] / "docs" / "ascend_refused.csv"
TP = (1, 2, 4, 8)
TOKENS = (1, 128)
HEAD = ("scheme", "layer kind", "model", "layer", "tp", "soc", "K", "N", "rule")


@dataclass(frozen=True)
class Layer:
    """A linear layer: `cut` is `out` (column parallel), `in` (row parallel) or `whole` (on every device)."""

    name: str
    cut: str
    columns: int
    rows: int


def _attention(hidden, queries, keys, inner):
    return (Layer("q", "out", hidden, queries), Layer("k, v", "out", hidden, keys), Layer("qkv", "out", hidden, queries + 2 * keys),
            Layer("o", "in", queries, hidden), Layer("gate, up", "out", hidden, inner), Layer("gate_up", "out", hidden, 2 * inner),
            Layer("down", "in", inner, hidden))


def _wan(width, inner):
    return (Layer("attn q, k, v", "out", width, width), Layer("attn out", "in", width, width), Layer("ffn.0", "out", width, inner),
            Layer("ffn.2", "in", inner, width))


LINEAR = {
    "Qwen3-8B": _attention(4096, 4096, 1024, 12288),
    "Qwen3-32B": _attention(5120, 8192, 1024, 25600),
    "Qwen3-30B-A3B": _attention(2048, 4096, 512, 768)[:4],
    "DeepSeek-V3": (Layer("q_a", "whole", 7168, 1536), Layer("q_b", "out", 1536, 24576), Layer("kv_a", "whole", 7168, 576),
                    Layer("kv_b", "out", 512, 32768), Layer("o", "in", 16384, 7168), Layer("dense gate, up", "out", 7168, 18432),
                    Layer("dense down", "in", 18432, 7168), Layer("shared gate, up", "out", 7168, 2048),
                    Layer("shared down", "in", 2048, 7168)),
}
BLOCKS = {"Wan2.2-A14B": _wan(5120, 13824), "Wan2.2-TI2V-5B": _wan(3072, 14336)}
EXPERTS = {"Qwen3-30B-A3B": (2048, 768, 128, 8), "DeepSeek-V3": (7168, 2048, 256, 8)}


@functools.cache
def rows() -> dict:
    """Name of a row to its scheme: the rows of SGLang's Ascend table and those this project adds."""
    import qfunc
    from qfunc._spec import ActivationSpec, Scheme, WeightSpec, group
    mx = group(32)

    def microscaled(name, weight, rule, activation, act_rule, rounding):
        return Scheme(name, WeightSpec(weight, mx, scale_dtype="e8m0", scale_rule=rule, rounding="rha"),
                      ActivationSpec(activation, mx, scale_dtype="e8m0", scale_rule=act_rule, rounding=rounding))

    clipped = qfunc.scheme("w4a8_dynamic").replace(name="w4a8_clip", activation_clip=0.9)
    flat = qfunc.scheme("w4a4_dynamic").replace(name="w4a4_flatquant", activation_clip=0.95)
    named = {
        "ModelSlim W8A8": "w8a8_static_asym", "W8A8 static symmetric": "w8a8_static",
        "ModelSlim W8A8_DYNAMIC": "w8a8_dynamic", "ModelSlim W4A4_DYNAMIC": "w4a4_dynamic",
        "ModelSlim W4A4_FLATQUANT_DYNAMIC": flat, "ModelSlim W4A8_DYNAMIC": "w4a8_dynamic",
        "ModelSlim W4A8_DYNAMIC g256": "w4a8_dynamic_g256", "ModelSlim W8A16": "w8a16", "ModelSlim W4A16": "w4a16",
        "ModelSlim WFP8AFP8_DYNAMIC": "fp8_dynamic",
        "ModelSlim W8A8_MXFP8": microscaled("w8a8_mxfp8", "fp8_e4m3", "mx_floor", "fp8_e4m3", "mx_floor", "rne"),
        "ModelSlim W4A8_MXFP": microscaled("w4a8_mxfp", "fp4_e2m1", "mx_even1", "fp8_e4m3", "mx_floor", "rne"),
        "ModelSlim W4A4_MXFP4": microscaled("w4a4_mxfp4", "fp4_e2m1", "mx_even1", "fp4_e2m1", "mx_even1", "rha"),
        "ModelSlim W4A4_MXFP4_DUALSCALE": "mxfp4_dual",
        "AWQ W4A16 g128": "w4a16_g128_asym", "AWQ W4A16 whole rows": "w4a16_asym",
        "GPTQ W4A16 g128": "w4a16_g128", "GPTQ W4A16 g128 asymmetric": "w4a16_g128_asym",
        "GPTQ W4A16 g128 act-order": "w4a16_g128_actorder", "GPTQ W8A16 g128": "w8a16_g128",
        "GPTQ W8A16 g128 asymmetric": "w8a16_g128_asym", "GPTQ W3A16 g128": "w3a16_g128",
        "auto-round W4A16 g32 asymmetric": "w4a16_g32_asym", "auto-round W8A16": "w8a16",
        "auto-round W2A16 g32": "w2a16_g32",
        "compressed-tensors W8A8 dynamic": "w8a8_dynamic", "compressed-tensors W4A8 dynamic": "w4a8_dynamic_g128",
        "compressed-tensors W4A8 dynamic, clipped": clipped, "compressed-tensors W4A16 g128": "w4a16_g128",
        "compressed-tensors W4A16 g32": "w4a16_g32", "compressed-tensors W8A16": "w8a16",
        "compressed-tensors MXFP4 weight-only": "mxfp4_a16", "compressed-tensors NVFP4 weight-only": "nvfp4_a16",
        "online MXFP8": "mxfp8", "online MXFP4": "mxfp4", "online W4A8 MX": "mxfp4_a8",
        "GGUF Q4_K": "gguf:Q4_K", "GGUF Q8_0": "gguf:Q8_0", "bitsandbytes NF4": "nf4",
        "DeepSeek block FP8": "fp8_block", "NVFP4": "nvfp4", "W8A8 block": "w8a8_block",
    }
    return {name: qfunc.scheme(what) if isinstance(what, str) else what for name, what in named.items()}


def abstract(scheme, columns: int, rows_: int, experts: int = 0, dtype: str = "bfloat16"):
    """The QTensor of shapes that a scheme makes of a matrix (columns, rows), or of a stack of them."""
    import jax
    import jax.numpy as jnp

    from qfunc._codes import code
    from qfunc._pack import packed_size
    from qfunc._qtensor import CODECS, QTensor
    from qfunc._scales import scale_shape
    spec, lead = scheme.weight, (experts,) * bool(experts)

    def leaf(*shape, dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype))

    if spec.code in CODECS.decoders:
        elements, size = CODECS.blocks[spec.code]
        return QTensor(leaf(rows_, columns // elements * size, dtype="uint8"), scheme=scheme, dtype=dtype)
    element = code(spec.code)
    packed = element.packed
    codes = leaf(rows_, packed_size(columns, element.bits) if packed else columns, dtype=element.dtype)
    shape = scale_shape(spec.granularity, rows_, columns)
    scales = {"e8m0": "uint8", "fp8_e4m3": "float8_e4m3fn"}
    leaves = {"scale": leaf(*shape, dtype=scales.get(spec.scale_dtype, spec.scale_dtype))}
    if spec.zero is not None:
        leaves["zero"] = leaf(*shape, dtype="uint8" if spec.zero == "int" else spec.scale_dtype)
    if spec.scale2_dtype is not None:
        leaves["scale2"] = leaf(rows_, -(-columns // 512), dtype="float32") if spec.scale_dtype == "e8m0" else leaf(1, 1, dtype="float32")
    if spec.actorder:
        leaves["perm"] = leaf(columns, dtype="int32")
    if scheme.activation is not None and scheme.activation.mode == "static":
        leaves["input_scale"] = leaf(1, 1, dtype="float32")
        if scheme.activation.zero is not None:
            leaves["input_zero"] = leaf(1, 1, dtype="int32")
    return QTensor(codes, **leaves, scheme=scheme, dtype=dtype, pad=-columns % 128 if packed else 0)


def cases():
    """(row, layer kind, model, layer, tp, K, N, extra) of every combination.

    `extra`: (experts, experts of a token) of a mixture; ("out",) of a slice of a layer's outputs.
    """
    for row in rows():
        for kind, models in (("linear", LINEAR), ("block", BLOCKS)):
            for model, layers in models.items():
                for layer in layers:
                    for tp in TP if layer.cut != "whole" else (1,):
                        columns = layer.columns // (tp if layer.cut == "in" else 1)
                        outs = layer.rows // (tp if layer.cut == "out" else 1)
                        yield row, kind, model, layer.name, tp, columns, outs, ("out",) if layer.cut == "out" and tp > 1 else ()
        for model, (hidden, inner, experts, top) in EXPERTS.items():
            for tp in TP:
                yield row, "moe", model, "experts", tp, hidden, inner // tp, (experts, top)


class Judge:
    """Puts every npu call to the eager rules, too; on meta tensors torch itself asks the Meta functions."""

    def __init__(self):
        import npu_cpu
        import npu_rules
        from torch.utils._python_dispatch import TorchDispatchMode
        npu_cpu.install()
        judge = self
        self.calls = Counter()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.namespace == "npu":
                    name = function._schema.name.removeprefix("npu::")
                    npu_rules.check(name, function, args, kwargs or {})
                    judge.calls[name] += 1
                return function(*args, **(kwargs or {}))

        self.mode = Mode


@functools.cache
def _judge() -> Judge:
    return Judge()


def run_linear(scheme, columns: int, outs: int, soc: str, dtype: str, bias: bool):
    """Place and run one linear layer for every token count on the meta device. Raises PlacementError, or what the judges raise."""
    import torch
    from npu_rules import on

    from qfunc.interop.cann._linear import linear
    from qfunc.interop.cann._place import place
    kind = getattr(torch, dtype)
    with on(soc), _judge().mode():
        w = place({"kernel": abstract(scheme, columns, outs, dtype=dtype)}, "meta", soc)["kernel"]
        b = torch.empty(outs, device="meta") if bias else None
        for tokens in TOKENS:
            y = linear(w, torch.empty((tokens, columns), dtype=kind, device="meta"), b)
            assert tuple(y.shape) == (tokens, outs) and y.dtype == kind, (y.shape, y.dtype)


def run_moe(scheme, hidden: int, inner: int, experts: int, top: int, soc: str, dtype: str):
    """Place the experts and run them twice: one grouped matmul after another, and the fused flow."""
    import torch
    from npu_rules import on

    from qfunc.interop.cann._grouped import grouped_matmul
    from qfunc.interop.cann._moe import moe, place_experts
    from qfunc.interop.cann._place import place
    kind = getattr(torch, dtype)
    shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    with on(soc), _judge().mode():
        qs = {name: abstract(scheme, *shape, experts, dtype) for name, shape in shapes.items()}
        placed = place({"experts": {name: {"kernel": q} for name, q in qs.items()}}, "meta", soc)["experts"]
        for tokens in TOKENS:
            sizes = torch.empty(experts, dtype=torch.int64, device="meta")
            for name in ("gate", "down"):
                x = torch.empty((tokens * top, shapes[name][0]), dtype=kind, device="meta")
                y = grouped_matmul(placed[name]["kernel"], x, sizes)
                assert tuple(y.shape) == (tokens * top, shapes[name][1]) and y.dtype == kind, (name, y.shape, y.dtype)
        stack = place_experts(qs["gate"], qs["up"], qs["down"], "meta", soc)
        for tokens in TOKENS:
            x = torch.empty((tokens, hidden), dtype=kind, device="meta")
            y = moe(stack, x, torch.empty((tokens, top), device="meta"), torch.empty((tokens, top), dtype=torch.int32, device="meta"))
            assert tuple(y.shape) == (tokens, hidden) and y.dtype == kind, (y.shape, y.dtype)


@functools.cache
def verdict(scheme, kind: str, columns: int, outs: int, extra: tuple, soc: str, dtype: str) -> tuple[str, str]:
    """(`accepted`, ''), (`generation` or `alignment`, the rule by which `place` refuses) or (`fault`, what a judge said)."""
    from qfunc.interop.cann._place import PlacementError
    if cut_blocks(scheme, kind, columns, outs, extra):
        return "alignment", cut_blocks(scheme, kind, columns, outs, extra)
    try:
        if kind == "moe":
            run_moe(scheme, columns, outs, *extra, soc, dtype)
        else:
            run_linear(scheme, columns, outs, soc, dtype, bias=kind == "block")
    except PlacementError as error:
        rule = "; ".join(dict.fromkeys(why for _, why in error.refused))
        return ("alignment" if " needs " in rule else "generation"), rule
    except Exception as error:                      # noqa: BLE001 - the verdict of a judge, whatever it raises
        return "fault", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "accepted", ""


def homes(row: str, experts: bool) -> tuple[str, ...]:
    """The generations that run a row at all."""
    from qfunc.interop.cann._place import refusal
    shape = (8, 4096, 4096) if experts else (4096, 4096)
    return tuple(soc for soc in ("A2", "A3", "A5") if refusal(rows()[row], shape, soc, experts) is None)


def cut_blocks(scheme, kind: str, columns: int, outs: int, extra: tuple) -> str:
    """Why no device's slice of such a weight exists, whatever runs it: GGUF and blocks of 128 x 128 are cut between blocks alone."""
    grain = scheme.weight.granularity
    size = grain.size if scheme.weight.code.startswith("gguf:") or grain.kind == "block" else 1
    broken = [f"K = {k}" for k in ((columns, outs) if kind == "moe" else (columns,)) if k % size]
    if grain.kind == "block" and extra == ("out",) and outs % grain.out and grain.out % outs:     # ranks may share a block of outputs
        broken.append(f"N = {outs}")
    return f"{scheme.name} needs slices of whole blocks of {size}, found {broken[0]}" if broken else ""


def refused():
    """The rows of docs/ascend_refused.csv: every combination that an alignment rule refuses, found without running anything.

    Generations that do not run the row at all are not listed: they are a table of their own, `qfunc.interop.cann._soc.ROWS`.
    """
    from qfunc.interop.cann._place import refusal
    out, seen = [], {}
    for row, kind, model, layer, tp, columns, outs, extra in cases():
        scheme = rows()[row]
        for soc in ("A2", "A3", "A5"):
            key = (scheme, kind, columns, outs, extra[:1], soc)
            if key not in seen:
                seen[key] = _refusals(scheme, kind, columns, outs, extra, soc, refusal)
            if seen[key] and " needs " in seen[key]:
                out.append((row, kind, model, layer, str(tp), soc, str(columns), str(outs), seen[key]))
    return out


def _refusals(scheme, kind, columns, outs, extra, soc, refusal):
    if cut_blocks(scheme, kind, columns, outs, extra):
        return cut_blocks(scheme, kind, columns, outs, extra)
    if kind != "moe":
        return refusal(scheme, (columns, outs), soc)
    shapes = ((extra[0], columns, outs), (extra[0], outs, columns))
    return "; ".join(dict.fromkeys(why for shape in shapes if (why := refusal(scheme, shape, soc, True))))


def main(arguments) -> int:
    import npu_cpu
    npu_cpu.npu_host.load()
    start, totals, faults, where = time.time(), Counter(), [], defaultdict(Counter)
    for row, kind, model, layer, tp, columns, outs, extra in cases():
        for soc in ("A2", "A3", "A5"):
            for dtype in ("bfloat16", "float16"):
                found, rule = verdict(rows()[row], kind, columns, outs, extra, soc, dtype)
                totals[found] += len(TOKENS)
                where[row, kind][found] += len(TOKENS)
                if found == "fault":
                    faults.append((row, kind, model, layer, tp, soc, dtype, columns, outs, rule))
    names = ("accepted", "alignment", "generation", "fault")
    print(f"{'scheme row':42s} {'layers':7s}" + "".join(f"{name:>12s}" for name in names))
    for (row, kind), counts in where.items():
        print(f"{row:42s} {kind:7s}" + "".join(f"{counts[name]:12d}" for name in names))
    print(f"{sum(totals.values())} combinations of row, layer, tp, generation, type and tokens: "
          + ", ".join(f"{totals[name]} {name}" for name in names))
    print(f"{sum(_judge().calls.values())} operator calls judged, {verdict.cache_info().currsize} distinct placements, "
          f"{time.time() - start:.0f} s")
    for fault in faults[:40]:
        print("FAULT", *fault)
    if "--write" in arguments:
        with REFUSED.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *refused()])
        print(f"wrote {len(refused())} rows of {REFUSED.name}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
