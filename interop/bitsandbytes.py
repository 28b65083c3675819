"""bitsandbytes checkpoints: NF4 and FP4 in flat blocks (scales plain or quantized again), and LLM.int8.

4 bits: `weight` uint8 [N K / 2, 1], the matrix flattened row by row, first element of a pair in the high nibble; `weight.absmax`, one scale
per `blocksize` elements, float32, or uint8 codes of the 256 values `weight.nested_quant_map` under `weight.nested_absmax` (blocks of 256)
plus an offset; `weight.quant_map`, the 16 values; `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), JSON as bytes.
8 bits: `weight` int8 [N, K], `SCB` float32 [N]; W = weight SCB / 127.
Source: bitsandbytes 0.50, `functional.py` (`QuantState.as_dict`), `nn/modules.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qfunc._codec import NESTED_BLOCK, dynamic_map
from qfunc._codes import FP4_BNB, NF4
from qfunc._spec import CHANNEL, ActivationSpec, WeightSpec, group

from . import _common as common
from ._family import Config, Family, Source
from ._naming import named
from ._plan import FLOATS, Layer, Parts, fill_of, scale_reader, value
from ._refuse import integer, parse_json, short
from ._repack import nibble_rows

TABLES = {"nf4": ("nf4", NF4), "fp4": ("fp4_bnb", FP4_BNB)}
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Settings:
    threshold: float
    config: Config


def settings(source: Source) -> Settings:
    quant = source.quant
    threshold = quant.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1e6:
        raise quant.fail("llm_int8_threshold", "a number from 0 to 1e6")
    quant.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "nf4")
    return Settings(float(threshold), quant)


def split(name: str) -> tuple[str, str]:
    module, mark, rest = name.partition(".weight.")
    return (module, f"weight.{rest}") if mark else tuple(name.rpartition(".")[::2])


MARKS = frozenset({"SCB", "weight.absmax", "weight.quant_map", STATE + "nf4", STATE + "fp4"})


def layer(config: Settings, parts: Parts) -> Layer | None:
    if not MARKS & parts.tensors.keys():
        return None
    return int8_layer(config, parts) if "SCB" in parts else four_bit_layer(parts)


def int8_layer(config: Settings, parts: Parts) -> Layer:
    weight = parts.take("weight", "I8", ndim=2)
    outs, ins = weight.shape
    if "weight_format" in parts and parts.take("weight_format", "U8", [(), (1,)]).read().any():
        raise parts.fail("weight_format", "0, which is row major", "another layout")
    _, read = scale_reader(parts, "SCB", CHANNEL, outs, ins, ("F32",))
    act = ActivationSpec("int8", outlier_threshold=config.threshold) if config.threshold else ActivationSpec("int8")
    return common.finish(parts, named(WeightSpec("int8"), act), outs, ins,
                         {"codes": weight.read, "scale": lambda: read() / np.float32(127)})


def _state(parts: Parts, kind: str) -> dict:
    name = STATE + kind
    tensor = parts.take(name, "U8", ndim=1)
    state = parse_json(tensor.read().tobytes(), f"{tensor.file.path}: {parts.module}.{name}")
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise parts.fail(name, f"quant_type {kind}", repr(state))
    if str(state.get("dtype", "float32")).removeprefix("torch.") not in ("float32", "float16", "bfloat16"):
        raise parts.fail(name, "dtype float32, float16 or bfloat16", short(state["dtype"]))
    return state


def four_bit_layer(parts: Parts) -> Layer:
    kind = "fp4" if STATE + "fp4" in parts else "nf4"
    state = _state(parts, kind)
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise parts.fail(STATE + kind, "a shape of two positive integers", repr(shape))
    outs, ins = shape
    size = integer(state.get("blocksize"), parts.all[0].file.path, f"{parts.module}: blocksize", 1, 2**20)
    if ins % 2:
        raise parts.fail("weight", "rows of whole bytes", f"{ins} inputs")
    weight = parts.take("weight", ("U8", "BF16", "F16", "F32"))
    if weight.nbytes * 2 != outs * ins:
        raise parts.fail("weight", f"{outs * ins // 2} bytes for {shape}", weight.nbytes)
    code, table = TABLES[kind]
    known = parts.take("weight.quant_map", "F32", (16,)).read() if "weight.quant_map" in parts else np.asarray(table, np.float32)
    if not np.allclose(known, np.asarray(table, np.float32), rtol=0, atol=1e-6):
        raise parts.fail("weight.quant_map", f"the values of {kind}", known.tolist())
    count = -(-outs * ins // size)
    nested = "weight.nested_absmax" in parts
    absmax = parts.take("weight.absmax", "U8" if nested else ("F32",), [(count,), (count, 1)])
    more = _nested(parts, state, kind, count) if nested else {}
    if ins % size:
        # Blocks that begin in one row and end in the next: each row repeats its share of their scales, in the largest groups that fit.
        own = math.gcd(ins, size)
        first = np.arange(0, outs * ins, own, dtype=np.int64) // size
        readers = {"scale": lambda: _plain(parts, absmax, more)[first].reshape(outs, ins // own)}
        spec = WeightSpec(code, group(own))
    else:
        readers = {"scale": lambda: value(parts, "weight.absmax", absmax).reshape(outs, ins // size), **more}
        spec = WeightSpec(code, group(size), **DOUBLE) if nested else WeightSpec(code, group(size))
    extras = {"bias": parts.take("bias", tuple(FLOATS), (outs,)).read} if "bias" in parts else {}
    parts.done()

    def codes():
        flat = np.frombuffer(weight.read().tobytes(), np.uint8) if weight.dtype != "U8" else weight.read().reshape(-1)
        return nibble_rows(flat.reshape(outs, ins // 2), ins, fill_of(code), high_first=True)
    readers["codes"] = codes
    return Layer(parts.module, named(spec), (ins, outs), lambda: common.run(readers), extras, parts.all,
                 dtype=str(state.get("dtype", "")).removeprefix("torch.") or None)


DOUBLE = {"scale_dtype": "uint8", "scale2_dtype": "float32", "scale_rule": "double"}


def _plain(parts: Parts, absmax, nested: dict) -> np.ndarray:
    """The scales of all blocks in float32, as `dequantize_blockwise` of bitsandbytes computes nested ones."""
    array = value(parts, "weight.absmax", absmax).reshape(-1)
    if not nested:
        return array
    outer, offset = nested["scale2"]()[0], nested["scale_offset"]()[0, 0]
    return dynamic_map()[array] * np.repeat(outer, NESTED_BLOCK)[: array.size] + offset


def _nested(parts: Parts, state: dict, kind: str, count: int) -> dict:
    if state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise parts.fail(STATE + kind, f"nested_blocksize {NESTED_BLOCK}", state.get("nested_blocksize"))
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not np.isfinite(offset):
        raise parts.fail(STATE + kind, "a finite nested_offset", repr(offset))
    outer = parts.take("weight.nested_absmax", "F32", (-(-count // NESTED_BLOCK),))
    table = parts.take("weight.nested_quant_map", "F32", (256,)).read()
    if not np.allclose(table, dynamic_map(), rtol=0, atol=1e-6):
        raise parts.fail("weight.nested_quant_map", "bitsandbytes' dynamic map", "other values")
    return {"scale2": lambda: value(parts, "weight.nested_absmax", outer).reshape(1, -1),
            "scale_offset": lambda: np.full((1, 1), offset, np.float32)}


FIELDS = {
    "quant_method": "read", "llm_int8_threshold": "read", "bnb_4bit_quant_type": "checked: the quant state tells",
    "load_in_4bit": "the tensors tell", "load_in_8bit": "the tensors tell", "_load_in_4bit": "the tensors tell",
    "_load_in_8bit": "the tensors "
    "tell", "bnb_4bit_use_double_quant": "the tensors tell", "bnb_4bit_compute_dtype": "a choice at run time",
    "bnb_4bit_quant_storage": "the "
    "tensors tell", "llm_int8_skip_modules": "the tensors tell", "llm_int8_enable_fp32_cpu_offload": "a choice at run time",
    "llm_int8_has_fp16_weight": "a choice at run time",
}
FAMILY = Family("bitsandbytes", settings, layer, MARKS, split, FIELDS)
