"""Where torch and JAX part ways at the edges of `to_torch` and `place`: shared codes, cached traces, storage, ends of integer ranges."""

import jax
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


ENDS = {name: [np.iinfo(name).min, np.iinfo(name).min + 1, 0, 1, 7, np.iinfo(name).max] + [-1] * name.startswith("int")
        for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32")}


def agrees(function, *arrays):
    got = cann.to_torch(function)(*map(cann.to_tensor, arrays))
    want = np.asarray(function(*arrays))
    assert str(got.dtype).removeprefix("torch.") == want.dtype.name
    np.testing.assert_array_equal(np.asarray(cann.to_array(got)), want)


@pytest.mark.parametrize("dtype", ENDS)
@pytest.mark.parametrize("function", [jax.lax.div, jax.lax.rem], ids=["div", "rem"])
def test_division_at_the_ends_of_integers(function, dtype):
    x, y = (jnp.asarray(a.reshape(-1)) for a in np.meshgrid(*[np.asarray(ENDS[dtype], dtype)] * 2))
    agrees(function, x, y)
    for value in ENDS[dtype]:
        agrees(lambda x, value=value: function(x, jnp.full((), value, dtype)), x)


@pytest.mark.parametrize("dtype", ENDS)
def test_signs_and_shifts_of_integers_with_the_highest_bit(dtype, rng):
    x = jnp.asarray([*ENDS[dtype], *rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 20, endpoint=True)], dtype)
    agrees(jax.lax.sign, x)
    for shift in (jax.lax.shift_right_arithmetic, jax.lax.shift_right_logical, jax.lax.shift_left):
        agrees(shift, x, jnp.asarray(rng.integers(0, x.dtype.itemsize * 8 + 2, x.shape), dtype))
        agrees(lambda x, shift=shift: shift(x, jnp.full_like(x, 1)), x)
    if dtype == "uint8":
        assert cann.to_torch(jax.lax.shift_right_arithmetic)(*(torch.tensor([n], dtype=torch.uint8) for n in (200, 1))).tolist() == [228]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "float8_e4m3fn", "bfloat16"])
def test_rows_beyond_a_table_of_any_type_are_filled(dtype, rng):
    table, ids = jnp.asarray(rng.integers(0, 200, (5, 3)), dtype), jnp.asarray([0, 7, -9, 4], jnp.int32)
    for fill in (None, 0, 3) if dtype.startswith(("u", "i")) else (None, 0):
        def rows(x, i, fill=fill):
            return jnp.take(x, i, axis=0, mode="fill", fill_value=fill)

        got, want = cann.to_torch(rows)(*map(cann.to_tensor, (table, ids))), rows(table, ids)
        np.testing.assert_array_equal(np.asarray(cann.to_array(got), np.float32), np.asarray(want, np.float32))


def test_writing_to_a_result_leaves_constants_as_they_are(rng):
    first, second = jnp.asarray(rng.standard_normal(6), jnp.float32), np.asarray(rng.standard_normal(6), np.float32)
    kept = np.array(first), np.array(second)

    def loop(x):
        return jax.lax.fori_loop(0, 2, lambda i, carry: (carry[0] + 1, jnp.asarray(second)), (x, jnp.zeros(6)))

    def function(x):
        return x + 1, first, first.reshape(2, 3).T, jnp.asarray(second), {"inner": jax.jit(lambda: first)()}, loop(x)

    run = cann.to_torch(function)
    for _ in range(2):
        found = jax.tree.leaves(run(torch.ones(6)))
        for got, want in zip(found, jax.tree.leaves(function(jnp.ones(6))), strict=True):
            np.testing.assert_allclose(got.numpy(), np.asarray(want), rtol=1e-6)
            got.zero_()
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(second, kept[1])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_unsigned_arrays_and_keys_are_placed_and_come_back(dtype, rng):
    values = rng.integers(0, np.iinfo(dtype).max, (2, 3), dtype, endpoint=True)
    tree = {"array": jnp.asarray(values), "numpy": values, "wide": rng.integers(0, 2**64, 3, np.uint64), "raw": jax.random.PRNGKey(7),
            "typed": jax.random.key(7), "shape": jax.ShapeDtypeStruct((2,), dtype)}
    placed = cann.place(tree, "cpu", "A2")
    assert placed["array"].dtype == placed["shape"].dtype == getattr(torch, dtype) and placed["wide"].dtype == torch.uint64
    assert placed["shape"].is_meta and placed["typed"] is tree["typed"]
    back = cann.restore({name: leaf for name, leaf in placed.items() if name not in ("shape", "typed")})
    for name, leaf in back.items():
        np.testing.assert_array_equal(leaf, np.asarray(tree[name]), strict=True)
    drawn = cann.to_torch(lambda keys: [jax.random.uniform(key, (4,)) for key in keys])([placed["raw"], placed["typed"]])
    want = np.asarray(jax.random.uniform(tree["raw"], (4,)))
    assert all(np.array_equal(got.numpy(), want) for got in drawn)
