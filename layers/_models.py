"""One entry for existing models, whatever library they are written in."""

from __future__ import annotations

from importlib import import_module

import jax

import qfunc

KINDS: tuple[tuple[str, str, str], ...] = (
    ("flax.nnx.module.Module", "flax", "quantize_nnx"),
    ("flax.linen.module.Module", "linen", "quantize_linen"),
)
"""Full name of a base class, the module of this package that serves it, and the function there."""


def quantize_model(model, *args, **kwargs):
    """Quantize an existing model by one call.

        qmodel = quantize_model(nnx_model, "w8a8_dynamic")                            # quantize_nnx
        qmodel, qvariables = quantize_model(linen_model, variables, "w8a8_dynamic")   # quantize_linen
        qmodel = quantize_model(equinox_model, "w8a8_dynamic")                        # qfunc.quantize: the model is its own pytree

    Arguments and results are those of the function in the comment; no library is imported that the model does not bring along.
    Raises TypeError for a bare function, which has no parameters of its own: run it by `functional`.
    """
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__}
    for base, module, function in KINDS:
        if base in names:
            return getattr(import_module(f"{__package__}.{module}"), function)(model, *args, **kwargs)
    if all(leaf is model for leaf in jax.tree.leaves(model)) and not hasattr(model, "shape"):
        raise TypeError(f"quantize_model: expected a model or a pytree of parameters, found {type(model).__name__}; a function "
                        "f(params, x) runs on quantized parameters as qfunc.layers.functional(f)")
    return qfunc.quantize(model, *args, **kwargs)
