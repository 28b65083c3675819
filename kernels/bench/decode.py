"""Decoding speed of a random model in the shape of Qwen2.5-0.5B: schemes against floating point, the memory floor and transformers.

    python kernels/bench/decode.py [--layers 24] [--tokens 64] [--schemes w4a16_g128,w8a8_dynamic] [--peers] [--scan]

Prints, in one run on one machine: tokens per second (median of rounds, prompt of 16 tokens, batch 1), compile time, bytes read per token,
the floor (those bytes over the measured read bandwidth) and the ratios to float32 and to the floor; then transformers on torch with
random weights of the same shape and its own cache, in float32 and bfloat16, where both are installed (`--no-peers` leaves them out).
`--scan` runs the layers under `lax.scan` over stacked weights as well: a scan slices every weight out of its stack, which costs a copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np

import qfunc
from qfunc.layers import decoder
from qfunc.layers.families import model_config
from qfunc.layers.generate import decode, prefill, row_keys
from qfunc.layers.model import Model

SHAPE = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
         "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True}


def random_params(config) -> dict:
    """Float32 parameters of the shape of `config`, normal with variance 1 / inputs."""
    rng = np.random.default_rng(0)

    def linear(ins, outs, bias=False):
        kernel = rng.standard_normal((ins, outs), np.float32) * np.float32(ins**-0.5)
        return {"kernel": kernel, **({"bias": np.zeros(outs, np.float32)} if bias else {})}
    h, d, inner = config.hidden_size, config.head_dim, SHAPE["intermediate_size"]
    norm = {"weight": np.ones(h, np.float32)}
    layers = {}
    for i in range(config.num_hidden_layers):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads, "v_proj": config.num_key_value_heads}
        layers[str(i)] = {"self_attn": {**{name: linear(h, n * d, True) for name, n in heads.items()},
                                        "o_proj": linear(config.num_attention_heads * d, h)},
                          "mlp": {"gate_proj": linear(h, inner), "up_proj": linear(h, inner), "down_proj": linear(inner, h)},
                          "input_layernorm": norm, "post_attention_layernorm": norm}
    table = rng.standard_normal((config.vocab_size, h), np.float32)
    return {"model": {"embed_tokens": {"weight": table}, "layers": layers, "norm": norm}}


def bandwidth(rounds: int = 5) -> float:
    """Bytes per second of reading a large array with all threads that XLA uses."""
    data = jnp.ones((1 << 28,), jnp.int32)
    total = jax.jit(lambda x: x.sum())
    total(data).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        total(data).block_until_ready()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def measure(model: Model, tokens: int, rounds: int) -> tuple[float, float]:
    """(tokens per second, seconds to compile)."""
    options = {"apply": decoder.apply, "config": model.config, "greedy": True}
    draw, ids = (row_keys(0, 1), jnp.float32(1), jnp.float32(1)), jnp.arange(1, 17)[None]

    def once():
        token, cache = prefill(model.params, ids, model.init_cache(1, 16 + tokens), *draw, **options)
        token.block_until_ready()
        start = time.perf_counter()
        out, *_ = decode(model.params, token, cache, jnp.zeros(1, bool), jnp.int32(1), *draw, **options, steps=tokens)
        out.block_until_ready()
        return time.perf_counter() - start
    first = time.perf_counter()
    once()
    first = time.perf_counter() - first
    seconds = statistics.median(once() for _ in range(rounds))
    return tokens / seconds, first - seconds


def torch_speed(layers: int, tokens: int, rounds: int, dtype: str) -> tuple[float, int]:
    """(tokens per second, bytes of its parameters) of transformers' Qwen2 on torch: the time of a long answer less that of one token."""
    import torch
    import transformers
    made = transformers.Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "model_type"}, num_hidden_layers=layers)
    with torch.no_grad():
        model = transformers.Qwen2ForCausalLM(made).eval().to(getattr(torch, dtype))
        ids = torch.arange(1, 17)[None]

        def once(count):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            return time.perf_counter() - start
        once(2)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return statistics.median((tokens - 1) / (once(tokens) - once(1)) for _ in range(rounds)), size


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", default="w4a16_g128,w8a8_dynamic")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True,
                        help="transformers on torch, where both are installed")
    parser.add_argument("--scan", action="store_true", help="also with the layers under lax.scan")
    args = parser.parse_args()
    config = model_config({**SHAPE, "num_hidden_layers": args.layers})
    params = random_params(config)
    speed = bandwidth()
    print(f"{args.layers} layers of {config.hidden_size}, {jax.devices()[0].platform}, read bandwidth {speed / 1e9:.1f} GB/s")
    print(f"{'weights':24s} {'MB':>7s} {'tokens/s':>9s} {'floor':>8s} {'of floor':>8s} {'x float32':>9s} {'compile s':>9s}")
    base = None

    def show(name, size, rate, compiling=""):
        nonlocal base
        base, floor = base or rate, speed / size
        print(f"{name:24s} {size / 1e6:7.0f} {rate:9.2f} {floor:8.1f} {rate / floor:8.2f} {rate / base:9.2f} {compiling:>9}", flush=True)

    def row(name, packed, config, scan=False):
        model = Model(packed, config)
        rate, compiling = measure(model.stacked() if scan else model, args.tokens, args.rounds)
        show(name, model.nbytes, rate, f"{compiling:.1f}")

    half = config.replace(dtype="bfloat16")
    row("float32", jax.tree.map(jnp.asarray, params), config)
    row("bfloat16", jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), half)
    for scheme in args.schemes.split(","):
        # The tied table is quantized, too, as it is half of what a token reads.
        packed = qfunc.quantize(params, {"*embed_tokens*": scheme, "*": scheme})
        packed = jax.tree.map(jnp.asarray, packed)
        row(scheme, packed, config)
        if args.scan:
            row(f"{scheme}, scan", packed, config, scan=True)
    absent = [name for name in ("torch", "transformers") if args.peers and find_spec(name) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}")
    for dtype in ("float32", "bfloat16") if args.peers and not absent else ():
        rate, size = torch_speed(args.layers, args.tokens, args.rounds, dtype)
        show(f"transformers, {dtype}", size, rate)


if __name__ == "__main__":
    main()
