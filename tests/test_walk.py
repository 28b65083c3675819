"""The walker's bookkeeping of axes, and that evaluating a function through it changes nothing."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from near import near

from qfunc import _views
from qfunc._tracked import Tracked, track
from qfunc._walk import Walker

rng = np.random.default_rng()


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def pointers(shape):
    """An array whose every element is its own index: what a view must show after any reshape and transpose."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def shown(axes, sizes):
    """The array that a view without repeats says it shows, element by element."""
    strides = dict(zip(sizes, np.cumprod([1, *list(sizes.values())[:0:-1]])[::-1], strict=True))
    parts = [run for runs in axes for run in runs]
    flat = np.array([sum(i * run.step * strides[run.axis] for i, run in zip(index, parts, strict=True))
                     for index in itertools.product(*(range(run.size) for run in parts))])
    return flat.reshape(_views.shape(axes))


@settings(max_examples=60)
@given(st.data())
def test_views_follow_reshapes_and_transposes(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    sizes = dict(enumerate(shape))
    axes, array = _views.whole(sizes), pointers(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(array.ndim)))
            axes, array = _views.transpose(axes, order), array.transpose(order)
            continue
        factors = [f for n in array.shape for f in {4: (2, 2), 6: (2, 3)}.get(n, (n,))]
        cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
        target = [int(np.prod(factors[a:b], dtype=int)) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
        new = _views.reshape(axes, target)
        if new is None:
            return
        axes, array = new, array.reshape(target)
    assert _views.shape(axes) == array.shape
    assert np.array_equal(shown(axes, sizes), array)


def test_an_uneven_cut_is_no_view():
    assert _views.reshape(_views.whole({0: 6, 1: 4}), (8, 3)) is None


def test_broadcast_repeats():
    axes = _views.broadcast(_views.whole({0: 3}), (2, 3, 5), (1,))
    assert _views.shape(axes) == (2, 3, 5)
    assert axes[0][0].axis is None and axes[1][0].axis == 0


FUNCTIONS = {
    "scan": lambda w, x: lax.scan(lambda c, layer: (jnp.tanh(c @ layer), c.sum()), x, w),
    "scan, carried weight": lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w[0]), None, length=3)[0][0],
    "scan, changing weight": lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.5), None), (x, w[0]), None, length=3)[0],
    "reverse scan": lambda w, x: lax.scan(lambda c, layer: (jnp.tanh(c @ layer), c), x, w, reverse=True),
    "nested scan": lambda w, x: lax.scan(
        lambda c, layer: (lax.scan(lambda d, _: (jnp.tanh(d @ layer), None), c, None, length=2)[0], c), x, w),
    "scan over rows": lambda w, x: lax.scan(lambda c, row: (c + row, None), x[0], w[0])[0],
    "fori": lambda w, x: lax.fori_loop(0, 4, lambda i, c: jnp.tanh(c @ w[i]), x),
    "while": lambda w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w[c[0]])), (0, x)),
    "weight in a condition": lambda w, x: lax.while_loop(
        lambda c: ((c[0] @ w[0]).sum() < 50) & (c[1] < 9), lambda c: (c[0] + 1, c[1] + 1), (x, 0))[1],
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda w, x: x @ w[0], lambda w, x: x @ w[1].T, w, x),
    "switch": lambda w, x: lax.switch(1, [lambda x: x, lambda x: x @ w[2], lambda x: (x @ w[0]) @ w[1]], x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w[0]))(w, x),
    "custom_jvp": lambda w, x: jax.nn.relu(w[0]).sum() + jax.nn.silu(x @ w[1]),
    "jit": lambda w, x: jax.jit(lambda w, x: jnp.einsum("ij,ljk->lik", x, w))(w, x),
    "slices": lambda w, x: (x @ w[1:2, :, :2][0], w[-1, 2:], w[:, 0, 0]),
    "casts": lambda w, x: x.astype(jnp.bfloat16) @ w[0].astype(jnp.bfloat16),
    "returned": lambda w, x: (w, w.T, x),
    "unused": lambda w, x: ((w * 2).sum(), x)[1],
    "barrier": lambda w, x: lax.optimization_barrier((w[0], x))[0] @ x.T,
    "weights times weights": lambda w, x: x @ (w[0] @ w[1]),
    "inner grad": lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w[0]).sum())(x),
    "inner vmap": lambda w, x: jax.vmap(lambda w, x: x @ w, (0, None))(w, x),
}


class Noting(Walker):
    """Counts contractions in a note, as calibration does."""

    def contract(self, eqn, values):
        for value in values:
            if isinstance(value, Tracked):
                leaf = value.leaf
                while leaf.parent is not None and leaf.index is not None:
                    leaf = leaf.parent
                self.note(leaf, jnp.ones((), jnp.int32))
        return super().contract(eqn, values)

    def merge(self, old, new):
        return old + new

    def empty(self, note):
        return jnp.zeros((), jnp.int32)

    def stacked(self, leaf, note, scanned):
        return (leaf.parent if scanned else leaf), note.sum()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("jitted", [False, True])
def test_walking_changes_nothing(name, jitted):
    function = FUNCTIONS[name]
    w, x = normal(4, 5, 5) * 0.5, normal(3, 5)

    def walked(w, x):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(w, x)
        walker = Noting()
        outs = walker.run(closed.jaxpr, closed.consts, [track("w", w), x])
        return jax.tree.unflatten(jax.tree.structure(shapes), [walker.plain(out) for out in outs])

    got = (jax.jit(walked) if jitted else walked)(w, x)
    want = (jax.jit(function) if jitted else function)(w, x)
    near(got, want)


@pytest.mark.parametrize("name, count", [
    ("scan", 4), ("nested scan", 8), ("fori", 4), ("while", 3), ("checkpoint", 1), ("scan, carried weight", 3),
])
def test_notes_leave_loops(name, count):
    function = FUNCTIONS[name]
    w, x = normal(4, 5, 5), normal(3, 5)

    @jax.jit
    def notes(w, x):
        closed = jax.make_jaxpr(function)(w, x)
        walker = Noting()
        walker.run(closed.jaxpr, closed.consts, [track("w", w), x])
        return {leaf.path: note for leaf, note in walker.notes.items()}

    assert int(notes(w, x)["w"]) == count
