"""The linear layer: y = x @ kernel + bias, whatever the kernel is stored as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

import qfunc


def linear(params: Mapping, x, *, out_dtype=None):
    """One linear layer.

    Arguments: `params` with `kernel` (in, out), an array or a QTensor, and optionally `bias` (out,); `x` [..., in].
    Returns: [..., out] in `out_dtype`, by default the dtype of `x`; accumulated in float32 or int32, the bias added in float32.
    Raises: ValueError where the contracted axes differ.
    """
    return qfunc.matmul(x, params["kernel"], bias=params.get("bias"), out_dtype=out_dtype)


def linears(params: Sequence[Mapping], x) -> list:
    """Several linear layers of one input, such as query, key and value; the input is quantized once where that is the same for all.

    Arguments: `params`, the layers as `linear` takes them; `x` [..., in].
    Returns: what `[linear(p, x) for p in params]` gives, element for element, with the same derivatives.
    """
    if len(params) > 1 and all(_dynamic(p["kernel"]) for p in params) and len({p["kernel"].scheme.activation for p in params}) == 1:
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
