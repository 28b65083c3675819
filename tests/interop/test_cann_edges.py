"""Where torch and JAX part ways at the edges of `to_torch` and `place`: shared codes, cached traces, storage, ends of integer ranges."""

import jax.numpy as jnp
import npu_cpu
import npu_weights
import numpy as np
import pytest

import qfunc

torch = pytest.importorskip("torch")
from qfunc.interop import cann  # noqa: E402


@pytest.fixture(autouse=True)
def calls():
    return npu_cpu.install()


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def shared(x, q):
    return qfunc.matmul(qfunc.quantize_activation(x, q), q, out_dtype=jnp.bfloat16)


@pytest.mark.parametrize(("scheme", "function"), [("w8a8_dynamic", qfunc.matmul), ("w8a8_dynamic", shared), ("fp8_dynamic", shared),
                                                  ("nf4", qfunc.matmul)])
def test_a_dequantized_weight_is_smoothed_once(scheme, function, rng):
    q = npu_weights.weight(rng, scheme, 128, 64).replace(smooth=jnp.asarray(np.exp(rng.uniform(-2, 2, 128)), jnp.float32))
    x = normal(rng, 4, 128)
    placed = cann.place(q, "cpu", "A5" if scheme == "w8a8_dynamic" else "A2", dequantize=True)
    got = cann.to_torch(function)(cann.to_tensor(x), placed).float().numpy()
    want = np.asarray(function(x, q), np.float32)
    assert placed.kind == "float" and np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_experts_that_are_dequantized_are_smoothed_each_by_its_own(rng):
    q = npu_weights.weight(rng, "w8a8_dynamic", 128, 64, experts=3)
    q = q.replace(smooth=jnp.asarray(np.exp(rng.uniform(-2, 2, (3, 128))), jnp.float32))
    x, sizes = normal(rng, 6, 128), jnp.asarray([2, 0, 3], jnp.int32)
    placed = cann.place({"experts": q}, "cpu", "A5", dequantize=True)["experts"]
    got = cann.to_torch(qfunc.grouped_matmul)(cann.to_tensor(x), placed, cann.to_tensor(sizes)).float().numpy()
    want = np.asarray(qfunc.grouped_matmul(x, q, sizes), np.float32)
    assert placed.kind == "float" and np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_static_numbers_that_are_equal_are_not_the_same():
    cast, x = cann.to_torch(lambda x, a: x.astype(jnp.asarray(a).dtype)), torch.arange(4, dtype=torch.int32)
    assert [cast(x, a).dtype for a in (1, 1.0, True)] == [torch.int32, torch.float32, torch.bool]
    signed = cann.to_torch(lambda x, a: jnp.copysign(x, a))
    assert signed(torch.ones(2), 0.0).tolist() == [1, 1] and signed(torch.ones(2), -0.0).tolist() == [-1, -1]
    handed = cann.to_torch(lambda x, a: (x, a))
    assert handed(torch.ones(1), 1)[1] is not True and handed(torch.ones(1), True)[1] is True
    for _ in range(3):
        assert np.isnan(handed(torch.ones(1), float("nan"))[1])
    assert len(cast._traces) == 3 and len(handed._traces) == 3
