"""Checkpoints in and out: one reader a family, GGUF, safetensors, qfunc's own folders. `load` and `inspect` are the way in."""

from importlib import import_module as _import_module

_PUBLIC = {
    "Checkpoint": "_checkpoint", "Inspection": "_inspect", "inspect": "_inspect", "load": "_checkpoint", "load_model": "model",
    "load_native": "native", "save_native": "native",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(_import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
