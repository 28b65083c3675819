"""What lies in a checkpoint, told from headers alone: names with their numbers folded, types, shapes, sizes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from ._refuse import read_json, refuse
from .native import INDEX
from .safetensors import File, Files, Tensor, open_folder


def listing(path: str | Path) -> list[dict]:
    """The tensors of a safetensors file or folder as rows: name (with `*` for numbers), count, dtype, shape, bytes; largest rows first.

    Tensors of one folded name, type and shape are one row. Raises: CheckpointError where the file or a file of the folder is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise refuse(path, "", "a file or a folder", "nothing")
    files = open_folder(path) if path.is_dir() else Files([File(path)])
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for name, tensor in files.items():
        groups[re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name), tensor.dtype, tensor.shape].append(tensor)
    rows = [{"name": name, "count": len(found), "dtype": dtype, "shape": shape, "bytes": sum(t.nbytes for t in found)}
            for (name, dtype, shape), found in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def headline(path: str | Path) -> list[str]:
    """What the JSON beside the tensors says of a folder: model type, architecture, quantization, schemes of a qfunc folder."""
    folder = Path(path)
    lines = []
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in ("model_type", "architectures", "quantization_config"):
        if config.get(key):
            lines.append(f"{key}: {json.dumps(config[key])}")
    if (folder / INDEX).is_file():
        entries = read_json(folder / INDEX).get("tensors", {})
        names = [e["scheme"]["name"] for e in entries.values() if isinstance(e, dict) and isinstance(e.get("scheme"), dict)]
        counted = ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
        lines.append(f"qfunc folder: {counted or 'nothing quantized'}, {len(entries) - len(names)} leaves in float")
    return lines
