"""The linear layer: y = x @ kernel + bias, whatever the kernel is stored as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

import qfunc

ROTATIONS = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n", "left_trans", "right_trans")
"""Leaves beside a kernel that rotate its input (msModelSlim's online QuaRot and FlatQuant)."""
_PAIRS = (("kronecker_rotation_m", "kronecker_rotation_n"), ("left_trans", "right_trans"))


def linear(params: Mapping, x, *, out_dtype=None):
    """One linear layer.

    Arguments: `params` with `kernel` (in, out), an array or a QTensor, optionally `bias` (out,) and rotations of the input as `rotated`
    takes them; `x` [..., in].
    Returns: [..., out] in `out_dtype`, by default the dtype of `x`; accumulated in float32 or int32, the bias added in float32.
    Raises: ValueError where the contracted axes differ.
    """
    if any(name in params for name in ROTATIONS):
        out_dtype, x = out_dtype or x.dtype, rotated(params, x)
    return qfunc.matmul(x, params["kernel"], bias=params.get("bias"), out_dtype=out_dtype)


def rotated(params: Mapping, x):
    """The input of a layer whose weight was rotated, rotated likewise, in float32.

    Arguments: `params`, of which `heads_rotation` R [H, H] turns x, seen as [..., H, D], along its heads: y_g = sum_h x_h R_hg; a pair
    `kronecker_rotation_m`, `kronecker_rotation_n` (or `left_trans`, `right_trans`) M [a, a], N [b, b] turns x, seen as [..., a, b],
    into M^T x N.
    Returns: float32, the shape of `x`; `x` itself where there is no rotation.
    """
    shape = x.shape
    if "heads_rotation" in params:
        turn = params["heads_rotation"].astype(jnp.float32)
        x = jnp.einsum("...hd,hg->...gd", x.reshape(*shape[:-1], turn.shape[0], -1).astype(jnp.float32), turn).reshape(shape)
    for first, second in _PAIRS:
        if first in params:
            m, n = params[first].astype(jnp.float32), params[second].astype(jnp.float32)
            x = x.reshape(*shape[:-1], m.shape[0], n.shape[0]).astype(jnp.float32)
            x = jnp.einsum("...ab,ac,bd->...cd", x, m, n).reshape(shape)
    return x


def as_float(kernel):
    """A kernel as a float32 array (in, out), dequantized where it is packed."""
    return kernel.dequantize("float32") if isinstance(kernel, qfunc.QTensor) else jnp.asarray(kernel, jnp.float32)


def linears(params: Sequence[Mapping], x) -> list:
    """Several linear layers of one input, such as query, key and value; the input is quantized once where that is the same for all.

    Arguments: `params`, the layers as `linear` takes them; `x` [..., in].
    Returns: what `[linear(p, x) for p in params]` gives, element for element, with the same derivatives.
    """
    rotations = any(name in p for p in params for name in ROTATIONS)
    alike = not rotations and all(_dynamic(p["kernel"]) for p in params) and len({p["kernel"].scheme.activation for p in params}) == 1
    if len(params) > 1 and alike:
        return _shared([{name: p[name] for name in ("kernel", "bias") if p.get(name) is not None} for p in params], x)
    return [linear(p, x) for p in params]


@jax.custom_jvp
def _shared(params, x):
    codes = qfunc.quantize_activation(x, params[0]["kernel"].scheme.activation)
    return [linear(p, codes, out_dtype=x.dtype) for p in params]


@_shared.defjvp
def _shared_jvp(primals, tangents):
    # Codes have no derivative; that of each matmul with the float input is straight-through.
    return _shared(*primals), jax.jvp(lambda params, x: [linear(p, x) for p in params], primals, tangents)[1]


def _dynamic(kernel) -> bool:
    """True for a packed kernel whose activation scales come from the input alone, not from leaves that belong to this kernel."""
    if not isinstance(kernel, qfunc.QTensor) or kernel.scheme.activation is None or len(kernel.matrix_shape) > 2:
        return False
    own = (kernel.smooth, kernel.perm, kernel.input_scale)
    return kernel.scheme.activation.outlier_threshold is None and all(leaf is None for leaf in own)


def row_linear(params: Mapping, x, axis: str | None):
    """A linear layer whose input is split over the mesh axis `axis`: partial products, their sum over the axis in float32, then the bias.

    Arguments: as for `linear`; `axis` None is `linear` itself. Returns: [..., out] in the dtype of `x`, equal on all devices of the axis.
    """
    if axis is None:
        return linear(params, x)
    y = lax.psum(linear({k: v for k, v in params.items() if k != "bias"}, x, out_dtype=jnp.float32), axis)
    return (y if "bias" not in params else y + params["bias"].astype(jnp.float32)).astype(x.dtype)
