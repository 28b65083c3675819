"""The slow path: a function of placed weights inside a jitted JAX function, through `jax.pure_callback`.

JAX has no device for an NPU, so each call leaves the compiled program: the activations are copied into the callback, to the NPU, back, and
out again, and everything around the call stays on the host. Per call that is about 0.1 ms and two copies of the activations besides the
transfers, some 25 ms per decoded token for a model of 32 layers whose 7 linears each call back. It is there to check a layer against the
rest of a JAX program; to compute, give the whole function to `to_torch`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch

from ._arrays import numpy_dtype, to_array, to_tensor
from ._trace import _held, _is_leaf, to_torch


def callback(fn: Callable, params, *, vmap_method: str = "sequential", **options) -> Callable:
    """`fn(params, *args)` for placed `params`, as a JAX function of `args` that jit can hold.

    Arguments:
        fn: a JAX function, as for `to_torch`.
        params: what `place` gave: it stays on the device, only the other arguments and the results travel.
        vmap_method: what `jax.vmap` of the result does, as in `jax.pure_callback`.
        options: of `to_torch`.

    Returns: a function of pytrees of arrays. It has no derivative, and since it is declared pure, XLA may drop or repeat its calls.
    """
    run = to_torch(fn, **options)
    leaves = jax.tree.leaves(params, is_leaf=_is_leaf)
    device = next((torch.device(leaf.device) for leaf in leaves if _held(leaf) or isinstance(leaf, torch.Tensor)), torch.device("cpu"))
    logical = jax.tree.map(_logical, params, is_leaf=_is_leaf)

    def outside(*args):
        out = run(params, *jax.tree.map(lambda a: to_tensor(np.asarray(a), device), args))
        return jax.tree.map(lambda leaf: np.asarray(to_array(leaf)), out)

    def call(*args):
        shapes = jax.eval_shape(fn, logical, *args)
        return jax.pure_callback(outside, shapes, *args, vmap_method=vmap_method)

    return call


def _logical(leaf):
    if _held(leaf):
        return leaf.abstract
    if isinstance(leaf, torch.Tensor):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), jax.dtypes.canonicalize_dtype(numpy_dtype(leaf.dtype)))
    return leaf
