"""Quantize an existing flax linen model without touching its code.

The model's `apply` runs unchanged through `qfunc.layers.functional`: modules see float arrays of the logical shapes while they are
traced, so their checks of parameter shapes hold, and every matmul with a packed leaf becomes one packed matmul, also in modules of
one's own and under `nn.scan`, `nn.remat` and `nn.vmap`. (Method interceptors reach only modules that one has written a replacement
for, and neither parameters used directly nor shapes that linen checks before.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import qfunc

from ._axes import weight_axes
from ._functional import functional


@dataclasses.dataclass(frozen=True)
class QuantizedLinen:
    """A linen module that runs on packed parameters; `module` is the original, untouched."""

    module: Any

    def apply(self, variables, *args, **kwargs):
        """`module.apply` on variables that hold QTensors: the same arguments (rngs, method, mutable, ...) and results."""
        return functional(self.module.apply)(variables, *args, **kwargs)


def quantize_linen(module, variables, scheme_or_rules, *, calibration=None, inputs: tuple | Mapping | None = None, check: bool = True,
                   progress: bool | None = None) -> tuple[QuantizedLinen, Any]:
    """Quantize a linen model.

        qmodel, qvariables = quantize_linen(model, variables, "w8a8_dynamic", inputs=(x,))
        y = qmodel.apply(qvariables, x)

    Arguments:
        module: a `flax.linen.Module`.
        variables: what `module.init` returns (other collections than `params` stay as they are), or the `params` alone.
        scheme_or_rules, calibration, check, progress: as in `qfunc.quantize`; paths are those of the parameters, without `params/`.
            Statistics come from `qfunc.calibrate(module.apply, variables, batches)`.
        inputs: arguments of `module.apply` after the variables, as a tuple, or a mapping of keyword arguments in which `args` are the
            positional ones; arrays or ShapeDtypeStructs. With them the model is traced and each parameter's axes are known exactly;
            without them they are told by names and shapes, which cannot see through `nn.DenseGeneral` under `nn.scan`.

    Returns: (model, variables): the first has `apply`, the second the structure that was given, QTensors in it.

    Raises: as `qfunc.quantize`; a leaf of which the table of names knows no axes stays in floating point.
    """
    whole = isinstance(variables, Mapping) and "params" in variables
    params = variables["params"] if whole else variables
    known = None
    if inputs is not None:
        keywords = dict(inputs) if isinstance(inputs, Mapping) else {"args": inputs}
        args = keywords.pop("args", ())
        known = weight_axes(module.apply, variables if whole else {"params": params}, *args, **keywords)
    qparams = qfunc.quantize(params, scheme_or_rules, calibration=calibration, check=check, progress=progress, orientations=known)
    if not whole:
        return QuantizedLinen(module), qparams
    return QuantizedLinen(module), type(variables)({**variables, "params": qparams})
