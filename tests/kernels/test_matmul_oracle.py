"""The reference matmuls against float64 products of what the codes mean, exact integers, and bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc

K, N = 192, 24
SCHEMES = ["w3a16_g32", "w4a16_g32_asym", "w8a16", "int4wo_g64", "w8a8_dynamic", "w4a8_dynamic_g64", "w4a8_dynamic_g32_asym",
           "w2a8_dynamic", "w4a4_dynamic", "w4afp8_g64", "w8a8_block", "fp8", "fp8_dynamic", "fp8_block", "fp8_e5m2", "mxfp8",
           "mxfp6", "mxfp4", "mxfp4_a8", "nvfp4", "nvfp4_token", "nf4", "nf4_dq", "fp4_bnb"]
matmul = jax.jit(qfunc.matmul, static_argnames="out_dtype")
grouped = jax.jit(qfunc.grouped_matmul)


@pytest.fixture(autouse=True)
def reference():
    with qfunc.use("reference"):
        yield


def matrix(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def make(w, name):
    return qfunc.quantize({"kernel": w}, name)["kernel"]


def meant(x, spec, **calibrated):
    """The activation that the codes mean, in float64."""
    if spec is None:
        return np.asarray(x, np.float64)
    codes, scale, zero = qfunc.quantize_activation(x, spec, **calibrated)
    if codes.dtype == jnp.uint8:
        import ml_dtypes
        codes = np.asarray(codes).view({"fp4_e2m1": ml_dtypes.float4_e2m1fn, "fp6_e2m3": ml_dtypes.float6_e2m3fn}[spec.code])
    columns = np.shape(codes)[-1]
    size = spec.granularity.size if spec.granularity.kind == "group" else columns
    zero = 0 * scale if zero is None else zero
    scale, zero = (np.repeat(np.asarray(part, np.float64), size, -1)[..., :columns] for part in (scale, zero))
    return (np.asarray(codes).astype(np.float64) - zero) * scale


def close(got, want, limit=3e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= limit * max(np.linalg.norm(want), 1e-30), np.linalg.norm(got - want) / np.linalg.norm(want)


def float64(q):
    return np.asarray(q.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(rng, name):
    q, x, bias = make(matrix(rng, K, N), name), matrix(rng, 5, K).at[2].set(0), matrix(rng, N)
    spec, want = q.scheme.activation, meant(x := x.at[:, 3].multiply(9), qfunc.scheme(name).activation) @ float64(q)
    y = matmul(x, q, bias=bias)
    close(y, want + np.asarray(bias, np.float64))
    np.testing.assert_array_equal(y[2], bias, err_msg="a zero row gives exactly the bias")
    if spec is not None:
        np.testing.assert_array_equal(matmul(qfunc.quantize_activation(x, q), q, bias=bias), y)


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w8a8_dynamic", "fp8", "nvfp4", "w8a8_block"])
def test_narrow_floats_one_row_and_no_row(rng, name):
    q, x, bias = make(matrix(rng, K, N), name), matrix(rng, 5, K), matrix(rng, N)
    spec, half = q.scheme.activation, x.astype(jnp.bfloat16)
    low = matmul(half, q, bias=bias)
    assert low.dtype == jnp.bfloat16
    close(low, meant(half, spec) @ float64(q) + np.asarray(bias, np.float64), 4e-3)
    wide = matmul(half, q, bias=bias, out_dtype=jnp.float32)
    close(wide, meant(half, spec) @ float64(q) + np.asarray(bias, np.float64))
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16), err_msg="one cast, at the end")
    assert matmul(x[:0], q).shape == (0, N) and matmul(x[0], q).shape == (N,)
    close(matmul(x[0], q), meant(x[:1], spec)[0] @ float64(q))


def integers(rng, low, high, *shape):
    """Integers of which every row and column reaches the ends of its range, so that scales are exactly 1."""
    x = rng.integers(low, high + 1, shape).astype(np.float32)
    x[..., :, 0], x[..., 0, :] = high, high
    x[..., :, 1], x[..., 1, :] = low, low
    return x


@pytest.mark.parametrize(("name", "w_range", "x_range"), [
    ("w8a8_dynamic", (-127, 127), (-127, 127)), ("w4a8_dynamic", (-7, 7), (-127, 127)), ("w4a4_dynamic", (-7, 7), (-7, 7)),
    ("w8a8_dynamic_asym", (0, 255), (-127, 127)), ("w8a8_block", (-127, 127), (-127, 127))])
def test_integer_sums_are_exact(rng, name, w_range, x_range):
    w, x = integers(rng, *w_range, 131, 17), integers(rng, *x_range, 9, 131)
    q = make(jnp.asarray(w), name)
    if name == "w8a8_block":
        x[:, 128:130] = x_range[0]                                              # the partial last group of each row
    want = x.astype(np.int64) @ w.astype(np.int64)
    np.testing.assert_array_equal(matmul(x, q), want)
    stack = make(jnp.asarray(np.stack([w, w[:, ::-1]])), name)
    both = np.concatenate([x[:4].astype(np.int64) @ w.astype(np.int64), x[4:].astype(np.int64) @ w[:, ::-1].astype(np.int64)])
    np.testing.assert_array_equal(grouped(x, stack, jnp.array([4, 5])), both)


def test_sums_beyond_int32_do_not_wrap():
    columns = 40000
    scheme = qfunc.scheme("w8a8_dynamic_asym").replace(activation_zero="int")
    q = make(jnp.full((columns, 2), 255.0), scheme)
    y = matmul(jnp.full((2, columns), 255.0), q)
    np.testing.assert_allclose(y, 255.0**2 * columns, rtol=1e-6)


@pytest.mark.parametrize("weight_group", [32, 96])
@pytest.mark.parametrize("activation_group", [128, 48])
def test_groups_that_straddle(rng, weight_group, activation_group):
    scheme = qfunc.scheme(f"w4a8_dynamic_g{weight_group}").replace(activation_granularity=qfunc.Granularity("group", activation_group))
    w, x = matrix(rng, 288, 10), matrix(rng, 4, 288) * jnp.exp(jnp.linspace(0, 5, 288))
    q = make(w, scheme)
    close(matmul(x, q), meant(x, scheme.activation) @ float64(q))
    stack = make(jnp.stack([w, 2 * w]), scheme)
    want = np.concatenate([meant(x[:1], scheme.activation) @ float64(stack[0]), meant(x[1:], scheme.activation) @ float64(stack[1])])
    close(grouped(x, stack, jnp.array([1, 3])), want)


@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
def test_zero_points_on_both_sides(rng, granularity):
    scheme = qfunc.scheme("w4a8_dynamic_g32_asym").replace(
        activation_zero="int", activation_granularity=qfunc.Granularity(granularity, 64 * (granularity == "group")))
    w, x = matrix(rng, K, N) + 1, matrix(rng, 7, K) + 2
    q = make(w, scheme)
    close(matmul(x, q), meant(x, scheme.activation) @ float64(q))
    stack = make(jnp.stack([w, -w, w]), scheme)
    rows = [x[:3], x[3:3], x[3:6]]
    want = [meant(part, scheme.activation) @ float64(stack[e]) for e, part in enumerate(rows) if len(part)]
    close(grouped(x, stack, jnp.array([3, 0, 3])), np.concatenate([*want, np.zeros((1, N))]))


def test_static_scale_and_zero_point(rng):
    x = matrix(rng, 30, K) + 1
    q = qfunc.quantize({"kernel": matrix(rng, K, N)}, "w8a8_static_asym", calibration={"kernel": x})["kernel"]
    assert q.input_scale.shape == (1, 1) and q.input_zero.dtype == jnp.int32
    want = meant(x, q.scheme.activation, scale=q.input_scale, zero=q.input_zero)
    assert np.abs(want - np.asarray(x)).max() <= 0.51 * float(q.input_scale[0, 0])
    close(matmul(x, q), want @ float64(q))
    close(matmul(100 * x[:2], q), meant(100 * x[:2], q.scheme.activation, scale=q.input_scale, zero=q.input_zero) @ float64(q))


def test_an_order_of_the_input_channels(rng):
    x = matrix(rng, 5, K)
    w = matrix(rng, K, N) * jnp.exp(jnp.asarray(rng.standard_normal((K, 1)), jnp.float32))
    q = qfunc.quantize({"kernel": w}, "w4a16_g32_actorder", calibration={"kernel": x * jnp.linspace(1, 3, K)})["kernel"]
    assert sorted(np.asarray(q.perm).tolist()) == list(range(K)) and np.linalg.norm(float64(q) - w) < 0.3 * np.linalg.norm(w)
    close(matmul(x, q), np.asarray(x, np.float64) @ float64(q))
    for name in ("w4a8_dynamic_g32", "w8a8_block"):
        other = q.replace(scheme=q.scheme.replace(activation=qfunc.scheme(name).activation))
        close(matmul(x, other), meant(x, other.scheme.activation) @ float64(other))


@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8_dynamic", "fp8"])
def test_smoothing_multiplies_x_first(rng, name):
    x, smooth = matrix(rng, 5, K), jnp.asarray(rng.uniform(0.3, 3, K), jnp.float32)
    q = make(matrix(rng, K, N), name)
    np.testing.assert_array_equal(matmul(x, q.replace(smooth=smooth)), matmul(x * smooth, q))


def only_ties_differ(theirs, rows):
    """Our codes of the rows [R, K], after a check that other codes differ from them only where the quotient is halfway."""
    rows = np.asarray(rows, np.float64)
    quotient = rows / (np.abs(rows).max(1, keepdims=True).astype(np.float32) / np.float32(127))
    codes = np.rint(quotient.astype(np.float32)).astype(np.int64)
    # Three float32 roundings, on either side, of what the quotient is made of.
    halfway = np.abs(np.abs(quotient - np.trunc(quotient)) - 0.5) <= 3 * 2.0**-24 * np.abs(quotient)
    assert (codes == theirs)[~halfway].all() and np.abs(codes - theirs).max() <= 1
    return codes


def test_llm_int8_is_what_bitsandbytes_computes(rng):
    import torch
    from bitsandbytes import functional
    w, x = np.array(matrix(rng, K, N)), np.clip(np.array(matrix(rng, 6, K)), -5, 5)      # no outliers but those below
    x[:, [5, 70]] /= 10        # its scale of a row counts what is below the threshold in the columns that it splits off, ours does not
    x[1, 5], x[3, 70], x[0, 11] = 40, -6.5, 5.9
    codes, row_max, columns = functional.int8_vectorwise_quant(torch.from_numpy(x).half(), threshold=6.0)
    weights, w_max, _ = functional.int8_vectorwise_quant(torch.from_numpy(w.T.copy()).half())
    assert columns.tolist() == [5, 70]
    half = x.astype(np.float16).astype(np.float64)
    plain = np.delete(half, [5, 70], 1)
    # It multiplies by 127 / amax where we divide, so only a tie of half precision numbers may fall to the other side.
    ours = [only_ties_differ(np.delete(codes.numpy(), [5, 70], 1), plain), only_ties_differ(weights.numpy(), w.T.astype(np.float16))]
    q = make(jnp.asarray(w.astype(np.float16)), "llm_int8")
    np.testing.assert_array_equal(np.asarray(q.codes), ours[1])
    scales = [np.abs(plain).max(1) / 127, np.abs(w.T.astype(np.float16).astype(np.float64)).max(1) / 127]
    np.testing.assert_allclose(scales[1], w_max.double().numpy() / 127, rtol=1e-6)
    np.testing.assert_allclose(scales[0], row_max.double().numpy() / 127, rtol=1e-6)
    want = ours[0] @ np.delete(ours[1], [5, 70], 1).T * np.outer(*scales) + half[:, [5, 70]] @ (ours[1][:, [5, 70]] * scales[1][:, None]).T
    close(matmul(jnp.asarray(x.astype(np.float16)), q, out_dtype=jnp.float32), want, 1e-6)
    stack = make(jnp.asarray(np.stack([w, w[:, ::-1]]).astype(np.float16)), "llm_int8")
    rows = grouped(jnp.asarray(x.astype(np.float16)), stack, jnp.array([4, 2])).astype(jnp.float32)
    close(rows[:4], np.asarray(matmul(x[:4].astype(np.float16), stack[0], out_dtype=jnp.float32)), 1e-3)
    close(rows[4:], np.asarray(matmul(x[4:].astype(np.float16), stack[1], out_dtype=jnp.float32)), 1e-3)


@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8_dynamic", "w4a8_dynamic_g32_asym", "fp8", "nvfp4", "mxfp4", "w8a8_block", "nf4_dq"])
def test_experts_and_leading_axes_are_their_own_matmuls(rng, name):
    w, x, bias = make(matrix(rng, 3, K, N), name), matrix(rng, 3, 4, K), matrix(rng, 3, N)
    x = x * jnp.asarray([1.0, 20, 400])[:, None, None]
    want = np.stack([matmul(x[e], w[e], bias=bias[e]) for e in range(3)])
    close(matmul(x, w, bias=bias), want, 1e-6)
    close(matmul(x[0], w, bias=bias)[1], matmul(x[0], w[1], bias=bias[1]), 1e-6)
    close(jax.jit(jax.vmap(qfunc.matmul))(x, w) + bias[:, None], want, 1e-6)
    turned = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), w)
    mapped = jax.vmap(lambda x, w, b: qfunc.matmul(x, w, bias=b), in_axes=(0, 1, 0), out_axes=1)
    close(np.moveaxis(np.asarray(jax.jit(mapped)(x, turned, bias)), 1, 0), want, 1e-6)
    over_x = jax.vmap(lambda x, b: qfunc.matmul(x, w[1], bias=b))
    close(jax.jit(over_x)(x, bias)[1], want[1], 1e-6)
    _, scanned = jax.lax.scan(lambda c, layer: (c, qfunc.matmul(layer[0], layer[1])), 0, (x, w))
    close(np.asarray(scanned) + np.asarray(bias)[:, None], want, 1e-6)
    rows, sizes = x.reshape(12, K), jnp.array([4, 0, 5])
    parts = [matmul(rows[:4], w[0], bias=bias[0]), matmul(rows[4:9], w[2], bias=bias[2]), np.zeros((3, N))]
    close(grouped(rows.at[9:].set(jnp.nan), w, sizes, bias=bias), np.concatenate(parts), 1e-6)


@pytest.mark.parametrize(("name", "how"), [
    ("w8a8_dynamic", "native"), (None, "reference"),
    *(pytest.param(name, how, marks=pytest.mark.slow) for name in ("w4a16_g32", "w4a16_g32_asym", "fp8", "nvfp4", "llm_int8", "nf4_dq")
      for how in ("native", "reference"))])
def test_rows_that_the_product_gathers_are_rows_gathered_before(rng, name, how):
    w = matrix(rng, 3, K, N)
    w, x, bias = w if name is None else make(w, name), matrix(rng, 5, K), matrix(rng, 3, N)
    rows, sizes, dy = jnp.asarray(rng.integers(0, 5, 12), jnp.int32), jnp.array([4, 0, 6]), matrix(rng, 12, N)

    def inside(x, rows, bias):
        return qfunc.grouped_matmul(x, w, sizes, rows=rows, bias=bias)

    def before(x, rows, bias):
        return qfunc.grouped_matmul(x[rows], w, sizes, bias=bias)

    with qfunc.use(how):
        np.testing.assert_array_equal(jax.jit(inside)(x, rows, bias), jax.jit(before)(x, rows, bias))
        if name is not None:                    # JAX's own ragged product has no such batching rule
            mapped = jax.jit(jax.vmap(inside, (None, 0, None)))(x, jnp.stack([rows, rows[::-1]]), bias)
            np.testing.assert_array_equal(mapped[1], jax.jit(before)(x, rows[::-1], bias))
        got, want = (jax.vjp(lambda x, b, f=f: f(x, rows, b), x, bias)[1](dy) for f in (inside, before))
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, 1e-6)
    if name == "w8a8_dynamic":                  # codes once a token
        with qfunc.use(how):
            codes = qfunc.quantize_activation(x, w)
            np.testing.assert_array_equal(jax.jit(inside)(codes, rows, bias), jax.jit(before)(x, rows, bias))


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w8a8_dynamic", "fp8", "mxfp4", "nvfp4", "llm_int8", "w8a8_block"])
def test_the_derivative_is_straight_through(rng, name):
    q, x, bias, dy = make(matrix(rng, K, N), name), matrix(rng, 5, K), matrix(rng, N), matrix(rng, 5, N)
    q = q.replace(smooth=jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32))
    _, pull = jax.vjp(lambda x, b: qfunc.matmul(x, q, bias=b), x, bias)
    dx, db = pull(dy)
    close(dx, np.asarray(dy, np.float64) @ (float64(q) * np.asarray(q.smooth, np.float64)[:, None]).T, 1e-6)
    close(db, np.asarray(dy, np.float64).sum(0), 1e-6)
    batched = jax.vmap(jax.grad(lambda x, g: jnp.vdot(qfunc.matmul(x, q), g)))(x, dy)
    close(batched, dx, 1e-5)


def test_the_derivative_in_the_scale_is_that_of_the_product(rng):
    q, x, dy = make(matrix(rng, K, N), "w4a16_g32"), matrix(rng, 5, K), matrix(rng, 5, N)
    ds = jax.grad(lambda s: jnp.vdot(qfunc.matmul(x, q.replace(scale=s)), dy))(q.scale)
    outer = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    codes = np.round(float64(q) / np.repeat(np.asarray(q.scale, np.float64), 32, -1).T)
    close(ds, (outer * codes).reshape(K // 32, 32, N).sum(1).T, 1e-5)


def test_what_does_not_fit_is_named(rng):
    q = make(matrix(rng, 3, K, N), "w8a8_dynamic")
    sizes = jnp.array([1, 1, 0])
    for call, words in ((lambda: qfunc.matmul(jnp.ones((2, 191)), q), "191.*192"),
                        (lambda: qfunc.matmul(jnp.ones((2, 4, K)), q), "batch axes"),
                        (lambda: qfunc.matmul(jnp.ones((2, K)), q, bias=jnp.ones(7)), "bias"),
                        (lambda: qfunc.grouped_matmul(jnp.ones((2, K)), q, jnp.array([1, 1])), "2 groups"),
                        (lambda: qfunc.grouped_matmul(jnp.ones((2, K)), q, sizes, rows=jnp.ones(2)), "rows must be integers"),
                        (lambda: qfunc.grouped_matmul(jnp.ones((2, 7)), q, sizes), "192")):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="floating point"):
        qfunc.matmul(jnp.ones((2, K), jnp.int32), q)
    with pytest.raises(ValueError, match="floating point"):
        qfunc.matmul(qfunc.quantize_activation(jnp.ones((2, K)), "w8a8_dynamic"), make(matrix(rng, K, N), "w8a16"))
