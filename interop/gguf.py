"""GGUF files: every ggml type, kept packed in its own blocks, under Hugging Face names; the tokenizer stays in the configuration.

`decode(raw, type_name, columns)` turns rows of blocks into ggml's own floats, bit for bit. Weights are `gguf:<type>` QTensors whose codes
are the file's bytes; NVFP4 tensors with an outer scale beside them (`<name>.scale`) become `nvfp4`. Rows of q and k are put back in
Hugging Face's order; asked for by its GGUF name, a weight comes in the file's order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from qfunc._ggml import decode
from qfunc._qtensor import QTensor
from qfunc._spec import Scheme

from . import _gguf_names as names
from ._common import NV_WEIGHT
from ._gguf_file import GgufFiles, GgufTensor
from ._load import Leaf, Plan, build
from ._naming import named
from ._paths import is_kernel, leaf_name, split_path
from ._plan import Layer
from ._refuse import refuse
from ._repack import nibble_rows

__all__ = ["decode", "load_gguf", "plan_gguf"]

FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}


def _f16(*places: int) -> tuple:
    return tuple(((place + 1, 0x7C),) for place in places)


# Where the scales lie in a block of each type: (byte, bits) that are all set where the number is not finite.
NOT_FINITE = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq4_nl", "iq4_xs", "q1_0", "q2_0",
                     "q8_1"), _f16(0)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), _f16(0, 2)),
    "q2_k": _f16(80, 82), "q3_k": _f16(108), "q6_k": _f16(208), "q8_k": (((3, 0x7F), (2, 0x80)),), "tq1_0": _f16(52), "tq2_0": _f16(64),
    "iq1_m": (((55, 0x70), (53, 0xC0)),), "mxfp4": (((0, 0xFF),),),
}


def check_scales(tensor: GgufTensor, raw: np.ndarray) -> None:
    """Refuse blocks whose scale is NaN or infinite, as llama.cpp's `--check-tensors` does."""
    for places in NOT_FINITE.get(tensor.dtype, ()):
        blocks = raw.reshape(-1, tensor.type.bytes)
        bad = np.logical_and.reduce([blocks[:, byte] & bits == bits for byte, bits in places])
        if bad.any():
            raise refuse(tensor.file.path, f"tensor {tensor.name!r}", f"finite scales in blocks of {tensor.dtype}",
                         f"NaN or infinity in block {int(bad.argmax())} of {len(blocks)}")


def scheme_of(kind: str) -> Scheme:
    """The weight-only scheme of a ggml type."""
    from qfunc._schemes import scheme
    return scheme(f"gguf:{kind}")


def plan_gguf(files: GgufFiles) -> tuple[Plan, dict]:
    """The leaves of a GGUF file and the model's configuration."""
    architecture = files.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise refuse(files.path, "general.architecture", "a string", repr(architecture))
    plan = Plan()
    experts = bool(names.number(files.metadata, f"{architecture}.expert_count"))
    if architecture not in names.PERMUTED | names.PLAIN:
        plan.notes.append(f"architecture {architecture!r}: whether its q and k rows are permuted is not known; they are left as they lie")
    unnamed = []
    for tensor in files.tensors.values():
        stem, _, param = tensor.name.rpartition(".")
        if param in ("scale", "input_scale") and f"{stem}.weight" in files.tensors:
            continue
        if tensor.name == names.ROPE_FACTORS:
            # Part of the configuration: `rope_scaling`.
            if tensor.dtype != "f32" or len(tensor.shape) != 1:
                raise refuse(files.path, f"tensor {tensor.name!r}", "one row of f32", f"{tensor.dtype} {list(tensor.shape)}")
            continue
        full = names.hugging_face(tensor.name, architecture, experts)
        if full is None:
            unnamed.append(tensor.name)
            full = tensor.name
        _add(plan, files, tensor, full, architecture)
    if unnamed:
        plan.notes.append(f"{len(unnamed)} tensors without a Hugging Face name keep their own, such as {unnamed[0]!r}")
    return plan, names.config(files.metadata, architecture, files.tensors)


def _add(plan: Plan, files: GgufFiles, tensor: GgufTensor, full: str, architecture: str) -> None:
    module, _, param = full.rpartition(".")
    if tensor.type is None or tensor.dtype in FLOATS or tensor.dtype in ("i8", "i16"):
        _add_float(plan, tensor, module, param, _heads(files, tensor, architecture), architecture)
        return
    if len(tensor.shape) < 2 or param != "weight":
        raise refuse(files.path, f"tensor {tensor.name!r}", "a float type for what is no matrix", tensor.dtype)
    heads = _heads(files, tensor, architecture)
    layer = _layer(files, tensor, module, heads)
    path = (*split_path(module), leaf_name(module))
    plan.leaves.append(Leaf(path, layer.shape, layer.tensors, (layer,)))
    _name(plan, tensor, module, path, heads)


def _heads(files: GgufFiles, tensor: GgufTensor, architecture: str) -> int | None:
    heads = names.permuted_heads(tensor.name, architecture, files.metadata)
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else tensor.shape[-1]
    if heads is not None and heads < 1:
        raise refuse(files.path, f"tensor {tensor.name!r}", f"a number of heads in {architecture}.attention.head_count", heads)
    if heads is not None and rows % (2 * heads):
        raise refuse(files.path, f"tensor {tensor.name!r}", f"rows that {heads} heads divide into pairs", rows)
    return heads


def _name(plan: Plan, tensor: GgufTensor, module: str, path: tuple[str, ...], heads: int | None) -> None:
    plan.names[module] = path, None
    plan.names[tensor.name.rpartition(".")[0]] = ((path, heads), "file order") if heads else (path, None)
    if ".experts." in module:
        stack, _, rest = module.partition(".experts.")
        for index in range(tensor.shape[0]):
            plan.names[f"{stack}.experts.{index}.{rest}"] = path, index


def _layer(files: GgufFiles, tensor: GgufTensor, module: str, heads: int | None) -> Layer:
    *batch, outs, ins = tensor.shape
    outer = files.tensors.get(f"{tensor.name.rpartition('.')[0]}.scale")
    if tensor.dtype == "nvfp4" and outer is not None:
        return _nvfp4(files, tensor, module, outer, heads)
    if outer is not None:
        raise refuse(files.path, f"tensor {outer.name!r}", "an outer scale for nvfp4 only", tensor.dtype)

    def codes() -> dict[str, np.ndarray]:
        raw = tensor.raw()
        check_scales(tensor, raw)
        return {"codes": raw if heads is None else names.to_hugging_face(raw, heads)}
    return Layer(module, scheme_of(tensor.dtype), (*batch, ins, outs), codes, tensors=(tensor,))


def _nvfp4(files: GgufFiles, tensor: GgufTensor, module: str, outer: GgufTensor, heads: int | None) -> Layer:
    """NVFP4 blocks of 64 (four e4m3 scales, then 32 bytes of split nibbles) as canonical codes, scales and the outer scale."""
    *batch, outs, ins = tensor.shape
    if outer.dtype != "f32" or int(np.prod(outer.shape)) != int(np.prod(batch or [1])):
        raise refuse(files.path, f"tensor {outer.name!r}", "one float32 per matrix", f"{outer.dtype} {list(outer.shape)}")
    inputs = files.tensors.get(f"{tensor.name.rpartition('.')[0]}.input_scale")
    if inputs is not None and (inputs.dtype != "f32" or int(np.prod(inputs.shape)) not in (1, int(np.prod(batch or [1])))):
        raise refuse(files.path, f"tensor {inputs.name!r}", "one float32, or one per matrix", f"{inputs.dtype} {list(inputs.shape)}")

    def numbers(of: GgufTensor) -> np.ndarray:
        array = of.raw().view(np.float32).reshape(*((-1,) if of.nbytes > 4 else [1] * len(batch)), 1, 1)
        if not np.isfinite(array).all():
            raise refuse(of.file.path, f"tensor {of.name!r}", "finite scales", "NaN or infinity")
        return array

    def leaves() -> dict[str, np.ndarray]:
        raw = tensor.raw()
        blocks = (raw if heads is None else names.to_hugging_face(raw, heads)).reshape(-1, ins // 64, 36)
        nibbles = blocks[..., 4:].reshape(-1, ins // 64, 4, 1, 8) >> np.array([0, 4], np.uint8)[:, None] & 15
        codes = nibbles.reshape(len(blocks), ins)
        packed = nibble_rows(codes[:, 0::2] | codes[:, 1::2] << 4, ins)
        scale = np.where(blocks[..., :4] == 0x7F, 0, blocks[..., :4]).astype(np.uint8).reshape(*batch, outs, ins // 16)
        if scale.max() > 0x7F:
            raise refuse(tensor.file.path, f"tensor {tensor.name!r}", "unsigned e4m3 scales, bytes up to 127", int(scale.max()))
        out = {"codes": packed.reshape(*batch, outs, -1), "scale": scale.view(ml_dtypes.float8_e4m3fn),
               "scale2": numbers(outer)}
        if inputs is not None:
            out["input_scale"] = numbers(inputs)
        return out
    return Layer(module, named(NV_WEIGHT), (*batch, ins, outs), leaves, tensors=(tensor, outer))


def _add_float(plan: Plan, tensor: GgufTensor, module: str, param: str, heads: int | None, architecture: str) -> None:
    kernel = is_kernel(module, param, 2 if len(tensor.shape) >= 2 else 1) and tensor.dtype in FLOATS
    shift = names.is_shifted(tensor.name, architecture)

    def read() -> np.ndarray:
        raw = tensor.raw()
        array = raw if tensor.type is None else raw.view({**FLOATS, "i8": np.int8, "i16": np.int16}[tensor.dtype])
        array = array if heads is None else names.to_hugging_face(array, heads)
        if array.dtype in (np.float64, np.int64):
            array = array.astype(np.float32 if array.dtype == np.float64 else np.int32)
        if shift:
            array = array.astype(np.float32) - 1
        return array.swapaxes(-1, -2) if kernel else array
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if kernel else tensor.shape
    path = (*split_path(module), "kernel" if kernel else param)
    plan.leaves.append(Leaf(path, shape, (tensor,), read=read))
    if param == "weight":
        _name(plan, tensor, module, path, heads if kernel else None)


def _in_file_order(params: dict, path: tuple[str, ...], heads: int):
    leaf = params
    for key in path:
        leaf = leaf[key]
    if isinstance(leaf, QTensor):
        rows = {name: getattr(leaf, name) for name in ("codes", "scale") if getattr(leaf, name) is not None}
        return leaf.replace(**{name: names.to_gguf(array, heads) for name, array in rows.items()})
    return names.to_gguf(leaf.T, heads).T


def load_gguf(path: Path, dtype: str | None, place, progress: bool | None):
    """Load a GGUF file as `qfunc.load` does: see there."""
    from ._checkpoint import Checkpoint
    files = GgufFiles(path)
    plan, config = plan_gguf(files)
    params = build(plan, "float32", place, progress, dtype)
    found = {name: partial(_in_file_order, params, *entry[0]) if entry[1] == "file order" else entry for name, entry in plan.names.items()}
    schemes = {} if dtype is not None else {leaf.name: leaf.scheme for leaf in plan.leaves if leaf.members}
    return Checkpoint(params, config, "gguf", schemes, None, tuple(plan.notes), found)
