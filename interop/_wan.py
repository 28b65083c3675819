"""Wan's diffusion transformers: the original code's names, those of diffusers, and the folders that hold two of them.

msModelSlim writes the original names; diffusers, and everything downstream of it, has its own. The rules are those of SGLang's
`multimodal_gen/tools/wan_repack.py`: substrings, replaced in this order in every tensor name. Wan2.2's A14B models are two transformers,
`high_noise_model` (diffusers: `transformer`) and `low_noise_model` (`transformer_2`), with weights and schemes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ._refuse import folder_json, inside, refuse

RULES: tuple[tuple[str, str], ...] = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"), ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"), ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    # The original calls the norm in front of cross-attention norm3 and the one in front of the MLP norm2.
    ("norm2", "norm__"), ("norm3", "norm2"), ("norm__", "norm3"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"), ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"), ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    *((f"{old}.{part}", f"{new}.{name}") for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
      for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))),
    ("attn2.to_k_img", "attn2.add_k_proj"), ("attn2.to_v_img", "attn2.add_v_proj"), ("attn2.norm_k_img", "attn2.norm_added_k"),
    # msModelSlim wraps a smoothed layer X as X.linear and keeps its factors in X.div.
    (".linear.", "."), (".div.", "."),
)
ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_ORIGINAL = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn)\.(?:q|k|v|o)\.")
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}

# Fields of the original config.json under diffusers' names.
_FIELDS = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}


def renamed(name: str) -> str:
    """A tensor name of the original code in diffusers' spelling. Not for names that have it already: the two call their norms crosswise."""
    for old, new in RULES:
        name = name.replace(old, new)
    return name


def described(key: str) -> str:
    """A key of a description in diffusers' spelling: a tensor's name, or a property of an attention module, whose rules would mangle it."""
    if key.endswith(".quant_type"):
        return ".".join(ATTENTION.get(part, part) for part in key.split("."))
    return renamed(key)


def original(names: Iterable[str]) -> bool:
    """Whether tensors have the names of the original code."""
    return any(_ORIGINAL.match(name) for name in names)


def rename(tensors: Mapping, where) -> dict:
    """Tensors under diffusers' names; two that would become one are refused."""
    out: dict = {}
    for name, tensor in tensors.items():
        new = renamed(name)
        if new in out:
            raise refuse(where, f"tensor {name!r}", "a name of its own in diffusers' spelling", f"{new!r}, which another tensor has")
        out[new] = tensor
    return out


def config(data: dict) -> dict:
    """The original code's configuration with diffusers' fields beside its own."""
    out = {**data, **{new: data[old] for old, new in _FIELDS.items() if old in data}}
    dim, heads = data.get("dim"), data.get("num_heads")
    if isinstance(dim, int) and isinstance(heads, int) and heads > 0:
        out["attention_head_dim"] = dim // heads
    return out


def components(path: Path) -> dict[str, Path]:
    """The transformers of a pipeline's folder by diffusers' names: {} where the folder is a checkpoint itself.

    A diffusers folder names them in `model_index.json`; msModelSlim's output for two experts has a folder for each.
    """
    if not path.is_dir():
        return {}
    if (path / "model_index.json").exists():
        index = folder_json(path, "model_index.json")
        # A component that the pipeline does without is listed as [null, null].
        names = [n for n in index if re.fullmatch(r"transformer(_\d+)?", n) and index[n] != [None, None]]
        if not names:
            raise refuse(path / "model_index.json", "", "a pipeline with a transformer", ", ".join(index))
        return {name: _folder(path, name) for name in names}
    if any((path / folder).is_dir() for folder in EXPERTS.values()):
        return {name: _folder(path, folder) for name, folder in EXPERTS.items()}
    return {}


def _folder(path: Path, name: str) -> Path:
    found = inside(path, name, path)
    if not found.is_dir():
        raise refuse(path, name, "the folder of this transformer", "none")
    return found
