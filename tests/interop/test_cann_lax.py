"""The table of lax primitives: each rule against JAX on the same numbers, NaN, infinities and ends of types included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

torch = pytest.importorskip("torch")
to_torch = pytest.importorskip("qfunc.interop.cann").to_torch

ODD = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, np.inf, -np.inf, np.nan, 1e-30, -3e4, 7.25], np.float32)
INTS = np.array([0, 1, -1, 2, -2, 7, -8, 100, -100, 127, -128, 2**31 - 1, -2**31, 12345, 5, 3], np.int32)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}        # compiled once, run once


def agree(function, *args, exact=False, atol=1e-6):
    """The torch form of a function gives what jit of it gives: shape, type and numbers.

    `atol` is for sums: of n float32 terms in two orders they differ by up to n 2^-23 of the sum of magnitudes, however small they are.
    """
    want = jax.tree.leaves(jax.jit(function, compiler_options=QUICK)(*args))
    got = jax.tree.leaves(to_torch(function, rules="reference")(*args))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert str(g.dtype).removeprefix("torch.") == str(w.dtype) and tuple(g.shape) == w.shape
        if g.dtype.is_complex:
            np.testing.assert_allclose(g.numpy(), w, rtol=3e-6, atol=atol)
            continue
        g = g.to(torch.float64).numpy() if g.dtype.is_floating_point else g.to(torch.int64).numpy() if g.dtype != torch.bool else g.numpy()
        with np.errstate(invalid="ignore"):         # of signalling NaNs
            w = np.asarray(w).astype(g.dtype)
        if exact or g.dtype.kind != "f":
            np.testing.assert_array_equal(g, w)
        else:
            np.testing.assert_allclose(g, w, rtol=3e-6, atol=atol)


UNARY = ["neg", "abs", "sign", "floor", "ceil", "is_finite", "round", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt",
         "square", "logistic", "tanh", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf",
         "erfc", "erf_inv", "lgamma", "bessel_i0e", "bessel_i1e"]
EXACT = ("neg", "abs", "sign", "floor", "ceil", "is_finite", "round", "square")


def test_unary():
    agree(lambda x: [getattr(lax, name)(x) for name in EXACT], ODD, exact=True)
    finite = ("sin", "cos", "tan", "lgamma", "bessel_i0e", "bessel_i1e")
    agree(lambda x: {name: getattr(lax, name)(x) for name in UNARY if name not in finite}, ODD)
    agree(lambda x: {name: getattr(lax, name)(x) for name in finite}, ODD[:10])


def test_round_to_even_and_integers():
    agree(lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), ODD, exact=True)
    agree(lambda x: (-x, jnp.abs(x), jnp.sign(x), ~x, lax.population_count(x), lax.clz(x), lax.integer_pow(x, 3)), INTS)
    agree(lambda x: (lax.integer_pow(x, 3), lax.integer_pow(x, -2), lax.integer_pow(x, 2)), ODD[2:9])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter"])
def test_binary_floats(name):
    x, y = np.repeat(ODD, len(ODD)), np.tile(ODD, len(ODD))
    if name == "rem":                       # the remainder of quotients beyond float32 is anyone's
        keep = np.abs(x) < 1e6
        x, y = x[keep], y[keep]
    agree(getattr(lax, name), x, y, exact=name in ("add", "sub", "mul", "max", "min"))
    agree(lambda x: (getattr(lax, name)(x, jnp.float32(2.5)), getattr(lax, name)(jnp.float32(2.5), x)), ODD)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32"])
def test_binary_integers(dtype):
    values = INTS.astype(dtype)
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    keep = ~((x == np.iinfo(dtype).min) & (y.astype(np.int64) == -1))           # -2^31 / -1 has no int32
    x, y = x[keep], y[keep]
    functions = [lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.eq,
                 lax.lt, lax.ge, lax.shift_left, lax.shift_right_logical, *[lax.shift_right_arithmetic] * dtype.startswith("i")]
    three = jnp.asarray(3, dtype)
    agree(lambda x, y: [f(x, y) for f in functions], x, y)
    agree(lambda x: [(f(x, three), f(three, x)) for f in functions], values)


KINDS = ["bool", "int8", "uint8", "int32", "uint32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"]


@pytest.mark.parametrize("source", ["float32", "bfloat16", "int32", "uint32", "int8", "bool", "float8_e4m3fn"])
def test_casts(source):
    ends = [448, 464, 465, 480, -500, 57344, 61440, 70000, 255, 256, -129, 2.0**31, -2.0**31, 3e9]
    values = np.concatenate([ODD, ends]).astype(np.float32)
    x = jnp.asarray(INTS if source in ("int32", "uint32", "int8", "bool") else values).astype(source)
    agree(lambda x: [x.astype(to) for to in KINDS], x, exact=True)


def test_bits():
    x = jnp.asarray(ODD)
    for to in ("int32", "uint32", "uint16", "uint8"):
        agree(lambda x, to=to: lax.bitcast_convert_type(x, to), x, exact=True)
    agree(lambda x: lax.bitcast_convert_type(x.reshape(4, 4), jnp.float32), jnp.asarray(INTS).astype(jnp.int8), exact=True)
    agree(lambda x: lax.bitcast_convert_type(x, jnp.bfloat16), jnp.arange(16, dtype=jnp.uint16), exact=True)
    wide = jnp.concatenate([x, jnp.asarray([65519, 65520, 240, 248, 1e-8, 6e-8, 1e-40, 3.4e38, 464], jnp.float32)])
    for exponent, mantissa in ((8, 7), (5, 10), (4, 3), (5, 2), (8, 10), (8, 23)):
        agree(lambda x, e=exponent, m=mantissa: lax.reduce_precision(x, e, m), wide, exact=True)
    half = wide.astype(jnp.bfloat16)
    agree(lambda x: (lax.reduce_precision(x, 4, 3), lax.reduce_precision(x.astype(jnp.float16), 4, 3)), half, exact=True)


def test_complex_numbers(rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)

    def function(x):
        z = lax.complex(x, x + 1)
        turned = z * jnp.exp(lax.complex(jnp.zeros_like(x), x))
        return z, turned, jnp.real(turned), jnp.imag(z), jnp.abs(z), jnp.conj(z) / (z + 3), z.sum(0), z @ z.T, jnp.where(x > 0, z, turned)
    agree(function, x, atol=1e-5)


def test_eight_bit_floats_are_computed_in_32_bits_and_rounded_once():
    x = jnp.asarray([0.5, -1.75, 448, 3, -0.0625, 17, 1, -448], jnp.float8_e4m3fn)
    y = x[::-1]
    agree(lambda x, y: (x + y, x * y, -x, jnp.abs(x), lax.max(x, y), lax.min(x, y), x < y, lax.exp(x), lax.clamp(y[0], x, x[2]),
                        lax.reduce_max(x, (0,)), lax.sort(x), lax.argmax(x, 0, jnp.int32), lax.dot(x, y, preferred_element_type="float32"),
                        x.at[jnp.asarray([1, 1])].add(y[:2]), lax.cumsum(x[:2])), x, y, exact=True)


def test_large_unsigned_numbers():
    x = jnp.asarray([[3, 2**31 + 5], [2**32 - 1, 0]], jnp.uint32)
    index, top = jnp.asarray([0, 0]), jnp.uint32(2**31 + 1)
    agree(lambda x: (lax.clamp(jnp.uint32(4), x, top), x.at[index].max(top), x.at[index].min(top), x.at[index].add(top), x.prod(1),
                     lax.dot(x, x), jnp.cumsum(x, 1), x.min(0), lax.clz(x), x.at[index].multiply(top)), x, exact=True)
    agree(lambda x: (lax.clamp(jnp.uint16(4), x, jnp.uint16(40000)), x.at[index].max(jnp.uint16(50000))), x.astype(jnp.uint16), exact=True)
    agree(lambda x: (lax.dot(x, x), x.at[0].set(False)), x > 3)


def test_shapes(rng):
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    agree(lambda x: (x.reshape(12, 5), x.T, x[::2, 1:, ::-1], jnp.squeeze(x[:1], 0), x[None], jnp.broadcast_to(x[:, :1], (2, 3, 4, 5))), x)
    agree(lambda x: (jnp.concatenate([x, x + 1], 1), jnp.split(x, [1, 3], 1), jnp.repeat(x, 2, 1), jnp.tile(x, (1, 2, 1))), x)
    agree(lambda x: (lax.pad(x, 1.5, ((1, 2, 0), (0, 0, 2), (-1, 1, 0))), jnp.pad(x, 1),
                     lax.pad(x, x[0, 0, 0], ((0, 0, 0), (1, 1, 1), (2, -2, 0)))), x)
    agree(lambda x: (jnp.zeros((2, 3)), jnp.arange(7), jnp.eye(3), lax.iota(jnp.uint32, 5), jnp.full((2,), 3, jnp.int8)), x)
    agree(lambda x: (lax.reshape(x, (5, 12), (2, 0, 1)), jnp.moveaxis(x, 0, -1), lax.rev(x, (0, 2))), x)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "uint32", "bool", "int8"])
def test_moving_types_that_torch_hardly_knows(dtype, rng):
    x = jnp.asarray(rng.integers(0, 100, (4, 6))).astype(dtype)
    index = jnp.asarray([2, 0, 3], jnp.int32)
    agree(lambda x: (x[index], jnp.concatenate([x, x]), jnp.flip(x, 1), jnp.where(jnp.arange(6) > 2, x, x[:1]), x.at[1].set(x[0])),
          x, exact=True)
    agree(lambda x, i: (lax.dynamic_slice_in_dim(x, i, 2, 0), lax.dynamic_update_slice_in_dim(x, x[:2], i, 0),
                        jnp.stack([x, x]).reshape(8, 6)), x, np.int32(3), exact=True)


def test_reductions(rng):
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    agree(lambda x: (x.sum(1), x.max((0, 2)), x.min(), x.prod(2), x.mean(-1), x.argmax(1), x.argmin(2), jnp.var(x, 1),
                     x.astype(jnp.bfloat16).max(0)), x, atol=1e-5)
    agree(lambda x: (lax.reduce(x, np.float32(2), lax.add, (0, 2)), lax.reduce(x, np.float32(3), lax.mul, (1,)),
                     lax.reduce(x, np.float32(0.5), lax.max, (0,)), lax.reduce(x > 0, np.bool_(False), lax.bitwise_or, (2,))), x, atol=1e-5)
    i = rng.integers(-50, 50, (3, 7)).astype(np.int8)
    agree(lambda i: (i.sum(1), i.max(1), lax.reduce_and_p.bind(i, axes=(1,)), lax.reduce_or_p.bind(i, axes=(0, 1)),
                     lax.reduce_xor_p.bind(i, axes=(1,)), i.astype(jnp.uint32).sum(), (i > 0).any(1), (i > 0).all(0)), i)
    agree(lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True), jnp.cumprod(x, 0), lax.cummax(x, 1), lax.cummin(x, 1, reverse=True),
                     lax.cumlogsumexp(x, 0)), x, atol=1e-5)
    agree(lambda i: jnp.cumsum(i.astype(jnp.int32), 1), i)
    ties = jnp.asarray([[1.0, 3, 3, 2], [0, 0, 0, 0], [5, 1, 5, 5]])
    agree(lambda x: (jnp.argmax(x, 1), jnp.argmin(x, 1), lax.top_k(x, 3), jnp.argsort(x, 1), jnp.argsort(-x, axis=1)), ties)


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 0), (2, 1))])
def test_pooling(rng, padding):
    x = rng.standard_normal((7, 9)).astype(np.float32)
    for options in ({}, {"window_dilation": (2, 1)}, {"base_dilation": (1, 2)}):
        agree(lambda x, o=options: [lax.reduce_window(x, start, f, (2, 3), (2, 1), padding, **o)
                                    for start, f in ((-np.inf, lax.max), (np.inf, lax.min), (0.0, lax.add))], x, atol=1e-5)
    agree(lambda x: lax.reduce_window(x, np.iinfo(np.int32).min, lax.max, (2, 2), (1, 1), padding), (10 * x).astype(np.int32))


def test_sorting(rng):
    x = np.concatenate([ODD, ODD[::-1]])
    agree(lambda x: (jnp.sort(x), jnp.argsort(x)), x, exact=True)
    keys, second, values = rng.integers(0, 4, (3, 40)).astype(np.int32)
    agree(lambda a, b, c: lax.sort((a, b, c), num_keys=2), keys, second, values)
    agree(lambda a, b: (lax.sort((a, b), num_keys=1), jnp.sort(a.astype(jnp.uint32)), jnp.sort(a > 1)), keys, values)
    agree(lambda x: lax.top_k(x, 2), rng.standard_normal((2, 5)).astype(np.float32))
    agree(lambda a: jnp.searchsorted(jnp.cumsum(a), jnp.arange(30), side="right"), keys)


def test_gathers(rng):
    x = rng.standard_normal((5, 6, 7)).astype(np.float32)
    ids = jnp.asarray(rng.integers(-9, 9, (3, 4)), jnp.int32)
    agree(lambda x, i: (jnp.take(x, i, 0), jnp.take(x, i, 1, mode="clip"), jnp.take(x, i, 2, mode="wrap"), x[i], x[:, i], x[i, 2],
                        x[1, :, i]), x, ids)
    agree(lambda x, i: jnp.take_along_axis(x[:3, :4], i[:, :, None] % 7, 2), x, ids)
    agree(lambda x, i: (x[i % 5, i % 6], x[i % 5, :, i % 7], x[i[0] % 5][:, i[0] % 6]), x, ids)
    agree(lambda x, i: jax.vmap(lambda a, j: lax.dynamic_slice(a, (j, 0), (2, 7)))(x, i.reshape(-1)[:5]), x, ids)
    agree(lambda x, i: jax.vmap(lambda a, j: a[j])(x, i.reshape(-1)[:5] % 6), x, ids)
    agree(lambda i, j: (jnp.take(i, j), jnp.take(i.astype(jnp.uint8), j), jnp.take(i > 0, j)), jnp.arange(8, dtype=jnp.int32), ids)
    agree(lambda x, i: (x[i], x[0, 0][i], jnp.take(x[0, 0], i)), x, jnp.int32(-2))
    agree(lambda x, i, j: x[i, 1:4, j], x, jnp.int32(2), jnp.int32(9))


def test_scatters(rng):
    x = rng.standard_normal((5, 6)).astype(np.float32)
    ids = jnp.asarray([4, 0, 9, -2, 2], jnp.int32)         # of two updates of one element either may stay
    rows = rng.standard_normal((5, 6)).astype(np.float32)
    agree(lambda x, i, r: (x.at[i].set(r), x.at[i].add(r), x.at[:, i].add(r[:, :5]), x.at[i, i].mul(2.0), x.at[i].max(r),
                           x.at[i].min(r, mode="drop"), x.at[i].subtract(r)), x, ids, rows)
    agree(lambda x, i, r: (x.at[i].add(r, mode="clip"), x.at[2].set(r[0]), x.at[1:3].set(0.0), x.at[i, 2].set(7.0)), x, ids, rows)
    agree(lambda i: (jnp.bincount(i, length=6), jnp.zeros(6, jnp.int8).at[i].add(1)), jnp.asarray([1, 1, 5, 0, 1], jnp.int32))
    agree(lambda x, i: jax.vmap(lambda a, j: a.at[j].set(0.0))(x, i), x, jnp.asarray([1, 2, 3, 4, 5], jnp.int32))
    agree(lambda x, r, i: lax.dynamic_update_slice(x, r[:2, :3], (i, i)), x, rows, jnp.int32(4))


def test_contractions(rng):
    a, b = rng.standard_normal((2, 3, 4, 5)).astype(np.float32), rng.standard_normal((2, 6, 4, 5)).astype(np.float32)
    agree(lambda a, b: (jnp.einsum("bind,bjnd->bnij", a, b), jnp.einsum("bind,bjnd->bijn", a, b), a @ b[:, 0].mT[:, None]), a, b, atol=2e-5)
    i = rng.integers(-128, 128, (4, 64)).astype(np.int8)
    agree(lambda i: lax.dot_general(i, i, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32), i)
    sizes = jnp.asarray([2, 0, 3], jnp.int32)
    stack = rng.standard_normal((3, 5, 4)).astype(np.float32)
    agree(lambda x, w, s: lax.ragged_dot(x, w, s), a.reshape(-1, 5)[:7], stack, sizes, atol=2e-5)
    image, kernel = rng.standard_normal((2, 8, 9, 3)).astype(np.float32), rng.standard_normal((3, 2, 3, 6)).astype(np.float32)
    order = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    agree(lambda x, w: (lax.conv_general_dilated(x, w, (2, 1), "SAME", **order),
                        lax.conv_transpose(x, w, (2, 3), "SAME", **order),
                        lax.conv_general_dilated(x, w, (1, 1), ((-1, 2), (0, -1)), rhs_dilation=(2, 1), **order)), image, kernel, atol=5e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_products_are_rounded_once(dtype, rng):
    x, w = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((9, 300), (300, 20)))
    full = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    exact = to_torch(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32), rules="reference")(x, w)
    # Float32 sums of 300 products in two orders, however they cancel.
    sums = 2 * 300 * 2.0**-24 * (np.abs(np.asarray(x, np.float32)) @ np.abs(np.asarray(w, np.float32)))
    assert (np.abs(exact.numpy() - np.asarray(full)) <= sums).all()
    got = to_torch(lambda x, w: jnp.einsum("ik,kj->ji", x, w, preferred_element_type=jnp.float32).T.astype(dtype), rules="reference")(x, w)
    step = np.abs(np.asarray(full)) * float(jnp.finfo(dtype).eps)
    assert (np.abs(got.float().numpy() - np.asarray(full)) <= step + sums).all()
    rough = to_torch(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32), rules="reference", products="operands")(x, w)
    assert rough.dtype == torch.float32 and torch.equal(rough, rough.to(getattr(torch, dtype)).float())


def test_control_flow(rng):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    agree(lambda x: lax.scan(lambda c, row: (c + row, (c * row, row > 0)), jnp.zeros(3), x), x)
    agree(lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(3), x, reverse=True, unroll=2), x)
    agree(lambda x: (lax.fori_loop(0, 4, lambda i, c: c * x[i], jnp.ones(3)), lax.map(jnp.sin, x)), x)
    agree(lambda n: jax.vmap(lambda m: lax.while_loop(lambda c: c[0] < m, lambda c: (c[0] + 2, c[1] * 3), (0, jnp.arange(2))))(n),
          jnp.asarray([0, 5, 2, 4]))
    # The largest, since a sum of another order could reach the bound a step sooner or later.
    agree(lambda x: lax.while_loop(lambda c: c[0].max() < 50, lambda c: (c[0] + jnp.abs(x[0]), c[1] + 1), (jnp.ones(3), 0)), x)
    for value in (1.0, -1.0):
        agree(lambda x, v: lax.cond(v > 0, lambda: x * 2, lambda: x - 1), x, np.float32(value))
    for which in (-3, 0, 1, 2, 9):
        agree(lambda x, i: lax.switch(i, [lambda: x, lambda: x * 2, lambda: x * 3]), x, np.int32(which))
        read = to_torch(lambda x, i: lax.switch(i, [lambda: x, lambda: x * 2, lambda: x * 3]), rules="reference", branches="read")
        got = read(x, np.int32(which))
        assert torch.equal(got, torch.tensor(x) * (min(max(which, 0), 2) + 1))
    agree(lambda x: (lax.platform_dependent(x, tpu=lambda x: lax.igamma(x, x), default=jnp.sin), jnp.diagonal(x)), x)
    agree(lambda x: lax.cond(x[0, 0] > 100, lambda: lax.while_loop(lambda c: c.sum() < 1e9, lambda c: c, x), lambda: x), x)
    agree(lambda x: (jax.nn.relu(x), jax.nn.gelu(x), jax.nn.silu(x), jax.nn.softmax(x), jax.nn.logsumexp(x), jax.checkpoint(jnp.sin)(x)), x)
    # Small numbers, since 1 - tanh^2 near 1 keeps few digits of whatever computes it.
    agree(jax.grad(lambda x: (jnp.tanh(x @ x.T) ** 2).sum()), x / 4)
    agree(jax.vmap(lambda r: lax.fori_loop(0, 3, lambda i, c: c + r, r)), x)


def test_random_numbers_are_jaxs():
    key = jax.random.key(7)
    agree(lambda k: (jax.random.bits(k, (5,)), jax.random.bits(k, (3,), "uint8"), jax.random.bits(k, (3,), "uint16")), key, exact=True)
    agree(lambda k: (jax.random.uniform(k, (4, 5)), jax.random.categorical(jax.random.fold_in(k, 3), jnp.zeros((3, 9)))), key)
    agree(lambda k: [jax.random.normal(one, (3,)) for one in jax.random.split(k, 3)], key)
    agree(lambda k, i: jax.random.key_data(jax.random.fold_in(k, i)), key, np.uint32(12), exact=True)
    agree(lambda seed: jax.random.permutation(jax.random.key(seed), 10), np.int32(-5))


def test_what_is_unknown_is_refused_with_its_equation():
    def function(x):
        # In a loop, in a function inside of the function, and beside it; what comes after is no reason to stop.
        y = lax.scan(lambda c, r: (jnp.linalg.cholesky(c), r), x, x)[0] + jax.jit(lambda x: jnp.linalg.eigh(jnp.sin(x))[1] * 2)(x)
        return (y + x) @ x, x.at[0, 0].apply(jnp.sin), x.astype(jnp.int4)
    with pytest.raises(NotImplementedError, match="(?s)cholesky.*eigh.*apply.*scatter.*int4 has no form.*convert_element_type"):
        to_torch(function, rules="reference")(np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="branches"):
        to_torch(function, branches="guess")
