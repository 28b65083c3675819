"""Layers that run on packed weights, and the ways to run existing models on them.

`functional`, `quantize_model`, `quantize_nnx` and `quantize_linen` take models as they are; the submodules hold layers of our own.
Names are loaded when they are first used, since those of other libraries import them.
"""

from qfunc._lazy import attach as _attach

_PUBLIC = {
    "functional": "_functional", "nnx_function": "flax", "quantize_linen": "linen", "quantize_model": "_models", "quantize_nnx": "flax",
    "weight_axes": "_axes",
}

__all__ = [*_PUBLIC]
__getattr__, __dir__ = _attach(__name__, _PUBLIC)
