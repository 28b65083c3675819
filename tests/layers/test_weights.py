"""Parameters that are not whole are refused by name before a model computes with them."""

import copy

import numpy as np
import pytest
from checkpoints import checkpoint

import qfunc
from qfunc.layers.families import adapt, model_config

DENSE = {"model_type": "qwen3", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "float32", "tie_word_embeddings": False}
MOE = {**DENSE, "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {**DENSE, "model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
          "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def shapes(config: dict) -> dict[str, tuple]:
    """Path to shape of every leaf."""
    hidden, kind = config["hidden_size"], config["model_type"]
    sizes = {"model/embed_tokens/weight": (40, hidden), "model/norm/weight": (hidden,), "lm_head/kernel": (hidden, 40)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model/layers/{layer}"
        sizes |= {f"{at}/{name}/weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q_proj/kernel": (hidden, 64), "k_proj/kernel": (hidden, 32), "v_proj/kernel": (hidden, 32),
                     "o_proj/kernel": (64, hidden), "q_norm/weight": (16,), "k_norm/weight": (16,), "q_proj/bias": (64,)}
        if kind == "deepseek_v3":
            attention = {"q_a_proj/kernel": (hidden, 20), "q_a_layernorm/weight": (20,), "q_b_proj/kernel": (20, 48),
                         "kv_a_proj_with_mqa/kernel": (hidden, 16), "kv_a_layernorm/weight": (12,), "kv_b_proj/kernel": (12, 56),
                         "o_proj/kernel": (24, hidden)}
        sizes |= {f"{at}/self_attn/{name}": shape for name, shape in attention.items()}
        mlp = {"gate_proj/kernel": (hidden, 48), "up_proj/kernel": (hidden, 48), "down_proj/kernel": (48, hidden)}
        if kind == "qwen3":
            sizes |= {f"{at}/mlp/{name}": shape for name, shape in mlp.items()}
            continue
        sizes |= {f"{at}/mlp/experts/{name}": (4, *shape) for name, shape in mlp.items()}
        sizes[f"{at}/mlp/gate/kernel"] = (hidden, 4)
        shared = "shared_expert" if kind == "qwen2_moe" else "shared_experts"
        sizes |= {f"{at}/mlp/{shared}/{name}": shape for name, shape in mlp.items()}
        extra = {"shared_expert_gate/kernel": (hidden, 1)} if kind == "qwen2_moe" else {"gate/e_score_correction_bias": (4,)}
        sizes |= {f"{at}/mlp/{name}": shape for name, shape in extra.items()}
    return sizes


def tree(leaves: dict) -> dict:
    out: dict = {}
    for path, leaf in leaves.items():
        node = out
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def leaves(config: dict) -> dict:
    return {path: np.zeros(shape, np.float32) for path, shape in shapes(config).items()}


def apart(found: dict) -> dict:
    """The stacks of experts one by one."""
    out = {}
    for path, leaf in found.items():
        before, middle, after = path.partition("/experts/")
        out |= {f"{before}{middle}{i}/{after}": row for i, row in enumerate(leaf)} if middle else {path: leaf}
    return out


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("config", [DENSE, MOE, LATENT], ids=["dense", "moe", "latent"])
def test_every_leaf_is_needed_and_has_its_shape(config, single):
    whole, made = apart(leaves(config)) if single else leaves(config), model_config(config)
    adapt(tree(whole), made)
    for path, leaf in whole.items():
        optional = path.endswith(("/bias", "correction_bias")) or (config is MOE and path.endswith(("q_norm/weight", "k_norm/weight")))
        rest = {name: other for name, other in whole.items() if name != path}
        module = path.removesuffix("/kernel").removesuffix("/weight")
        if optional:
            adapt(tree(rest), made)
        else:
            with pytest.raises(ValueError, match=f"{module.partition('/mlp/experts')[0]}.*expected|expected model/.* found"):
                adapt(tree(rest), made)
        for axis in range(leaf.ndim):
            # Twice as much, and one alone, which would broadcast.
            for other in (np.concatenate([leaf, leaf], axis), np.take(leaf, [0], axis)):
                padded = path == "model/embed_tokens/weight" and axis == 0 or path == "lm_head/kernel" and axis == 1
                if other.shape == leaf.shape or padded and other.shape[axis] > leaf.shape[axis]:
                    continue
                with pytest.raises(ValueError, match=r"expected .* found"):
                    adapt(tree({**rest, path: other}), made)


@pytest.mark.parametrize(("missing", "message"), [
    ((3,), "mlp/experts/3: expected the experts 0 to 3 of the configuration, found 3 experts"),
    ((0, 2), "mlp/experts/0: expected"), ((), "mlp/experts/4: expected the experts 0 to 3 of the configuration, found 5 experts")])
def test_experts_one_by_one_are_all_there(missing, message):
    whole = apart(leaves(MOE))
    for path in list(whole):
        if any(f"layers/1/mlp/experts/{i}/" in path for i in missing):
            del whole[path]
        elif not missing and "/experts/3/" in path:
            whole[path.replace("/3/", "/4/")] = whole[path]
    with pytest.raises(ValueError, match=message):
        adapt(tree(whole), model_config(MOE))


def test_experts_need_a_configuration_of_them():
    with pytest.raises(ValueError, match="model/layers/0/mlp: expected no experts"):
        adapt(tree(leaves(MOE)), model_config({**DENSE, "model_type": "llama"}))


@pytest.mark.parametrize("quantize", [None, "w8a16"])
@pytest.mark.parametrize("count", [3, 8])
def test_a_checkpoint_with_another_number_of_experts_is_refused(tmp_path, rng, quantize, count):
    """Without its last expert a stack is shorter, and the tokens of that expert would get nothing."""
    names = {path.replace("/", ".").replace(".kernel", ".weight"): rng.standard_normal(leaf.shape).astype(np.float32)
             for path, leaf in apart(leaves(MOE)).items()}
    names = {name: np.ascontiguousarray(leaf.T) if "proj" in name or "gate" in name or "lm_head" in name else leaf
             for name, leaf in names.items()}
    config = copy.deepcopy(MOE)
    qfunc.load_model(checkpoint(tmp_path / "whole", names, config=config), quantize=quantize)
    if count == 3:
        names = {name: leaf for name, leaf in names.items() if ".experts.3." not in name}
    folder = checkpoint(tmp_path / "part", names, config={**config, "num_experts": 4 if count == 3 else 8})
    with pytest.raises(qfunc.CheckpointError, match=r"model/layers/0/mlp/(experts/gate_proj|gate): expected \((4|32), .*found \((3|32), "):
        qfunc.load_model(folder, quantize=quantize)
