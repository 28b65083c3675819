"""From a `Call` to custom calls: what the Triton kernels take, and how they are put into the function that is being lowered."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from .. import _activation as _activation  # the references must be in the table first: what is registered later is preferred
from .. import _export, _reference
from .. import _grouped as _grouped
from .. import _matmul as _matmul
from .. import _take as _take
from .._dispatch import TARGETS, Call, Declined, Implementation, register
from . import _bridge, _fit, _image, _launch, _operands, _plan_matmul, _tables, _target, _xla
from ._fit import planned as planned
from ._fit import program_of as program_of
from ._launch import Config, Launch, Target

PLATFORMS = ("cuda", "rocm")
LABEL = "qfunc_{}"


def supports(call: Call, platform: str) -> str | None:
    """None, or why no Triton kernel runs this call; `Declined` where XLA's own product is expected to be faster."""
    if call.primitive == TAKE:
        reason = _refuse(_flat(call), platform)
        # The reference gathers the rows asked for and decodes them in one loop of XLA's: no slow path.
        return reason if reason is None else Declined(reason)
    if any(0 in part.shape for part in call.x) or (call.packed is not None and 0 in call.w.matrix_shape):
        return Declined("nothing is computed of an empty operand")
    if call.primitive in MATMULS and call.target is not None and (reason := _refuse_matmul(call)) is not None:
        return reason
    return next((reason for part in _parts(call) if (reason := _refuse(part, platform)) is not None), None)


def _refuse(call: Call, platform: str) -> str | None:
    if call.target is None:
        return _target.missing_target(platform)
    return _launch.refusal(call, Target.parse(call.target)) or _fit.refusal(call)


def _refuse_matmul(call: Call) -> str | None:
    w = call.w
    if w.perm is not None and call.spec is not None and call.spec.granularity.kind == "group":
        return "an activation quantized in groups against a permuted weight"
    threshold, tokens = _tables.xla_from(call, call.target), _tables.shape_of(call)[0]
    if threshold is not None and tokens >= threshold and _xla.refusal(call) is None:
        return Declined(f"from {threshold} tokens on XLA's own product is the faster one, here are {tokens}")
    return None


def _parts(call: Call) -> tuple[Call, ...]:
    """The calls that kernels are launched for: a matmul that splits outlier columns off is two."""
    return _split(call) if _splits(call) else (call,)


def _splits(call: Call) -> bool:
    return call.packed is not None and call.spec is not None and call.spec.outlier_threshold is not None and not call.quantized


def _split(call: Call) -> tuple[Call, Call]:
    """LLM.int8's two products: codes by codes, and the outlier columns in floating point. Both in float32, the second with the bias."""
    spec = dataclasses.replace(call.spec, outlier_threshold=None)

    def variant(activation, **fields):
        scheme = dataclasses.replace(call.packed.scheme, activation=activation)
        leaves = dict(zip(call.packed.fields, call.leaves, strict=True))
        leaves.pop("smooth", None)
        packed = dataclasses.replace(call.packed, scheme=scheme, fields=tuple(leaves))
        return dataclasses.replace(call, packed=packed, leaves=tuple(leaves.values()), spec=activation, out_dtype=np.dtype(np.float32),
                                   **fields)

    return variant(spec, bias=None), variant(None)


def execute(launch: Launch, arrays, target: str) -> list[jax.Array]:
    """Run a launch in the function that is being traced; returns its results."""
    present, indices = dict(launch.arrays), {name: i for i, (name, _) in enumerate(launch.results)}
    # The custom call sees addresses alone: an array of another type or size would be read as garbage.
    for (name, wanted), array in zip(launch.arrays, arrays, strict=True):
        if (array.shape, np.dtype(array.dtype)) != (wanted.shape, np.dtype(wanted.dtype)):
            raise _image.KernelError(f"{launch.kernel.name}: {name} was described as {wanted.dtype} {wanted.shape}, "
                                     f"found {array.dtype} {array.shape}")
    arguments = []
    for name, kind in launch.signature.items():
        if name in present:
            arguments.append(_bridge.Operand())
        elif name in indices:
            arguments.append(_bridge.Result(indices[name]))
        elif kind != "constexpr":
            arguments.append(_bridge.Scalar(launch.scalars[name], kind))
    return _bridge.call(program_of(launch), arguments, launch.grid, arrays, launch.outputs, target=target,
                        label=LABEL.format(launch.kernel.name))


def quantize_activation(call: Call, x, *extra):
    """`quantize_activation`: see `qfunc.kernels._reference.quantize_activation`."""
    launch = _fit.fitted(call)
    arrays, found = _operands.row_arrays(launch, call, x, *extra)
    return _operands.row_results(launch, call, execute(launch, arrays, call.target), found)


def _quantize(call: Call, x, extra: tuple, scope: int) -> tuple:
    """The activation of a matmul as codes; by XLA where the kernel does not make them (the loop that it writes is a good one)."""
    inner = Call("quantize_activation", (_struct(x),), spec=call.spec, extra=tuple(_struct(e) for e in extra), scope=scope,
                 target=call.target)
    if (_launch.refusal(inner, Target.parse(call.target)) or _fit.refusal(inner)) is None:
        return tuple(quantize_activation(inner, x, *extra))
    return tuple(_reference.quantize_activation(inner, x, *extra))


def _struct(array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype))


def matmul(call: Call, *operands, config: Config | None = None):
    """`quantized_matmul` and `quantized_grouped_matmul`: see `qfunc.kernels._reference`. `config` overrides the tables'."""
    if call.rows is not None and not _rows_apart(call):
        call, operands = call.direct, call.gather(operands)
    if _splits(call):
        return _with_outliers(call, *operands)
    def complete(launch: Launch) -> Launch:
        return launch if call.rows is None else _plan_matmul.routed(launch, tokens=call.x[0].shape[0])

    # A config that is given is measured as it is, or not at all.
    launch = _fit.fitted(call.direct, complete) if config is None else complete(planned(call.direct, config))
    rows = None
    if call.rows is not None:
        *operands, rows = operands
        rows = jnp.clip(rows, 0, call.x[0].shape[0] - 1)        # the kernel reads whatever lies there
    x, w, sizes, bias = _operands.activation(call, *operands, quantize=functools.partial(_quantize, call))
    (y,) = execute(launch, _operands.arrays(launch, x, w, sizes, bias, rows), call.target)
    return _operands.finish(launch, call.direct, y, bias)


def _rows_apart(call: Call) -> bool:
    """Whether a row's codes do not depend on its expert or on other rows, so that it is quantized before it is gathered."""
    if call.w.smooth is not None or call.w.perm is not None:
        return False
    spec = None if call.quantized else call.spec
    return spec is None or spec.granularity.kind != "tensor" and spec.outer != "tensor" and spec.outlier_threshold is None


def _with_outliers(call: Call, *operands):
    (x,), w, sizes, bias = call.split(operands)
    owner = None
    value = x
    if sizes is not None:
        owner, valid = _grouped.owners(sizes, x.shape[0])
        value = jnp.where(valid[:, None], value, jnp.zeros((), x.dtype))
    if w.smooth is not None:
        smooth = w.smooth[owner] if owner is not None else jnp.expand_dims(w.smooth, tuple(range(call.batch, x.ndim - 1)))
        value = value.astype(jnp.float32) * smooth.astype(jnp.float32)
    over = jnp.abs(value.astype(jnp.float32)) >= call.spec.outlier_threshold
    if owner is not None:
        mask = (jax.ops.segment_max(over.astype(jnp.int32), owner, sizes.shape[0]) > 0)[owner]
    else:
        mask = jnp.any(over, axis=tuple(range(call.scope, x.ndim - 1)), keepdims=True)
    zero = jnp.zeros((), value.dtype)
    regular, irregular = (dataclasses.replace(part, x=(_struct(value),)) for part in _split(call))
    leaves = [leaf for name, leaf in w.leaves.items() if name != "smooth"]
    tail = [part for part in (sizes,) if part is not None]
    y = matmul(regular, jnp.where(mask, zero, value), *leaves, *tail)
    y = y + matmul(irregular, jnp.where(mask, value, zero), *leaves, *tail, *([] if bias is None else [bias]))
    return y.astype(call.out_dtype)


def _flat(call: Call) -> Call:
    """A take of ids in one row, as the kernel has it."""
    return dataclasses.replace(call, primitive="take", x=(jax.ShapeDtypeStruct((math.prod(call.x[0].shape),), np.dtype(np.int32)),))


def take(call: Call, ids, *leaves):
    """`quantized_take`: rows [*ids.shape, hidden] of a table, decoded."""
    launch = _fit.fitted(_flat(call))
    (y,) = execute(launch, _operands.take_arrays(launch, ids.reshape(-1), call.packed.build(leaves)), call.target)
    return y.reshape(*ids.shape, -1)


TAKE = "quantized_take"
MATMULS = ("quantized_matmul", "quantized_grouped_matmul")
RUN = {"quantized_matmul": matmul, "quantized_grouped_matmul": matmul, "quantize_activation": quantize_activation,
       TAKE: take}


_export.CUSTOM_CALLS += [_bridge.TARGET, _bridge.JAX_TRITON_TARGET]
for _platform in PLATFORMS:
    TARGETS[_platform] = functools.partial(_target.target_of, _platform)
for _primitive in _xla.PRIMITIVES:
    register(_primitive, Implementation("xla", PLATFORMS, _xla.supports, _xla.matmul))
for _primitive, _run in RUN.items():
    register(_primitive, Implementation("triton", PLATFORMS, supports, _run, gathers=True))
