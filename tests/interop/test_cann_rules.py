"""The torch side of the quantized primitives: placed weights on CPU kernels behind torch_npu's schemas, against the JAX reference."""

import jax
import jax.numpy as jnp
import npu_cpu
import npu_rules
import npu_weights
import numpy as np
import pytest

from qfunc.kernels import grouped_matmul as jax_grouped
from qfunc.kernels import matmul as jax_matmul
from qfunc.kernels import use

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def calls():
    """The operator calls of the test."""
    made = npu_cpu.install()
    made.clear()
    return made


def _place(q, soc, **named):
    from qfunc.interop import cann
    name = "experts" if len(q.matrix_shape) > 2 else "layer"
    return cann.place({name: {"kernel": q}}, "cpu", soc, **named)[name]["kernel"]


def _bits(steps: str) -> int:
    return {"bfloat16": 7, "float16": 10, "float32": 23}[steps]


def _close(y, ref, dtype: str, steps: float = 1.0, beside=0.0):
    """Within `steps` units in the last place of the larger of ref and `beside`, and what float32 sums differ by."""
    y, ref = y.to(torch.float32).numpy(), np.asarray(ref.astype(jnp.float32))
    assert y.shape == ref.shape
    size = np.maximum(np.maximum(np.abs(ref), np.abs(y)), beside)
    step = np.exp2(np.floor(np.log2(np.maximum(size, 1e-30))) - _bits(dtype))
    bound = steps * step + 2e-6 * max(np.abs(ref).max(initial=0), 1e-30)
    worst = np.abs(y - ref) / bound
    assert worst.max(initial=0) <= 1, f"{worst.max()} of the bound, {np.mean(y != ref):.3f} differ"


def _torch(x, dtype: str):
    return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, dtype))


def _reference(x, q, dtype, bias=None, out=None):
    with use("reference"):
        return jax_matmul(jnp.asarray(x).astype(dtype), q, bias=None if bias is None else jnp.asarray(bias), out_dtype=out or dtype)


# (scheme, generation, kind of weight it runs as, K, N, largest code of the activation)
EXACT = [
    ("w8a8_dynamic", "A2", "w8a8", 136, 40, 127),
    ("w8a8_static", "A3", "w8a8_static", 72, 24, 0),
    ("w8a8_static_asym", "A2", "w8a8_static", 72, 24, 0),
    ("w8a8_dynamic_tensor", "A2", "w8a8", 64, 24, 127),
    ("w5a8_dynamic", "A2", "w8a8", 200, 24, 127),
    ("w4a8_dynamic", "A3", "w4a8", 256, 24, 127),
    ("w4a8_dynamic", "A2", "w8a8", 168, 21, 127),
    ("w4a8_dynamic_g256", "A2", "w4a8", 768, 16, 127),
    ("w4a8_dynamic_g512", "A2", "w4a8", 1024, 16, 127),
    ("w4a8_dynamic_g32", "A2", "codes16", 96, 16, 127),
    ("w4a8_dynamic_g64_asym", "A2", "codes16", 192, 24, 127),
    ("w8a8_dynamic_g32", "A2", "codes16", 160, 19, 127),
    ("w4a4_dynamic", "A2", "w4a4", 72, 21, 7),
    ("w4a4_dynamic_g32", "A3", "codes16", 64, 16, 7),
    ("w3a8_dynamic", "A2", "w4a8", 512, 8, 127),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme, soc, kind, columns, rows, top", EXACT)
def test_integer_sums_are_exact(rng, calls, scheme, soc, kind, columns, rows, top, dtype):
    # Scales that are powers of two leave one rounding, the last cast: then every bit must agree.
    q = npu_weights.weight(rng, scheme, columns, rows, dtype=dtype, powers=True)
    x = npu_weights.activation(rng, 5, columns, top=top)
    if scheme == "w8a8_dynamic_tensor":
        x[:, 0] = x[0, 0]
    w = _place(q, soc)
    from qfunc.interop import cann
    with npu_rules.on(soc):
        y = cann.linear(w, _torch(x, dtype))
    assert w.kind == kind
    ref = _reference(x, q, dtype)
    np.testing.assert_array_equal(y.to(torch.float32).numpy(), np.asarray(ref.astype(jnp.float32)))
    assert [name for name, *_ in calls if "matmul" in name] == ["npu_weight_quant_batchmatmul" if kind == "codes16" else "npu_quant_matmul"]
    assert sum(name.endswith("quant") or name == "npu_quantize" for name, *_ in calls) <= 1


# (scheme, generation, bias inside the operator)
CLOSE = [
    ("w8a8_dynamic", "A2", True),
    ("w8a8_static_asym", "A2", True),
    ("w4a8_dynamic", "A2", False),
    ("w4a4_dynamic", "A3", False),
    ("w4a16_g128", "A2", True),
    ("w4a16_g32_asym", "A3", True),
    ("w4a16", "A2", True),
    ("w8a16_g64_asym", "A2", True),
    ("w8a16_asym", "A2", True),
    ("w3a16_g32", "A2", True),
    ("w2a16_g32_asym", "A2", True),
    ("w6a16_g64", "A3", True),
    ("w4a16_g128_actorder", "A2", True),
    ("w4a16_g64_asym_actorder", "A2", True),
    ("mxfp8", "A5", True),
    ("mxfp4", "A5", True),
    ("mxfp4_a8", "A5", True),
    ("mxfp4_dual", "A5", True),
    ("w8a8_block", "A2", True),
    ("fp8_block", "A5", False),
    ("fp8_dynamic", "A5", False),
    ("fp8", "A5", False),
    ("fp8_static", "A5", False),
    ("w4a8_static_g32_asym", "A2", False),
    ("gguf:Q8_0", "A3", True),
    ("nf4", "A2", True),
    ("fp8_w8a16", "A5", True),
    ("int4wo_g64", "A2", True),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme, soc, inside", CLOSE)
def test_within_one_step_of_the_float32_sum(rng, scheme, soc, inside, dtype):
    from qfunc.interop import cann
    columns = 1024 if scheme == "mxfp4_dual" else 256
    q = npu_weights.weight(rng, scheme, columns, 24, dtype=dtype)
    w = _place(q, soc)
    if w.kind in ("a16", "w4a8", "codes16"):        # the operator takes scales of 16 bits, or of 10 bits of mantissa
        q = q.replace(scale=q.scale.astype(dtype).astype(q.scale.dtype))
        w = _place(q, soc)
    x, bias = npu_weights.activation(rng, 3, columns), rng.standard_normal(24).astype(np.float32)
    if scheme.endswith("asym") and w.kind == "a16":
        bias = bias.astype(np.float16).astype(np.float32)
    with npu_rules.on(soc):
        plain, y = (cann.linear(w, _torch(x, dtype), b) for b in (None, torch.from_numpy(bias)))
    ref = _reference(x, q, dtype)
    if w.kind == "float":                           # weights rounded to 16 bits: as good as their number allows
        scale = np.abs(np.asarray(ref.astype(jnp.float32))).max()
        np.testing.assert_allclose(plain.to(torch.float32).numpy(), np.asarray(ref.astype(jnp.float32)), atol=2.0 ** -_bits(dtype) * scale)
        return
    # float16 without a scale per token drops 13 bits of the static scale; codes16 rounds once before the scale per token.
    steps = 3 if w.kind == "w8a8_static" and dtype == "float16" else 2 if w.kind == "codes16" else 1.01
    if w.kind.endswith("block"):                    # the operator gives bfloat16, whatever is wanted
        steps, inside = (1.01, inside) if dtype == "bfloat16" else (9, True)
    _close(plain, ref, dtype, steps)
    beside = np.abs(plain.to(torch.float32).numpy())
    _close(y, _reference(x, q, dtype, bias), dtype, steps + (0 if inside else 1), beside)


def test_a_float32_result_comes_from_int32_sums(rng, calls):
    from qfunc.interop import cann
    q = npu_weights.weight(rng, "w8a8_dynamic", 96, 16)
    x, bias = npu_weights.activation(rng, 4, 96), rng.standard_normal(16).astype(np.float32)
    y = cann.linear(_place(q, "A2"), _torch(x, "bfloat16"), torch.from_numpy(bias), torch.float32)
    _close(y, _reference(x, q, "bfloat16", bias, "float32"), "float32", 4)
    assert calls[-1][2]["output_dtype"] == 3


def test_float32_activations_are_quantized_from_float32(rng, calls):
    from qfunc.interop import cann
    q = npu_weights.weight(rng, "w8a8_dynamic", 96, 16, dtype="float32")
    x = rng.standard_normal((4, 96)).astype(np.float32)
    y = cann.linear(_place(q, "A2"), torch.from_numpy(x))
    _close(y, _reference(x, q, "float32"), "float32", 4)
    assert [name for name, *_ in calls] == ["npu_quant_matmul"]           # npu_dynamic_quant takes 16 bits alone


GROUPED = [
    ("w8a8_dynamic", "A2", 64, 32), ("w4a8_dynamic", "A3", 64, 64), ("w4a8_dynamic_g32", "A2", 64, 64), ("w4a4_dynamic", "A2", 64, 64),
    ("w4a16_g32_asym", "A2", 64, 16), ("w8a16", "A3", 40, 16), ("w8a16_g32_asym", "A2", 64, 16), ("w8a8_dynamic_g32", "A2", 64, 16),
    ("mxfp8", "A5", 128, 32), ("mxfp4", "A5", 128, 64), ("mxfp4_a8", "A5", 128, 64), ("fp8_dynamic", "A5", 64, 32), ("nf4", "A5", 64, 16),
    ("w4a16_g32_actorder", "A2", 64, 16), ("w8a8_static", "A3", 64, 32), ("w8a8_static_asym", "A2", 72, 24), ("fp8_block", "A5", 192, 136),
]


@pytest.mark.parametrize("scheme, soc, columns, rows", GROUPED)
def test_experts_equal_the_reference(rng, calls, scheme, soc, columns, rows):
    from qfunc.interop import cann
    q = npu_weights.weight(rng, scheme, columns, rows, experts=4, powers=True)
    x = npu_weights.activation(rng, 9, columns, top={"int8": 127, "int4": 7}.get(getattr(q.scheme.activation, "code", ""), 0))
    sizes = np.array([3, 0, 4, 0], np.int32)                                # an empty expert, and two rows that belong to none
    w = _place(q, soc)
    with npu_rules.on(soc):
        y = cann.grouped_matmul(w, _torch(x, "bfloat16"), torch.from_numpy(sizes))
    with use("reference"):
        ref = jax_grouped(jnp.asarray(x).astype(jnp.bfloat16), q, jnp.asarray(sizes))
    if w.kind in ("w8a8", "w8a8_static", "w4a8", "w4a4"):
        np.testing.assert_array_equal(y.to(torch.float32).numpy(), np.asarray(ref.astype(jnp.float32)))
    elif w.kind != "float":
        _close(y, ref, "bfloat16", 1.01)
    else:
        np.testing.assert_allclose(y.to(torch.float32).numpy(), np.asarray(ref.astype(jnp.float32)), atol=0.02 * float(jnp.abs(ref).max()))
    assert not y[7:].any()
    assert sum(name == "npu_grouped_matmul" for name, *_ in calls) == 1


def test_no_rows_and_rows_of_zeros(rng, calls):
    from qfunc.interop import cann
    for scheme, soc in (("w8a8_dynamic", "A2"), ("w4a16_g32", "A2"), ("mxfp8", "A5")):
        w = _place(npu_weights.weight(rng, scheme, 64, 16), soc)
        calls.clear()
        assert cann.linear(w, torch.zeros((2, 0, 64), dtype=torch.bfloat16)).shape == (2, 0, 16) and not calls
        y = cann.linear(w, torch.zeros((3, 64), dtype=torch.bfloat16), torch.ones(16))
        assert (y == 1).all()
    stack = _place(npu_weights.weight(rng, "w8a8_dynamic", 64, 16, experts=3), "A2")
    calls.clear()
    none = cann.grouped_matmul(stack, torch.zeros((0, 64), dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32))
    assert none.shape == (0, 16) and not calls
    ones = cann.grouped_matmul(stack, torch.ones((4, 64), dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32), torch.ones((3, 16)))
    assert ones.shape == (4, 16) and not ones.any()


PLACED = ["w8a8_dynamic", "w8a8_static_asym", "w4a8_dynamic", "w4a8_dynamic_g64_asym", "w4a4_dynamic", "w4a16_g32_asym", "w3a16",
          "w5a16_g32", "w8a16_asym", "w4a16_g32_actorder", "mxfp8", "mxfp4", "mxfp4_a8", "fp8_dynamic", "nf4", "gguf:Q4_0",
          "int4wo_g32", "nvfp4_a16"]


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("scheme", PLACED)
def test_placement_can_be_undone(rng, scheme, experts):
    from qfunc.interop import cann
    soc = "A5" if scheme.startswith(("mx", "fp8")) else "A2"
    q = npu_weights.weight(rng, scheme, 192, 64, experts=experts, smooth=scheme == "w8a8_dynamic")
    back = cann.restore({"experts" if experts else "l": {"kernel": _place(q, soc)}})
    found = next(iter(next(iter(back.values())).values()))
    assert jax.tree.structure(found) == jax.tree.structure(q) and found.scheme == q.scheme
    for name, leaf in q.leaves.items():
        mine = getattr(found, name)
        assert mine.dtype == leaf.dtype and np.array_equal(np.asarray(mine).view(np.uint8), np.asarray(leaf).view(np.uint8)), name


def test_the_same_weight_is_placed_once_and_parts_keep_their_shapes(rng):
    from qfunc.interop import cann
    q = npu_weights.weight(rng, "w4a16_g32", 64, 16)
    tree = cann.place({"a": q, "b": q, "norm": jnp.ones(4, jnp.bfloat16), "n": 3}, "cpu", "A2")
    assert tree["a"] is tree["b"] is cann.place(q, "cpu", "A2") and tree["n"] == 3 and tree["norm"].dtype == torch.bfloat16
    w = tree["a"]
    assert [p.shape for p in w.parts] == [leaf.shape for leaf in jax.tree.leaves(q)]
    assert jax.tree.structure(w.abstract) == jax.tree.structure(q)
    assert all(np.array_equal(p.tensor().numpy(), np.asarray(leaf)) for p, leaf in zip(w.parts, jax.tree.leaves(q), strict=True))
    assert w.nbytes < 1.3 * q.nbytes


def test_refusals_name_every_weight_the_rule_and_what_would_do(rng):
    from qfunc.interop import cann
    from qfunc.interop.cann._place import PlacementError
    params = {"a": npu_weights.weight(rng, "mxfp8", 64, 16), "b": npu_weights.weight(rng, "w4a16_g16", 64, 16),
              "c": npu_weights.weight(rng, "w4a16_g32", 64, 12), "d": npu_weights.weight(rng, "w8a8_dynamic", 64, 16),
              "e": npu_weights.weight(rng, "nvfp4", 64, 16)}
    with pytest.raises(PlacementError) as caught:
        cann.place(params, "cpu", "A2")
    text = str(caught.value)
    assert [path for path, _ in caught.value.refused] == ["a", "b", "c", "e"]
    for words in ("runs on A5 alone, found A2", "w8a8_dynamic", "multiple of 32 inputs, found 16", "N % 8 == 0, found N = 12",
                  "no operator computes"):
        assert words in text
    for soc, words in (("A5", "runs on A2 and A3 alone"), ("A7", "A2, A3, A5")):
        with pytest.raises(ValueError, match=words):
            cann.place(params["d"], "cpu", soc)
    with pytest.raises(PlacementError, match="last axes up to 65535"):
        cann.place(jax.eval_shape(lambda: npu_weights.weight(rng, "w8a8_dynamic", 8, 70000)), "meta", "A2")
    tree = cann.place(params, "cpu", "A2", dequantize=True)
    assert [tree[k].kind for k in "abcde"] == ["float", "float", "float", "w8a8", "float"]
    assert "activations stay in floating point" in tree["e"].note and not tree["d"].note
    only = cann.place(params["d"], "cpu", "A5", dequantize="*")
    assert only.kind == "float"
    with pytest.raises(ValueError, match="dtype='float16'"):
        cann.linear(cann.place(npu_weights.weight(rng, "w4a16_g32", 64, 16), "cpu", "A2"), torch.zeros((1, 64), dtype=torch.float16))


def test_weights_keep_their_bits_on_the_device(rng):
    # Memory is why one quantizes: what the operator cannot hold packed must be said, and this is the list.
    for scheme, soc, bits in (("w8a8_dynamic", "A2", 8), ("w4a8_dynamic", "A2", 4), ("w4a4_dynamic", "A2", 4), ("w4a16_g128", "A2", 4),
                              ("w2a16_g32", "A2", 4), ("w6a16", "A2", 8), ("mxfp4", "A5", 4), ("mxfp8", "A5", 8), ("nf4", "A2", 16)):
        w = _place(npu_weights.weight(rng, scheme, 512, 256), soc)
        stored = w.operands["weight"]
        assert stored.untyped_storage().nbytes() == 512 * 256 * bits // 8, scheme


def test_explain_tells_what_runs_and_what_is_slow(rng):
    import qfunc
    from qfunc.interop import cann
    clipped = qfunc.scheme("w8a8_dynamic").replace(name="w8a8_clip", activation_clip=0.9)
    tree = cann.place({"a": npu_weights.weight(rng, "w8a8_dynamic", 64, 16), "b": npu_weights.weight(rng, clipped, 64, 16),
                       "c": npu_weights.weight(rng, "nf4", 64, 16), "d": jnp.ones(3)}, "cpu", "A2")
    lines = cann.explain(tree)
    assert [(line.path, line.kind) for line in lines] == [("a", "w8a8"), ("b", "w8a8"), ("c", "float")]
    assert not lines[0].note and "clipping" in lines[1].note and lines[2].note == "nf4 is dequantized to bfloat16"
    text = repr(lines)
    assert "npu_quant_matmul" in text and "[1] activations are quantized by elementwise operations" in text
    assert lines[2].nbytes == 64 * 16 * 2
    assert repr(cann.explain({"d": 1})) == "no placed weight"


@pytest.mark.parametrize("scheme, native", [("w8a8_dynamic", True), ("w4a4_dynamic", True), ("w8a8_static_asym", True), ("mxfp8", True),
                                            ("mxfp4", True), ("mxfp4_dual", True), ("fp8_dynamic", True), ("w8a8_dynamic_tensor", True),
                                            ("fp8", False), ("w8a8_block", False), ("fp8_static", False)])
def test_a_note_says_which_activations_are_composed(rng, calls, scheme, native):
    from qfunc.interop import cann
    soc = "A5" if scheme.startswith(("mx", "fp8")) else "A2"
    w = _place(npu_weights.weight(rng, scheme, 512, 16), soc)
    calls.clear()
    cann.linear(w, _torch(npu_weights.activation(rng, 3, 512), "bfloat16"))
    assert bool(w.note) != native and any("quant" in name and "matmul" not in name for name, *_ in calls) == native


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16_g32_asym"])
def test_a_stack_of_layers_is_placed_one_by_one_and_serves_as_experts_too(rng, calls, scheme):
    from qfunc.interop import cann
    q = npu_weights.weight(rng, scheme, 64, 16, experts=3)
    layers = cann.place({"layers": {"kernel": q}}, "cpu", "A2")["layers"]["kernel"]
    experts = _place(q, "A2")
    assert len(layers.children) == 3 and layers[1] is layers.children[1] and layers.nbytes == sum(layers[i].nbytes for i in range(3))
    pairs = zip(jax.tree.leaves(layers.restore()), jax.tree.leaves(q), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    x = _torch(npu_weights.activation(rng, 5, 64), "bfloat16")
    sizes = torch.tensor([2, 1, 2])
    assert torch.equal(cann.grouped_matmul(layers, x, sizes), cann.grouped_matmul(experts, x, sizes))
    assert torch.equal(cann.linear(experts[2], x), cann.linear(layers[2], x)) and layers.form(True) is layers.form(True)
    with pytest.raises(ValueError, match="one matrix"):
        cann.linear(experts, x)
    with pytest.raises(IndexError, match="no leading axis"):
        layers[0][0]


# (scheme, what divides K, what divides N, largest code of the activation)
ODD = (("w8a8_dynamic", 1, 1, 127), ("w6a8_dynamic", 1, 1, 127), ("w4a4_dynamic", 8, 1, 7), ("w4a16_asym", 1, 8, 0),
       ("w8a16_g32_asym", 32, 1, 0), ("w4a8_dynamic_g32", 32, 8, 127))


def test_odd_shapes_against_plain_numpy(rng, calls):
    # A second reference, without JAX: integers in int64, scales in float64.
    from qfunc._codes import code
    from qfunc._pack import unpack
    from qfunc.interop import cann
    for _ in range(24):
        scheme, step, rows, top = ODD[rng.integers(len(ODD))]
        columns, outs, tokens = step * int(rng.integers(2, 160 // step + 3)), rows * int(rng.integers(1, 40)), int(rng.integers(1, 7))
        q = npu_weights.weight(rng, scheme, columns, outs)
        q = q.replace(scale=q.scale.astype(jnp.bfloat16).astype(jnp.float32))
        x = npu_weights.activation(rng, tokens, columns)
        y = cann.linear(_place(q, "A2"), _torch(x, "bfloat16")).to(torch.float32).numpy()
        element = code(q.scheme.weight.code)
        codes = np.asarray(q.codes)
        values = (unpack(codes, element.bits, columns) if element.packed else codes).astype(np.float64) - element.offset
        wide = [np.repeat(np.asarray(leaf, np.float64), -(-columns // leaf.shape[-1]), -1)[:, :columns] for leaf in (
            q.scale, q.zero if q.zero is not None else np.zeros_like(q.scale))]
        matrix, seen = (values - wide[1]) * wide[0], x.astype(np.float64)
        if top:
            size = np.abs(x).max(-1, keepdims=True) / np.float32(top)
            size = np.where(size == 0, np.float32(1), size)
            seen = np.round(x / size).astype(np.float64) * size
        exact = seen @ matrix.T
        unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
        bound = (2 if "g32" in scheme else 1) * unit + 1e-5 * np.abs(exact).max(initial=1e-30)
        assert (np.abs(y - exact) <= bound).all(), (scheme, columns, outs, tokens)
