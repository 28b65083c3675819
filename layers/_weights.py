"""`adapt`: a checkpoint's parameters as the forward pass takes them, once they are found to be whole.

What a layer must have is checked by path and shape, so that a file that lacks a tensor is refused by name: the forward pass reads norms of
heads, sinks and shared experts off the parameters, and without them it would compute other numbers in silence.
"""

from __future__ import annotations

from collections.abc import Mapping

from qfunc._qtensor import QTensor

from .config import ModelConfig

HEAD_NORMS = ("self_attn/q_norm/weight", "self_attn/k_norm/weight")
REQUIRED: dict[str, tuple[str, ...]] = {
    "qwen2": tuple(f"self_attn/{name}_proj/bias" for name in "qkv"), "qwen3": HEAD_NORMS, "qwen3_moe": HEAD_NORMS,
    "gemma3_text": HEAD_NORMS, "gpt_oss": ("self_attn/sinks", "mlp/router/bias"),
}
"""Family to the paths that each of its layers has besides those that all families have."""


def adapt(params: Mapping, config: ModelConfig) -> dict:
    """Parameters as the forward pass takes them: families that keep all experts in one float tensor get `<proj>/{kernel, bias}`.

    Only the structure changes; arrays are shared. Raises: ValueError where a part that the model has is missing, or has another shape than
    the configuration says.
    """
    params = _settled(params, config)
    model = params.get("model")
    if not isinstance(model, Mapping) or not {"embed_tokens", "layers", "norm"} <= model.keys():
        raise ValueError(f"parameters of {config.family}: expected model/embed_tokens, model/layers and model/norm, found "
                         + ", ".join(sorted(model if isinstance(model, Mapping) else params)))
    missing = [i for i in range(config.num_hidden_layers) if str(i) not in model["layers"]]
    if missing:
        raise ValueError(f"model/layers/{missing[0]}: expected {config.num_hidden_layers} layers, found {len(model['layers'])}")
    if "lm_head" not in params and not config.tied:
        raise ValueError("lm_head: expected an output layer, as the configuration does not tie it to the embeddings, found none")
    for index in range(config.num_hidden_layers):
        _check_layer(_Part(model["layers"][str(index)], f"model/layers/{index}"), config)
    top = _Part(params, "")
    top.shape("model/norm/weight", config.hidden_size)
    rows, columns = _table(top)
    if columns != config.hidden_size or rows < config.vocab_size:
        raise ValueError(f"model/embed_tokens: expected vocab_size {config.vocab_size} by hidden_size {config.hidden_size}, "
                         f"found {rows} by {columns}")
    if "lm_head" in params:
        # A vocabulary may be padded.
        outs = top.linear("lm_head", config.hidden_size)
        if outs < config.vocab_size:
            raise ValueError(f"lm_head: expected at least vocab_size {config.vocab_size} outputs, found {outs}")
    return params


class _Part:
    """Parameters below a path, asked for what they must have."""

    def __init__(self, params: Mapping, where: str):
        self.params, self.where = params, where

    def get(self, path: str):
        node = self.params
        for key in path.split("/"):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def below(self, path: str) -> _Part:
        return _Part(self.get(path) or {}, f"{self.where}/{path}")

    def fail(self, path: str, expected, found) -> ValueError:
        return ValueError(f"{self.where}/{path}: expected {expected}, found {found}".removeprefix("/"))

    def shape(self, path: str, *sizes: int | None, named: str | None = None) -> tuple[int, ...]:
        """The shape of a leaf, which must have these sizes (None: any)."""
        leaf, named = self.get(path), named or path
        if leaf is None or isinstance(leaf, Mapping):
            raise self.fail(named, "a tensor", "none")
        found = tuple(leaf.shape)
        if len(found) != len(sizes) or any(want not in (None, size) for want, size in zip(sizes, found, strict=True)):
            wanted = f"({', '.join('any' if size is None else str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"
            raise self.fail(named, f"{wanted} from the sizes and numbers of the configuration", found)
        return found

    def linear(self, path: str, ins: int, outs: int | None = None, *lead: int) -> int:
        """The outputs of a linear layer (of a stack of `lead` of them), whose bias, if any, has as many."""
        *_, outs = self.shape(f"{path}/kernel", *lead, ins, outs, named=path)
        if self.get(f"{path}/bias") is not None:
            self.shape(f"{path}/bias", *lead, outs)
        return outs


def _table(top: _Part) -> tuple[int, int]:
    name = "weight" if top.get("model/embed_tokens/weight") is not None else "kernel"
    shape = top.shape(f"model/embed_tokens/{name}", None, None, named="model/embed_tokens")
    return shape[::-1] if isinstance(top.get(f"model/embed_tokens/{name}"), QTensor) else shape


def _check_layer(layer: _Part, config: ModelConfig) -> None:
    names, hidden = config.names, config.hidden_size
    (_check_attention if config.latent is None else _check_latent)(layer.below("self_attn"), config)
    for name in (names.attention_norm, names.attention_out_norm, names.mlp_norm, names.mlp_out_norm):
        if name is not None:
            layer.shape(f"{name}/weight", hidden)
    mlp = layer.below(names.mlp)
    if "experts" not in mlp.params:
        _check_mlp(mlp, hidden)
    elif config.routing is None:
        raise layer.fail(names.mlp, f"no experts, as the configuration of {config.family} names none", "experts")
    else:
        _check_mixture(mlp, config)
    for path in REQUIRED.get(config.family, ()):
        if layer.get(path) is None:
            raise layer.fail(path, f"the tensor that each layer of {config.family} has", "none")


def _check_attention(part: _Part, config: ModelConfig) -> None:
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    for name, outs in (("q_proj", queries), ("k_proj", shared), ("v_proj", shared)):
        part.linear(name, hidden, outs)
    part.linear("o_proj", queries, hidden)
    for path, size in (("q_norm/weight", config.head_dim), ("k_norm/weight", config.head_dim), ("sinks", config.num_attention_heads)):
        if part.get(path) is not None:
            part.shape(path, size)


def _check_latent(part: _Part, config: ModelConfig) -> None:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.latent
    ins, name = hidden, "q_proj"
    if "q_proj" not in part.params:
        ins, name = part.linear("q_a_proj", hidden), "q_b_proj"
        part.shape("q_a_layernorm/weight", ins)
    part.linear(name, ins, heads * (latent.nope + latent.rope))
    part.linear("kv_a_proj_with_mqa", hidden, latent.kv_rank + latent.rope)
    part.shape("kv_a_layernorm/weight", latent.kv_rank)
    part.linear("kv_b_proj", latent.kv_rank, heads * (latent.nope + latent.value))
    part.linear("o_proj", heads * latent.value, hidden)


def _check_mlp(part: _Part, hidden: int) -> None:
    inner = part.linear("gate_proj", hidden)
    part.linear("up_proj", hidden, inner)
    part.linear("down_proj", inner, hidden)


def _check_mixture(part: _Part, config: ModelConfig) -> None:
    names, hidden, count = config.names, config.hidden_size, config.routing.experts
    part.linear(names.router, hidden, count)
    if part.get(f"{names.router}/e_score_correction_bias") is not None:
        part.shape(f"{names.router}/e_score_correction_bias", count)
    own = part.below("experts")
    single = {int(key) for key in own.params if key.isdigit()}
    odd = sorted(single ^ set(range(count))) if single else []
    if odd:
        raise own.fail(str(odd[0]), f"the experts 0 to {count - 1} of the configuration", f"{len(single)} experts")
    for index in sorted(single):
        _check_expert(_Part({**own.params, **own.params[str(index)]}, f"{own.where}/{index}"), config,
                      {name: (count,) for name in own.params if name not in own.params[str(index)]})
    if not single:
        _check_expert(own, config, dict.fromkeys(own.params, (count,)))
    if names.shared is not None:
        _check_mlp(part.below(names.shared), hidden)
    if names.shared_gate is not None:
        part.linear(names.shared_gate, hidden, 1)


def _check_expert(part: _Part, config: ModelConfig, lead: Mapping[str, tuple[int, ...]]) -> None:
    """One expert, or a stack of them: `lead`, the leading axis of those of its layers that are stacked."""
    names, hidden = config.names, config.hidden_size
    if names.gate_up is not None and names.gate_up in part.params:
        inner = part.linear(names.gate_up, hidden, None, *lead.get(names.gate_up, ())) // 2
    else:
        inner = part.linear(names.gate, hidden, None, *lead.get(names.gate, ()))
        part.linear(names.up, hidden, inner, *lead.get(names.up, ()))
    part.linear(names.down, inner, hidden, *lead.get(names.down, ()))


def _settled(node, config: ModelConfig):
    if not isinstance(node, Mapping):
        return node
    out = {name: _settled(value, config) for name, value in node.items()}
    for name in (config.names.gate_up, config.names.down) if config.names.gate_up else ():
        value = out.get(name)
        if value is not None and not isinstance(value, Mapping):
            bias = out.pop(f"{name}_bias", None)
            out[name] = {"kernel": value} if bias is None else {"kernel": value, "bias": bias}
    return out
