"""Rules and orientations: who is quantized, along which axis, and what is refused in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import near

import qfunc
from qfunc._orient import Orientation, Site, from_axes, orient
from qfunc._quantize import make_plan


def floats(*shape):
    return jnp.ones(shape, jnp.float32)


MODEL = {
    "embed_tokens": {"weight": floats(100, 64)},
    "layers": {str(i): {
        "attn": {"q": {"kernel": floats(64, 64), "bias": floats(64)}},
        "mlp": {"gate": {"kernel": floats(64, 4)}, "gate_proj": {"kernel": floats(64, 128)}, "experts": {"kernel": floats(4, 64, 128)}},
        "input_norm": {"weight": floats(64)}} for i in range(2)},
    "lm_head": {"kernel": floats(64, 100)},
    "step": jnp.array(3),
}


def schemes_of(params, rules):
    return {job.path: job.scheme.name for job in make_plan(params, rules).jobs}


def test_one_scheme_leaves_out_embeddings_norms_routers_and_the_head():
    want = {f"layers/{i}/{path}" for i in range(2) for path in ("attn/q/kernel", "mlp/gate_proj/kernel", "mlp/experts/kernel")}
    assert set(schemes_of(MODEL, "w8a8_dynamic")) == want


def test_any_other_pattern_overrides_the_defaults():
    assert "lm_head/kernel" in schemes_of(MODEL, {"lm_head/*": "w8a16", "*": None})
    assert "layers/1/mlp/gate/kernel" in schemes_of(MODEL, {"*/mlp/*": "w8a16", "*": None})
    assert "embed_tokens/weight" in schemes_of(MODEL, {"embed_tokens/*": "w8a16"})


def test_a_pattern_over_a_layer_passes_its_one_axis_leaves_by():
    assert set(schemes_of(MODEL, {"layers/0/*": "w8a16", "*": None})) == {
        "layers/0/attn/q/kernel", "layers/0/mlp/gate/kernel", "layers/0/mlp/gate_proj/kernel", "layers/0/mlp/experts/kernel"}


def test_first_match_wins_and_a_star_crosses_slashes():
    found = schemes_of(MODEL, {"*/experts/*": "w4a8_dynamic", "layers/1/*": None, "*": "w8a8_dynamic"})
    assert found == {"layers/0/attn/q/kernel": "w8a8_dynamic", "layers/0/mlp/gate_proj/kernel": "w8a8_dynamic",
                     "layers/0/mlp/experts/kernel": "w4a8_dynamic", "layers/1/mlp/experts/kernel": "w4a8_dynamic"}


@pytest.mark.parametrize(("rules", "words"), [
    ({"layers/0/attn/k/*": "w8a16", "*": None}, ("matches nothing", "layers/0/attn/q/kernel")),
    ({"*": "w8a16", "layers/0/*": "w4a16"}, ("'layers/0/*'", "shadowed by '*'")),
    ({"*/bias": "w8a16", "*": None}, ("'*/bias'", "fewer than two axes")),
    ({"layers/*": "w8a17"}, ("no scheme 'w8a17'", "w8a16")),
    ({"step": "w8a16", "*": None}, ("'step'",)),
    ("w4a16_g96", ("layers/0/attn/q/kernel", "64", "groups that would", "32")),
    ({}, ("no rules",)),
])
def test_refusals_name_what_is_wrong(rules, words):
    with pytest.raises(ValueError) as error:
        qfunc.quantize(MODEL, rules)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_one_refusal_lists_every_failing_leaf_and_changes_nothing():
    params = {name: {"kernel": jnp.ones((100, 8))} for name in "abc"} | {"d": {"kernel": jnp.ones((128, 8))}}
    with pytest.raises(ValueError) as error:
        qfunc.quantize(params, "w4a16_g128", donate=True)
    assert all(f"{name}/kernel" in str(error.value) for name in "abc") and "d/kernel" not in str(error.value)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_quantized_leaf_is_kept_and_never_silently_requantized():
    once = qfunc.quantize(MODEL, {"*/attn/*": "w8a16", "*": None})
    twice = qfunc.quantize(once, {"*/attn/*": "w8a16", "*": "w4a16"})
    assert twice["layers"]["0"]["attn"]["q"]["kernel"] is once["layers"]["0"]["attn"]["q"]["kernel"]
    with pytest.raises(ValueError, match="already quantized as w8a16"):
        qfunc.quantize(once, {"*/attn/*": "w4a16", "*": None})


# path, shape, other leaves, expected orientation (None: stays in floating point)
ORIENTATIONS = [
    ("kernel", (8, 4), {}, Orientation()),
    ("experts/kernel", (3, 8, 4), {}, Orientation(1)),
    ("w", (8, 4), {}, Orientation()),
    ("dense/weight", (4, 8), {}, Orientation(transposed=True)),
    ("experts/weight", (3, 4, 8), {}, Orientation(1, transposed=True)),
    ("embedding", (100, 8), {}, Orientation(transposed=True)),
    ("w", (3, 8, 4), {}, None),
    ("kernel", (3, 3, 8, 4), {}, None),
    ("Conv_0/kernel", (3, 3, 8, 4), {}, None),
    ("conv1/kernel", (3, 8, 4), {}, None),
    ("dense/bias", (2, 8), {}, None),
    ("attn/query/kernel", (32, 4, 8), {"attn/query/bias": (4, 8)}, Orientation(0, 1, 2)),
    ("attn/query/kernel", (32, 4, 8), {"attn/out/kernel": (4, 8, 32)}, Orientation(0, 1, 2)),
    ("attn/query/kernel", (4, 32, 32), {"attn/query/bias": (4, 32)}, Orientation(1)),          # four stacked layers
    ("attn/query/kernel", (2, 32, 4, 8), {}, Orientation(1, 1, 2)),
    ("attn/out/kernel", (4, 8, 32), {"attn/out/bias": (32,)}, Orientation(0, 2, 1)),
    ("attn/out/kernel", (4, 32, 32), {"attn/out/bias": (4, 32)}, Orientation(1)),
    ("attn/out/kernel", (2, 4, 8, 32), {"attn/out/bias": (2, 32)}, Orientation(1, 2, 1)),
]


@pytest.mark.parametrize(("path", "shape", "others", "want"), ORIENTATIONS, ids=[f"{p}-{s}-{len(o)}" for p, s, o, _ in ORIENTATIONS])
def test_orientation_by_name(path, shape, others, want):
    answer = orient(Site(path, shape, "", {path: shape, **others}))
    assert answer == want if want is not None else isinstance(answer, str)


@pytest.mark.parametrize("leaf", [("q/kernel", (32, 4, 8), {"q/bias": (4, 8)}, (32, 32)), ])
def test_folded_axes_share_scales_as_the_folded_matrix_does(rng, leaf):
    w = rng.standard_normal((32, 4, 8)).astype(np.float32)
    folded = qfunc.quantize({"query": {"kernel": w, "bias": floats(4, 8)}}, "w8a16")["query"]["kernel"]
    flat = qfunc.quantize({"kernel": w.reshape(32, 32)}, "w8a16")["kernel"]
    assert folded.shape == (32, 4, 8) and folded.matrix_shape == (32, 32)
    np.testing.assert_array_equal(folded.dequantize(), np.asarray(flat.dequantize()).reshape(32, 4, 8))


def test_transposed_weights_share_scales_along_their_contracted_axis(rng):
    w = rng.standard_normal((24, 64)).astype(np.float32)
    w[3] *= 2.0**-15                                    # an output channel of its own scale
    q = qfunc.quantize({"dense": {"weight": w}}, "w8a16")["dense"]["weight"]
    assert q.shape == (24, 64) and q.matrix_shape == (64, 24)
    error = np.abs(np.asarray(q.dequantize()) - w).max(1) / np.abs(w).max(1)
    assert error.max() <= 0.5 / 127 * 1.001
    x = jnp.asarray(rng.standard_normal(64), jnp.float32)
    near(q @ x, np.asarray(q.dequantize()) @ np.asarray(x))


def test_axes_and_batch_of_a_rule(rng):
    w = rng.standard_normal((3, 8, 4, 32)).astype(np.float32)
    with pytest.raises(ValueError, match="axes= or batch="):
        qfunc.quantize({"w": w}, {"w": "w8a16"})
    assert not make_plan({"w": w, "k": w[0, 0]}, "w8a16").kept["w"] == ""
    q = qfunc.quantize({"w": w}, {"w": qfunc.Rule("w8a16", axes=((-1,), (1, 2)))})["w"]
    assert q.shape == w.shape and q.matrix_shape == (3, 32, 32) and q.view.transposed
    stacked = qfunc.quantize({"w": w}, {"w": qfunc.Rule("w8a16", batch=2)})["w"]
    assert stacked.matrix_shape == (3, 8, 4, 32)
    with pytest.raises(ValueError, match="batch axes"):
        qfunc.quantize({"w": w}, {"w": qfunc.Rule("w8a16", batch=1)})
    with pytest.raises(ValueError, match="neighbours"):
        from_axes((3, 8, 4, 32), (0,), (2, 3))


def test_paths_lose_linen_and_nnx_wrapping():
    assert list(schemes_of({"params": {"dense": {"kernel": floats(8, 8)}}}, "w8a16")) == ["dense/kernel"]
    assert list(schemes_of({"dense": {"kernel": {"value": floats(8, 8)}}}, "w8a16")) == ["dense/kernel"]
    attention = {name: floats(8, 8) for name in ("query", "key", "value")}
    assert sorted(schemes_of({"attn": attention}, {"attn/*": "w8a16"})) == ["attn/key", "attn/query", "attn/value"]
