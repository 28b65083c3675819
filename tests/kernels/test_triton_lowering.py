"""Lowering for GPUs on a machine without one: what is called, under every transformation, and why something is not."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import lowered
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from near import near

import qfunc
from qfunc.kernels import _reference
from qfunc.kernels._dispatch import Declined, targeted
from qfunc.kernels._matmul import describe
from qfunc.kernels.triton import _bridge, _image, _lowering, _tables, _target

TARGETS = {"cuda": "sm_90", "rocm": "gfx942"}


@pytest.fixture
def hopper(monkeypatch):
    """Lowering for sm_90 without compiling anything."""
    with lowered.without_compiling(monkeypatch):
        yield


def shapes(scheme: str, ins=512, outs=256, batch=(), dtype=jnp.float32):
    w = jax.ShapeDtypeStruct((*batch, ins, outs), dtype)
    return jax.eval_shape(lambda w: qfunc.quantize({"kernel": w}, scheme)["kernel"], w)


def x_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def found(fn, *args, **options):
    return lowered.reached(lowered.lower(fn, *args, **options))


SCHEMES = [name for name in qfunc.schemes if "static" not in name and "actorder" not in name]
BY_XLA = {"mxfp4_dual"}
"""Schemes whose activations XLA quantizes: the kernel of rows does not know their rule."""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_scheme_becomes_kernels(target, monkeypatch, hopper):
    platform = "rocm" if target.startswith("gfx") else "cuda"
    monkeypatch.setattr(_bridge, "_code_or_path", lambda program, image: "code")
    for scheme in SCHEMES if target == "sm_90" else SCHEMES[::9]:
        q = shapes(scheme)
        with _target.lowering_for(target):
            got = lowered.reached(lowered.lower(qfunc.matmul, x_of(3, 512), q, platform=platform))
        spec = q.scheme.activation
        products = 2 if spec is not None and spec.outlier_threshold is not None else 1
        want = Counter(dense=products) + Counter(quantize_rows=int(spec is not None and scheme not in BY_XLA))
        assert lowered.operations(got) == Counter({("quantized_matmul", "triton"): 1}), scheme
        assert lowered.kernels(got) == want, scheme


@pytest.mark.parametrize("scheme", ["w4a16_g128_asym", "w8a8_dynamic", "fp8", "mxfp4", "nvfp4", "llm_int8"])
def test_experts_become_kernels(scheme, hopper):
    q = shapes(scheme, batch=(4,))
    got = found(qfunc.grouped_matmul, x_of(10, 512), q, jax.ShapeDtypeStruct((4,), jnp.int32))
    spec = q.scheme.activation
    products = 2 if spec is not None and spec.outlier_threshold is not None else 1
    assert lowered.operations(got) == Counter({("quantized_grouped_matmul", "triton"): 1})
    assert lowered.kernels(got) == Counter(grouped=products) + Counter(quantize_rows=int(spec is not None))


@pytest.mark.parametrize(("scheme", "inside"), [("w4a16_g128", True), ("w8a8_dynamic", True), ("fp8", False), ("llm_int8", False)])
def test_rows_of_experts_are_gathered_by_the_kernel_where_codes_are_a_rows_own(scheme, inside, hopper):
    q, rows = shapes(scheme, batch=(4,)), jax.ShapeDtypeStruct((10,), jnp.int32)
    text = lowered.lower(lambda x, q, sizes, rows: qfunc.grouped_matmul(x, q, sizes, rows=rows), x_of(5, 512), q,
                         jax.ShapeDtypeStruct((4,), jnp.int32), rows)
    calls = [line for line in text.splitlines() if "custom_call @" in line and '"qfunc_grouped"' in line]
    assert len(calls) == (2 if scheme == "llm_int8" else 1)
    for line in calls:
        operands = line.rpartition(" : (")[2].partition(") -> ")[0]
        assert operands.startswith(f"tensor<1x{5 if inside else 10}x512x") and ("tensor<10xi32>" in operands) == inside, operands
        assert "-> tensor<10x256xbf16>" in line or scheme == "llm_int8", line


def test_a_mixture_gathers_inside_and_quantizes_each_token_once(hopper):
    from qfunc.layers.config import Names, Routing
    from qfunc.layers.mlp import gated
    from qfunc.layers.moe import mixture
    q = shapes("w8a8_dynamic", 512, 512, batch=(4,))
    params = {"gate": {"kernel": jax.ShapeDtypeStruct((512, 4), jnp.float32)},
              "experts": {name: {"kernel": q} for name in ("gate_proj", "up_proj", "down_proj")}}
    text = lowered.lower(lambda params, x: mixture(params, x, Routing(4, 2), Names(), gated("silu")), params, x_of(5, 512))
    found = lowered.reached(text)
    assert lowered.kernels(found) == Counter(grouped=3, quantize_rows=2)
    quantized = sorted(line.rpartition(" : (")[2].split("x512x")[0] for line in text.splitlines() if '"qfunc_quantize_rows"' in line)
    assert quantized == ["tensor<10", "tensor<5"]               # the tokens, then the hidden rows of their two experts


def test_one_quantization_for_several_matmuls(hopper):
    q = shapes("w8a8_dynamic")

    def qkv(x, q):
        codes = qfunc.quantize_activation(x, q)
        return [qfunc.matmul(codes, q) for _ in range(3)]

    got = found(qkv, x_of(2, 5, 512), q)
    assert lowered.operations(got) == Counter({("quantize_activation", "triton"): 1, ("quantized_matmul", "triton"): 3})
    assert lowered.kernels(got) == Counter(quantize_rows=1, dense=3)


def test_an_embedding_becomes_a_kernel(hopper, recwarn):
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    got = found(qfunc.take, shapes("w4a16_g128"), ids)
    assert lowered.operations(got) == Counter({("quantized_take", "triton"): 1}) and lowered.kernels(got) == Counter(take=1)
    codes = jax.ShapeDtypeStruct((256, 2 * 144), jnp.uint8)
    q = qfunc.QTensor(codes=codes, scheme=qfunc.scheme("gguf:q4_k"), dtype="bfloat16")
    got = found(qfunc.take, q, ids)
    assert lowered.operations(got) == Counter({("quantized_take", "reference"): 1}) and not recwarn.list


def test_jit_vmap_scan_grad_shard_map(hopper):
    q, stack, x = shapes("w8a8_dynamic"), shapes("w8a8_dynamic", batch=(3,)), x_of(4, 512)
    one = Counter(quantize_rows=1, dense=1)
    assert lowered.kernels(found(jax.vmap(qfunc.matmul, (0, None)), x_of(3, 4, 512), q)) == one
    assert lowered.kernels(found(jax.vmap(qfunc.matmul), x_of(3, 4, 512), stack)) == one
    assert lowered.kernels(found(jax.vmap(qfunc.matmul, (None, 0)), x, stack)) == one
    square = shapes("w8a8_dynamic", 512, 512, batch=(3,))
    layers = found(lambda x, qs: jax.lax.scan(lambda x, q: (qfunc.matmul(x, q), None), x, qs)[0], x, square)
    assert lowered.kernels(layers) == one
    forward = found(jax.grad(lambda x, q: qfunc.matmul(x, q).astype(jnp.float32).sum()), x, q)
    assert set(lowered.kernels(forward)) <= {"dense", "quantize_rows"}
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("tp",))
    split = jax.tree.map(lambda leaf: PartitionSpec("tp"), q)
    whole = jax.shard_map(qfunc.matmul, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=PartitionSpec(None, "tp"), check_vma=False)
    assert lowered.kernels(found(whole, x, q)) == one


def test_export_for_one_platform_and_for_two(hopper, rng):
    q, x = shapes("w4a16_g128"), x_of(4, 512)
    for platforms in (("cuda",), ("cpu", "cuda")):
        made = jax.export.export(jax.jit(qfunc.matmul), platforms=platforms, disabled_checks=qfunc.kernels.export_checks())(x, q)
        assert made.platforms == platforms and "qfunc_dense" in made.mlir_module()
        back = jax.export.deserialize(made.serialize())
    w = qfunc.quantize({"kernel": jnp.asarray(rng.standard_normal((512, 256)), jnp.float32)}, "w4a16_g128")["kernel"]
    value = jnp.asarray(rng.standard_normal((4, 512)), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(back.call(value, w), np.float32), np.asarray(qfunc.matmul(value, w), np.float32))


def test_equal_layers_share_one_function(hopper):
    q = shapes("w4a16_g128", 512, 512)
    text = lowered.lower(lambda x, q: qfunc.matmul(qfunc.matmul(x, q), q), x_of(4, 512), q)
    assert text.count("custom_call @triton_kernel_call_ffi") == 1
    assert lowered.kernels(lowered.reached(text)) == Counter(dense=2)


def test_nothing_is_launched_of_nothing(hopper, recwarn):
    q = shapes("w8a8_dynamic")
    got = found(qfunc.matmul, x_of(0, 512), q)
    assert not lowered.kernels(got) and not recwarn.list
    (choice,) = qfunc.explain(qfunc.matmul, x_of(0, 512), q, platform="cuda")
    assert choice.implementation == "xla" and "empty" in dict(choice.refused)["triton"]


def test_without_a_target_nothing_is_guessed(monkeypatch):
    monkeypatch.setattr(_image, "triton_version", lambda: "3.6.0")
    monkeypatch.delenv("QFUNC_CUDA_CAPABILITY", raising=False)
    q = shapes("w4a16_g128")
    (choice,) = qfunc.explain(qfunc.matmul, x_of(4, 512), q, platform="cuda")
    assert choice.implementation == "xla" and "QFUNC_CUDA_CAPABILITY" in dict(choice.refused)["triton"]
    with pytest.warns(qfunc.kernels.FallbackWarning, match="QFUNC_CUDA_CAPABILITY"):
        qfunc.kernels._dispatch._warn.cache_clear()
        lowered.lower(qfunc.matmul, x_of(4, 512), q)
    with pytest.raises(NotImplementedError, match="QFUNC_CUDA_CAPABILITY"), qfunc.use("triton"):
        lowered.lower(qfunc.matmul, x_of(4, 512), q)
    monkeypatch.setenv("QFUNC_CUDA_CAPABILITY", "9.0")
    (choice,) = qfunc.explain(qfunc.matmul, x_of(4, 512), q, platform="cuda")
    assert choice.implementation == "triton"


def test_another_target_traces_again(hopper):
    q, x = shapes("fp8_dynamic"), x_of(4, 512)
    jitted = jax.jit(qfunc.matmul)
    texts = []
    for target in ("sm_90", "sm_80", "sm_90"):
        with _target.lowering_for(target):
            texts.append(jitted.trace(x, q).lower(lowering_platforms=("cuda",)).as_text())
    assert texts[0] == texts[2] and texts[0] != texts[1]


def test_use_forces_each_implementation(hopper):
    q, x = shapes("w8a8_dynamic"), x_of(4, 512)
    for name in ("triton", "xla", "reference"):
        with qfunc.use(name):
            got = found(qfunc.matmul, x, q)
        assert lowered.operations(got) == Counter({("quantized_matmul", name): 1})


def test_xla_is_preferred_where_a_table_says_so(hopper, monkeypatch, recwarn):
    monkeypatch.setattr(_tables, "xla_from", lambda call, target: 1024)
    q = shapes("w8a8_dynamic")
    small, large = (qfunc.explain(qfunc.matmul, x_of(m, 512), q, platform="cuda")[0] for m in (1023, 1024))
    assert small.implementation == "triton" and not small.refused
    assert large.implementation == "xla" and "from 1024 tokens on" in dict(large.refused)["triton"]
    got = found(qfunc.matmul, x_of(1024, 512), q)
    assert lowered.operations(got) == Counter({("quantized_matmul", "xla"): 1}) and not lowered.kernels(got)
    assert not [w for w in recwarn.list if isinstance(w.message, qfunc.kernels.FallbackWarning)]
    # A product in groups is no single product of XLA's: the kernel keeps it at any size.
    grouped = qfunc.explain(qfunc.matmul, x_of(4096, 512), shapes("w8a8_block"), platform="cuda")[0]
    assert grouped.implementation == "triton"


def test_a_permuted_weight_with_grouped_activations_is_refused_in_words(hopper):
    q = shapes("w4a8_dynamic_g128")
    spec = qfunc.scheme("w8a8_block").activation
    q = q.replace(perm=jax.ShapeDtypeStruct((512,), jnp.int32), scheme=q.scheme.replace(activation=spec))
    (choice,) = qfunc.explain(qfunc.matmul, x_of(4, 512), q, platform="cuda")
    assert choice.implementation == "reference" and "permuted" in dict(choice.refused)["triton"]


def test_gguf_runs_on_xla_with_its_reason(hopper):
    codes = jax.ShapeDtypeStruct((256, 2 * 144), jnp.uint8)
    q = qfunc.QTensor(codes=codes, scheme=qfunc.scheme("gguf:q4_k"), dtype="bfloat16")
    (choice,) = qfunc.explain(qfunc.matmul, x_of(4, 512), q, platform="cuda")
    assert choice.implementation == "xla" and "decoder" in dict(choice.refused)["triton"]


def random_call(rng, scheme, x, ins, outs, batch=(), sizes=None, smooth=False):
    w = jnp.asarray(rng.standard_normal((*batch, ins, outs)), jnp.float32)
    q = qfunc.quantize({"kernel": w}, scheme)["kernel"]
    if smooth:
        q = q.replace(smooth=jnp.asarray(rng.uniform(0.5, 2, (*batch, ins)), jnp.float32))
    made = []

    def take(fn, *args):
        jaxpr = jax.make_jaxpr(fn)(*args)
        (equation,) = [e for e in jaxpr.eqns if e.primitive.name.startswith("quantized")]
        call = describe([jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars], equation.params)
        made.append(targeted(call, "cuda"))

    if sizes is None:
        take(qfunc.matmul, x, q)
        return made[0], (x, *q.leaves.values())
    take(qfunc.grouped_matmul, x, q, sizes)
    return made[0], (x, *q.leaves.values(), sizes)


@pytest.mark.parametrize("experts", [0, 3])
def test_smoothing_in_front_of_a_float_product_keeps_its_type(rng, hopper, experts):
    x = jnp.asarray(rng.standard_normal((9, 128)), jnp.bfloat16)
    sizes = jnp.asarray([4, 0, 3], jnp.int32) if experts else None
    call, operands = random_call(rng, "w4a16_g32_asym", x, 128, 64, (experts,) * bool(experts), sizes, smooth=True)
    (smoothed,), *_ = _lowering._operands.activation(call, *operands, quantize=None)
    assert smoothed.dtype == jnp.bfloat16
    jax.eval_shape(lambda *leaves: _lowering.matmul(call, *leaves), *operands)


def test_what_is_launched_is_what_was_described(rng, hopper):
    call, operands = random_call(rng, "w8a16", jnp.ones((2, 128), jnp.bfloat16), 128, 64)
    launch = _lowering.planned(call)
    x, w, sizes, bias = _lowering._operands.activation(call, *operands, quantize=None)
    arrays = _lowering._operands.arrays(launch, x, w, sizes, bias)
    with pytest.raises(_image.KernelError, match="x was described as bfloat16"):
        _lowering.execute(launch, [arrays[0].astype(jnp.float32), *arrays[1:]], "sm_90")


def test_zero_points_of_an_activation_need_an_integer_product(hopper):
    spec = qfunc.ActivationSpec("int8", qfunc.Granularity("token"), zero="int")
    for name, refused in (("nf4", True), ("w8a16", False)):
        scheme = qfunc.Scheme("own", weight=qfunc.scheme(name).weight, activation=spec)
        (choice,) = qfunc.explain(qfunc.matmul, x_of(4, 512), shapes(scheme), platform="cuda")
        assert ("zero points of the activation" in dict(choice.refused).get("triton", "")) == refused


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_outlier_columns_are_a_product_of_their_own(rng, monkeypatch, hopper, grouped, smooth):
    x = np.array(rng.standard_normal((9, 128)), np.float32)
    x[:, [3, 70]] *= 20
    sizes = jnp.asarray([4, 0, 3], jnp.int32) if grouped else None
    call, operands = random_call(rng, "llm_int8", jnp.asarray(x), 128, 64, (3,) if grouped else (), sizes, smooth)
    reference = _reference.grouped_matmul if grouped else _reference.matmul
    monkeypatch.setattr(_lowering, "matmul", reference)
    got, want = _lowering._with_outliers(call, *operands), reference(call, *operands)
    near(got, want)


XLA = ["w8a8_dynamic", "w4a16_g128", "fp8_dynamic", "fp8", "fp8_w8a16", "mxfp4", "nvfp4", "nf4", "w4a8_dynamic"]


@pytest.mark.parametrize("scheme", XLA)
def test_xla_products_equal_the_reference(rng, hopper, scheme):
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16)
    call, operands = random_call(rng, scheme, x, 256, 64)
    assert _lowering._xla.refusal(call) is None
    got = np.asarray(_lowering._xla.matmul(call, *operands), np.float32)
    want = np.asarray(_reference.matmul(call, *operands), np.float32)
    # Dequantized operands are rounded to 8 bits of mantissa once each, the result once more.
    assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_are_really_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("QFUNC_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(_image, "_images", {})
    q, experts = shapes("w4a8_dynamic"), shapes("w4a16_g128", batch=(4,))

    def step(ids, q, experts, sizes):
        x = qfunc.take(q, ids)[:, :512].astype(jnp.bfloat16)
        y = qfunc.matmul(x, q)
        return y, qfunc.grouped_matmul(x, experts, sizes)

    operands = jax.ShapeDtypeStruct((20,), jnp.int32), q, experts, jax.ShapeDtypeStruct((4,), jnp.int32)
    with _target.lowering_for("sm_90"):
        got = found(step, *operands)
    assert lowered.kernels(got) == Counter(take=1, quantize_rows=1, dense=1, grouped=1)
    images = [_image.Image.from_bytes(path.read_bytes()) for path in tmp_path.rglob("*.gz")]
    assert {image.name for image in images} == {"take", "quantize_rows", "dense", "grouped"}
    code = {image.name: image.code.decode() for image in images}
    assert all(".target sm_90a" in text for text in code.values())
    assert "wgmma.mma_async" in code["dense"] and ".s8.s8" in code["dense"] and "wgmma.mma_async" in code["grouped"]


def test_import_touches_neither_triton_nor_a_device():
    code = "import sys, qfunc.kernels, jax; assert not {'triton', 'torch', 'jax_triton'} & set(sys.modules), 'imported'\n" \
           "from jax._src import xla_bridge; assert not xla_bridge._backends, 'a backend was started'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "QFUNC_CUDA_CAPABILITY": "90"})


def test_declined_is_a_reason():
    assert isinstance(Declined("faster"), str) and Declined("faster") == "faster"
