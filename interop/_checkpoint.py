"""`load`: any checkpoint as a tree of packed parameters; `Checkpoint`, what it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from qfunc._errors import CheckpointError
from qfunc._paths import nearest
from qfunc._spec import Scheme

from . import _wan
from ._detect import quantization
from ._family import Config, Family, Source
from ._hub import fetch
from ._load import Plan, build, make_plan, placer
from ._refuse import folder_json, inside, refuse
from ._wan import components
from .native import INDEX
from .safetensors import File, Files, open_folder

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "f16": "float16", "fp16": "float16", "float16": "float16", "half": "float16",
          "f32": "float32", "fp32": "float32", "float32": "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Fields:
        params: nested dict in Hugging Face names; linear weights are `kernel`, (in, out), `QTensor` where packed; the experts of a layer
            are one leaf with a leading axis where scheme and shape agree, else `experts/<i>/...`.
        config: the model's configuration (config.json, or a GGUF file's metadata); of a diffusion pipeline, those of its transformers.
        format: the family that read it: `awq`, `gptq`, ..., `gguf`, `qfunc`, or `float`.
        schemes: path to `Scheme`, for every packed leaf.
        kv_cache: element type of the key/value cache that the checkpoint has scales for (`fp8_e4m3`, `int8`), or None; the scales are the
            leaves `k_scale`, `v_scale` (and `k_zero`, `v_zero`) of the attention modules.
        notes: what is odd about the checkpoint, in words.
    """

    params: dict
    config: dict
    format: str
    schemes: dict[str, Scheme]
    kv_cache: str | None = None
    notes: tuple[str, ...] = ()
    names: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def weight(self, name: str):
        """The weight of a module as the checkpoint names it (`model.layers.0.mlp.experts.3.down_proj`, `blk.1.attn_k`), or by its path.

        An expert of a stack is its own slice. Names of a GGUF file give the tensor in the file's row order, Hugging Face names in
        theirs. KeyError names the nearest modules.
        """
        key = name.removesuffix(".weight").replace("/", ".").removesuffix(".kernel")
        if key not in self.names:
            raise KeyError(f"no weight {name!r}; the nearest are {', '.join(nearest(key, self.names))}")
        entry = self.names[key]
        if callable(entry):
            return entry()
        path, index = entry
        leaf: Any = self.params
        for part in path:
            leaf = leaf[part]
        return leaf if index is None else jax.tree.map(lambda a: a[index], leaf)


def load(path: str | Path, *, dequantize: str | None = None, shardings=None, progress: bool | None = None) -> Checkpoint:
    """Load a quantized (or float) checkpoint, its format detected by itself.

    Arguments:
        path: a folder, a `.gguf` or `.safetensors` file, or a hub id such as `org/name` (downloaded by huggingface_hub).
        dequantize: a float dtype such as `"bf16"`: every packed weight becomes a float kernel of it.
        shardings: where leaves go: a sharding, a function (path, leaf) -> sharding, or a dict from paths or patterns to shardings (a
            sharding for a packed weight may be a QTensor of shardings). None: the default device.
        progress: a bar: True, False, or None for one in a terminal when it takes long.

    Returns: `Checkpoint`. Raises: CheckpointError, naming file and tensor, for whatever is damaged, unsafe or not understood.
    """
    path = locate(path)
    if dequantize is not None and dequantize not in DTYPES:
        raise ValueError(f"dequantize: expected one of {', '.join(DTYPES)}, found {dequantize!r}")
    dtype = DTYPES[dequantize] if dequantize is not None else None
    place = placer(shardings)
    if is_gguf(path):
        from .gguf import load_gguf
        return load_gguf(gguf_file(path), dtype, place, progress)
    if (path / INDEX).exists():
        return _native(path, dtype, shardings)
    whole = plan_folder(path)
    params = build(whole.plan, logical_dtype(whole.config, whole.plan), place, progress, dtype)
    return Checkpoint(params, whole.config, whole.format, _schemes(whole.plan, dtype), whole.plan.kv_code, tuple(whole.plan.notes),
                      whole.plan.names)


@dataclass(frozen=True)
class Planned:
    """A folder's leaves: `format`, `config`, `plan`, and how many tensors of how many bytes they come from."""

    format: str
    config: dict
    plan: Plan
    tensors: int
    nbytes: int


def plan_folder(path: Path) -> Planned:
    """Plan a safetensors checkpoint, or every transformer of a diffusion pipeline under its name."""
    parts = components(path)
    if not parts:
        return _planned(path)
    planned = {name: _planned(folder) for name, folder in parts.items()}
    plan, formats = Plan(), {part.format for part in planned.values()} - {"float"}
    if len(formats) > 1:
        raise refuse(path, "", "transformers of one format", ", ".join(sorted(formats)))
    for name, part in planned.items():
        plan.leaves += [replace(leaf, path=(name, *leaf.path)) for leaf in part.plan.leaves]
        plan.names |= {f"{name}.{key}": ((name, *keys), index) for key, (keys, index) in part.plan.names.items()}
        plan.notes += [f"{name}: {note}" for note in part.plan.notes]
    return Planned(next(iter(formats), "float"), {name: part.config for name, part in planned.items()}, plan,
                   sum(part.tensors for part in planned.values()), sum(part.nbytes for part in planned.values()))


def _planned(path: Path) -> Planned:
    family, source = open_source(path)
    plan = make_plan(source, family)
    return Planned(family.name if family is not None else "float", source.config, plan, len(source.files), source.files.nbytes)


def _schemes(plan: Plan, dtype: str | None) -> dict[str, Scheme]:
    return {} if dtype is not None else {leaf.name: leaf.scheme for leaf in plan.leaves if leaf.members}


def locate(path: str | Path) -> Path:
    """The local path of a checkpoint, downloaded where `path` is a hub id."""
    if not str(path):
        # Path would take it for the current folder.
        raise CheckpointError("expected a folder, a .gguf or .safetensors file or a hub id, found an empty path")
    local = Path(path)
    if local.exists():
        return local
    if isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return fetch(path)
    raise CheckpointError(f"{path}: expected a folder, a .gguf or .safetensors file or a hub id, found nothing")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder whose only weights are one."""
    if path.is_dir():
        return not any(path.glob("*.safetensors")) and any(path.glob("*.gguf"))
    return path.suffix.lower() == ".gguf"


def gguf_file(path: Path) -> Path:
    """The GGUF file of a folder: the only one, or the first part of the only split one."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    first = [f for f in files if "-of-" not in f.name or "-00001-of-" in f.name]
    if len(first) != 1:
        raise refuse(path, "", "one .gguf file", ", ".join(f.name for f in files))
    return inside(path, first[0].name, path)


def open_source(path: Path) -> tuple[Family | None, Source]:
    """The reader of a safetensors checkpoint, and what it reads."""
    if path.is_dir():
        folder, files = path, open_folder(path)
    else:
        _check_single(path)
        folder, files = path.parent, Files([File(path)])
    config = folder_json(folder, "config.json") or {}
    family, quant = quantization(folder, config)
    quant, aliases = quant or Config({}, folder), {}
    if _wan.original(files):
        aliases = {_wan.renamed(name): name for name in files}
        files, config = files.under(_wan.rename(files, folder)), _wan.config(config)
        if family is not None and family.name == "modelslim":
            quant = Config({_wan.described(key): value for key, value in quant.data.items()}, quant.where)
    return family, Source(folder, config, quant, files, list(files.notes), aliases)


def _check_single(path: Path) -> None:
    """Refuse a file that is no checkpoint by itself."""
    if path.suffix.lower() != ".safetensors":
        raise refuse(path, "", "a .gguf or .safetensors file, or the folder of a checkpoint", f"a file {path.suffix or 'without a suffix'}")
    part = re.fullmatch(r".*-(\d{1,6})-of-(\d{1,6})", path.stem)
    if part is not None and int(part[2]) > 1:
        raise refuse(path, "", f"a whole checkpoint; its folder, {path.parent}, has all parts", f"part {int(part[1])} of {int(part[2])}")


def logical_dtype(config: dict, plan: Plan) -> str:
    """The dtype of the model's float tensors: the configuration's, else that of most of them."""
    for holder in (config, config.get("text_config"), config.get("transformer")):
        for key in ("dtype", "torch_dtype"):
            found = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(found, str) and found.removeprefix("torch.") in ("bfloat16", "float16", "float32"):
                return found.removeprefix("torch.")
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    sizes: dict[str, int] = {}
    for leaf in plan.leaves:
        if not leaf.members and leaf.tensors and leaf.tensors[0].dtype in names:
            sizes[leaf.tensors[0].dtype] = sizes.get(leaf.tensors[0].dtype, 0) + leaf.nbytes
    return names[max(sizes, key=sizes.get)] if sizes else "bfloat16"


def _native(path: Path, dtype: str | None, shardings) -> Checkpoint:
    from qfunc._paths import leaf_path
    from qfunc._qtensor import QTensor
    from qfunc._quantize import dequantize

    from .native import load_native
    found = load_native(path)
    place = placer(shardings)
    flat, tree = jax.tree_util.tree_flatten_with_path(found.params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    named = [(leaf_path(keys), place(leaf_path(keys), leaf)) for keys, leaf in flat]
    params = jax.tree_util.tree_unflatten(tree, [leaf if dtype is None else dequantize(leaf, dtype) for _, leaf in named])
    schemes = {name: leaf.scheme for name, leaf in named if isinstance(leaf, QTensor) and dtype is None}
    names = {name.rpartition("/")[0].replace("/", "."): (tuple(name.split("/")), None) for name, _ in named}
    return Checkpoint(params, found.config or {}, "qfunc", schemes, names=names)
