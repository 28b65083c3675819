"""What else multiplies on a GPU, by name: torch's own operators, XLA's, and gemlite, torchao and qwix where they are installed.

Each maker gets (rows, columns, contracted, experts, copies, device) and returns launches on random operands of its own, one for each
copy, in bfloat16 outside; it raises where the operator does not exist or does not take the shape, which is reported, not hidden.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GROUP = 128


@dataclass(frozen=True)
class Problem:
    """m tokens (of all experts together), n outputs, k contracted, experts (0: dense), copies of the weight, torch device."""

    m: int
    n: int
    k: int
    experts: int
    copies: int
    device: str


@dataclass(frozen=True)
class Peer:
    """`make(problem)` gives torch launches, or (jitted function, operand sets) where `jax`; `kind` are the schemes it is a peer of
    (None: only the common denominator); `package` must be installed; `grouped` for experts."""

    make: Callable[[Problem], Any]
    kind: tuple[str, ...] = ()
    package: str = "torch"
    grouped: bool = False
    jax: bool = False


def _random(p: Problem, *shape):
    import torch
    return torch.randn(*shape, device=p.device, dtype=torch.float32).to(torch.bfloat16)


def _codes(p: Problem, *shape):
    import torch
    return torch.randint(-127, 128, shape, device=p.device, dtype=torch.int8)


def torch_bf16(p: Problem):
    import torch
    x, weights = _random(p, p.m, p.k), [_random(p, p.n, p.k) for _ in range(p.copies)]
    return [lambda w=w: torch.mm(x, w.t()) for w in weights]


def torch_int8(p: Problem):
    """int32 sums without scales; at 16 rows and fewer the operator refuses, so 32 are given."""
    import torch
    x, weights = _codes(p, max(p.m, 32), p.k), [_codes(p, p.n, p.k) for _ in range(p.copies)]
    return [lambda w=w: torch._int_mm(x, w.t()) for w in weights]


def _fp8(p: Problem, row: bool):
    import torch
    x = _random(p, max(p.m, 16), p.k).to(torch.float8_e4m3fn)
    ones = [torch.ones(shape, device=p.device) for shape in (((x.shape[0], 1), (1, p.n)) if row else ((), ()))]
    weights = [_random(p, p.n, p.k).to(torch.float8_e4m3fn) for _ in range(p.copies)]
    return [lambda w=w: torch._scaled_mm(x, w.t(), scale_a=ones[0], scale_b=ones[1], out_dtype=torch.bfloat16) for w in weights]


def torch_int4(p: Problem):
    import torch
    x, launches = _random(p, p.m, p.k), []
    for _ in range(p.copies):
        codes = torch.randint(0, 256, (p.n, p.k // 2), device=p.device, dtype=torch.uint8)
        if p.device == "cpu":
            wide = torch.randint(0, 16, (p.n, p.k), dtype=torch.int32)
            packed = torch._convert_weight_to_int4pack_for_cpu(wide, 2)
            multiply = torch._weight_int4pack_mm_for_cpu
        else:
            packed, multiply = torch._convert_weight_to_int4pack(codes, 8), torch._weight_int4pack_mm
        scales = _random(p, p.k // GROUP, p.n, 2)
        launches.append(lambda w=packed, s=scales, f=multiply: f(x, w, GROUP, s))
    return launches


def torch_grouped(p: Problem):
    import torch
    x = _random(p, p.m, p.k)
    ends = torch.linspace(0, p.m, p.experts + 1, device=p.device)[1:].to(torch.int32)
    weights = [_random(p, p.experts, p.n, p.k) for _ in range(p.copies)]
    return [lambda w=w: torch._grouped_mm(x, w.transpose(-2, -1), offs=ends) for w in weights]


def _xla(p: Problem, dtype: str, out: str):
    import jax
    import jax.numpy as jnp
    keys = jax.random.split(jax.random.key(0), p.copies + 1)

    def made(key, *shape):
        return jax.random.randint(key, shape, -127, 128, jnp.int8) if dtype == "int8" else jax.random.normal(key, shape, jnp.dtype(dtype))

    x = made(keys[0], p.m, p.k)
    dims = (((1,), (1,)), ((), ()))

    def one(x, w):
        return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.dtype(out))

    return one, [(x, made(key, p.n, p.k)) for key in keys[1:]]


def gemlite_int4(p: Problem):
    import gemlite
    import torch
    launches = []
    for _ in range(p.copies):
        layer = gemlite.GemLiteLinear(4, group_size=GROUP, in_features=p.k, out_features=p.n, input_dtype=gemlite.DType.BF16,
                                      output_dtype=gemlite.DType.BF16)
        codes = torch.randint(0, 16, (p.n, p.k), device=p.device, dtype=torch.uint8)
        scales = _random(p, p.n * p.k // GROUP, 1).abs()
        layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
        launches.append(layer)
    x = _random(p, p.m, p.k)
    return [lambda f=f: f(x) for f in launches]


def _torchao(p: Problem, config: str, **options):
    import torch
    from torchao import quantization
    x, layers = _random(p, p.m, p.k), []
    for _ in range(p.copies):
        layer = torch.nn.Linear(p.k, p.n, bias=False, device=p.device, dtype=torch.bfloat16)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        layers.append(torch.compile(layer, mode="max-autotune-no-cudagraphs") if p.device != "cpu" else layer)

    def launch(layer):
        with torch.no_grad():
            return layer(x)
    return [lambda f=f: launch(f) for f in layers]


def qwix_int8(p: Problem):
    import jax
    import jax.numpy as jnp
    import qwix
    keys = jax.random.split(jax.random.key(0), p.copies + 1)
    x = jax.random.normal(keys[0], (p.m, p.k), jnp.bfloat16)

    def one(x, w):
        return qwix.dot_general(qwix.quantize(x, "int8", channelwise_axes=(0,)), w, (((1,), (0,)), ((), ())))

    return one, [(x, qwix.quantize(jax.random.normal(key, (p.k, p.n), jnp.bfloat16), "int8", channelwise_axes=(1,))) for key in keys[1:]]


INT8, FP8, INT4 = ("w8a8_dynamic",), ("fp8_dynamic",), ("w4a16_g128",)
PEERS = {
    "torch bf16": Peer(torch_bf16), "torch grouped bf16": Peer(torch_grouped, grouped=True),
    "torch _int_mm": Peer(torch_int8, INT8), "torch _scaled_mm tensor": Peer(lambda p: _fp8(p, False), FP8),
    "torch _scaled_mm row": Peer(lambda p: _fp8(p, True), FP8), "torch _weight_int4pack_mm": Peer(torch_int4, INT4),
    "XLA bf16": Peer(lambda p: _xla(p, "bfloat16", "bfloat16"), package="jax", jax=True),
    "XLA int8": Peer(lambda p: _xla(p, "int8", "int32"), INT8, "jax", jax=True),
    "gemlite int4": Peer(gemlite_int4, INT4, "gemlite"),
    "torchao int8": Peer(lambda p: _torchao(p, "Int8DynamicActivationInt8WeightConfig"), INT8, "torchao"),
    "torchao fp8": Peer(lambda p: _torchao(p, "Float8DynamicActivationFloat8WeightConfig"), FP8, "torchao"),
    "qwix int8": Peer(qwix_int8, INT8, "qwix", jax=True),
}
DENOMINATOR = {False: "torch bf16", True: "torch grouped bf16"}


def installed(package: str) -> bool:
    """Whether a package is here, without importing it."""
    return importlib.util.find_spec(package) is not None
