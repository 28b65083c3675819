"""Layers that run on packed weights, and the ways to run existing models on them.

`functional`, `quantize_model`, `quantize_nnx` and `quantize_linen` take models as they are; the submodules hold layers of our own.
Names are loaded when they are first used, since those of other libraries import them.
"""

from importlib import import_module as _import_module

_PUBLIC = {
    "functional": "_functional", "nnx_function": "flax", "quantize_linen": "linen", "quantize_model": "_models", "quantize_nnx": "flax",
    "weight_axes": "_axes",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(_import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
