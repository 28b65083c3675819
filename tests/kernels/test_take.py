"""`quantized_take`: one equation, the rows of `dequantize` bit for bit on every implementation, batching and derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc.kernels.cpu import _library

IMPLEMENTATIONS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_library.isa() is None, reason=f"no native kernels: {_library.load()[1]}")),
]
SCHEMES = ("w3a16_g32", "w4a16_g128_asym", "int4wo_g32", "w4a16_g64_actorder", "fp8_block", "nvfp4_a16", "nf4_dq")


def table(rng, name, hidden=256, vocab=70):
    w = jnp.asarray(rng.standard_normal((hidden, vocab), np.float32))
    x = jnp.asarray(rng.standard_normal((16, hidden), np.float32))
    return qfunc.quantize({"kernel": w}, name, calibration={"kernel": x} if "actorder" in name else None)["kernel"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_those_of_dequantize(rng, name, implementation):
    q, ids = table(rng, name), np.asarray([[0, 69, 3], [-1, 70, -71]])
    with qfunc.use(implementation):
        rows = np.asarray(qfunc.take(q, jnp.asarray(ids)))
    full = np.asarray(q.dequantize()).T
    assert rows.shape == (2, 3, 256) and rows.dtype == full.dtype
    np.testing.assert_array_equal(rows[ids != 70][:4], full[[0, 69, 3, 69]])
    assert np.all(np.isnan(rows[1, 1:]))


def test_one_equation_and_no_matrix(rng):
    q = table(rng, "w4a16_g32")
    traced = str(jax.make_jaxpr(lambda q, ids: qfunc.take(q, ids))(q, jnp.zeros((2, 3), jnp.int32)))
    assert traced.count("quantized_take[") == 1 and "gather" not in traced
    (told,) = qfunc.explain(qfunc.take, q, jnp.zeros(3, jnp.int32), platform="cuda")
    assert told.primitive == "quantized_take" and told.weight == (256, 70)
    with pytest.raises(TypeError, match="integers"):
        qfunc.take(q, jnp.zeros(3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batches(rng, implementation):
    tables = [table(rng, "w8a16") for _ in range(3)]
    stack, ids = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables), jnp.asarray(rng.integers(0, 70, (3, 4)))
    with qfunc.use(implementation):
        each = jnp.stack([qfunc.take(q, row) for q, row in zip(tables, ids, strict=True)])
        np.testing.assert_array_equal(jax.jit(jax.vmap(qfunc.take))(stack, ids), each)
        np.testing.assert_array_equal(jax.vmap(qfunc.take, (None, 1), 1)(tables[0], ids), qfunc.take(tables[0], ids))
        assert qfunc.take(tables[0], jnp.zeros((0, 2), jnp.uint8)).shape == (0, 2, 256)


def test_derivative_in_the_scales(rng):
    q, ids = table(rng, "w4a16_g64_asym"), jnp.asarray([3, 3, 8])

    def total(scale, rows):
        return jnp.sum(rows(q.replace(scale=scale)) ** 2)

    got = jax.grad(total)(q.scale, lambda q: qfunc.take(q, ids))
    want = jax.grad(total)(q.scale, lambda q: q.dequantize().T[ids])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.any(np.asarray(got))
