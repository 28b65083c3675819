"""qfunc: quantization formats as pure functions over pytrees of packed weights, for JAX on CPU, GPU and Ascend.

    q = qfunc.quantize(params, "w8a8_dynamic")      # any pytree
    y = qfunc.matmul(x, q["mlp"]["kernel"])         # or x @ q["mlp"]["kernel"]

Public names are loaded when they are first used: importing qfunc touches no device and imports nothing heavy beyond jax.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_PUBLIC = {
    "ActivationSpec": "_spec", "CheckpointError": "_errors", "Granularity": "_spec", "QTensor": "_qtensor",
    "QuantizedActivation": "_activation", "Rule": "_rules", "Scheme": "_spec", "Statistics": "_calibrate", "WeightSpec": "_spec",
    "calibrate": "_calibrate", "dequantize": "_quantize", "explain": "kernels", "grouped_matmul": "kernels", "matmul": "kernels",
    "quantize": "_quantize", "quantize_activation": "kernels", "report": "_report", "scheme": "_schemes", "schemes": "_schemes",
    "take": "kernels", "use": "kernels",
}
_SUBPACKAGES = ("interop", "kernels", "layers")

__all__ = [*_PUBLIC, *_SUBPACKAGES]


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return _import_module(f"{__name__}.{name}")
    if name in _PUBLIC:
        value = getattr(_import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
