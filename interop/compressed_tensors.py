"""compressed-tensors checkpoints (llm-compressor, auto-round's `llm_compressor`): groups of layers with weight and activation formats.

Tensors by format: `int-quantized`, `float-quantized`, `naive-quantized`: `weight` [N, K], one code a byte, `weight_scale`,
`weight_zero_point`, `input_scale`, `input_zero_point`. `pack-quantized`: `weight_packed` int32 [N, ceil(K b / 32)], a bit stream of
offset-binary codes along the inputs, `weight_shape`, zero points streamed along the outputs, `weight_g_idx`. `nvfp4-pack-quantized`:
nibbles, e4m3 scales and global scales that divide. `mxfp4-pack-quantized`, `mxfp6-pack-quantized`, `mxfp8-quantized`: MX.
Sparse weights lie beside a map of their places (`_sparse`). Exports for Ascend keep `int-quantized` int4 as msModelSlim does, two outputs
a byte, with `weight_offset` and `scale_bias`.
W = (q - z) s. Before version 0.10 widths that do not divide 32 were padded to whole codes per word: told by the shape.
Source: compressed-tensors, `compressors/` and `quantization/quant_args.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, Granularity, WeightSpec, block, group

from . import _common as common
from . import _sparse, modelslim
from ._family import Config, Family, Source
from ._naming import named
from ._paths import is_table
from ._plan import Layer, Parts, fill_of, scale_reader
from ._refuse import short
from ._repack import by_rows, nibble_rows, padded_words, six_bit_bytes, stream
from ._streams import row_stream

DENSE = "dense"
EXPERTS = ("MoEGMM", "FusedMoE")
"""Classes that exporters name as targets when they mean the experts' linears."""
OFFLINE = ("weight_input", "weight_output")
"""Where a transform is multiplied into the weight."""
CLASSES = (*EXPERTS, "Linear", "Embedding")
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
           "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision", "marlin-24", DENSE)


@dataclass(frozen=True)
class Group:
    """One `config_groups` entry."""

    targets: tuple[str, ...]
    weights: Config | None
    activation: ActivationSpec | None
    format: str | None


@dataclass(frozen=True)
class Settings:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str
    config: Config
    kv: str | None

    def of(self, module: str) -> Group | None:
        """The group that names the module most closely: by its name, by a pattern, by its class; None where it is ignored or none does.

        The order among names and among patterns is that of compressed-tensors' `match_targets`, the alphabet's; of several groups with
        one target the first.
        """
        kind = "Embedding" if is_table(module) else "Linear"
        if kind in self.ignore or self._named(self.ignore, module) is not None:
            return None
        targets = {target: group for group in reversed(self.groups) for target in group.targets}
        experts = EXPERTS if ".experts." in module else ()
        found = next((name for name in experts if name in targets), None) or self._named(targets, module) or kind
        return targets.get(found)

    def _named(self, entries: Iterable[str], module: str) -> str | None:
        """The first entry that is the module's name or a pattern of it."""
        named = sorted((e for e in entries if e not in CLASSES), key=lambda entry: (entry.startswith("re:"), entry))
        return self.config.find(named, module, "target")


def _preset(bits: int, kind: str, strategy: str, size: int | None = None, act: dict | None = None, symmetric: bool = True) -> dict:
    return {"weights": {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": symmetric},
            "input_activations": act}


_TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
PRESETS = {
    **{f"W{b}A16": _preset(b, "int", "group", 128) for b in range(2, 9)}, "W8A16": _preset(8, "int", "channel"),
    "W4A16_ASYM": _preset(4, "int", "group", 128, symmetric=False), "W8A8": _preset(8, "int", "channel", act=_TOKEN8),
    "INT8": _preset(8, "int", "channel", act=_TOKEN8), "W4A8": _preset(4, "int", "group", 128, act=_TOKEN8),
    "FP8": _preset(8, "float", "tensor", act={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}),
    "FP8_DYNAMIC": _preset(8, "float", "channel", act={"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
}


def settings(source: Source) -> Settings:
    quant = source.quant
    quant.choice("quantization_status", ("compressed", "frozen"), "compressed")
    sparsity = quant.section("sparsity_config")
    if sparsity is not None:
        sparsity.choice("format", (None, DENSE, *_sparse.FORMATS))
    transform = quant.section("transform_config")
    if transform is not None:
        _transforms(transform)
    form = quant.choice("format", FORMATS, "naive-quantized")
    sections = quant.get("config_groups")
    if not isinstance(sections, dict) or not sections:
        raise quant.fail("config_groups", "an object of groups")
    groups = tuple(_group(name, entry, quant) for name, entry in sections.items())
    kv = quant.section("kv_cache_scheme")
    return Settings(groups, tuple(quant.strings("ignore")), form, quant, None if kv is None else _kv(kv))


def _transforms(config: Config) -> None:
    """Rotations that were multiplied into the weights when the checkpoint was made need nothing; those at run time are refused."""
    for name, entry in config.sections("config_groups").items():
        scheme = Config(entry, config.where, f"{config.prefix}config_groups.{name}.")
        if scheme.boolean("requires_grad"):
            raise scheme.fail("requires_grad", "false: transforms that are in the weights already")
        places = scheme.get("apply")
        if not isinstance(places, list) or not all(isinstance(place, dict) for place in places):
            raise scheme.fail("apply", "a list of objects")
        for place in places:
            if place.get("location") not in OFFLINE:
                raise scheme.fail("apply", f"the locations {' and '.join(OFFLINE)} (transforms at run time are not read)",
                                  short(place.get("location")))


def _kv(config: Config) -> str:
    kind = config.choice("type", ("int", "float"), "float")
    config.integer("num_bits", low=8, high=8, default=8)
    config.choice("strategy", ("tensor", "attn_head", "channel"), "tensor")
    if config.get("symmetric") is False:
        raise config.fail("symmetric", "true (asymmetric caches are not read)")
    return {"int": "int8", "float": "fp8_e4m3"}[kind]


def _group(name: str, entry, quant: Config) -> Group:
    if name in PRESETS and isinstance(entry, list):
        entry = {"targets": entry, **PRESETS[name]}
    config = Config(entry, quant.where, f"{quant.prefix}config_groups.{name}.")
    if config.get("output_activations") is not None:
        raise config.fail("output_activations", "null (quantized outputs are not read)")
    weights, act = config.section("weights"), config.section("input_activations")
    if weights is not None:
        weights.integer("num_bits", low=1, high=8)
        weights.choice("type", ("int", "float"), "int")
    form = config.choice("format", (*FORMATS, None))
    return Group(tuple(config.strings("targets")), weights, None if act is None else activation(act), form)


def strategy(config: Config) -> str:
    """The strategy field, or what the group size implies where it is absent."""
    found = config.get("strategy")
    if found is None:
        size = config.get("group_size")
        found = "tensor" if size is None else "channel" if size == -1 else "group"
    config.data = {**config.data, "strategy": found}
    return config.choice("strategy", ("tensor", "channel", "group", "block", "token", "tensor_group"))


def activation(config: Config) -> ActivationSpec:
    """The activation spec of `input_activations`."""
    bits, kind = config.integer("num_bits", low=4, high=8), config.choice("type", ("int", "float"), "int")
    how, dynamic = strategy(config), config.get("dynamic")
    if dynamic not in (True, False, None, "local"):
        raise config.fail("dynamic", "true, false or \"local\"")
    zero = None if config.boolean("symmetric", True) else "int"
    code = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8_e4m3", ("float", 4): "fp4_e2m1"}.get((kind, bits))
    if code is None:
        raise config.fail("num_bits", "8 or 4")
    if how == "tensor_group" or (kind == "float" and bits == 4 and config.get("group_size") == 16):
        return common.NV_INPUT
    scale = str(config.get("scale_dtype"))
    if how == "group":
        size = config.group_size("group_size")
        if size is None:
            raise config.fail("group_size", "a positive integer")
        return common.mx_input(code, "mx_even1") if "uint8" in scale and size == 32 else ActivationSpec(code, group(size), zero=zero,
                                                                                                          scale_rule=_rule(kind))
    if how not in ("tensor", "token"):
        raise config.fail("strategy", "tensor, token, group or tensor_group")
    grain = TENSOR if how == "tensor" else TOKEN
    static = not dynamic
    if static and grain is not TENSOR:
        raise config.fail("dynamic", "true, as only one scale per tensor can be static")
    return ActivationSpec(code, grain, mode="static" if static else "dynamic", zero=zero, scale_rule=_rule(kind))


def _rule(kind: str) -> str:
    return "amax_half" if kind == "int" else "amax"


def granularity(config: Config, parts: Parts, ins: int) -> Granularity:
    """The granularity of a weight with `ins` inputs."""
    how = strategy(config)
    if how == "block":
        shape = config.get("block_structure")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**24 for n in shape):
            raise config.fail("block_structure", "two positive integers")
        return block(*shape)
    if how in ("group", "tensor_group"):
        size = config.group_size("group_size")
        return CHANNEL if size is None or size >= ins else group(size)
    if how == "token":
        raise parts.fail("", "a weight strategy", "token")
    return TENSOR if how == "tensor" else CHANNEL


MARKS = frozenset({"weight_packed", "weight_scale", _sparse.MARK})


def layer(config: Settings, parts: Parts) -> Layer | None:
    if not MARKS & parts.tensors.keys():
        return None
    mine = config.of(parts.module)
    if mine is None or mine.weights is None:
        raise parts.fail("", "a float layer: it is ignored, or no group targets it", "quantized tensors")
    form = mine.format or config.format
    if form not in READERS:
        raise parts.fail("", f"a format among {', '.join(READERS)}", form)
    if _sparse.MARK not in parts:
        return READERS[form](mine.weights, mine.activation, parts)
    out = READERS[form](mine.weights, mine.activation, _sparse.spread(parts))
    return replace(out, tensors=parts.all)


def bytes_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    kind, bits = config.get("type") or "int", config.get("num_bits")
    weight = parts.tensors.get("weight")
    if weight is None or len(weight.shape) != 2:
        raise parts.fail("weight", "a matrix", "none" if weight is None else list(weight.shape))
    scales = parts.tensors.get("weight_scale")
    if bits == 4 and weight.dtype == "I8" and act is not None and scales is not None and scales.shape == (2 * weight.shape[0], 1):
        # Exports for Ascend have msModelSlim's tensors: two outputs a byte.
        return modelslim.four(act)(None, parts)
    return common.byte_layer(parts, grain=granularity(config, parts, weight.shape[1]), activation=act, bits=bits if kind == "int" else 8,
                             symmetric=config.boolean("symmetric", True), rule=_rule(kind), dtypes=("I8",) if kind == "int" else common.FP8,
                             readers=common.inputs(parts, act))


def packed_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    bits, symmetric = config.get("num_bits"), config.boolean("symmetric", True)
    packed = parts.take("weight_packed", "I32", ndim=2)
    shape = parts.take("weight_shape", ("I64", "I32"), (2,)).read()
    outs, ins = int(shape[0]), int(shape[1])
    dense, padded = -(-ins * bits // 32), -(-ins // (32 // bits))
    if outs != packed.shape[0] or ins < 1 or packed.shape[1] not in (dense, padded):
        raise parts.fail("weight_packed", f"shape [{outs}, {dense}] for weight_shape [{outs}, {ins}] at {bits} bits", list(packed.shape))
    is_dense = packed.shape[1] == dense
    grain = granularity(config, parts, ins)
    kind, read_scale = scale_reader(parts, "weight_scale", grain, outs, ins)
    groups = 1 if grain.kind != "group" else -(-ins // grain.size)
    readers = {"scale": read_scale, **common.inputs(parts, act)}
    if "weight_zero_point" in parts:
        zeros = parts.take("weight_zero_point", "I32", [(-(-outs * bits // 32), groups), (-(-outs // (32 // bits)), groups)])
        if not symmetric:
            dense_zeros = zeros.shape[0] == -(-outs * bits // 32)
            readers["zero"] = lambda: np.ascontiguousarray(_unpack(zeros.read().view(np.uint32).T, bits, outs, dense_zeros).T)
    elif not symmetric:
        raise parts.fail("weight_zero_point", "zero points of an asymmetric weight", "none")
    order = _order(parts, grain, ins, groups, config.get("actorder") in (True, "group", "dynamic"))
    code = f"int{bits}" if symmetric else f"uint{bits}"
    scheme = named(WeightSpec(code, grain, None if symmetric else "int", kind, scale_rule="amax_half" if symmetric else "minmax",
                              actorder=order is not None), act)
    if order is not None:
        readers["perm"] = lambda: order

    def codes():
        words, fill = packed.read().view(np.uint32), fill_of(code)
        if bits == 4 and order is None:
            return nibble_rows(words.view(np.uint8), ins, fill)

        def unpack(rows):
            out = padded_words(rows, bits, ins)
            return out if order is None else out[:, order]
        out = row_stream(words, bits, ins, order, fill) if is_dense else by_rows(words, unpack, bits, ins, fill)
        return (out ^ np.uint8(128)).view(np.int8) if code == "int8" else out
    return common.finish(parts, scheme, outs, ins, {"codes": codes, **readers})


def _unpack(words: np.ndarray, bits: int, count: int, dense: bool) -> np.ndarray:
    return (stream if dense else padded_words)(np.ascontiguousarray(words), bits, count)


def _order(parts: Parts, grain: Granularity, ins: int, groups: int, needed: bool) -> np.ndarray | None:
    if "weight_g_idx" not in parts:
        if needed and groups > 1:
            # Ordered by weight alone ("weight", "static"), the groups are runs of inputs.
            raise parts.fail("weight_g_idx", "the group of each input, as actorder says", "none")
        return None
    index = parts.take("weight_g_idx", ("I32", "I64"), (ins,)).read().astype(np.int64)
    if grain.kind != "group" or (index == -1).all():
        return None
    if index.min() < 0 or index.max() >= groups:
        raise parts.fail("weight_g_idx", f"groups from 0 to {groups - 1}", f"{index.min()} to {index.max()}")
    plain = np.arange(ins) // grain.size
    order = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[order], plain):
        raise parts.fail("weight_g_idx", f"groups of {grain.size} inputs each", "groups of other sizes")
    return None if np.array_equal(index, plain) else order


def nvfp4_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    readers = common.inputs(parts, act, invert=True, scale="input_global_scale")
    return common.nv_layer(parts, "weight_packed", "weight_global_scale", "weight_scale", act, True, readers)


def mxfp4_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    return common.mx_layer(parts, "weight_packed", "weight_scale", act)


def mxfp8_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    return common.mx_layer(parts, "weight", "weight_scale", act)


def mxfp6_layer(config: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    packed = parts.take("weight_packed", "U8", ndim=2)
    outs, ins = packed.shape[0], packed.shape[1] * 4 // 3
    if packed.shape[1] % 3:
        raise parts.fail("weight_packed", "rows of whole groups of three bytes", list(packed.shape))
    kind, read_scale = scale_reader(parts, "weight_scale", common.MX, outs, ins, common.E8M0)
    scheme = named(WeightSpec("fp6_e2m3", common.MX, scale_dtype=kind, scale_rule="mx_even1"), act)
    return common.finish(parts, scheme, outs, ins, {
        "codes": lambda: by_rows(packed.read(), lambda rows: six_bit_bytes(rows, ins), 6, ins, 0), "scale": read_scale})


READERS = {
    "int-quantized": bytes_layer, "float-quantized": bytes_layer, "naive-quantized": bytes_layer, "pack-quantized": packed_layer,
    "nvfp4-pack-quantized": nvfp4_layer, "mxfp4-pack-quantized": mxfp4_layer, "mxfp8-quantized": mxfp8_layer,
    "mxfp6-pack-quantized": mxfp6_layer,
}
FIELDS = {
    "quant_method": "read", "format": "read", "config_groups": "read: targets, format, weights (num_bits, type, symmetric, strategy, "
    "group_size, block_structure), input_activations (the same, dynamic, scale_dtype); output_activations must be null; observer, "
    "observer_kwargs, zp_dtype say how it was calibrated", "ignore": "read", "kv_cache_scheme": "read: type, num_bits, strategy, "
    "symmetric", "quantization_status": "read: compressed or frozen", "sparsity_config": "read: format", "transform_config":
    "read: only transforms that are in the weights already",
    "global_compression_ratio": "not needed", "version": "not needed: shapes tell the packing",
    "moe_sparsity_config": "not needed",
}
FAMILY = Family("compressed-tensors", settings, layer, MARKS, fields=FIELDS, kv_code=lambda s: s.kv)

