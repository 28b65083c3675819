"""QTensor as a JAX citizen: every transformation, placement and serialization that arrays survive."""

import copy
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from near import near

import qfunc
from qfunc._qtensor import static_from_json, static_to_json

SCHEMES = ("w8a8_dynamic", "w8a16_asym", "w4a16_g32_asym", "w3a16_g32", "fp8_block", "mxfp4", "nvfp4", "nf4_dq", "mxfp6", "int4wo_g32")


def make(rng, name="w4a16_g32_asym", shape=(192, 40), dtype=jnp.float32):
    w = jnp.asarray(rng.standard_normal(shape), dtype)
    return qfunc.quantize({"kernel": w}, name)["kernel"]


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("name", SCHEMES)
def test_shape_is_derived_from_the_leaves(rng, name):
    q = make(rng, name, (3, 192, 40))
    assert q.shape == (3, 192, 40) and q.ndim == 3 and q.size == 3 * 192 * 40
    assert q[1].shape == (192, 40)
    assert jax.vmap(lambda w: jnp.zeros(w.shape))(q).shape == (3, 192, 40)
    _, inner = jax.lax.scan(lambda c, w: (c, jnp.zeros(w.shape)), 0, q)
    assert inner.shape == (3, 192, 40)
    equal(jax.tree.map(lambda *a: jnp.stack(a), q[0], q[1], q[2]), q)


@pytest.mark.parametrize("name", SCHEMES)
def test_nbytes_counts_every_leaf(rng, name):
    q = make(rng, name)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
    assert q.nbytes == held
    assert q.bits_per_weight == pytest.approx(8 * held / (192 * 40))


def test_structures_of_layers_are_equal(rng):
    assert jax.tree.structure(make(rng)) == jax.tree.structure(make(rng))
    assert hash(jax.tree.structure(make(rng))) == hash(jax.tree.structure(make(rng)))


def test_placeholders_pass_through(rng):
    q = make(rng)
    jax.tree.unflatten(jax.tree.structure(q), [object()] * len(jax.tree.leaves(q)))
    like = jax.ShapeDtypeStruct((192, 40), jnp.bfloat16)
    shapes = jax.eval_shape(lambda w: qfunc.quantize({"kernel": w}, "w4a16_g32_asym")["kernel"], like)
    assert shapes.shape == (192, 40) and shapes.dtype == "bfloat16" and shapes.nbytes == q.nbytes
    assert "192, 40" in repr(shapes)


@pytest.mark.parametrize("name", SCHEMES)
def test_closed_over_equals_argument(rng, name):
    q = make(rng, name)
    x = jnp.asarray(rng.standard_normal((5, 192)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda: q.dequantize())(), jax.jit(lambda q: q.dequantize())(q))
    near(jax.jit(lambda x: x @ q)(x), jax.jit(lambda x, q: x @ q)(x, q))


def test_operators(rng):
    q = make(rng)
    x = rng.standard_normal((5, 192)).astype(np.float32)
    want = qfunc.matmul(jnp.asarray(x), q)
    np.testing.assert_array_equal(x @ q, want)                     # a numpy operand reaches __rmatmul__
    np.testing.assert_array_equal(jnp.asarray(x) @ q, want)
    near(q.T @ x.T, want.T, 1e-6)
    assert q.T.shape == (40, 192)
    np.testing.assert_array_equal(q.T.dequantize(), q.dequantize().T)
    with pytest.raises(ValueError, match="contracts"):
        jnp.zeros((2, 40)) @ q.T
    with pytest.raises(TypeError):
        jnp.sin(q)                                                  # no silent cast to a float array


def test_indexing_reaches_leading_axes_only(rng):
    q = make(rng, shape=(4, 192, 40))
    assert q[...] is q
    equal(q[1:3], jax.tree.map(lambda a: a[1:3], q))
    with pytest.raises(IndexError, match="packed"):
        q[0, 1]


def test_device_put_and_donation(rng):
    q = make(rng, shape=(192, 48))
    mesh = Mesh(np.array(jax.devices()), ("t",))
    placed = jax.device_put(q, NamedSharding(mesh, PartitionSpec("t")))
    assert placed.codes.sharding.num_devices == 2
    equal(placed, q)
    x = jnp.asarray(rng.standard_normal((5, 192)), jnp.float32)
    near(jax.jit(qfunc.matmul)(x, placed), x @ q)
    twice = jax.jit(lambda q: jax.tree.map(lambda a: a, q), donate_argnums=0)(jax.tree.map(jnp.copy, q))
    equal(twice, q)


def test_shard_map_sees_local_shapes(rng):
    q = make(rng, shape=(192, 48))
    mesh = Mesh(np.array(jax.devices()), ("t",))
    x = jnp.asarray(rng.standard_normal((5, 192)), jnp.float32)
    seen = []

    def local(x, w):
        seen.append(w.shape)
        return qfunc.matmul(x, w)

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("t")), "out_specs": PartitionSpec(None, "t")}
    y = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(x, q)
    assert seen[0] == (192, 24)
    near(y, x @ q)


@pytest.mark.parametrize("name", SCHEMES)
def test_pickle_and_copy(rng, name):
    q = make(rng, name)
    equal(pickle.load(io.BytesIO(pickle.dumps(q))), q)
    equal(copy.deepcopy(q), q)


@pytest.mark.parametrize("name", ("w8a8_dynamic", "mxfp4", "nvfp4"))
def test_orbax(rng, name, tmp_path):
    q = make(rng, name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", {"kernel": q})
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, {"kernel": q})
        equal(checkpointer.restore(tmp_path / "q", target)["kernel"], q)


def test_export_with_a_packed_argument(rng):
    q = make(rng)
    x = jnp.asarray(rng.standard_normal((5, 192)), jnp.float32)
    with qfunc.use("reference"):
        exported = jax.export.export(jax.jit(qfunc.matmul), platforms=("cpu", "cuda"),
                                     disabled_checks=qfunc.kernels.export_checks())(x, q)
    assert exported.platforms == ("cpu", "cuda")
    near(jax.export.deserialize(exported.serialize()).call(x, q), x @ q)


@pytest.mark.parametrize("name", SCHEMES)
def test_static_fields_survive_json(rng, name):
    q = make(rng, name)
    fields = static_from_json(static_to_json(q))
    assert all(getattr(q, key) == value for key, value in fields.items())


def test_gradient_by_packed_leaves_is_float0_or_a_scale(rng):
    q = make(rng, "w4a16_g32")
    x = jnp.asarray(rng.standard_normal((5, 192)), jnp.float32)
    g = jax.grad(lambda q: qfunc.matmul(x, q).sum(), allow_int=True)(q)
    assert g.codes.dtype == jax.dtypes.float0 and g.scale.shape == q.scale.shape
    step = jnp.zeros_like(q.scale).at[3, 2].set(1.0)
    moved = (x @ q.replace(scale=q.scale + step).dequantize()).sum() - (x @ q.dequantize()).sum()
    np.testing.assert_allclose(g.scale[3, 2], moved, rtol=1e-3, atol=1e-3)
