"""The description of GPU launches: what is refused and why, and that the grid reaches every tile. No triton is needed, none is imported."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc import _codec
from qfunc._codes import code
from qfunc._qtensor import QTensor
from qfunc._spec import ActivationSpec, Granularity, group
from qfunc.kernels._dispatch import Call, Packed
from qfunc.kernels.triton import _launch, _plan_matmul

HOPPER = _launch.Target.parse("sm_90")
Struct = jax.ShapeDtypeStruct


@functools.cache
def packed_weight(scheme, columns, outs, experts):
    lead = () if experts is None else (experts,)
    leaves = jax.eval_shape(lambda w: _codec.encode(w, scheme.weight), Struct((*lead, outs, columns), jnp.float32))
    return QTensor(**leaves, scheme=scheme, dtype="bfloat16", pad=-columns % 128 if code(scheme.weight.code).packed else 0)


def call_of(name, rows=5, columns=512, outs=48, dtype=jnp.bfloat16, experts=None, **fields):
    scheme = name if isinstance(name, qfunc.Scheme) else qfunc.scheme(name)
    w = packed_weight(scheme, columns, outs, experts)
    call = Call("quantized_matmul" if experts is None else "quantized_grouped_matmul", (Struct((rows, columns), np.dtype(dtype)),),
                Packed.of(w), tuple(w.leaves.values()), None if experts is None else Struct((experts,), np.int32),
                spec=scheme.activation, out_dtype=np.dtype(jnp.bfloat16))
    return dataclasses.replace(call, **fields)


def test_importing_it_imports_no_triton():
    program = "import sys, qfunc.kernels.triton._launch as l, qfunc.kernels.triton._plan_matmul, qfunc.kernels.triton._plan_rows\n" \
              "import qfunc.kernels.triton._plan_take; sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("target", list(_launch.SHARED_MEMORY))
def test_every_regular_scheme_has_a_launch(target):
    refused = {name: reason for name in qfunc.schemes
               if (reason := _launch.refusal(call_of(name), _launch.Target.parse(target))) is not None}
    assert set(refused) == {"llm_int8"}, refused
    for name in set(qfunc.schemes) - set(refused):
        launch = _launch.describe(call_of(name), _launch.Target.parse(target))
        assert set(launch.signature) == set(launch.kernel.arguments) and set(launch.constants) <= set(launch.kernel.constants)
        assert launch.constants["RUN"] <= min(128, launch.constants["GROUP"], launch.constants["X_GROUP"] or 128)


def scheme_with(**changes):
    return qfunc.scheme("w4a8_dynamic_g128").replace(name="own", **changes)


REFUSED = {
    "groups": (lambda: call_of("w4a16_g8"), "groups of 8"),
    "odd groups": (lambda: call_of("w4a16_g96", columns=576), "groups of 96"),
    "short integers": (lambda: call_of("w4a8_dynamic_g16"), "integer groups of 16"),
    "type": (lambda: call_of("w4a16", dtype=jnp.int32), "x of type int32"),
    "result": (lambda: call_of("w4a16", out_dtype=np.dtype(np.int32)), "the result of type int32"),
    "bias": (lambda: call_of("w4a16", bias=Struct((48,), np.int32)), "bias of type int32"),
    "points": (lambda: call_of(scheme_with(activation_granularity=group(128), activation_zero="int")), "zero points for"),
    "no rows": (lambda: call_of("w4a16", rows=0), "an empty product"),
    "long sums": (lambda: call_of("w8a8_dynamic", columns=2**18, outs=16), "int32 does not hold"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_say_why(name):
    make, words = REFUSED[name]
    reason = _launch.refusal(make(), HOPPER)
    assert reason is not None and words in reason
    with pytest.raises(NotImplementedError, match="sm_90"):
        _launch.describe(make(), HOPPER)


def test_refusals_of_rows_and_targets():
    x = (Struct((4, 256), np.dtype(jnp.bfloat16)),)
    rows = ((ActivationSpec("int8", group(48)), "groups of 48"), (ActivationSpec("int8", scale_rule="full_range"), "full_range"),
            (ActivationSpec("int8", group(64), zero="int", scale_rule="minmax"), "zero points"))
    for spec, words in rows:
        assert words in _launch.refusal(Call("quantize_activation", x, spec=spec), HOPPER)
    assert _launch.refusal(Call("quantize_activation", x, spec=ActivationSpec("int8", Granularity("token"))), HOPPER) is None
    assert "sm_70" in _launch.refusal(call_of("w4a16"), _launch.Target.parse("sm_70"))
    with pytest.raises(ValueError, match="found 'hopper'"):
        _launch.Target.parse("hopper")


def test_fp8_is_multiplied_as_it_is_only_where_the_target_can():
    found = {target: _launch.describe(call_of("fp8_dynamic"), _launch.Target.parse(target)) for target in _launch.SHARED_MEMORY}
    native = {target for target, launch in found.items() if launch.constants["DOT"] == "e4m3"}
    assert native == set(_launch.SHARED_MEMORY) - {"sm_80", "sm_86", "gfx942"}
    assert found["sm_90"].types["codes"] == "*fp8e4nv" and found["sm_80"].types["codes"] == "*u8"


def test_split_k_leaves_no_program_without_steps(rng):
    for columns in (128, 384, 1000, 4096, 5120):
        for split in (1, 2, 3, 5, 8, 16, 100):
            launch = _launch.describe(call_of("w4a16", columns=columns), HOPPER, _launch.Config(split_k=split))
            steps = -(-columns // 128)
            each = -(-steps // launch.split)
            assert launch.split <= split and (launch.split - 1) * each < steps
            assert launch.outputs[0].shape[0] == (launch.split if launch.split > 1 else 1)


def test_the_grid_of_experts_reaches_every_tile(rng):
    for _ in range(200):
        experts, rows, tile = int(rng.integers(1, 9)), int(rng.integers(1, 200)), int(2 ** rng.integers(4, 7))
        sizes = rng.multinomial(int(rng.integers(0, rows + 1)), rng.dirichlet(np.full(experts, 0.3)))
        launch = _launch.describe(call_of("w4a16", rows, experts=experts), HOPPER, _launch.Config(block_m=tile, block_n=64))
        every = np.append(sizes, rows - sizes.sum())
        assert launch.grid[0] >= np.sum(-(-every // tile)), (every, tile)
        assert launch.constants["E_BLOCK"] >= experts + 1


def test_routing_inside_a_launch_adds_its_arrays():
    plain = _launch.describe(call_of("w8a8_dynamic", 24, experts=4), HOPPER)
    routed = _plan_matmul.routed(plain, tokens=6, weighted=True)
    arrays = dict(routed.arrays)
    assert arrays["x"].shape == (1, 6, 512) and arrays["x_scale"].shape == (1, 6, 1)
    assert arrays["rows"].shape == (24,) and arrays["weights"].dtype == np.float32
    assert [name for name, _ in routed.arrays] == [name for name in routed.kernel.inputs if name in arrays]
