"""qfunc: quantization formats as pure functions over pytrees of packed weights, for JAX.

    q = qfunc.quantize(params, "w8a8_dynamic")      # any pytree
    y = qfunc.matmul(x, q["mlp"]["kernel"])         # or x @ q["mlp"]["kernel"]

Public names are loaded when they are first used: importing qfunc touches no device and imports nothing heavy beyond jax.
"""

from ._lazy import attach as _attach

__version__ = "0.1.0"

_PUBLIC = {
    "ActivationSpec": "_spec", "CheckpointError": "_errors", "Granularity": "_spec", "QTensor": "_qtensor",
    "QuantizedActivation": "_activation", "Rule": "_rules", "Scheme": "_spec", "Statistics": "_calibrate", "WeightSpec": "_spec",
    "Checkpoint": "interop._checkpoint", "calibrate": "_calibrate", "dequantize": "_quantize", "explain": "kernels",
    "grouped_matmul": "kernels", "load": "interop._checkpoint", "load_model": "interop.model", "matmul": "kernels",
    "merge": "_statistics", "merge_across": "_statistics", "observe": "_calibrate", "statistics_of": "_statistics",
    "quantize": "_quantize", "quantize_activation": "kernels", "report": "_report", "scheme": "_schemes", "schemes": "_schemes",
    "take": "kernels", "use": "kernels",
}
# Names whose functions come later; calling one says what there is instead.
_RESERVED = {
    "save": "qfunc.interop.save_native writes qfunc's own layout, which qfunc.load reads",
}
_SUBPACKAGES = ("interop", "kernels", "layers")

__all__ = [*_PUBLIC, *_RESERVED, *_SUBPACKAGES]


def _later(name: str, instead: str):
    def later(*args, **kwargs):
        raise NotImplementedError(f"qfunc.{name} does not exist yet; {instead}")
    later.__name__ = later.__qualname__ = name
    later.__doc__ = f"Reserved: {instead}."
    return later


globals().update({name: _later(name, instead) for name, instead in _RESERVED.items()})
__getattr__, __dir__ = _attach(__name__, _PUBLIC, _SUBPACKAGES)
