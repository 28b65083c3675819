"""Sums of float32 terms in two orders: how far apart they may be."""

import jax
import numpy as np


def near(got, want, tolerance=1e-5):
    """Raises unless trees agree in structure and shapes, and each pair of leaves to `tolerance` of the larger of 1 and its largest value.

    Of a sum whose terms cancel no relative error is small, whatever is right; its error is one of the terms, which the largest value
    of its array stands for.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max(initial=1.0)))
